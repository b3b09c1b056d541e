"""Where each source keeps each layer: one `Scheme` a source, as plain data.

Sources: hszhao/semseg (model/resnet.py, model/pspnet.py), hszhao/PSPNet (evaluation/prototxt), torchvision and timm
(models/resnet.py), mmsegmentation (backbones/resnet.py, decode_heads/), PyTorch-Encoding (models/).
"""

from collections.abc import Mapping
from dataclasses import dataclass

Pair = tuple[str, str]  # names of a convolution and of the batch norm after it
Heads = Mapping[str, Mapping[str, Pair]]


@dataclass(frozen=True)
class Scheme:
    """Names of a network's layers in one source, without the names of their tensors.

    Attributes:
      stem: the three convolutions of a deep stem; empty where the source has none.
      stem_7x7: the one convolution of the plain stem; None where the source has none.
      block: prefix of a residual block's layers, from {stage} 1-4 and {block} 0-, or {caffe_stage} 2-5 and
        {caffe_block} 1-.
      convs: the convolutions of a block, two of them in a basic block.
      downsample: the convolution of a block's shortcut.
      heads: of each head that the source has (those of config.model, and aux) the layers by their names here, less the
        number that a name ends with: {level} 0-, {number} 1- and {bins} are made of it. A linear layer or an encoding
        stands where a convolution does; "" is for a part that a layer has not.
      basic: whether the source's networks of basic blocks can be built here.
    """

    stem: tuple[Pair, ...]
    stem_7x7: Pair | None
    block: str
    convs: tuple[Pair, ...]
    downsample: Pair
    heads: Heads
    basic: bool = True


def _torch(prefix: str, stem: tuple[Pair, ...], plain: bool, heads: Heads, basic: bool = True) -> Scheme:
    """Return the scheme of a torch network: all of them name residual blocks alike."""
    return Scheme(
        stem=tuple((prefix + conv, prefix + bn) for conv, bn in stem),
        stem_7x7=(f"{prefix}conv1", f"{prefix}bn1") if plain else None,
        block=prefix + "layer{stage}.{block}.",
        convs=(("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3")),
        downsample=("downsample.0", "downsample.1"),
        heads=heads,
        basic=basic,
    )


def _module(name: str) -> Pair:
    """Return the names within a ConvModule of mmsegmentation."""
    return f"{name}.conv", f"{name}.bn"


_TIMM_STEM = (("conv1.0", "conv1.1"), ("conv1.3", "conv1.4"), ("conv1.6", "bn1"))
_MMSEG_STEM = (("stem.0", "stem.1"), ("stem.3", "stem.4"), ("stem.6", "stem.7"))

