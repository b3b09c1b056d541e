"""Bilinear resizing and adaptive pooling as matrices, one per axis.

Both are linear and separable, so a resize is two matrix products: static shapes, PyTorch's semantics at every
size, and a gradient without scatter. (`jax.image.resize` has no align-corners mode and antialiases.)
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array


def align_corners_positions(n_out: int, n_in: int) -> np.ndarray:
    """Source position of each of `n_out` samples when first and last samples of both grids coincide: f64 [n_out]."""
    if n_out == 1:
        return np.zeros(1)
    return np.arange(n_out) * ((n_in - 1) / (n_out - 1))


def half_pixel_positions(n_out: int, n_in: int) -> np.ndarray:
    """Source position of each of `n_out` samples when the outer pixel edges coincide, clamped: f64 [n_out]."""
    return np.clip((np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5, 0, n_in - 1)


def weights_at(positions: Any, n_in: int) -> Any:
    """Return linear-interpolation weights [..., n, n_in] that read a signal of `n_in` samples at `positions` [..., n].

    NumPy in, NumPy out; JAX in, JAX out (positions may be traced). Positions must lie in [0, n_in - 1].
    """
    xp = jnp if isinstance(positions, jax.Array) else np
    return xp.maximum(0.0, 1.0 - xp.abs(positions[..., None] - xp.arange(n_in)))


def resize_weights(n_out: int, n_in: int, align_corners: bool) -> np.ndarray:
    """Return the matrix f32 [n_out, n_in] of a 1-D linear resize, as torch's `interpolate(mode="bilinear")` does it."""
    positions = (align_corners_positions if align_corners else half_pixel_positions)(n_out, n_in)
    return weights_at(positions, n_in).astype(np.float32)


def resize(
    x: Array,
    size: tuple[int, int],
    align_corners: bool,
    precision: Any = None,
    *,
    valid: tuple[int, int] | None = None,
    canvas: tuple[int, int] | None = None,
) -> Array:
    """Resize [B, h, w, C] to [B, size[0], size[1], C] bilinearly, in the dtype of `x`.

    Where `valid` is given, only that many first rows and columns of `x` count; where `canvas` is, the result is the top
    left of [B, *canvas, C], with zeros beyond.
    """
    valid, canvas = valid or (x.shape[1], x.shape[2]), canvas or size
    if x.shape[1:3] == size == valid == canvas:
        return x
    # Rows first: where they are split over devices, a piece of few columns is what moves.
    for axis, product in enumerate(("hg,bgwc->bhwc", "wv,bhvc->bhwc")):
        matrix = resize_weights(size[axis], valid[axis], align_corners)
        matrix = np.pad(matrix, ((0, canvas[axis] - size[axis]), (0, x.shape[1 + axis] - valid[axis])))
        x = jnp.einsum(product, jnp.asarray(matrix, x.dtype), x, precision=precision)
    return x


