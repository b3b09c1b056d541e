"""What network a set of tensors is of: told by their names and shapes, and by what its source's code does."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from psp_jax.config import defaults
from psp_jax.weights.schemes import BACKBONES, Scheme, scheme_of

Tensors = Mapping[str, np.ndarray]

# Residual blocks per stage, as in models/resnet.py, by kind of block.
_BASIC = {(1, 1, 1, 1): 10, (2, 2, 2, 2): 18, (3, 4, 6, 3): 34}
_BOTTLENECK = {(3, 4, 6, 3): 50, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152, (3, 30, 48, 8): 269}

_IMAGENET = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
_CAFFE_MEAN = ((123.68, 116.779, 103.939), (1.0, 1.0, 1.0))

MAX_CHANNELS = 65_536  # no layer of a known network has a tenth
MAX_DIGITS = 3  # of a block's number
MAX_CONVS = 8  # of an FCN head; mmsegmentation's own have one or two

# Layers that tell a head from the others, in the order to look for them: FCN's may begin like others'.
_MARKS = {"psp": "level", "aspp": "branch", "enc": "encoding", "fcn": "conv"}
# Layers that give as many channels as config.model.head_channels says.
_WIDTHS = {"psp": "fuse", "aspp": "fuse", "enc": "conv", "fcn": "conv"}

# What no tensor tells: how the source's code runs its segmentation networks, in fields of config.model. It is
# basic_dilation for basic blocks only: a bottleneck has but one convolution to dilate.
CONVENTIONS: dict[str, dict[str, Any]] = {
    "semseg": {"first_block_dilation": "full", "basic_dilation": "both", "align_corners": True},
    "mmseg": {"first_block_dilation": "contracted", "basic_dilation": "first", "align_corners": False},
    "encoding": {"first_block_dilation": "contracted", "basic_dilation": "both", "align_corners": True},
    "caffe": {"first_block_dilation": "full", "basic_dilation": "both", "align_corners": True},
}

# Beginnings of names that only a source's segmentation networks have.
_WHOLE = {
    "semseg": ("layer0.", "ppm.", "cls."),
    "mmseg": ("backbone.", "decode_head."),
    "encoding": ("pretrained.", "head."),
}
# Beginnings of names that belong to a network which this version cannot build or import.
_UNBUILT = {
    "mmseg": {
        "decode_head.sep_bottleneck.": "DepthwiseSeparableASPPHead",
        "decode_head.0.": "a cascade of heads",
        "neck.": "a neck between backbone and head",
    },
    "encoding": {
        "head.aspp.": "DeepLabV3Head, which fuses by a 1x1 convolution and has another after it",
        "jpu.": "JPU",
    },
    "timm": {"layer1.0.downsample.2.": "ResNet-D, which averages before the shortcut's convolution"},
}


@dataclass(frozen=True)
class Recognised:
    """A network as its tensors describe it.

    Attributes:
      settings: fields of config.model; all of them for a segmentation network, those of the backbone's tensors else.
      num_classes: of a segmentation network; None for a backbone.
      mean, std: RGB statistics on the 0..255 scale that its images are normalised with.
      parts: "all" for a segmentation network, "backbone" for a classification network.
    """

    settings: dict[str, Any]
    num_classes: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    parts: str


def recognise(source: str, tensors: Tensors) -> Recognised:
    """Tell what network `tensors` are of; `tables.to_variables` then checks each of them.

    Raises:
      ValueError: the source is unknown, the tensors are none of its networks', or of one that cannot be built here.
    """
    whole = source not in BACKBONES or any(name.startswith(_WHOLE.get(source, ())) for name in tensors)
    scheme = scheme_of(source, whole)
    for start, what in _UNBUILT.get(source, {}).items():
        if any(name.startswith(start) for name in tensors):
            raise ValueError(
                f"The tensors {start}* are of {what}, which is not imported here yet; choose another network."
            )
    settings = _backbone(source, scheme, tensors)
    mean, std = _CAFFE_MEAN if source == "caffe" else _IMAGENET
    if not whole:
        return Recognised(settings, None, mean, std, "backbone")
    head, num_classes = _heads(source, scheme, tensors)
    settings = defaults().model.to_dict() | CONVENTIONS[source] | settings | head
    if settings["depth"] >= 50:
        settings["basic_dilation"] = defaults().model.basic_dilation
    if source == "caffe" and settings["depth"] == 50:
        settings["stride_in"] = "1x1"  # the released ADE20K network; those of depth 101 stride in the 3x3 convolution
    return Recognised(settings, num_classes, mean, std, "all")


def _kernel(source: str, layer: str) -> str:
    return f"{layer}/0" if source == "caffe" else f"{layer}.weight"


def _outputs(source: str, tensors: Tensors, layer: str) -> int:
    """Return how many channels a convolution gives; ValueError where it is not there."""
    return _length(source, tensors, _kernel(source, layer), 4)


def _length(source: str, tensors: Tensors, name: str, axes: int) -> int:
    """Return the length of the first of a tensor's axes; ValueError where it has another number of them."""
    if name not in tensors:
        raise ValueError(f"This is no network of {source}: it lacks {name}; choose the source that it is of.")
    if tensors[name].ndim != axes:
        raise ValueError(f"{name} has {tensors[name].ndim} axes instead of {axes}; get the file anew.")
    if tensors[name].size == 0 or tensors[name].shape[0] > MAX_CHANNELS:
        raise ValueError(f"{name} has the impossible shape {tensors[name].shape}; get the file anew.")
    return tensors[name].shape[0]


