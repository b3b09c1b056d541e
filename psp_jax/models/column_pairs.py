"""Maps of few channels as pairs of columns, for the first layers of a network.

The fastest axis of a TPU's register holds 128 numbers, and the units that multiply take as many channels: a map of 64
leaves half of both empty. Two neighbouring columns side by side in the channels fill them. A convolution of such maps
has a kernel that holds the original one twice, a column apart. Where the output is wide by itself, its even and its odd
columns come out as two maps, which are what a max pool with stride 2 compares.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from psp_jax.models.row_convolution import convolve_rows

Array = jax.Array
LANES = 128


@flax.struct.dataclass
class ColumnPairs:
    """A map [B, H, W, C] by pairs of its columns.

    Attributes:
      maps: one map [B, H, ceil(W / 2), 2 C] of columns side by side, what stands for column W, if W is odd, meaning
        nothing; or two, the even columns [B, H, ceil(W / 2), C] and the odd ones [B, H, floor(W / 2), C].
      width: W.
    """

    maps: tuple[Array, ...]
    width: int = flax.struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[B, H, W, C]."""
        batch, height, _, channels = self.maps[0].shape
        return batch, height, self.width, channels * len(self.maps) // 2

    def side_by_side(self) -> Array:
        """Return the columns side by side [B, H, ceil(W / 2), 2 C], with zeros for column W."""
        if len(self.maps) == 1:
            return without_last(self.maps[0], self.width)
        even, odd = self.maps
        missing = even.shape[2] - odd.shape[2]
        return jnp.concatenate([even, jnp.pad(odd, ((0, 0), (0, 0), (0, missing), (0, 0)))], -1)

    def apart(self) -> tuple[Array, Array]:
        """Return the even columns [B, H, ceil(W / 2), C] and the odd ones [B, H, floor(W / 2), C]."""
        if len(self.maps) == 2:
            return self.maps[0], self.maps[1]
        even, odd = jnp.split(self.maps[0], 2, axis=-1)
        return even, odd[:, :, : self.width // 2]


def without_last(x: Array, width: int) -> Array:
    """Return [..., ceil(width / 2), 2 C], columns side by side, with zeros for the one beyond an odd width."""
    if width % 2 == 0:
        return x
    position, channel = (lax.broadcasted_iota(jnp.int32, x.shape[-2:], axis) for axis in (0, 1))
    return jnp.where((position < width // 2) | (channel < x.shape[-1] // 2), x, 0)


def convolve_pairs(x: Array | ColumnPairs, kernel: Array, stride: int, padding: int, by_rows: bool) -> ColumnPairs:
    """Convolve [B, H, W, C] with [k, k, C, D] as `models.layers.Conv` does without dilation: pairs of [B, H', W', D].

    They are side by side where two columns' channels have room in a register. `by_rows` is for a map that is no pairs.
    """
    size, channels, width = kernel.shape[1], kernel.shape[2], x.shape[2]
    held = 2 if isinstance(x, ColumnPairs) else 1  # columns that a position of the input holds
    x, by_rows = (x.side_by_side(), False) if isinstance(x, ColumnPairs) else (x, by_rows)
    width = (width + 2 * padding - size) // stride + 1
    before = -(-padding // held)  # positions of padding, and of the window
    window = -(-(held * before - padding + stride + size) // held)

    kernels = []
    for output in range(2):
        start = held * before - padding + stride * output  # where in the window the kernel begins
        wide = jnp.pad(kernel, ((0, 0), (start, held * window - size - start), (0, 0), (0, 0)))
        kernels.append(wide.reshape(kernel.shape[0], window, held * channels, -1))

    def outputs(kernel: Array, number: int) -> Array:
        step = 2 * stride // held
        after = (number - 1) * step + window - before - x.shape[2]
        if by_rows:
            return convolve_rows(x, kernel, stride, 1, padding, columns=(step, (before, after)))
        pads = [(padding, padding), (before, after)]
        return lax.conv_general_dilated(x, kernel, (stride, step), pads, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    if 2 * kernel.shape[-1] <= LANES:
        return ColumnPairs((outputs(jnp.concatenate(kernels, -1), -(-width // 2)),), width)
    even, odd = (outputs(kernel, (width + 1 - i) // 2) for i, kernel in enumerate(kernels))
    return ColumnPairs((even, odd), width)
