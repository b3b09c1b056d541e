"""Networks in the names and layouts of other frameworks, for tests.

`random_tensors` takes names and shapes from the tables of the package, so it shows nothing about the tables: their
names are held to others in test_weights_tables.py. `caffe_network` is made without them.
"""

import functools
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from psp_jax.config import defaults
from psp_jax.models import variable_shapes
from psp_jax.weights.tables import names

Tensors = dict[str, np.ndarray]
MMSEG = {"stem": "32-32-64", "first_block_dilation": "contracted", "align_corners": False}
MMSEG_18 = MMSEG | {"depth": 18, "basic_dilation": "first", "head_channels": 128, "aux_channels": 64}


def settings_of(**options: Any) -> dict[str, Any]:
    """Return the fields of config.model, with some changed."""
    return defaults().model.to_dict() | options


def shapes_of(settings: Mapping[str, Any], classes: int, parts: str = "all") -> dict[str, Any]:
    """Return the shapes of a network's variables, or of its backbone's."""
    shapes = _shapes(tuple(settings.items()), classes)
    return shapes if parts == "all" else {kind: {"backbone": tree["backbone"]} for kind, tree in shapes.items()}


@functools.cache
def _shapes(settings: tuple[tuple[str, Any], ...], classes: int) -> dict[str, Any]:
    return variable_shapes(dict(settings), classes)


def random_tensors(source: str, settings: Mapping[str, Any], classes: int, parts: str = "all") -> Tensors:
    """Return a network of a source with the tables' names and shapes; the numbers repeat after a prime count."""
    table = names(source, settings, shapes_of(settings, classes, parts))
    noise = np.random.default_rng(0).uniform(0.1, 1.0, 65_537).astype(np.float32)
    return {name: np.resize(np.roll(noise, i), entry.shape) for i, (name, entry) in enumerate(table.items())}


def digest(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> tuple[int, str]:
    """Return how many tensors there are and 16 digits of the SHA-256 of their names and shapes."""
    listed = sorted(shapes)
    return len(listed), hashlib.sha256(repr(listed).encode()).hexdigest()[:16]


def caffe_network(semseg: Tensors) -> Tensors:
    """Return hszhao/semseg's PSPNet as the blobs of hszhao/PSPNet: its prototxt's names, BGR, the levels 6, 3, 2, 1."""
    blobs: Tensors = {}

    def convolution(layer: str, conv: str, bn: str) -> None:
        blobs[f"{layer}/0"] = semseg[f"{conv}.weight"]
        for i, leaf in enumerate(("weight", "bias", "running_mean", "running_var")):
            blobs[f"{layer}/bn/{i}"] = semseg[f"{bn}.{leaf}"].reshape(1, -1, 1, 1)

    for i, layer in enumerate(("conv1_1_3x3_s2", "conv1_2_3x3", "conv1_3_3x3")):
        convolution(layer, f"layer0.{3 * i}", f"layer0.{3 * i + 1}")
    for stage in range(1, 5):
        blocks = {name.split(".")[1] for name in semseg if name.startswith(f"layer{stage}.")}
        for block in range(len(blocks)):
            ours, theirs = f"layer{stage}.{block}", f"conv{stage + 1}_{block + 1}"
            for i, kind in enumerate(("1x1_reduce", "3x3", "1x1_increase"), start=1):
                convolution(f"{theirs}_{kind}", f"{ours}.conv{i}", f"{ours}.bn{i}")
            if block == 0:
                convolution(f"{theirs}_1x1_proj", f"{ours}.downsample.0", f"{ours}.downsample.1")
    for i, bins in enumerate((1, 2, 3, 6)):
        convolution(f"conv5_3_pool{bins}_conv", f"ppm.features.{i}.1", f"ppm.features.{i}.2")
    convolution("conv5_4", "cls.0", "cls.1")
    blobs["conv6/0"], blobs["conv6/1"] = semseg["cls.4.weight"], semseg["cls.4.bias"]
    blobs["conv1_1_3x3_s2/0"] = blobs["conv1_1_3x3_s2/0"][:, ::-1]
    features, levels = np.split(blobs["conv5_4/0"], 2, axis=1)
    blobs["conv5_4/0"] = np.concatenate([features, *reversed(np.split(levels, 4, axis=1))], axis=1)
    return blobs