def _blocks(scheme: Scheme, tensors: Tensors) -> tuple[int, ...]:
    """Return the number of residual blocks of each stage: the highest that some tensor's name holds."""
    counts = []
    for stage in range(1, 5):
        start, end = scheme.block.format(stage=stage, caffe_stage=stage + 1, block="\n", caffe_block="\n").split("\n")
        numbers = [name.removeprefix(start).partition(end)[0] for name in tensors if name.startswith(start)]
        numbers = [number for number in numbers if number.isdecimal() and len(number) <= MAX_DIGITS]
        first = 1 if "{caffe_block}" in scheme.block else 0
        counts.append(max((int(number) + 1 - first for number in numbers), default=0))
    return tuple(counts)


def _backbone(source: str, scheme: Scheme, tensors: Tensors) -> dict[str, Any]:
    """Return depth, stem, width and stride_in."""
    counts = _blocks(scheme, tensors)
    last = scheme.convs[2][0]
    start = scheme.block.partition("{")[0]
    bottleneck = any(name.startswith(start) and last in name for name in tensors)
    known = _BOTTLENECK if bottleneck else _BASIC
    if counts not in known:
        kind = "bottleneck" if bottleneck else "basic"
        listed = ", ".join(f"{blocks} is ResNet-{depth}" for blocks, depth in known.items())
        raise ValueError(
            f"This is no ResNet of {source} known here: its stages have {counts} {kind} blocks ({listed}); choose the "
            "source that it is of, or a complete file."
        )
    block = scheme.block.format(stage=1, block=0, caffe_stage=2, caffe_block=1)
    width = _outputs(source, tensors, block + scheme.convs[0][0])
    found = {"depth": known[counts], "width": width, "stride_in": "3x3"}
    if scheme.stem_7x7 and not (scheme.stem and _kernel(source, scheme.stem[0][0]) in tensors):
        _outputs(source, tensors, scheme.stem_7x7[0])
        return found | {"stem": "7x7"}
    first = _outputs(source, tensors, scheme.stem[0][0])
    stems = {width: "64-64-128", width // 2: "32-32-64"}
    if first not in stems:
        raise ValueError(
            f"The stem starts with {first} channels and the first stage with {width}, as in no network known here; "
            "choose another network."
        )
    return found | {"stem": stems[first]}


def _heads(source: str, scheme: Scheme, tensors: Tensors) -> tuple[dict[str, Any], int]:
    """Return what config.model says of the heads, and the number of classes."""

    def has(head: str, role: str) -> bool:
        pair = scheme.heads.get(head, {}).get(role)
        return pair is not None and any(name.startswith(pair[0].partition("{")[0]) for name in tensors)

    head = next((head for head, role in _MARKS.items() if has(head, role)), "fcn" if "fcn" in scheme.heads else "psp")
    layers = scheme.heads[head]
    width = layers[_WIDTHS[head]][0]
    found: dict[str, Any] = {"head": head, "head_channels": _outputs(source, tensors, width.format(level=0))}
    if head == "fcn":
        found |= {"fcn_convs": _convs(source, tensors, layers["conv"][0]), "fcn_concat": has("fcn", "fuse")}
    if head == "enc":
        codewords = _length(source, tensors, f"{layers['encoding'][0]}.codewords", 2)
        found |= {"codewords": codewords, "lateral": has("enc", "lateral")}
    found["aux_head"] = has("aux", "conv") or has("aux", "classifier")
    if found["aux_head"]:
        found["aux_channels"] = _outputs(source, tensors, scheme.heads["aux"]["conv"][0])
    return found, _outputs(source, tensors, layers["classifier"][0])


def _convs(source: str, tensors: Tensors, layer: str) -> int:
    """Return the number of an FCN head's convolutions, at most `MAX_CONVS`: more are left over for the table."""
    if "{" not in layer:
        return 1
    there = [_kernel(source, layer.format(level=level)) in tensors for level in range(MAX_CONVS)]
    return [*there, False].index(False)
