"""Sums over the pixels of a resized map of class scores that is never stored at its full size.

At the crop's size the scores, their exponentials and their gradient are the largest arrays of a training step by far.
Here they are made for some pixels after others, and of the gradient is kept what belongs to the scores at their own
size: for all pixels that lie alike between the scores, where the resize has such phases, else for columns of pixels.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from psp_jax.interpolation import resize_matrices

Array = jax.Array
Constrain = Callable[[Array], Array]
# Of scores and label: the sum, a scalar, and its gradient in the scores.
GradientOf = Callable[[Array, Array], tuple[Array, Array]]
# Of labels [..., n]: weights f32 [..., n] and targets f32 [..., C, n], which make the loss of a pixel of scores z:
# weight * logsumexp(z) - (target * z).sum().
Targets = Callable[[Array], tuple[Array, Array]]

# Of a block: the lanes of a TPU's register. Classes lie in the sublanes, where 150 need little padding.
_COLUMNS = 128
# Rows of phases of one turn of the loop, which reads and writes the sum of their gradients once.
_UNROLL = 4


def resized_sum(
    targets: Targets,
    scores: Array,
    label: Array,
    fill: int,
    align_corners: bool,
    valid: tuple[int, int] | None = None,
    real: tuple[int, int] | None = None,
    constrain: Constrain = lambda x: x,
) -> Array:
    """Return the sum over pixels of a loss of scores f32 [B, h, w, C] resized to the size of label [B, H, W]: a scalar.

    Args:
      targets: what the loss is made of.
      fill: label of pixels added beside the others, whose weight and target are 0.
      valid: (height, width) of the label that the scores are resized to, all by default; the rest has the label `fill`.
      real: (height, width) of the scores that count, all by default.
      constrain: pins the sharding of scores [B, h, w, C] and [B, H, w, C].
    """
    canvas, grid = (label.shape[1], label.shape[2]), (scores.shape[1], scores.shape[2])
    valid, real = valid or canvas, real or grid
    factors = [(n - 1) // max(m - 1, 1) for n, m in zip(valid, real, strict=True)]
    phases = all(m > 1 and (m - 1) * f + 1 == n for n, m, f in zip(valid, real, factors, strict=True))
    if align_corners and phases and all(n <= m * f for n, m, f in zip(canvas, grid, factors, strict=True)):
        gradient_of = functools.partial(_phases, targets, fill, (factors[0], factors[1]), constrain)
    else:
        down, across = resize_matrices(real, canvas, valid, align_corners)
        down, across = (np.pad(m, ((0, 0), (0, n - m.shape[1]))) for m, n in zip((down, across), grid, strict=True))
        gradient_of = functools.partial(_blocks, targets, fill, (down, across), constrain)
    return _sum(gradient_of, scores, label)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum(gradient_of: GradientOf, scores: Array, label: Array) -> Array:
    """Return the sum alone; its gradient is made with it, not from it."""
    return gradient_of(scores, label)[0]


def _forward(gradient_of: GradientOf, scores: Array, label: Array) -> tuple[Array, Array]:
    return gradient_of(scores, label)


def _backward(_: GradientOf, gradient: Array, factor: Array) -> tuple[Array, None]:
    return gradient * factor, None


_sum.defvjp(_forward, _backward)


def _blocks(
    targets: Targets,
    fill: int,
    matrices: tuple[np.ndarray, np.ndarray],
    constrain: Constrain,
    scores: Array,
    label: Array,
) -> tuple[Array, Array]:
    """Return the sum and its gradient by blocks of columns: all rows at once, for they may be spread over devices."""
    down, across = matrices
    blocks = -(-len(across) // _COLUMNS)
    width = -(-len(across) // blocks)
    more = blocks * width - len(across)
    across = np.pad(across, ((0, more), (0, 0))).reshape(blocks, width, -1)
    label = jnp.pad(label, ((0, 0), (0, 0), (0, more)), constant_values=fill)
    label = jnp.moveaxis(label.reshape(*label.shape[:2], blocks, width), 2, 0)
    # The scores stay exact in float32; the default on TPU would round them to bfloat16.
    exact = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    x = constrain(exact("hg,bgvc->bhvc", down, scores))

    def add(totals: tuple[Array, Array], block: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        across, (weight, target) = block[0], targets(block[1])
        logits = exact("wv,bhvc->bhcw", across, x)
        log_sum = jax.nn.logsumexp(logits, 2)
        value = (weight * log_sum).sum(-1) - (target * logits).sum((2, 3))
        slope = weight[:, :, None] * jnp.exp(logits - log_sum[:, :, None]) - target
        return (totals[0] + value, totals[1] + exact("wv,bhcw->bhvc", across, slope)), None

    nothing = jnp.zeros_like(x)  # made of x, so that it is spread over devices as x is
    (value, gradient), _ = lax.scan(add, (nothing[:, :, 0, 0], nothing), (jnp.asarray(across), label))
    return value.sum(), exact("hg,bhvc->bgvc", down, gradient)


def _phases(
    targets: Targets, fill: int, factors: tuple[int, int], constrain: Constrain, scores: Array, label: Array
) -> tuple[Array, Array]:
    """Return the sum and its gradient by phases of pixels: those at one place between four scores.

    The pixels of a phase lie in one row, [B, C, h w], where they fill the lanes of a TPU, and their logits are a
    weighted sum of four such arrays.
    """
    (images, height, width, classes), (rows, columns) = scores.shape, factors
    more = (height * rows - label.shape[1], width * columns - label.shape[2])
    label = jnp.pad(label, ((0, 0), (0, more[0]), (0, more[1])), constant_values=fill)
    label = label.reshape(images, height, rows, width, columns).transpose(2, 4, 0, 1, 3)
    label = label.reshape(rows, columns, images, height * width)

    def ahead(x: Array, pixels: int) -> Array:  # what comes around an end of the map is of void labels
        return lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (0, 0, 0), (-pixels, pixels, 0)))

    corners = (0, 1, width, width + 1)
    flat = _as_is(_as_is(constrain(scores)).reshape(images, -1, classes).swapaxes(1, 2))
    taps = [ahead(flat, corner) for corner in corners]

    def add(totals: Any, row: tuple[Array, Array]) -> tuple[Any, None]:
        below, label = row
        sides = (taps[0] * (1 - below) + taps[2] * below, taps[1] * (1 - below) + taps[3] * below)
        value, left, right = _row_of_phases(targets, *sides, label)
        parts = (value, left * (1 - below), right * (1 - below), left * below, right * below)
        return tuple(total + part for total, part in zip(totals, parts, strict=True)), None

    nothing = jnp.zeros_like(taps[0])
    start = (nothing[:, 0], nothing, nothing, nothing, nothing)
    places = jnp.arange(rows, dtype=scores.dtype) / rows
    (value, *slopes), _ = lax.scan(add, start, (places, label), unroll=min(_UNROLL, rows))
    slope = functools.reduce(jnp.add, [ahead(x, -corner) for x, corner in zip(slopes, corners, strict=True)])
    return value.sum(), constrain(_as_is(slope).swapaxes(1, 2).reshape(scores.shape))


def _as_is(x: Array) -> Array:
    """Return x, laid out in memory in the order of its axes, which to a TPU's compiler is but a view."""
    layout = Layout(tuple(range(x.ndim)))
    return lax.platform_dependent(x, tpu=lambda x: with_layout_constraint(x, layout), default=lambda x: x)


