"""Every field of a configuration with its default, and the checks that turn one into a run.

A configuration file defines `get_config(variant=None)`, starts from `defaults()` and states its differences.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict


def defaults() -> ConfigDict:
    """Return every known field; the values are those of hszhao/semseg's PSPNet-50 where it has them."""
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict(
        {
            "name": "ade20k",  # ade20k, image_folder or context_scenes
            "dir": "data",  # folder of images and masks for image_folder, else where the prepared records are
            "prepared_dir": "data",  # where image_folder's records go
            "classes": "",  # image_folder: a known class table or a classes.json; "" is <dir>/classes.json
            "archive": "",  # ade20k: ADEChallengeData2016.zip; "" downloads it
            "train_split": "train",
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
            "aux_head": True,
            "aux_channels": 256,
            "dropout": 0.1,
            "align_corners": True,
            "dtype": "float32",  # of convolutions; statistics, logits and loss are float32 always
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
            "log_every_steps": 50,
        }
    )
    # Options of the main and auxiliary cross entropy; hard examples are mined for the main one alone.
    config.loss = ConfigDict(
        {
            "class_weights": (),  # one for each class; () is 1 for all
            "label_smoothing": 0.0,
            "ohem_threshold": 0.0,  # pixels of at least this probability do not count; 0 is off, usual is 0.7
            "ohem_min_kept": 0,  # the least probable pixels that count in any case, for each image of the batch
        }
    )
    config.optimizer = ConfigDict(
        {
            "base_lr": 0.01,
            "power": 0.9,
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
            "gallery": 24,  # images in the report
            "save_predictions": False,  # write every label map to eval/predictions
        }
    )
    config.checkpoint = ConfigDict({"every_steps": 1000, "keep_latest": 2, "keep_best": 1})
    config.mesh = ConfigDict({"data": -1, "spatial": 1})
    config.log = ConfigDict({"tensorboard": True, "images": 4})
    return config