def bin_edges(n_in: int, bins: int) -> list[tuple[int, int]]:
    """Return [start, end) of each bin of torch's adaptive pooling: floor(i n / b), ceil((i + 1) n / b)."""
    return [(i * n_in // bins, -((-(i + 1) * n_in) // bins)) for i in range(bins)]


def average_weights(n_in: int, bins: int) -> np.ndarray:
    """Return the matrix f32 [bins, n_in] that averages a 1-D signal over each adaptive bin."""
    matrix = np.zeros((bins, n_in), np.float32)
    for i, (start, end) in enumerate(bin_edges(n_in, bins)):
        matrix[i, start:end] = 1.0 / (end - start)
    return matrix


def resize_into(x: Array, size: tuple[int, int], valid: Array | tuple[int, int] | None, align_corners: bool) -> Array:
    """Resize each of [B, h, w, C] to its own (height, width) `valid`, at the top left of [B, *size, C].

    Beyond `valid`, i32 [B, 2] or one pair, come zeros; where it is None, `size` is all of it.
    """
    if not isinstance(valid, Array):
        return resize(x, valid or size, align_corners, canvas=size)
    rows, columns = resize_matrices((x.shape[1], x.shape[2]), size, valid, align_corners)
    x = jnp.einsum("bhg,bgwc->bhwc", rows.astype(x.dtype), x)
    return jnp.einsum("bwv,bhvc->bhwc", columns.astype(x.dtype), x)


def resize_matrices(
    grid: tuple[int, int], size: tuple[int, int], valid: Array | tuple[int, int] | None, align_corners: bool
) -> tuple[Any, Any]:
    """Return the weights of `resize_into` from maps of h x w = `grid`: f32 [size[0], h] and [size[1], w].

    For i32 [B, 2] `valid` they are an image's own: [B, size[0], h] and [B, size[1], w].
    """
    found = []
    for n_in, n, axis in zip(grid, size, range(2), strict=True):
        if isinstance(valid, Array):
            pixel, n_out = jnp.arange(n), valid[:, axis, None]
            if align_corners:
                positions = pixel * ((n_in - 1) / jnp.maximum(n_out - 1, 1))
            else:
                positions = (pixel + 0.5) * (n_in / n_out) - 0.5
            matrix = weights_at(jnp.clip(positions, 0.0, n_in - 1.0), n_in)
            found.append(matrix * (pixel < n_out)[..., None])
        else:
            real = n if valid is None else valid[axis]
            found.append(np.pad(resize_weights(real, n_in, align_corners), ((0, n - real), (0, 0))))
    return found[0], found[1]


def _cells(length: int, bins: int, valid: Array) -> Array:
    """Return bool [B, bins, length], which of the first `valid` i32 [B] positions lie in each adaptive bin."""
    starts = jnp.arange(bins) * valid[:, None] // bins
    ends = -(-(jnp.arange(bins) + 1) * valid[:, None] // bins)
    position = jnp.arange(length)
    return (position >= starts[..., None]) & (position < ends[..., None])


def adaptive_average_pools(x: Array, bins: Sequence[int], valid: Array | tuple[int, int] | None = None) -> list[Array]:
    """Average [B, H, W, C] over a grid of n x n for each n of `bins`: [B, n, n, C], accumulated in float32.

    Where `valid`, i32 [B, 2] or one pair, is given, the grids divide the first (height, width) of each map alone.
    """
    down, across = ([_averages(x.shape[1 + axis], n, valid, axis) for n in bins] for axis in range(2))
    # Columns first: where rows are split over devices, the devices exchange no more than the bins. Those of all grids
    # at once, so that the map is read, and its gradient written, a single time.
    joined = (jnp if isinstance(valid, Array) else np).concatenate(across, -2)
    strips = jnp.einsum("...wv,...hvc->...hwc", joined, x.astype(jnp.float32))
    parts = [lax.slice_in_dim(strips, end - n, end, axis=2) for n, end in zip(bins, np.cumsum(bins), strict=True)]
    return [jnp.einsum("...hg,...gwc->...hwc", *pair).astype(x.dtype) for pair in zip(down, parts, strict=True)]


def _averages(length: int, bins: int, valid: Array | tuple[int, int] | None, axis: int) -> Any:
    """Return the weights f32 [bins, length] of `adaptive_average_pools` along an axis; [B, bins, length] by image."""
    if isinstance(valid, Array):
        cells = _cells(length, bins, valid[:, axis]).astype(jnp.float32)
        return cells / cells.sum(-1, keepdims=True)
    real = length if valid is None else valid[axis]
    return np.pad(average_weights(real, bins), ((0, 0), (0, length - real)))


def adaptive_max_pools(x: Array, bins: Sequence[int], valid: Array | tuple[int, int] | None = None) -> list[Array]:
    """Take the maximum of [B, H, W, C] over a grid of n x n for each n of `bins`; see `adaptive_average_pools`."""
    return [_adaptive_max_pool(x, n, valid) for n in bins]


def _adaptive_max_pool(x: Array, bins: int, valid: Array | tuple[int, int] | None) -> Array:
    """Take the maximum of [B, H, W, C] over a bins x bins grid of adaptive bins: [B, bins, bins, C].

    Where `valid`, i32 [B, 2] or one pair, is given, the grid divides the first (height, width) of each map alone.
    """
    if not isinstance(valid, Array):
        real = x.shape[1:3] if valid is None else valid
        for axis in (1, 2):
            edges = bin_edges(real[axis - 1], bins)
            parts = [lax.slice_in_dim(x, start, end, axis=axis).max(axis, keepdims=True) for start, end in edges]
            x = jnp.concatenate(parts, axis)
        return x
    down, across = (_cells(x.shape[1 + axis], bins, valid[:, axis]) for axis in range(2))
    least = -jnp.inf
    strips = [jnp.where(down[:, i, :, None, None], x, least).max(axis=1) for i in range(bins)]
    cells = [[jnp.where(across[:, j, :, None], strip, least).max(axis=1) for j in range(bins)] for strip in strips]
    return jnp.stack([jnp.stack(row, axis=1) for row in cells], axis=1)