def _row_of_phases(targets: Targets, left: Array, right: Array, label: Array) -> tuple[Array, Array, Array]:
    """Return the sum [B, n] of what phases between left and right f32 [B, C, n] add, and its gradient in both.

    Barriers keep the logits out of memory: they are made thrice from the two, each time for all phases at once.
    """
    shares = [i / len(label) for i in range(len(label))]
    weights, hits = zip(*map(targets, label), strict=True)

    def logits(left: Array, right: Array) -> list[Array]:
        return [left * (1 - share) + right * share if share else left for share in shares]

    largest = jnp.stack([x.max(1) for x in logits(left, right)])
    left, right, largest = lax.optimization_barrier((left, right, largest))
    made = logits(left, right)
    sums = [jnp.exp(x - most[:, None]).sum(1) for x, most in zip(made, largest, strict=True)]
    log_sum, weight = jnp.log(jnp.stack(sums)) + largest, jnp.stack(weights)
    value = (weight * log_sum).sum(0)
    value -= functools.reduce(jnp.add, [(hit * x).sum(1) for hit, x in zip(hits, made, strict=True)])
    # The slope is weight * exp(logit - log_sum) - target.
    left, right, offset = lax.optimization_barrier((left, right, log_sum - jnp.log(weight)))
    made = logits(left, right)
    slopes = [jnp.exp(x - less[:, None]) - hit for x, less, hit in zip(made, offset, hits, strict=True)]
    of_left = functools.reduce(jnp.add, [slope * (1 - share) for slope, share in zip(slopes, shares, strict=True)])
    of_right = functools.reduce(jnp.add, [slope * share for slope, share in zip(slopes, shares, strict=True)])
    return value, *lax.optimization_barrier((of_left, of_right))