# The smallest value of a field. Batch norm takes the variance over the images of a batch: one has none at the 1x1 bin.
_LEAST = {
    "data.num_workers": 0,
    "train.steps": 0,
    "train.epochs": 0,
    "train.batch_size": 2,
    "train.aux_weight": 0,
    "train.se_weight": 0,
    "train.log_every_steps": 1,
    "optimizer.base_lr": 0,
    "optimizer.power": 0,
    "optimizer.momentum": 0,
    "optimizer.weight_decay": 0,
    "optimizer.warmup_steps": 0,
    "eval.every_steps": 0,
    "eval.batch_size": 1,
    "eval.window_batch": 1,
    "eval.gallery": 0,
    "checkpoint.every_steps": 1,
    "checkpoint.keep_latest": 1,
    "checkpoint.keep_best": 0,
    "log.images": 0,
}


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ("train.steps", value) for every field."""
    for name, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def check_fields(config: ConfigDict) -> None:
    """Raise ValueError where `config` has a field that `defaults()` has not, or lacks one."""
    known, given = dict(flatten(defaults())), dict(flatten(config))
    for field in given:
        if field not in known:
            raise ValueError(unknown_field(field))
    for field in known:
        if field not in given:
            raise ValueError(f"The configuration lacks the field {field}; start it from psp_jax.config.defaults().")


def unknown_field(field: str) -> str:
    """Return the sentence that refuses `field` ("train.stpes") and lists the known ones near it."""
    known = [name for name, _ in flatten(defaults())]
    section = field.rpartition(".")[0]
    near = [name for name in known if name.rpartition(".")[0] == section] or known
    return f"Unknown configuration field {field}; known fields: {', '.join(near)}."


def _side_pair(value: tuple[int, ...] | int, field: str) -> tuple[int, int]:
    """Return (height, width) of a size given as one side or as both."""
    sides = (value,) if isinstance(value, int) else tuple(value)
    if len(sides) not in (1, 2) or any(side < 1 for side in sides):
        raise ValueError(f"{field}={value} must be (height, width) or one side, in pixels.")
    return (sides[0], sides[-1])


def check_size(size: tuple[int, int], field: str, model: Mapping[str, Any]) -> None:
    """Raise ValueError where the network's grid does not fit `size` (height, width).

    With align_corners, first and last feature sit on first and last pixel: sizes are k * output_stride + 1. Without,
    features divide the image evenly: k * output_stride. In between, features and pixels would drift apart.
    """
    stride = model["output_stride"]
    offset = 1 if model["align_corners"] else 0
    for side in size:
        if (side - offset) % stride:
            lower = (side - offset) // stride * stride + offset
            raise ValueError(
                f"{field}={size} does not fit model.output_stride={stride} with model.align_corners="
                f"{model['align_corners']}: each side must be k * {stride}{' + 1' if offset else ''}; "
                f"near {side} that is {lower} or {lower + stride}."
            )
    bins = max(model["bins"]) if model["head"] == "psp" else 1
    if (min(size) - offset) // stride + offset < bins:
        raise ValueError(
            f"{field}={size} gives fewer than {bins} feature positions a side, too few for model.bins={model['bins']}; "
            f"choose at least {(bins - offset) * stride + offset} pixels."
        )


def check_values(config: ConfigDict) -> None:
    """Raise ValueError, naming the field and the remedy, where a value makes no run; the model is checked elsewhere."""
    values = dict(flatten(config))
    for field, least in _LEAST.items():
        if values[field] < least:
            raise ValueError(f"{field}={values[field]} must be at least {least}.")
    if config.optimizer.momentum >= 1:
        raise ValueError(f"optimizer.momentum={config.optimizer.momentum} must be below 1.")
    if config.train.se_weight and config.model.head != "enc":
        raise ValueError(
            f"train.se_weight={config.train.se_weight} needs a head that tells the classes present, which model.head="
            f"{config.model.head!r} does not; set model.head=enc, or train.se_weight=0."
        )
    if not config.train.steps and not config.train.epochs:
        raise ValueError("train.steps and train.epochs are both 0; set one of them.")
    if config.eval.checkpoint not in ("latest", "best"):
        raise ValueError(f"eval.checkpoint={config.eval.checkpoint!r} is unknown; choose one of: latest, best.")
    check_size(crop_size(config), "train.crop_size", config.model)
    check_size(eval_size(config), "eval.size", config.model)
    window = eval_window(config)
    if window:
        check_size(window, "eval.window", config.model)


def crop_size(config: ConfigDict) -> tuple[int, int]:
    """(height, width) of the training crops."""
    return _side_pair(config.train.crop_size, "train.crop_size")


def eval_size(config: ConfigDict) -> tuple[int, int]:
    """(height, width) of the canvas that images are evaluated on."""
    return _side_pair(config.eval.size, "eval.size") if config.eval.size else crop_size(config)


def eval_window(config: ConfigDict) -> tuple[int, int] | None:
    """(height, width) of the windows of an evaluation; None leaves it to the protocol."""
    return _side_pair(config.eval.window, "eval.window") if config.eval.window else None


def check_mesh(config: ConfigDict, training: bool, data: int, spatial: int, processes: int) -> None:
    """Raise ValueError where batches or image rows do not divide over a mesh of (data, spatial) devices."""
    if data % processes:
        raise ValueError(
            f"mesh.data={data} does not divide over {processes} processes: mesh.spatial={spatial} would split an image "
            "between them; lower mesh.spatial."
        )
    fields = {}
    if training or config.eval.protocol == "whole":  # the others give each device an image at a time
        fields["eval.batch_size"] = config.eval.batch_size
    if training:
        fields["train.batch_size"] = config.train.batch_size
        rows = crop_size(config)[0]
        if rows % spatial:
            raise ValueError(
                f"train.crop_size has {rows} rows, which mesh.spatial={spatial} does not divide; with "
                "model.align_corners=False sizes are multiples of model.output_stride."
            )
    for field, size in fields.items():
        if size % data:
            raise ValueError(f"{field}={size} does not divide over {data} devices of mesh.data; choose a multiple.")


def total_steps(config: ConfigDict, num_images: int) -> int:
    """Return the number of optimizer steps for a training split of `num_images`."""
    if config.train.steps:
        return config.train.steps
    batches = num_images // config.train.batch_size
    steps = round(config.train.epochs * batches)
    if not steps:
        raise ValueError(
            f"train.epochs={config.train.epochs} makes no step: an epoch of {num_images} images holds "
            f"{batches} whole batches of train.batch_size={config.train.batch_size}; lower train.batch_size, or set "
            "train.steps instead."
        )
    return steps
