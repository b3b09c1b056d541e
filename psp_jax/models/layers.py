"""Convolution, batch normalisation and initialisers that every network here is made of."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

Array = jax.Array
# Which (height, width) of each map is real, the rest being padding: i32 [B, 2]; when training, one pair for all.
Valid = Array | tuple[int, int] | None
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


class BatchNorm(nn.Module):
    """Batch normalisation over all positions of the global batch (Ioffe and Szegedy, 2015).

    The batch axis may be sharded: under `jax.jit` the means are means over every replica. Statistics are float32
    whatever `dtype` is. As in torch, `momentum` 0.9 keeps nine tenths of the running statistics and the running
    variance takes the unbiased estimate; `flax.linen.BatchNorm` would take the biased one.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    relu: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool, valid: tuple[int, int] | Array | None = None, groups: int = 1) -> Array:
        """Normalise [B, ..., C], and set to 0 what is negative if `relu`; updates `batch_stats` when `train`.

        Where `valid` of maps [B, H, W, C] is given, the statistics are of what is real. With `groups` > 1 the batch is
        cut into that many equal runs of neighbours, each normalised by its own statistics, as replicas that do not
        exchange them would; the running statistics take the mean of theirs.
        """
        channels = x.shape[-1]
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels)
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        if not train:
            y = (x.astype(jnp.float32) - running_mean.value) * (scale * lax.rsqrt(running_var.value + self.epsilon))
            y = (y + bias).astype(self.dtype)
            return nn.relu(y) if self.relu else y
        if isinstance(valid, Array):
            raise TypeError("When training, the real size of maps is one pair, known while tracing.")
        options = _Normalisation(self.epsilon, self.relu, groups, valid, self.dtype)
        y, mean, var = _normalise(options, x, scale, bias)
        if not self.is_initializing():
            count = options.count(x)
            unbiased = var * (count / max(count - 1, 1))
            for running, found in ((running_mean, mean), (running_var, unbiased)):
                running.value = self.momentum * running.value + (1 - self.momentum) * found.mean(0).ravel()
        return y


@dataclass(frozen=True)
class _Normalisation:
    """What of batch normalisation by a batch's own statistics is known while tracing; see `BatchNorm`."""

    epsilon: float
    relu: bool
    groups: int
    valid: tuple[int, int] | None
    dtype: Any

    def grouped(self, x: Array) -> Array:
        """Map [B, ..., C] to f32 [groups, B / groups, ..., C]."""
        return x.astype(jnp.float32).reshape(self.groups, -1, *x.shape[1:])

    def count(self, x: Array) -> int:
        """Return over how many values of each channel of x the statistics of a group are."""
        return x.shape[0] // self.groups * math.prod(self.valid or x.shape[1:-1])

    def real(self, x: Array) -> Array:
        """Return x [groups, B / groups, H, W, C] with zeros beyond what is real."""
        return x if self.valid is None else jnp.where(inside(self.valid, x.shape[2:4]), x, 0.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalise(options: _Normalisation, x: Array, scale: Array, bias: Array) -> tuple[Array, Array, Array]:
    """Return x [B, ..., C] normalised, and its mean and biased variance f32 [groups, 1, ..., C], which get no gradient.

    The gradient is written down because the textbook's takes one pass for two sums, and one for the result, over the
    layer's input and the gradient, and nothing but the input is kept for it; differentiated step by step it takes more
    of both.
    """
    return _normalise_and_keep(options, x, scale, bias)[0]


def _normalise_and_keep(options: _Normalisation, x: Array, scale: Array, bias: Array) -> tuple[Any, Any]:
    grouped = options.grouped(x)
    axes, count = tuple(range(1, grouped.ndim - 1)), options.count(x)
    real = options.real(grouped)
    mean = real.sum(axes, keepdims=True) / count
    # One pass over the data; rounding can push the difference below zero where a channel is constant.
    var = jnp.maximum(jnp.square(real).sum(axes, keepdims=True) / count - jnp.square(mean), 0.0)
    y = (grouped - mean) * (scale * lax.rsqrt(var + options.epsilon)) + bias
    y = (nn.relu(y) if options.relu else y).astype(options.dtype).reshape(x.shape)
    return (y, mean, var), (x, scale, bias, mean, var)


def _normalise_gradient(options: _Normalisation, kept: Any, slopes: Any) -> tuple[Array, Array, Array]:
    x, scale, bias, mean, var = kept
    grouped, slope = options.grouped(x), options.grouped(slopes[0])
    inverse = lax.rsqrt(var + options.epsilon)
    normal = (grouped - mean) * inverse
    if options.relu:  # by the very numbers of the forward pass
        slope = jnp.where((grouped - mean) * (scale * inverse) + bias > 0, slope, 0.0)
    axes, count = tuple(range(1, grouped.ndim - 1)), options.count(x)
    of_bias, of_scale = (part.sum(axes, keepdims=True) for part in (slope, slope * normal))
    through_statistics = options.real((of_bias + normal * of_scale) / count)
    of_x = (slope - through_statistics) * (scale * inverse)
    return of_x.astype(x.dtype).reshape(x.shape), of_scale.sum(0).ravel(), of_bias.sum(0).ravel()


_normalise.defvjp(_normalise_and_keep, _normalise_gradient)


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
        """Return what the layer makes of x with a kernel; a method so that training can choose how it is lowered."""
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


def max_pool(x: Array, train: bool) -> Array:
    """Take the maximum of [B, H, W, C] over 3x3 windows with stride 2, as torch's `MaxPool2d(3, 2, 1)` does.

    When training, slices are compared one after another, so that the gradient, which goes to the first of equal values
    in a window, is made of selections: XLA's own scatters, which splits badly over rows and fails to compile on GPUs
    where only deterministic operations are allowed.
    """
    if not train:
        return nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
    for axis in (2, 1):
        size = x.shape[axis]
        pads = [(1, 1) if i == axis else (0, 0) for i in range(4)]
        padded = jnp.pad(x, pads, constant_values=-jnp.inf)
        first, second, third = (
            lax.slice_in_dim(padded, start, start + 2 * ((size - 1) // 2) + 1, 2, axis) for start in range(3)
        )
        x = jnp.where(second > first, second, first)
        x = jnp.where(third > x, third, x)
    return x


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
