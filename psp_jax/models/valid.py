"""Maps of which only a part is real: the first rows and columns, as many of each image as `valid` says."""

import jax
import jax.numpy as jnp

Array = jax.Array
# Which (height, width) of each map is real, the rest being padding: i32 [B, 2]; when training, one pair for all.
Valid = Array | tuple[int, int] | None


def strided(valid: Valid, stride: int) -> Valid:
    """Return what is real of the output of a layer with this stride whose input has the real part `valid`."""
    if isinstance(valid, tuple):
        return (-(-valid[0] // stride), -(-valid[1] // stride))
    return None if valid is None else (valid + stride - 1) // stride


def unless_whole(valid: Valid, x: Array) -> Valid:
    """Return `valid`, or None where it is known to be all of the maps x [B, H, W, C]."""
    return None if isinstance(valid, tuple) and valid == x.shape[1:3] else valid


def zero_beyond(x: Array, valid: Valid) -> Array:
    """Return [B, H, W, C] with zeros beyond what is real, as the padding of a convolution is."""
    valid = unless_whole(valid, x)
    return x if valid is None else x * inside(valid, x.shape[1:3]).astype(x.dtype)


def inside(valid: Array | tuple[int, int], size: tuple[int, ...]) -> Array:
    """Return bool [B or 1, H, W, 1], True within the first `valid` rows and columns of maps of this size."""
    pairs = jnp.asarray(valid).reshape(-1, 2)
    rows, columns = (jnp.arange(size[axis]) < pairs[:, axis, None] for axis in range(2))
    return rows[:, :, None, None] & columns[:, None, :, None]
