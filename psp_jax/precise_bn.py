"""Batch-norm statistics of given parameters over several training batches, in place of the running ones."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax.sharding import Mesh
from ml_collections import ConfigDict

from psp_jax import checks, parallel
from psp_jax.data.pipeline import Source, train_batches
from psp_jax.data.transforms import AugmentSettings
from psp_jax.models import build_model
from psp_jax.models.batch_norm import BatchNorm
from psp_jax.progress import Tracked
from psp_jax.train_step import normalize
from psp_jax.workdir import ModelCard

Array = jax.Array


def make_moments(
    model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...], bn_groups: int = 1
) -> Callable[..., Any]:
    """Return the function (parameters, image u8 [B, H, W, 3]) -> first two moments of every batch norm's input.

    In a forward pass as in training, with its `bn_groups`, over all positions of the global batch; the tree is that of
    `batch_stats`, with "mean" and "square", f32 [C], at each layer.
    """

    def moments(params: Any, image: Array) -> Any:
        found: dict[tuple[str, ...], Array] = {}

        def observe(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            if isinstance(context.module, BatchNorm):
                x = args[0].astype(jnp.float32)
                axes = tuple(range(x.ndim - 1))
                found[*context.module.path, "mean"] = x.mean(axes)
                found[*context.module.path, "square"] = jnp.square(x).mean(axes)
                return call(*args, **kwargs, groups=bn_groups)
            return call(*args, **kwargs)

        with nn.intercept_methods(observe):
            # Dropout comes behind the last batch norm: its key changes nothing.
            rngs = {"dropout": jax.random.key(0)}
            model.apply({"params": params}, normalize(image, mean, std), train=True, mutable=["batch_stats"], rngs=rngs)
        return traverse_util.unflatten_dict(found)

    return moments


def make_statistics(
    config: ConfigDict, card: ModelCard, mesh: Mesh, source: Source, track: Callable[[int, str], Tracked]
) -> Callable[[Any], Any]:
    """Return the function parameters -> `batch_stats`: mean and variance over config.eval.precise_bn_batches batches.

    The batches are the first of a run with config.seed, in the network's own crops, augmented as `config` says, so the
    same parameters give the same statistics. Source: Wu and Johnson, "Rethinking 'Batch' in BatchNorm" (2021), section
    3, and fvcore's precise_bn: the variance is that of all positions of all batches together.

    Args:
      config: of a run or an evaluation; its batch size, augmentation and seed are used.
      card: of the network; its window is the size of the crops.
      source: the images to train on.
      track: shows how far it is; see `psp_jax.progress.track`.
    """
    # What is observed inside a block that is recomputed could not leave it.
    model = build_model(card.model | {"remat": False}, card.classes.num_classes)
    moments_fn = make_moments(model, card.mean, card.std, checks.bn_groups(config))
    moments = jax.jit(moments_fn, out_shardings=parallel.replicated(mesh))
    number, sharding = config.eval.precise_bn_batches, parallel.batch_axis_sharding(mesh)
    index, count = parallel.share(sharding)

    def statistics(params: Any) -> Any:
        batches = train_batches(
            source,
            crop_size=card.window,
            batch_size=config.train.batch_size,
            seed=config.seed,
            num_steps=number,
            shard_index=index,
            shard_count=count,
            augment=AugmentSettings(**config.augment),
            num_workers=config.data.num_workers,
        )
        total: Any = None
        with contextlib.closing(batches), track(number, "batch-norm statistics") as advance:
            for batch in batches:
                image = parallel.to_global({"image": batch["image"]}, sharding)["image"]
                found = jax.tree.map(np.float64, jax.device_get(moments(params, image)))
                total = found if total is None else jax.tree.map(np.add, total, found)
                advance(1)
        layers = jax.tree.map(lambda layer: _mean_and_variance(layer, number), total, is_leaf=lambda x: "square" in x)
        return parallel.to_replicated(layers, mesh)

    return statistics


def _mean_and_variance(sums: dict[str, np.ndarray], number: int) -> dict[str, np.ndarray]:
    mean, square = sums["mean"] / number, sums["square"] / number
    # Rounding can push the difference below zero where a channel is constant.
    return {"mean": mean.astype(np.float32), "var": np.maximum(square - mean**2, 0).astype(np.float32)}
