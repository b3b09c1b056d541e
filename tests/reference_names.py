"""Names of hszhao/semseg's PSPNet tensors for the parameters here, to compare with its stored outputs."""

from collections.abc import Callable
from typing import Any

import numpy as np
from flax import traverse_util

BN = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def semseg_name(path: tuple[str, ...]) -> str:
    """Name in hszhao/semseg of the leaf at `path` of `params` or `batch_stats`."""
    part, *rest = path
    *module, kind, leaf = rest
    leaf = "weight" if leaf == "kernel" else BN[leaf]
    if part == "backbone":
        if module[0].startswith("stem"):
            index = 3 * (int(module[0][4:]) - 1) + (kind == "bn")
            return f"layer0.{index}.{leaf}"
        stage, block = module[0].removeprefix("layer").split("_block")
        if module[1] == "downsample":
            return f"layer{stage}.{block}.downsample.{int(kind == 'bn')}.{leaf}"
        return f"layer{stage}.{block}.{kind}{module[1][4:]}.{leaf}"
    prefix = "cls" if part == "head" else "aux"
    if module == ["classifier"]:
        return f"{prefix}.4.{leaf}"
    if module[0].startswith("level"):
        index = (1, 2, 3, 6).index(int(module[0][5:]))
        return f"ppm.features.{index}.{1 + (kind == 'bn')}.{leaf}"
    return f"{prefix}.{int(kind == 'bn')}.{leaf}"


def to_reference(tree: Any) -> dict[str, np.ndarray]:
    """Return {semseg name: tensor in torch's layout} of a tree of parameters or statistics."""
    flat = traverse_util.flatten_dict(tree)
    return {semseg_name(path): to_torch_layout(np.asarray(value)) for path, value in flat.items()}


def to_torch_layout(value: np.ndarray) -> np.ndarray:
    """Bring a convolution kernel from (height, width, in, out) to (out, in, height, width)."""
    return value.transpose(3, 2, 0, 1) if value.ndim == 4 else value


def from_reference(tree: Any, fill: Callable[[str, tuple[int, ...]], np.ndarray]) -> Any:
    """Return `tree` with every leaf replaced by fill(semseg name, torch shape), in float32."""
    flat = traverse_util.flatten_dict(tree)
    filled = {}
    for path, value in flat.items():
        torch_value = fill(semseg_name(path), to_torch_layout(np.empty(value.shape)).shape)
        filled[path] = (torch_value.transpose(2, 3, 1, 0) if value.ndim == 4 else torch_value).astype(np.float32)
    return traverse_util.unflatten_dict(filled)
