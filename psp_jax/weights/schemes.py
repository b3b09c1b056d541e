"""Where each source keeps each layer: one `Scheme` a source, as plain data.

Sources: hszhao/semseg (model/resnet.py, model/pspnet.py), hszhao/PSPNet (evaluation/prototxt), torchvision and timm
(models/resnet.py), mmsegmentation (backbones/resnet.py, decode_heads/), PyTorch-Encoding (models/).
"""

from collections.abc import Mapping
from dataclasses import dataclass

Pair = tuple[str, str]  # names of a convolution and of the batch norm after it


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
      heads: layers outside the backbone, by role: level (from {level} 0-, {number} 1- or {bins}), fuse and
        psp_classifier of a PSP head, fcn and fcn_classifier of an FCN head, aux and aux_classifier. A classifier has no
        batch norm.
      basic: whether the source's networks of basic blocks can be built here.
    """

    stem: tuple[Pair, ...]
    stem_7x7: Pair | None
    block: str
    convs: tuple[Pair, ...]
    downsample: Pair
    heads: Mapping[str, Pair]
    basic: bool = True


def _torch(prefix: str, stem: tuple[Pair, ...], plain: bool, heads: Mapping[str, Pair], basic: bool = True) -> Scheme:
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
            "level": ("ppm.features.{level}.1", "ppm.features.{level}.2"),
            "fuse": ("cls.0", "cls.1"),
            "psp_classifier": ("cls.4", ""),
            "aux": ("aux.0", "aux.1"),
            "aux_classifier": ("aux.4", ""),
        },
    ),
    "mmseg": _torch(
        "backbone.",
        _MMSEG_STEM,
        True,
        {
            "level": ("decode_head.psp_modules.{level}.1.conv", "decode_head.psp_modules.{level}.1.bn"),
            "fuse": ("decode_head.bottleneck.conv", "decode_head.bottleneck.bn"),
            "psp_classifier": ("decode_head.conv_seg", ""),
            "fcn": ("decode_head.convs.0.conv", "decode_head.convs.0.bn"),
            "fcn_classifier": ("decode_head.conv_seg", ""),
            "aux": ("auxiliary_head.convs.0.conv", "auxiliary_head.convs.0.bn"),
            "aux_classifier": ("auxiliary_head.conv_seg", ""),
        },
    ),
    "encoding": _torch(
        "pretrained.",
        _TIMM_STEM,
        True,
        {
            "level": ("head.conv5.0.conv{number}.0", "head.conv5.0.conv{number}.1"),
            "fuse": ("head.conv5.1", "head.conv5.2"),
            "psp_classifier": ("head.conv5.5", ""),
            "fcn": ("head.conv5.0", "head.conv5.1"),
            "fcn_classifier": ("head.conv5.4", ""),
            "aux": ("auxlayer.conv5.0", "auxlayer.conv5.1"),
            "aux_classifier": ("auxlayer.conv5.4", ""),
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
            "level": ("conv5_3_pool{bins}_conv", "conv5_3_pool{bins}_conv/bn"),
            "fuse": ("conv5_4", "conv5_4/bn"),
            "psp_classifier": ("conv6", ""),
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
