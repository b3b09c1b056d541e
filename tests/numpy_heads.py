"""Heads of mmsegmentation and PyTorch-Encoding in NumPy float64, by their formulas and the names of their tensors."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Stages = Sequence[np.ndarray]

# What the two call the parts of EncNet's head: (convolution, batch norm), or a name without a convolution or norm.
ENC: dict[str, dict[str, Any]] = {
    "mmseg": {
        "conv": ("decode_head.bottleneck.conv", "decode_head.bottleneck.bn"),
        "lateral": [(f"decode_head.lateral_convs.{i}.conv", f"decode_head.lateral_convs.{i}.bn") for i in range(2)],
        "fusion": ("decode_head.fusion.conv", "decode_head.fusion.bn"),
        "project": (
            "decode_head.enc_module.encoding_project.conv",
            "decode_head.enc_module.encoding_project.bn",
        ),
        "encoding": "decode_head.enc_module.encoding.0",
        "norm": "decode_head.enc_module.encoding.1",
        "gate": "decode_head.enc_module.fc.0",
        "se": "decode_head.se_layer",
        "classifier": "decode_head.conv_seg",
    },
    "encoding": {
        "conv": ("head.conv5.0", "head.conv5.1"),
        "lateral": [(f"head.connect.{i}.0", f"head.connect.{i}.1") for i in range(2)],
        "fusion": ("head.fusion.0", "head.fusion.1"),
        "project": ("head.encmodule.encoding.0", "head.encmodule.encoding.1"),
        "encoding": "head.encmodule.encoding.3",
        "norm": "head.encmodule.encoding.4",
        "gate": "head.encmodule.fc.0",
        "se": "head.encmodule.selayer",
        "classifier": "head.conv6.1",
    },
}


class State:
    """Tensors by name, and what a pass does with them.

    Attributes:
      train: whether batch norm takes the statistics of its batch.
      taken: names of the tensors that were needed.
      updated: the running statistics after a pass in training, by name.
    """

    def __init__(self, tensors: Mapping[str, np.ndarray], train: bool = False) -> None:
        self.tensors, self.train = tensors, train
        self.taken: set[str] = set()
        self.updated: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        self.taken.add(name)
        return self.tensors[name].astype(np.float64)

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        """Batch norm over the second axis of [B, C, ...], and ReLU."""
        axes = tuple(axis for axis in range(x.ndim) if axis != 1)
        shape = tuple(-1 if axis == 1 else 1 for axis in range(x.ndim))
        mean, var = self[f"{name}.running_mean"], self[f"{name}.running_var"]
        if self.train:
            count = x.size // x.shape[1]
            self.updated[f"{name}.running_mean"] = 0.9 * mean + 0.1 * x.mean(axes)
            self.updated[f"{name}.running_var"] = 0.9 * var + 0.1 * x.var(axes) * count / (count - 1)
            mean, var = x.mean(axes), x.var(axes)
        x = (x - mean.reshape(shape)) / np.sqrt(var.reshape(shape) + 1e-5)
        return np.maximum(x * self[f"{name}.weight"].reshape(shape) + self[f"{name}.bias"].reshape(shape), 0)

    def conv(self, names: tuple[str, str], x: np.ndarray, dilation: int = 1) -> np.ndarray:
        """Convolution [B, C, H, W] without bias that keeps the size, batch norm and ReLU."""
        kernel, (height, width) = self[f"{names[0]}.weight"], x.shape[2:]
        reach = dilation * (kernel.shape[-1] // 2)
        padded = np.pad(x, ((0, 0), (0, 0), (reach, reach), (reach, reach)))
        y = np.zeros((len(x), len(kernel), height, width))
        for i, j in np.ndindex(kernel.shape[2:]):
            window = padded[:, :, i * dilation : i * dilation + height, j * dilation : j * dilation + width]
            y += np.einsum("oc,bchw->bohw", kernel[:, :, i, j], window)
        return self.norm(names[1], y)

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        """Linear layer on [B, C], or 1x1 convolution on [B, C, H, W], with bias."""
        kernel, bias = self[f"{name}.weight"], self[f"{name}.bias"]
        y = np.tensordot(x, kernel.reshape(kernel.shape[:2]), (1, 1)) + bias  # channels last
        return y if x.ndim == 2 else y.transpose(0, 3, 1, 2)


def module(name: str) -> tuple[str, str]:
    """Return the names within mmsegmentation's ConvModule."""
    return f"{name}.conv", f"{name}.bn"


def fcn(state: State, stages: Stages, convs: int, concat: bool) -> dict[str, np.ndarray]:
    """FCNHead of mmsegmentation."""
    x = stages[-1]
    for i in range(convs):
        x = state.conv(module(f"decode_head.convs.{i}"), x)
    if concat:
        x = state.conv(module("decode_head.conv_cat"), np.concatenate([stages[-1], x], 1))
    return {"logits": state.linear("decode_head.conv_seg", x)}


def aspp(state: State, stages: Stages, dilations: Sequence[int]) -> dict[str, np.ndarray]:
    """ASPPHead of mmsegmentation: the image's mean, and a dilated convolution for each of `dilations`."""
    x = stages[-1]
    pooled = state.conv(module("decode_head.image_pool.1"), x.mean((2, 3), keepdims=True))
    branches = [np.broadcast_to(pooled, (*pooled.shape[:2], *x.shape[2:]))]
    for i, dilation in enumerate(dilations):
        branches.append(state.conv(module(f"decode_head.aspp_modules.{i}"), x, dilation))
    x = state.conv(module("decode_head.bottleneck"), np.concatenate(branches, 1))
    return {"logits": state.linear("decode_head.conv_seg", x)}


def enc(state: State, stages: Stages, source: str, lateral: bool) -> dict[str, np.ndarray]:
    """EncHead of mmsegmentation or PyTorch-Encoding."""
    names = ENC[source]
    x = state.conv(names["conv"], stages[-1])
    if lateral:
        levels = [state.conv(pair, stage) for pair, stage in zip(names["lateral"], stages[1:3], strict=True)]
        x = state.conv(names["fusion"], np.concatenate([x, *levels], 1))
    z = state.conv(names["project"], x)
    codewords, scale = state[f"{names['encoding']}.codewords"], state[f"{names['encoding']}.scale"]
    residuals = z.reshape(*z.shape[:2], -1).transpose(0, 2, 1)[:, :, None] - codewords  # [B, N, K, D]
    shares = np.exp(scale * np.square(residuals).sum(-1))
    shares /= shares.sum(-1, keepdims=True)
    codes = state.norm(names["norm"], (shares[..., None] * residuals).sum(1))  # [B, K, D]
    semantics = codes.mean(1)
    gate = 1 / (1 + np.exp(-state.linear(names["gate"], semantics)))
    x = np.maximum(x + x * gate[:, :, None, None], 0)
    return {"logits": state.linear(names["classifier"], x), "se_logits": state.linear(names["se"], semantics)}
