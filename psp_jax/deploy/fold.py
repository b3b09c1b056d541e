"""Batch norm folded into the convolution before it: fewer operations for the same function, for inference only."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from psp_jax.models.batch_norm import BatchNorm

Tree = Mapping[str, Any]


def fold_batch_norm(variables: Mapping[str, Tree]) -> dict[str, Any]:
    """Move the scale and the mean of every batch norm into the kernel before it and the batch norm's bias.

    The tree keeps its shape, so that the same network takes it: what is left of each batch norm adds its bias, since
    its statistics become those that normalise by 0 and 1.

    Args:
      variables: {"params", "batch_stats"} of a network made of `models.layers.ConvBN`.
    """
    params, batch_stats = _fold(variables["params"], variables["batch_stats"])
    return {"params": params, "batch_stats": batch_stats}


def _fold(params: Tree, batch_stats: Tree) -> tuple[dict[str, Any], dict[str, Any]]:
    if "bn" in batch_stats:
        return _fold_one(params, batch_stats)
    folded, stats = dict(params), dict(batch_stats)
    for name in batch_stats.keys() - {"mean", "var"}:  # those are of a batch norm without a convolution: it stays
        folded[name], stats[name] = _fold(params[name], batch_stats[name])
    return folded, stats


def _fold_one(params: Tree, batch_stats: Tree) -> tuple[dict[str, Any], dict[str, Any]]:
    norm, running = ({k: np.asarray(v, np.float64) for k, v in tree["bn"].items()} for tree in (params, batch_stats))
    epsilon = BatchNorm.epsilon
    factor = norm["scale"] / np.sqrt(running["var"] + epsilon)
    kernel = np.asarray(params["conv"]["kernel"], np.float64) * factor
    bias = norm["bias"] - running["mean"] * factor
    one = np.ones_like(factor, np.float32)
    folded = {"conv": {"kernel": kernel.astype(np.float32)}, "bn": {"scale": one, "bias": bias.astype(np.float32)}}
    # 1 - epsilon + epsilon is exactly 1 in float32, and so is the factor that the batch norm makes of it.
    return folded, {"bn": {"mean": np.zeros_like(one), "var": one - np.float32(epsilon)}}
