"""Two-way tables between the tensors of other frameworks and the variables here: nothing is dropped unnamed.

    names(source, settings, like)                    their name -> where the tensor goes, and in which layout
    to_variables(source, tensors, settings, like)    their tensors -> {"params", "batch_stats"}
    from_variables(source, variables, settings)      the exact inverse, bit for bit

`settings` are the fields of `config.model`; `like` is a tree of anything with a shape. Where the trees hold only a
backbone, the names are those of the source's classification networks.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import traverse_util

from psp_jax.weights.schemes import Pair, Scheme, scheme_of

Tensors = Mapping[str, np.ndarray]
Tree = dict[str, Any]

_TORCH_TENSORS = {
    ("conv", "kernel"): ".weight",
    ("conv", "bias"): ".bias",
    ("bn", "scale"): ".weight",
    ("bn", "bias"): ".bias",
    ("bn", "mean"): ".running_mean",
    ("bn", "var"): ".running_var",
    ("dense", "kernel"): ".weight",
    ("dense", "bias"): ".bias",
    ("encoding", "codewords"): ".codewords",
    ("encoding", "scale"): ".scale",
}
_CAFFE_BLOBS = {
    ("conv", "kernel"): "/0",
    ("conv", "bias"): "/1",
    ("bn", "scale"): "/0",
    ("bn", "bias"): "/1",
    ("bn", "mean"): "/2",
    ("bn", "var"): "/3",
}
# Layers that hold their leaves themselves, instead of in a "conv" and a "bn".
_BARE = {"encoding": "encoding", "encoding_bn": "bn", "gate": "dense", "se": "dense"}


def _same(value: np.ndarray) -> np.ndarray:
    return value


def _to_hwio(kernel: np.ndarray) -> np.ndarray:
    return kernel.transpose(2, 3, 1, 0)


def _to_oihw(kernel: np.ndarray) -> np.ndarray:
    return kernel.transpose(3, 2, 0, 1)


def _flip_inputs(kernel: np.ndarray) -> np.ndarray:
    """Turn a kernel [H, W, 3, O] on BGR into one on RGB, or back."""
    return kernel[:, :, ::-1]


def _reverse_levels(kernel: np.ndarray) -> np.ndarray:
    """Turn the kernel [H, W, 2 C, O] after the pyramid from the order features, 6, 3, 2, 1 to 1, 2, 3, 6, or back."""
    height, width, inputs, outputs = kernel.shape
    features, levels = kernel[:, :, : inputs // 2], kernel[:, :, inputs // 2 :]
    levels = levels.reshape(height, width, 4, -1, outputs)[:, :, ::-1].reshape(height, width, -1, outputs)
    return np.concatenate([features, levels], axis=2)


Convert = Callable[[np.ndarray], np.ndarray]
# Of each layout: from theirs to ours, from ours to theirs.
LAYOUTS: dict[str, tuple[Convert, Convert]] = {
    "vector": (_same, _same),
    "row": (np.ravel, lambda value: value.reshape(1, -1, 1, 1)),  # (1, C, 1, 1) of Caffe's BN layer
    "dense": (np.transpose, np.transpose),
    "conv": (_to_hwio, _to_oihw),
    "conv_bgr": (lambda k: _flip_inputs(_to_hwio(k)), lambda k: _to_oihw(_flip_inputs(k))),
    "conv_levels": (lambda k: _reverse_levels(_to_hwio(k)), lambda k: _to_oihw(_reverse_levels(k))),
}


@dataclass(frozen=True)
class Entry:
    """Where a tensor goes.

    Attributes:
      collection: "params" or "batch_stats".
      path: of the leaf in the collection.
      layout: a key of `LAYOUTS`.
      shape: that the tensor has in its source.
    """

    collection: str
    path: tuple[str, ...]
    layout: str
    shape: tuple[int, ...]


def names(source: str, settings: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Entry]:
    """Return {their name: entry} of every leaf of `like`.

    Raises:
      ValueError: the source is unknown, or has no place for one of the leaves.
    """
    whole = "head" in like["params"]
    scheme = scheme_of(source, whole)
    _check(source, scheme, settings)
    tensors = _CAFFE_BLOBS if source == "caffe" else _TORCH_TENSORS
    table = {}
    for collection, tree in like.items():
        for path, leaf in traverse_util.flatten_dict(tree).items():
            *module, kind, tensor = path
            if kind in _BARE:
                module, kind = [*module, kind], _BARE[kind]
            pair = layer_names(scheme, tuple(module), settings)
            if pair is None:
                raise ValueError(f"{source} has no place for {'.'.join(path)}; choose another format.")
            layout = _layout(source, path)
            shape = _their_shape(layout, leaf.shape)
            table[pair[kind == "bn"] + tensors[kind, tensor]] = Entry(collection, path, layout, shape)
    return table


def _their_shape(layout: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape in the source; no array is made for it, a hostile file could make it as large as it likes."""
    if layout == "vector":
        return shape
    if layout == "row":
        return (1, *shape, 1, 1)
    if layout == "dense":
        return shape[::-1]
    height, width, inputs, outputs = shape
    return outputs, inputs, height, width


