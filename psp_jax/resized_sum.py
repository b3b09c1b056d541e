"""Sums over the pixels of a resized map of class scores that is never stored at its full size.

At the crop's size the scores, their exponentials and their gradient are the largest arrays of a training step by far.
Here they are made for some columns of pixels after others, and of the gradient is kept what belongs to the scores at
their own width.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array
# Logits [B, H, C, width] and their labels [B, H, width] to [B, H].
Sums = Callable[[Array, Array], Array]

# Of a block: the lanes of a TPU's register. Classes lie in the sublanes, where 150 need little padding.
_COLUMNS = 128


def row_sums(
    sums: Sums,
    scores: Array,
    label: Array,
    fill: int,
    matrices: tuple[np.ndarray, np.ndarray],
    constrain: Callable[[Array], Array] = lambda x: x,
) -> Array:
    """Return what `sums` gives for a label [B, H, W] and scores f32 [B, h, w, C] resized to its size: [B, H].

    Args:
      sums: sums some of the pixels of each row; differentiable in the logits.
      fill: label of pixels added beside the others, for which `sums` must give 0.
      matrices: of the resize, f32 [H, h] and [W, w]; see `interpolation.resize_matrices`.
      constrain: pins the sharding of scores [B, H, w, C].
    """
    down, across = matrices
    blocks = -(-len(across) // _COLUMNS)
    width = -(-len(across) // blocks)
    more = blocks * width - len(across)
    across = np.pad(across, ((0, more), (0, 0))).reshape(blocks, width, -1)
    label = jnp.pad(label, ((0, 0), (0, 0), (0, more)), constant_values=fill)
    label = jnp.moveaxis(label.reshape(*label.shape[:2], blocks, width), 2, 0)
    # All rows at once, and columns in blocks: rows may be spread over devices. The scores stay exact in float32; the
    # default on TPU would round them to bfloat16.
    scores = constrain(jnp.einsum("hg,bgvc->bhvc", down, scores, precision=lax.Precision.HIGHEST))
    return _sum_blocks(sums, scores, jnp.asarray(across), label)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_blocks(sums: Sums, x: Array, across: Array, label: Array) -> Array:
    """Sum over blocks n: x f32 [B, H, w, C], across f32 [n, width, w] and label [n, B, H, width] to [B, H]."""
    return _value_and_gradient(sums, x, across, label)[0]


def _value_and_gradient(sums: Sums, x: Array, across: Array, label: Array) -> tuple[Array, Array]:
    def add(totals: tuple[Array, Array], block: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        def of(x: Array) -> Array:
            return sums(jnp.einsum("wv,bhvc->bhcw", block[0], x, precision=lax.Precision.HIGHEST), block[1])

        value, pull = jax.vjp(of, x)
        (gradient,) = pull(jnp.ones_like(value))
        return (totals[0] + value, totals[1] + gradient), None

    nothing = jnp.zeros_like(x)  # made of x, so that it is spread over devices as x is
    totals: tuple[Array, Array] = lax.scan(add, (nothing[:, :, 0, 0], nothing), (across, label))[0]
    return totals


def _pull_back(_: Sums, gradient: Array, weight: Array) -> tuple[Array, None, None]:
    return gradient * weight[..., None, None], None, None


_sum_blocks.defvjp(_value_and_gradient, _pull_back)
