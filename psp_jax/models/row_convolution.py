"""A convolution of maps as one of their rows, which takes the rows of an image for a batch.

Convolutions on a TPU lay the batch along the second fastest axis of a register: with an image, or a part of one, to a
chip most of it is empty. With the rows in the batch it is full, and where the rows of an image are spread over devices
that is a batch spread over devices. What remains of the second dimension are shifted copies of the map, one for each
row of the kernel, side by side in the channels: with several images a chip they cost more than is won.
"""

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def convolve_rows(x: Array, kernel: Array, stride: int, dilation: int, padding: int) -> Array:
    """Convolve [B, H, W, C] with [k, k, C, D]: [B, H', W', D], as `lax.conv_general_dilated` does."""
    size, (batch, height, _, _) = kernel.shape[0], x.shape
    rows = (height + 2 * padding - dilation * (size - 1) - 1) // stride + 1
    x = jnp.pad(x, ((0, 0), (padding, padding), (0, 0), (0, 0)))
    starts = range(0, size * dilation, dilation)
    parts = [lax.slice_in_dim(x, start, start + stride * (rows - 1) + 1, stride, axis=1) for start in starts]
    joined = jnp.concatenate(parts, axis=-1)
    joined = joined.reshape(batch * rows, *joined.shape[2:])
    # [k_y, k_x, C, D] -> [k_x, k_y C, D], in the order of the shifted copies
    kernel = kernel.transpose(1, 0, 2, 3).reshape(kernel.shape[1], -1, kernel.shape[3])
    dims = ("NWC", "WIO", "NWC")
    joined = lax.conv_general_dilated(
        joined, kernel, (stride,), [(padding, padding)], rhs_dilation=(dilation,), dimension_numbers=dims
    )
    return joined.reshape(batch, rows, *joined.shape[1:])