def _check(source: str, scheme: Scheme, settings: Mapping[str, Any]) -> None:
    """Raise ValueError where a network of these settings has no counterpart in the source."""
    if settings["depth"] < 50 and not scheme.basic:
        raise ValueError(f"A ResNet-{settings['depth']} has no counterpart in {source}; depths of 50 or more have.")
    if source == "caffe" and not (tuple(settings["bins"]) == (1, 2, 3, 6) and settings["reduce"]):
        raise ValueError(
            "The pyramids of caffe have model.bins=(1, 2, 3, 6) and model.reduce=True; choose another format."
        )


def layer_names(scheme: Scheme, module: tuple[str, ...], settings: Mapping[str, Any]) -> Pair | None:
    """Return the names of the layer at `module` (("backbone", "layer1_block0", "conv2")); None where there is none."""
    part, layer, *inner = module
    if part == "backbone" and layer.startswith("stem"):
        if settings["stem"] == "7x7":
            return scheme.stem_7x7
        return scheme.stem[int(layer[4:]) - 1] if scheme.stem else None
    if part == "backbone":
        stage, block = map(int, layer.removeprefix("layer").split("_block"))
        prefix = scheme.block.format(stage=stage, block=block, caffe_stage=stage + 1, caffe_block=block + 1)
        conv, bn = scheme.downsample if inner[0] == "downsample" else scheme.convs[int(inner[0][4:]) - 1]
        return prefix + conv, prefix + bn
    role = layer.rstrip("0123456789")
    pair = scheme.heads.get("aux" if part == "aux_head" else settings["head"], {}).get(role)
    number = int(layer[len(role) :] or 0)
    if pair is None or (number and "{" not in pair[0]):
        return None
    level = {"level": tuple(settings["bins"]).index, "lateral": (2, 3).index}.get(role, int)(number)
    conv, bn = (name.format(level=level, number=level + 1, bins=number) for name in pair)
    return conv, bn


def _layout(source: str, path: tuple[str, ...]) -> str:
    if path[-2] in _BARE and path[-1] == "kernel":
        return "dense"
    if path[-1] != "kernel":
        return "row" if source == "caffe" and path[-2] == "bn" else "vector"
    if source == "caffe":
        return {"stem1": "conv_bgr", "fuse": "conv_levels"}.get(path[1], "conv")
    return "conv"


