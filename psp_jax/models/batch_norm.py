"""Batch normalisation by the statistics of the global batch."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from psp_jax.models.column_pairs import ColumnPairs, without_last
from psp_jax.models.valid import inside

Array = jax.Array
Maps = tuple[Array, ...]


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
    def __call__(
        self, x: Array | ColumnPairs, train: bool, valid: tuple[int, int] | Array | None = None, groups: int = 1
    ) -> Any:
        """Normalise [B, ..., C], and set to 0 what is negative if `relu`; updates `batch_stats` when `train`.

        `ColumnPairs`, which are for training, stay such; their columns are all real. Where `valid` of maps
        [B, H, W, C] is given, the statistics are of what is real. With `groups` > 1 the batch is cut into that many
        equal runs of neighbours, each normalised by its own statistics, as replicas that do not exchange them would;
        the running statistics take the mean of theirs.
        """
        channels = x.shape[-1]
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels)
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        if not train:
            if isinstance(x, ColumnPairs):
                raise TypeError("Pairs of columns are for training alone.")
            y = (x.astype(jnp.float32) - running_mean.value) * (scale * lax.rsqrt(running_var.value + self.epsilon))
            y = (y + bias).astype(self.dtype)
            return nn.relu(y) if self.relu else y
        if isinstance(valid, Array):
            raise TypeError("When training, the real size of maps is one pair, known while tracing.")
        count = x.shape[0] // groups * math.prod(valid or x.shape[1:-1])
        maps: Maps = x.maps if isinstance(x, ColumnPairs) else (x,)
        width = x.width if isinstance(x, ColumnPairs) and len(maps) == 1 else None
        if valid and isinstance(x, ColumnPairs):
            valid = (valid[0], maps[0].shape[2])
        options = _Normalisation(self.epsilon, self.relu, groups, count, valid, width, self.dtype)
        maps, mean, var = _normalise(options, maps, scale, bias)
        if not self.is_initializing():
            unbiased = var * (count / max(count - 1, 1))
            for running, found in ((running_mean, mean), (running_var, unbiased)):
                running.value = self.momentum * running.value + (1 - self.momentum) * found.mean(0).ravel()
        return ColumnPairs(maps, x.width) if isinstance(x, ColumnPairs) else maps[0]


@dataclass(frozen=True)
class _Normalisation:
    """What of batch normalisation by a batch's own statistics is known while tracing; see `BatchNorm`.

    `count` is over how many values of a channel the statistics of a group are, `width` that of maps whose columns are
    side by side in pairs, None for others.
    """

    epsilon: float
    relu: bool
    groups: int
    count: int
    valid: tuple[int, int] | None
    width: int | None
    dtype: Any

    def grouped(self, maps: Maps) -> Maps:
        """Map each [B, ..., C] to f32 [groups, B / groups, ..., C]."""
        return tuple(x.astype(jnp.float32).reshape(self.groups, -1, *x.shape[1:]) for x in maps)

    def real(self, x: Array) -> Array:
        """Return x [groups, B / groups, H, W, C] with zeros beyond what is real."""
        if self.valid is not None:
            x = jnp.where(inside(self.valid, x.shape[2:4]), x, 0.0)
        return x if self.width is None else without_last(x, self.width)

    def summed(self, maps: Maps) -> Array:
        """Sum maps [groups, B / groups, ..., C] over all but groups and channels: [groups, 1, ..., C]."""
        total = functools.reduce(jnp.add, [x.sum(tuple(range(1, x.ndim - 1)), keepdims=True) for x in maps])
        return total if self.width is None else total.reshape(*total.shape[:-1], 2, -1).sum(-2)

    def per_channel(self, values: Array) -> Array:
        """Return values [..., C] as the channels of the maps have them."""
        return values if self.width is None else jnp.concatenate([values, values], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalise(options: _Normalisation, maps: Maps, scale: Array, bias: Array) -> tuple[Maps, Array, Array]:
    """Return maps [B, ..., C] normalised by statistics of all of them, and their mean and biased variance.

    The latter, f32 [groups, 1, ..., C], get no gradient. That of the rest is written down because the textbook's takes
    one pass for two sums, and one for the result, over the layer's input and the gradient, and nothing but the input is
    kept for it; differentiated step by step it takes more of both.
    """
    return _normalise_and_keep(options, maps, scale, bias)[0]


def _normalise_and_keep(options: _Normalisation, maps: Maps, scale: Array, bias: Array) -> tuple[Any, Any]:
    grouped, count = options.grouped(maps), options.count
    real = tuple(options.real(x) for x in grouped)
    mean = options.summed(real) / count
    # One pass over the data; rounding can push the difference below zero where a channel is constant.
    var = jnp.maximum(options.summed(tuple(jnp.square(x) for x in real)) / count - jnp.square(mean), 0.0)
    normalised = tuple(
        (nn.relu(y) if options.relu else y).astype(options.dtype).reshape(x.shape)
        for x, y in zip(maps, _affine(options, grouped, scale, bias, mean, var), strict=True)
    )
    return (normalised, mean, var), (maps, scale, bias, mean, var)


def _affine(options: _Normalisation, grouped: Maps, scale: Array, bias: Array, mean: Array, var: Array) -> Maps:
    of = options.per_channel
    factor = scale * lax.rsqrt(var + options.epsilon)
    return tuple((x - of(mean)) * of(factor) + of(bias) for x in grouped)


def _normalise_gradient(options: _Normalisation, kept: Any, slopes: Any) -> tuple[Maps, Array, Array]:
    maps, scale, bias, mean, var = kept
    of, grouped, count = options.per_channel, options.grouped(maps), options.count
    inverse = lax.rsqrt(var + options.epsilon)
    normal = tuple((x - of(mean)) * of(inverse) for x in grouped)
    slope = options.grouped(slopes[0])
    if options.relu:  # by the very numbers of the forward pass
        outputs = _affine(options, grouped, scale, bias, mean, var)
        slope = tuple(jnp.where(y > 0, s, 0.0) for y, s in zip(outputs, slope, strict=True))
    of_bias = options.summed(slope)
    of_scale = options.summed(tuple(s * n for s, n in zip(slope, normal, strict=True)))
    through_statistics = (options.real((of(of_bias) + n * of(of_scale)) / count) for n in normal)
    of_maps = tuple(
        ((s - t) * of(scale * inverse)).astype(x.dtype).reshape(x.shape)
        for x, s, t in zip(maps, slope, through_statistics, strict=True)
    )
    return of_maps, of_scale.sum(0).ravel(), of_bias.sum(0).ravel()


_normalise.defvjp(_normalise_and_keep, _normalise_gradient)
