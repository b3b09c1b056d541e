"""Every field of a configuration with its default; `checks` tells which values make a run.

A configuration file defines `get_config(variant=None)`, starts from `defaults()` and states its differences.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

# ImageNet's weights for PSPNet's stem, by depth: GluonCV's v1s networks in timm's conversion. Each name ends in the
# first digits of the file's SHA-256, which is checked.
IMAGENET_V1S = {
    depth: "https://github.com/rwightman/pytorch-pretrained-gluonresnet/releases/download/v0.1/" + name
    for depth, name in (
        (50, "gluon_resnet50_v1s-1762acc0.pth"),
        (101, "gluon_resnet101_v1s-60fe0cc1.pth"),
        (152, "gluon_resnet152_v1s-dcc41b81.pth"),
    )
}


def defaults() -> ConfigDict:
    """Return every known field; the values are those of hszhao/semseg's PSPNet-50 where it has them."""
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict(
        {
            "name": "ade20k",  # ade20k, cityscapes, context_scenes, image_folder, pascal_context or voc2012
            "dir": "data",  # folder of images and masks for image_folder, else where the prepared records are
            "prepared_dir": "data",  # where image_folder's records go
            "classes": "",  # image_folder: a known class table or a classes.json; "" is <dir>/classes.json
            "archive": "",  # ade20k: its zip; others: folder of the official archives; "" is <dir>/downloads
            "train_split": "train",  # or several: train+train_extra
            "eval_split": "validation",
            "num_workers": 2,  # decoding processes of each host; 0 decodes in threads
        }
    )
    config.augment = ConfigDict(
        {
            "scale_min": 0.5,
            "scale_max": 2.0,
            "rotate_degrees": 10.0,
            "rotate_probability": 0.5,
            "blur_probability": 0.5,
            "flip_probability": 0.5,
            "base_size": (),  # resized to before the scale: (long side,), or (long, short) limits; () is as it is
            "max_class_share": 1.0,  # a crop of which one class has more is drawn anew, at most ten times; 1 is off
            "photometric": False,  # random brightness, contrast, saturation and hue, as in mmsegmentation
        }
    )
    config.model = ConfigDict(
        {
            "depth": 50,
            "stem": "64-64-128",
            "width": 64,
            "output_stride": 8,
            "first_block_dilation": "full",
            "basic_dilation": "both",  # of the convolutions of a basic block; first in mmsegmentation
            "stride_in": "3x3",  # of a bottleneck; 1x1 in the paper's Caffe network on ADE20K
            "head": "psp",  # psp, fcn, aspp (DeepLabV3) or enc (EncNet)
            "head_channels": 512,
            "bins": (1, 2, 3, 6),
            "pool": "average",
            "reduce": True,
            "codewords": 32,  # enc: entries of the dictionary
            "lateral": False,  # enc: whether the second and third stage join the last
            "fcn_convs": 1,  # fcn: 3x3 convolutions; 2 in mmsegmentation's FCN
            "fcn_concat": False,  # fcn: whether one more takes their input too, as in mmsegmentation's FCN
            "aux_head": True,
            "aux_channels": 256,
            "dropout": 0.1,
            "bn_group_size": 0,  # images whose statistics batch norm takes together; 0 is the whole batch
            "align_corners": True,
            "dtype": "float32",  # of convolutions; statistics, logits and loss are float32 always
            # When training: native, rows (see models/row_convolution.py), or what is faster on these devices, also by
            # pairs of columns; no rows where those of mesh.spatial share several images, which would be gathered.
            "convolutions": "auto",
            "phases": False,  # dilated blocks as plain ones on the phases of their map: the same function
            "remat": False,
        }
    )
    config.init = ConfigDict(
        {
            "source": "random",  # at the first start only; or whose weights: torchvision, timm, semseg, mmseg, encoding
            "path": "",  # their file, or its URL
            "sha256": "",  # of the file, or its first digits; "" takes those that end the name in a URL
        }
    )
    config.train = ConfigDict(
        {
            "steps": 0,  # optimizer steps; where 0, `epochs` counts
            "epochs": 0.0,  # of num_images // batch_size steps each
            "batch_size": 16,  # images of the whole mesh, whatever its size
            "crop_size": (473, 473),  # (height, width), or (side,)
            "aux_weight": 0.4,
            "se_weight": 0.0,  # of the loss on the classes present, with model.head=enc; 0.2 in the reference
            "ema_decay": 0.0,  # share of a running mean of the parameters kept a step; 0 is off, usual is 0.999
            "max_skipped": 10,  # in a row that end a run: steps not finite or with invalid labels; they change nothing
            "log_every_steps": 50,
        }
    )
    # Of the main and the auxiliary loss; hard examples are mined for the main one alone.
    config.loss = ConfigDict(
        {
            "cross_entropy": 1.0,  # weight of each part
            "dice": 0.0,
            "lovasz": 0.0,
            # Options of the cross entropy.
            "class_weights": (),  # one for each class; () is 1 for all
            "class_weighting": "none",  # or inverse_log_frequency: weights from the pixels of the training split
            "label_smoothing": 0.0,
            "ohem_threshold": 0.0,  # pixels of at least this probability do not count; 0 is off, usual is 0.7
            "ohem_min_kept": 0,  # the least probable pixels that count in any case, for each image of the batch
        }
    )
    config.optimizer = ConfigDict(
        {
            "base_lr": 0.01,
            "power": 0.9,
            "end_lr": 0.0,  # the schedule never falls below; 1e-4 in mmsegmentation
            "momentum": 0.9,
            "weight_decay": 1e-4,
            "decay_bn_and_bias": True,
            "head_lr_multiplier": 10.0,
            "warmup_steps": 0,
        }
    )
    config.eval = ConfigDict(
        {
            "every_steps": 0,  # 0 validates at the end only
            "batch_size": 16,  # images of the whole mesh
            "size": (),  # (height, width) that each image is fitted into; () is the crop size
            # What follows is for --mode=evaluate; validations while training resize each image once (whole).
            "checkpoint": "latest",  # latest or best
            "protocol": "semseg",  # semseg, mmseg or whole
            "scales": "single",  # single, or multi: 0.5 0.75 1 1.25 1.5 1.75
            "base_size": (),  # semseg: (long side,), () is 512; mmseg: (long, short) limits, () is 2048, 512
            "window": (),  # (height, width) of a sliding window; () is the crop size (semseg), the whole image (mmseg)
            "stride": (),  # of the windows; () is two thirds of the window
            "window_batch": 4,  # windows that a device scores at a time
            "precise_bn_batches": 0,  # training batches to take batch-norm statistics from; 0 keeps the running ones
            "gallery": 24,  # images in the report
            "save_predictions": False,  # write every label map to eval/predictions
        }
    )
    config.checkpoint = ConfigDict({"every_steps": 1000, "keep_latest": 2, "keep_best": 1})
    config.mesh = ConfigDict(
        {
            "data": -1,  # devices that share the batch out; -1 is what `spatial` leaves
            "spatial": 1,  # devices that share the rows of each image out
            "devices": 0,  # how many there must be in all; 0 takes what is there
        }
    )
    # A process whose run stands still ends with code 69: no step for `times` times the usual one and `least_seconds`.
    config.watchdog = ConfigDict({"times": 20, "least_seconds": 300})  # times=0 is off
    config.log = ConfigDict({"tensorboard": True, "images": 4})
    return config


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ("train.steps", value) for every field."""
    for name, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def plain(config: ConfigDict) -> dict[str, Any]:
    """Return a configuration as values of JSON's types."""
    return dict(json.loads(config.to_json()))


