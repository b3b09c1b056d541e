"""Convolution, pooling, classifier and initialisers that every network here is made of."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from psp_jax.models.batch_norm import BatchNorm
from psp_jax.models.column_pairs import ColumnPairs
from psp_jax.models.valid import Valid, strided, unless_whole, zero_beyond

Array = jax.Array
# A small map [B, n, m, C], and the weights [..., H, n] and [..., W, m] that resize it; see `resize_matrices`.
Coarse = tuple[Array, tuple[Any, Any]]

# torch's default for convolutions, which the reference keeps in its heads: U(-1/sqrt(fan_in), 1/sqrt(fan_in)).
torch_default_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
# He et al. 2015, as torchvision's ResNet does it.
kaiming_fan_out_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def torch_bias_init(fan_in: int) -> Callable[..., Array]:
    """Return torch's default for biases of layers with `fan_in` inputs: U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        bound = fan_in**-0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class Conv(nn.Module):
    """Square convolution without bias; padding keeps [H, W] at stride 1.

    The padding is explicit because 'SAME' with stride 2 pads one pixel less at even sizes than torch's padding=1.
    """

    features: int
    kernel_size: int = 3
    stride: int = 1
    dilation: int = 1
    kernel_init: Any = kaiming_fan_out_init
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, coarse: Sequence[Coarse] = ()) -> Array:
        """Map [B, H, W, C] to [B, ceil(H / stride), ceil(W / stride), features].

        With `coarse` maps, for stride and dilation 1, the input is x and, in the channels behind, each of them resized
        to its size. Resizing and convolving are linear: the kernel is applied to the few cells of a coarse map, and
        what each of its taps gives is interpolated where the tap reads, which takes next to no multiplications.
        """
        if coarse and (self.stride, self.dilation) != (1, 1):
            raise ValueError(f"Coarse maps need stride and dilation 1, not {self.stride} and {self.dilation}.")
        if not coarse:
            return self.convolve(x, self.kernel(x.shape[-1]))
        channels = [x.shape[-1], *(cells.shape[-1] for cells, _ in coarse)]
        kernels = jnp.split(self.kernel(sum(channels)), np.cumsum(channels)[:-1], axis=2)
        rows, columns = [], []
        for (cells, weights), kernel in zip(coarse, kernels[1:], strict=True):
            down, across = (_shifted(jnp.asarray(weight, self.dtype), self.kernel_size) for weight in weights)
            taps = jnp.einsum("bijc,vucd->bviujd", cells.astype(self.dtype), kernel.astype(self.dtype))
            taps = taps.reshape(taps.shape[0], down.shape[-1], across.shape[-1], -1)
            rows.append(jnp.einsum("...hp,...pqd->...hqd", down, taps))
            columns.append(across)
        y = self.convolve(x, kernels[0])
        return y + jnp.einsum("...wq,...hqd->...hwd", jnp.concatenate(columns, -1), jnp.concatenate(rows, -2))

    def kernel(self, channels: int) -> Array:
        """Return the parameter f32 [kernel_size, kernel_size, channels, features]."""
        shape = (self.kernel_size, self.kernel_size, channels, self.features)
        kernel: Array = self.param("kernel", self.kernel_init, shape)
        return kernel

    def convolve(self, x: Array, kernel: Array) -> Array:
        """Return what the layer makes of x with a kernel.

        A method so that training can choose how it is lowered; it may take and return `ColumnPairs` then.
        """
        return lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            (self.stride, self.stride),
            [(self.padding, self.padding)] * 2,
            rhs_dilation=(self.dilation, self.dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    @property
    def padding(self) -> int:
        """Zeros that the map is given on every side."""
        return self.dilation * (self.kernel_size - 1) // 2


def _shifted(weights: Array, taps: int) -> Array:
    """Return, of resize weights [..., H, n], those at which the taps of a kernel read: [..., H, taps n]."""
    pad, size = taps // 2, weights.shape[-2]
    weights = jnp.pad(weights, [(0, 0)] * (weights.ndim - 2) + [(pad, pad), (0, 0)])
    return jnp.concatenate([lax.slice_in_dim(weights, i, i + size, axis=-2) for i in range(taps)], axis=-1)


class ConvBN(nn.Module):
    """`Conv`, `BatchNorm` and, unless `relu` is off, ReLU."""

    features: int
    kernel: int = 3
    stride: int = 1
    dilation: int = 1
    relu: bool = True
    kernel_init: Any = kaiming_fan_out_init
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool, valid: Valid = None, coarse: Sequence[Coarse] = ()) -> Array:
        """Map [B, H, W, C], beside `coarse` maps, to [B, ceil(H / stride), ceil(W / stride), features].

        Where `valid` says which (height, width) of each image is real, the output is that of the smaller image, with
        numbers beyond that mean nothing.
        """
        if self.kernel > 1:
            x = zero_beyond(x, valid)
        shape = self.features, self.kernel, self.stride, self.dilation
        x = Conv(*shape, self.kernel_init, self.dtype, name="conv")(x, coarse)
        after = unless_whole(strided(valid, self.stride), x)
        return BatchNorm(relu=self.relu, dtype=self.dtype, name="bn")(x, train, after)  # type: ignore[no-any-return]


def max_pool(x: Array | ColumnPairs, train: bool) -> Array:
    """Take the maximum of [B, H, W, C] over 3x3 windows with stride 2, as torch's `MaxPool2d(3, 2, 1)` does.

    When training, even and odd columns are compared, then rows, so that the gradient, which goes to the first of equal
    values in a window, is made of selections: XLA's own scatters, which splits badly over rows and fails to compile on
    GPUs where only deterministic operations are allowed.
    """
    if isinstance(x, ColumnPairs):
        even, odd = x.apart()
    elif train:
        even, odd = _even_and_odd(x, 2)
    else:
        return nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
    return _largest(*_even_and_odd(_largest(even, odd, 2), 1), 1)


def _even_and_odd(x: Array, axis: int) -> tuple[Array, Array]:
    even, odd = (lax.slice_in_dim(x, start, x.shape[axis], 2, axis) for start in range(2))
    return even, odd


def _largest(even: Array, odd: Array, axis: int) -> Array:
    """Return the maximum over windows of three along an axis, each in the middle of an even place."""
    missing = even.shape[axis] - odd.shape[axis]
    nothing = jnp.asarray(-jnp.inf, odd.dtype)
    before, after = (
        lax.pad(odd, nothing, [ends if i == axis else (0, 0, 0) for i in range(odd.ndim)])
        for ends in ((1, missing - 1, 0), (0, missing, 0))
    )
    x = jnp.where(even > before, even, before)
    return jnp.where(after > x, after, x)


class Classifier(nn.Module):
    """Channel dropout (whole maps, torch's Dropout2d) and a 1x1 convolution to class logits in float32."""

    num_classes: int
    dropout: float = 0.1

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Map [B, H, W, C] to f32 [B, H, W, num_classes]."""
        x = nn.Dropout(self.dropout, broadcast_dims=(1, 2), deterministic=not train)(x)
        return nn.Conv(
            self.num_classes,
            (1, 1),
            kernel_init=torch_default_init,
            bias_init=torch_bias_init(x.shape[-1]),
            dtype=jnp.float32,
            precision=lax.Precision.HIGHEST,  # the default on TPU would round to bfloat16
            name="conv",
        )(x)
