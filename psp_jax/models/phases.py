"""A dilated stage as the undilated one on interleaved subgrids of its map.

Position (y, x) of a map belongs to the phase (y mod d, x mod d). A 3x3 convolution of dilation d reads positions of one
phase only, next to each other in it: on the phases as images of a batch it is the plain convolution with padding 1.
1x1 convolutions and batch norm do not see the difference. No kernel and no gradient is dilated then, and one image
becomes a batch of d * d, which may also be spread over devices without an exchange of rows.
"""

import jax
import numpy as np

from psp_jax.models.valid import Valid

Array = jax.Array


def divides(x: Array, valid: Valid, dilation: int) -> bool:
    """Say whether maps x [B, H, W, C], real in `valid`, are known to fall into phases of equal sizes."""
    if isinstance(valid, Array):
        return False
    return not np.mod([x.shape[1:3], x.shape[1:3] if valid is None else valid], dilation).any()


def grown(valid: Valid, dilation: int) -> Valid:
    """Return what is real of maps whose phases have the real part `valid`."""
    return None if isinstance(valid, Array | None) else (valid[0] * dilation, valid[1] * dilation)


def to_phases(x: Array, dilation: int) -> Array:
    """Map [B, H, W, C] to [B d d, H / d, W / d, C], the phases of an image one after another."""
    if dilation == 1:
        return x
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // dilation, dilation, width // dilation, dilation, channels)
    return x.transpose(0, 2, 4, 1, 3, 5).reshape(-1, height // dilation, width // dilation, channels)


def from_phases(x: Array, dilation: int) -> Array:
    """Undo `to_phases`."""
    if dilation == 1:
        return x
    batch, height, width, channels = x.shape
    x = x.reshape(-1, dilation, dilation, height, width, channels).transpose(0, 3, 1, 4, 2, 5)
    return x.reshape(batch // dilation**2, height * dilation, width * dilation, channels)