def check_fields(config: ConfigDict) -> None:
    """Raise ValueError where `config` has a field that `defaults()` has not, lacks one, or a list is not of numbers."""
    known, given = dict(flatten(defaults())), dict(flatten(config))
    for field in given:
        if field not in known:
            raise ValueError(unknown_field(field))
    for field in known:
        if field not in given:
            raise ValueError(f"The configuration lacks the field {field}; start it from psp_jax.config.defaults().")
        value, kinds = given[field], int | float if field == "loss.class_weights" else int
        numbers = value if isinstance(value, tuple | list) else (value,)
        if isinstance(known[field], tuple) and not all(isinstance(number, kinds) for number in numbers):
            raise ValueError(f"{field}={str(value)[:200]} must hold {'whole ' if kinds is int else ''}numbers alone.")


def unknown_field(field: str) -> str:
    """Return the sentence that refuses `field` ("train.stpes") and lists the known ones near it, or the sections."""
    known = [name for name, _ in flatten(defaults())]
    section = field if any(name.startswith(f"{field}.") for name in known) else field.rpartition(".")[0]
    near = [name for name in known if section and name.startswith(f"{section}.")]
    near = near or list(
        dict.fromkeys(f"{top}.*" if rest else top for top, _, rest in (n.partition(".") for n in known))
    )
    return f"Unknown configuration field {' '.join(field[:200].split())}; known fields: {', '.join(near)}."


def unknown_override(arguments: Iterable[str]) -> str | None:
    """Return the sentence that refuses the first of the flags --config.FIELD=VALUE whose field is unknown."""
    given = [a.partition("=")[0].lstrip("-").removeprefix("config.") for a in arguments if a.startswith("--config.")]
    known = {name for name, _ in flatten(defaults())}
    return next((unknown_field(field) for field in given if field not in known), None)
