"""How training computes convolutions, where XLA's own way is not the fastest."""

from dataclasses import dataclass

import jax
from jax import lax

Array = jax.Array
_POSITIONS = (0, 1, 2)  # axes of a map that are not channels


@dataclass(frozen=True)
class Lowering:
    """Which convolutions are computed otherwise.

    Attributes:
      rows_up_to: those of at most so many channels go by rows; see `psp_jax.models.row_convolution`.
      products: those of a single cell are products of matrices; see `product`.
      pairs: those of `ResNet`'s stem; see `psp_jax.models.column_pairs`.
    """

    rows_up_to: float = 0
    products: bool = False
    pairs: bool = False


NATIVE = Lowering()


@jax.custom_vjp
def product(x: Array, kernel: Array) -> Array:
    """Multiply the channels of [B, H, W, C] with [C, D]: the 1x1 convolution, with a gradient that is a product too.

    XLA's CPU backend makes of the weight gradient of a convolution another one, whose window is the whole map: for a
    1x1 kernel that takes two to four times as long as the product that it is. Of that product the backend transposes
    one factor, together with all that it is computed from, element by element; here it is the one of fewer channels.
    """
    return lax.dot_general(x, kernel, (((3,), (0,)), ((), ())))


def _product_and_keep(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return product(x, kernel), (x, kernel)


def _product_gradient(kept: tuple[Array, Array], slope: Array) -> tuple[Array, Array]:
    x, kernel = kept
    over_positions = ((_POSITIONS, _POSITIONS), ((), ()))
    if x.shape[-1] < slope.shape[-1]:
        of_kernel = lax.dot_general(x, slope, over_positions)
    else:
        of_kernel = lax.dot_general(slope, x, over_positions).T
    return lax.dot_general(slope, kernel, (((3,), (1,)), ((), ()))), of_kernel


product.defvjp(_product_and_keep, _product_gradient)