# Classification networks, and the files that segmentation frameworks start training from.
BACKBONES = {
    "torchvision": _torch("", (), True, {}),
    "timm": _torch("", _TIMM_STEM, True, {}),
    "semseg": _torch("", (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3")), False, {}),
    "mmseg": _torch("", _MMSEG_STEM, True, {}),
    "encoding": _torch("", _TIMM_STEM, True, {}),
}

# Segmentation networks.
NETWORKS = {
    # semseg itself builds depths 50, 101 and 152 only; the names of basic blocks follow the same rule.
    "semseg": _torch(
        "",
        (("layer0.0", "layer0.1"), ("layer0.3", "layer0.4"), ("layer0.6", "layer0.7")),
        False,
        {
            "psp": {
                "level": ("ppm.features.{level}.1", "ppm.features.{level}.2"),
                "fuse": ("cls.0", "cls.1"),
                "classifier": ("cls.4", ""),
            },
            "aux": {"conv": ("aux.0", "aux.1"), "classifier": ("aux.4", "")},
        },
    ),
    "mmseg": _torch(
        "backbone.",
        _MMSEG_STEM,
        True,
        {
            "psp": {
                "level": _module("decode_head.psp_modules.{level}.1"),
                "fuse": _module("decode_head.bottleneck"),
                "classifier": ("decode_head.conv_seg", ""),
            },
            "aspp": {
                "image": _module("decode_head.image_pool.1"),
                "branch": _module("decode_head.aspp_modules.{level}"),
                "fuse": _module("decode_head.bottleneck"),
                "classifier": ("decode_head.conv_seg", ""),
            },
            "enc": {
                "conv": _module("decode_head.bottleneck"),
                "lateral": _module("decode_head.lateral_convs.{level}"),
                "fuse": _module("decode_head.fusion"),
                "project": _module("decode_head.enc_module.encoding_project"),
                "encoding": ("decode_head.enc_module.encoding.0", ""),
                "encoding_bn": ("", "decode_head.enc_module.encoding.1"),
                "gate": ("decode_head.enc_module.fc.0", ""),
                "se": ("decode_head.se_layer", ""),
                "classifier": ("decode_head.conv_seg", ""),
            },
            "fcn": {
                "conv": _module("decode_head.convs.{level}"),
                "fuse": _module("decode_head.conv_cat"),
                "classifier": ("decode_head.conv_seg", ""),
            },
            "aux": {"conv": _module("auxiliary_head.convs.0"), "classifier": ("auxiliary_head.conv_seg", "")},
        },
    ),
    "encoding": _torch(
        "pretrained.",
        _TIMM_STEM,
        True,
        {
            "psp": {
                "level": ("head.conv5.0.conv{number}.0", "head.conv5.0.conv{number}.1"),
                "fuse": ("head.conv5.1", "head.conv5.2"),
                "classifier": ("head.conv5.5", ""),
            },
            "enc": {
                "conv": ("head.conv5.0", "head.conv5.1"),
                "lateral": ("head.connect.{level}.0", "head.connect.{level}.1"),
                "fuse": ("head.fusion.0", "head.fusion.1"),
                "project": ("head.encmodule.encoding.0", "head.encmodule.encoding.1"),
                "encoding": ("head.encmodule.encoding.3", ""),
                "encoding_bn": ("", "head.encmodule.encoding.4"),
                "gate": ("head.encmodule.fc.0", ""),
                "se": ("head.encmodule.selayer", ""),
                "classifier": ("head.conv6.1", ""),
            },
            "fcn": {"conv": ("head.conv5.0", "head.conv5.1"), "classifier": ("head.conv5.4", "")},
            "aux": {"conv": ("auxlayer.conv5.0", "auxlayer.conv5.1"), "classifier": ("auxlayer.conv5.4", "")},
        },
        basic=False,  # its basic block dilates the second convolution by the stage before
    ),
    "caffe": Scheme(
        stem=tuple((name, f"{name}/bn") for name in ("conv1_1_3x3_s2", "conv1_2_3x3", "conv1_3_3x3")),
        stem_7x7=None,
        block="conv{caffe_stage}_{caffe_block}_",
        convs=(("1x1_reduce", "1x1_reduce/bn"), ("3x3", "3x3/bn"), ("1x1_increase", "1x1_increase/bn")),
        downsample=("1x1_proj", "1x1_proj/bn"),
        heads={
            "psp": {
                "level": ("conv5_3_pool{bins}_conv", "conv5_3_pool{bins}_conv/bn"),
                "fuse": ("conv5_4", "conv5_4/bn"),
                "classifier": ("conv6", ""),
            },
        },
        basic=False,
    ),
}

SOURCES = ("torchvision", "timm", "semseg", "mmseg", "encoding", "caffe")


def scheme_of(source: str, whole: bool) -> Scheme:
    """Return the scheme of a source's segmentation networks, or of its backbones alone.

    Raises:
      ValueError: the source is unknown or has no such network.
    """
    if source not in SOURCES:
        raise ValueError(f"The source {source!r} is unknown; choose one of: {', '.join(SOURCES)}.")
    schemes = NETWORKS if whole else BACKBONES
    if source not in schemes:
        kind = "segmentation networks" if whole else "backbones alone"
        raise ValueError(f"The source {source} has no {kind}; those that have are: {', '.join(schemes)}.")
    return schemes[source]
