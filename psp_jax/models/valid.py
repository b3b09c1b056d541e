"""Maps of which only a part is real: the first rows and columns, as many of each image as `valid` says."""

from typing import Any

import jax
import jax.numpy as jnp

from psp_jax.models.column_pairs import ColumnPairs

Array = jax.Array
# Which (height, width) of each map is real, the rest being padding: i32 [B, 2]; when training, one pair for all.
Valid = Array | tuple[int, int] | None


def strided(valid: Valid, stride: int) -> Valid:
    """Return what is real of the output of a layer with this stride whose input has the real part `valid`."""
    if isinstance(valid, tuple):
        return (-(-valid[0] // stride), -(-valid[1] // stride))
    return None if valid is None else (valid + stride - 1) // stride


def unless_whole(valid: Valid, x: Array | ColumnPairs) -> Valid:
    """Return `valid`, or None where it is known to be all of the maps x [B, H, W, C]."""
    return None if isinstance(valid, tuple) and valid == x.shape[1:3] else valid


def zero_beyond(x: Any, valid: Valid) -> Any:
    """Return [B, H, W, C], or such `ColumnPairs`, with zeros beyond what is real, as the padding of a convolution is.

    Of the latter only rows can be beyond.
    """
    valid = unless_whole(valid, x)
    if isinstance(x, ColumnPairs) and isinstance(valid, tuple):
        return ColumnPairs(tuple(zero_beyond(part, (valid[0], part.shape[2])) for part in x.maps), x.width)
    return x if valid is None else x * inside(valid, x.shape[1:3]).astype(x.dtype)


def inside(valid: Array | tuple[int, int], size: tuple[int, ...]) -> Array:
    """Return bool [B or 1, H, W, 1], True within the first `valid` rows and columns of maps of this size."""
    pairs = jnp.asarray(valid).reshape(-1, 2)
    rows, columns = (jnp.arange(size[axis]) < pairs[:, axis, None] for axis in range(2))
    return rows[:, :, None, None] & columns[:, None, :, None]