def to_variables(source: str, tensors: Tensors, settings: Mapping[str, Any], like: Mapping[str, Any]) -> Tree:
    """Return f32 {"params", "batch_stats"} of the shapes of `like`, made of every one of `tensors`.

    float64 is rounded to the nearest float32, float16 widened: bit for bit the same are float32 tensors alone.

    Raises:
      ValueError: tensors are missing, left over (see `ignored`), of a wrong shape or type, or hold impossible values;
        the sentence names a handful of them.
    """
    table = names(source, settings, like)
    if source == "caffe":  # older files give vectors four axes, most of length 1
        tensors = {name: _reshaped(value, table.get(name)) for name, value in tensors.items()}
    left_out = ignored(source, tensors, table)
    problems = {
        "it lacks": [name for name in table if name not in tensors],
        "it has, and no layer takes,": [name for name in tensors if name not in table and name not in left_out],
        "of another shape are": [
            f"{name} {_text(tensors[name].shape)} instead of {_text(entry.shape)}"
            for name, entry in table.items()
            if name in tensors and tensors[name].shape != entry.shape
        ],
    }
    told = [f"{problem} {_some(found)}" for problem, found in problems.items() if found]
    if told:
        raise ValueError(
            f"This is not a complete network of {source}: {'; '.join(told)}; choose the source that it is of, or a "
            "complete file."
        )
    flat: dict[str, dict[tuple[str, ...], np.ndarray]] = {collection: {} for collection in like}
    for name, entry in table.items():
        value = _checked(name, entry, tensors[name])
        flat[entry.collection][entry.path] = np.ascontiguousarray(LAYOUTS[entry.layout][0](value))
    return {collection: traverse_util.unflatten_dict(leaves) for collection, leaves in flat.items()}


def from_variables(source: str, variables: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return {their name: tensor} of parameters and statistics: what `to_variables` would make them of.

    Raises:
      ValueError: the source is unknown, or has no place for a part of this network.
    """
    flat = {collection: traverse_util.flatten_dict(tree) for collection, tree in variables.items()}
    return {
        name: np.ascontiguousarray(LAYOUTS[entry.layout][1](np.asarray(flat[entry.collection][entry.path])))
        for name, entry in names(source, settings, variables).items()
    }


def ignored(source: str, tensors: Tensors, known: Collection[str]) -> set[str]:
    """Return the names of those tensors that are neither `known` nor of use.

    In torch: counters of batch norm, and the classifier of a classification network. In Caffe: the one convolution to
    class scores that the auxiliary loss was taken on (the released files hold it, their prototxt does not).
    """
    unknown = [name for name in tensors if name not in known]
    if source == "caffe":
        scores = [name for name in unknown if name.endswith("/0") and tensors[name].shape[:1] == _classes(tensors)]
        layer = scores[0].removesuffix("/0") if len(scores) == 1 else None
        return {name for name in unknown if name in (f"{layer}/0", f"{layer}/1")}
    classifier = ("fc.weight", "fc.bias", "pretrained.fc.weight", "pretrained.fc.bias")
    return {name for name in unknown if name.endswith(".num_batches_tracked") or name in classifier}


def _reshaped(value: np.ndarray, entry: Entry | None) -> np.ndarray:
    """Return a tensor in the shape of its entry where only axes of length 1 differ, else as it is."""
    if entry is None or [n for n in value.shape if n != 1] != [n for n in entry.shape if n != 1]:
        return value
    return value.reshape(entry.shape)


def _classes(tensors: Tensors) -> tuple[int, ...]:
    """Return (classes,) of a Caffe network, () where it has no classifier."""
    return tensors["conv6/0"].shape[:1] if "conv6/0" in tensors else ()


def _checked(name: str, entry: Entry, value: np.ndarray) -> np.ndarray:
    """Return a tensor in f32; ValueError where it holds what no trained network does."""
    if value.dtype.kind != "f":
        raise ValueError(f"The tensor {name} holds {value.dtype} instead of floating-point numbers; get the file anew.")
    with np.errstate(over="ignore"):  # told below
        value = value.astype(np.float32)
    if not np.isfinite(value).all():
        raise ValueError(f"The tensor {name} holds values that are not finite in float32; get the file anew.")
    if entry.path[-1] == "var" and (value < 0).any():
        raise ValueError(f"The tensor {name} is a variance and holds values below 0; get the file anew.")
    return value


def _some(found: list[str], most: int = 4) -> str:
    """Return the first few of `found` on one line, whatever letters a hostile file gave its names."""
    listed = ", ".join(ascii(text[:100])[1:-1] for text in found[:most])
    return listed + (f" and {len(found) - most} more" if len(found) > most else "")


def _text(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, shape))})"
