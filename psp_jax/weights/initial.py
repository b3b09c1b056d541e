"""What a training run starts from: random weights, or those of a file in another framework's names."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from psp_jax.weights.architecture import Recognised, recognise
from psp_jax.weights.formats import read_tensors
from psp_jax.weights.schemes import SOURCES
from psp_jax.weights.tables import to_variables

RANDOM = "random"
PARTS = ("backbone", "head", "aux_head")
# What networks of one head must have in common beside its width.
_HEAD_FIELDS = {
    "psp": ("bins", "pool", "reduce", "align_corners"),
    "fcn": ("fcn_convs", "fcn_concat"),
    "enc": ("codewords", "lateral"),
}
ShapesOf = Callable[[Mapping[str, Any], int], Mapping[str, Any]]
Flat = dict[tuple[str, ...], Any]


def check_init(source: str, path: str, sha256: str = "") -> None:
    """Raise ValueError where `config.init` names no weights, or some that no run can start from."""
    known = ", ".join((RANDOM, *(name for name in SOURCES if name != "caffe")))
    if source == "caffe":
        raise ValueError(
            "init.source=caffe cannot start a run, since its networks take images that are normalised otherwise than "
            f"in training; choose one of: {known}."
        )
    if source not in (RANDOM, *SOURCES):
        raise ValueError(f"init.source={source!r} is unknown; choose one of: {known}.")
    if source != RANDOM and not path:
        raise ValueError(
            f"init.source={source} needs the weights: set init.path to a file or URL, or init.source=random."
        )
    if sha256 and not re.fullmatch("[0-9a-fA-F]{8,64}", sha256):
        raise ValueError(f"init.sha256={sha256!r} is not 8 to 64 hexadecimal digits; leave it empty or copy it anew.")


def initialise(
    variables: Mapping[str, Any],
    settings: Mapping[str, Any],
    shapes_of: ShapesOf,
    source: str,
    file: Path,
    mean: Sequence[float],
    std: Sequence[float],
) -> tuple[dict[str, Any], str]:
    """Return {"params", "batch_stats"} with the leaves that a file holds as f32 NumPy arrays, and what was done.

    A backbone initialises the backbone. A segmentation network initialises everything, but classifiers of another
    number of classes and an auxiliary head that the file lacks: these stay as they are.

    Args:
      variables: what the run would start from without the file.
      settings: the fields of `config.model`.
      shapes_of: (settings, number of classes) -> shapes of that network's variables.
      source: whose names the file has.
      file: with the tensors.
      mean, std: what the run normalises images with.

    Raises:
      ValueError: the file is damaged, of a network that the configuration does not describe (the sentence names the
        fields to change), or of one that takes images normalised in another way.
    """
    tensors = read_tensors(file)
    recognised = recognise(source, tensors)
    _check_fits(recognised, settings, source, file.name, mean, std)
    like = shapes_of(dict(settings) | recognised.settings, recognised.num_classes or 1)
    if recognised.parts == "backbone":
        like = {collection: {"backbone": tree["backbone"]} for collection, tree in like.items()}
    given = traverse_util.flatten_dict(to_variables(source, tensors, recognised.settings, like))
    ours = traverse_util.flatten_dict(dict(variables))
    taken = {path for path, value in ours.items() if path in given and given[path].shape == value.shape}
    merged = {path: given[path] if path in taken else value for path, value in ours.items()}
    return traverse_util.unflatten_dict(merged), f"{file.name} ({source}): {_told(ours, taken)}"


def _check_fits(
    recognised: Recognised,
    settings: Mapping[str, Any],
    source: str,
    name: str,
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    """Raise ValueError where a file's network and the configuration's could not share what they have in common."""
    theirs = recognised.settings
    fields = ["depth", "stem", "width"]
    fields += ["stride_in"] if theirs["depth"] >= 50 else []
    if recognised.parts == "all":
        fields += ["first_block_dilation", "head", "head_channels"]
        fields += ["basic_dilation"] if theirs["depth"] < 50 else []
        fields += ["aux_channels"] if theirs["aux_head"] and settings["aux_head"] else []
        fields += _HEAD_FIELDS.get(settings["head"], ()) if theirs["head"] == settings["head"] else ()
    wrong = [f"model.{field}={theirs[field]}" for field in fields if not _equal(theirs[field], settings[field])]
    if wrong:
        raise ValueError(
            f"{name} holds another network than the configuration; set {' and '.join(wrong)} to start from it."
        )
    if not (np.allclose(recognised.mean, mean) and np.allclose(recognised.std, std)):
        raise ValueError(
            f"{name} takes images with the mean {recognised.mean} and the deviation {recognised.std}, training gives "
            f"{tuple(mean)} and {tuple(std)}: no start for training; choose weights of another source than {source}."
        )


def _equal(one: Any, other: Any) -> bool:
    return bool(one == other) if isinstance(one, str | int) else tuple(one) == tuple(other)


def _told(ours: Flat, taken: set[tuple[str, ...]]) -> str:
    """Return "backbone, head; random: head.classifier", by the parts of a network and their layers."""
    initialised, random = [], []
    for part in PARTS:
        paths = {path for path in ours if path[1] == part}
        if paths & taken:
            initialised.append(part)
            random += sorted({f"{part}.{path[2]}" for path in paths - taken})
        elif paths:
            random.append(part)
    return ", ".join(initialised) + (f"; random: {', '.join(random)}" if random else "")
