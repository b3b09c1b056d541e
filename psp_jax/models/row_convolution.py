"""A convolution of maps as one of their rows, which takes the rows of an image for a batch.

Convolutions on a TPU lay the batch along the second fastest axis of a register: with an image, or a part of one, to a
chip most of it is empty. With the rows in the batch it is full, and where the rows of an image are spread over devices
that is a batch spread over devices. What remains of the second dimension are shifted copies of the map, one for each
row of the kernel: with several images a chip they cost more than is won.
"""

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def convolve_rows(
    x: Array,
    kernel: Array,
    stride: int,
    dilation: int,
    padding: int,
    columns: tuple[int, tuple[int, int]] | None = None,
) -> Array:
    """Convolve [B, H, W, C] with [k, l, C, D]: [B, H', W', D], as `lax.conv_general_dilated` does.

    `columns` are the stride and the padding of columns where they are not those of rows.
    """
    size, (batch, height, _, _) = kernel.shape[0], x.shape
    column_stride, sides = columns or (stride, (padding, padding))
    rows = (height + 2 * padding - dilation * (size - 1) - 1) // stride + 1
    x = jnp.pad(x, ((0, 0), (padding, padding), (0, 0), (0, 0)))
    starts = range(0, size * dilation, dilation)
    parts = [lax.slice_in_dim(x, start, start + stride * (rows - 1) + 1, stride, axis=1) for start in starts]
    # [B H', k, W, C]: the kernel covers the copies as a whole, and stays in the order that it has.
    copies = jnp.stack(parts, axis=2).reshape(batch * rows, size, *x.shape[2:])
    y = lax.conv_general_dilated(
        copies,
        kernel,
        (1, column_stride),
        [(0, 0), sides],
        rhs_dilation=(1, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y.reshape(batch, rows, *y.shape[2:])
