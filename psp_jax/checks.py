"""Checks of a configuration's values, and the sizes and steps that follow from them."""

import math
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from psp_jax.config import flatten

# Rows of features that a device must hold where images are spread over several.
LEAST_ROWS = 2
# The smallest value of a field. Batch norm takes the variance over the images of a batch: one has none at the 1x1 bin.
_LEAST = {
    "data.num_workers": 0,
    "train.steps": 0,
    "train.epochs": 0,
    "train.batch_size": 2,
    "train.aux_weight": 0,
    "train.se_weight": 0,
    "train.ema_decay": 0,
    "train.max_skipped": 2,
    "model.bn_group_size": 0,
    "train.log_every_steps": 1,
    "optimizer.base_lr": 0,
    "optimizer.power": 0,
    "optimizer.end_lr": 0,
    "optimizer.momentum": 0,
    "optimizer.head_lr_multiplier": 0,
    "optimizer.weight_decay": 0,
    "optimizer.warmup_steps": 0,
    "eval.every_steps": 0,
    "eval.batch_size": 1,
    "eval.window_batch": 1,
    "eval.gallery": 0,
    "eval.precise_bn_batches": 0,
    "checkpoint.every_steps": 1,
    "checkpoint.keep_latest": 1,
    "checkpoint.keep_best": 0,
    "watchdog.times": 0,
    "watchdog.least_seconds": 1,
    "log.images": 0,
}


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
        if not least <= values[field] < math.inf:
            raise ValueError(f"{field}={values[field]} must be at least {least}, and finite.")
    if config.optimizer.momentum >= 1:
        raise ValueError(f"optimizer.momentum={config.optimizer.momentum} must be below 1.")
    base_lr, end_lr = config.optimizer.base_lr, config.optimizer.end_lr
    if end_lr > base_lr:
        raise ValueError(f"optimizer.end_lr={end_lr} must not be above optimizer.base_lr={base_lr}.")
    if config.train.ema_decay >= 1:
        raise ValueError(f"train.ema_decay={config.train.ema_decay} must be below 1; 0 is off, usual is 0.999.")
    if config.train.se_weight and config.model.head != "enc":
        raise ValueError(
            f"train.se_weight={config.train.se_weight} needs a head that tells the classes present, which model.head="
            f"{config.model.head!r} does not; set model.head=enc, or train.se_weight=0."
        )
    if config.model.bn_group_size == 1:
        raise ValueError(
            "model.bn_group_size=1 leaves no variance where an image is pooled to a value; choose 2 or more."
        )
    bn_groups(config)
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


def bn_groups(config: ConfigDict) -> int:
    """Return how many parts of the batch have statistics of their own."""
    size = config.model.bn_group_size or config.train.batch_size
    if config.train.batch_size % size:
        raise ValueError(
            f"model.bn_group_size={size} does not divide train.batch_size={config.train.batch_size}; choose a factor, "
            "or 0 for statistics of the whole batch."
        )
    return int(config.train.batch_size // size)


def eval_size(config: ConfigDict) -> tuple[int, int]:
    """(height, width) of the canvas that images are evaluated on."""
    return _side_pair(config.eval.size, "eval.size") if config.eval.size else crop_size(config)


def eval_window(config: ConfigDict) -> tuple[int, int] | None:
    """(height, width) of the windows of an evaluation; None leaves it to the protocol."""
    return _side_pair(config.eval.window, "eval.window") if config.eval.window else None


def check_mesh(
    config: ConfigDict, crop: tuple[int, int], training: bool, data: int, spatial: int, processes: int
) -> None:
    """Raise ValueError where batches or rows of `crop` do not divide over a mesh of (data, spatial) devices."""
    devices = data * spatial // processes
    if devices % spatial and spatial % devices:
        raise ValueError(
            f"mesh.spatial={spatial} neither divides the {devices} devices of a process nor is a multiple of them; "
            f"choose a factor or a multiple of {devices}."
        )
    fields = {}
    if training or config.eval.protocol == "whole":  # the others give each device an image at a time
        fields["eval.batch_size"] = config.eval.batch_size
    if training or config.eval.precise_bn_batches:
        fields["train.batch_size"] = config.train.batch_size
    stride = config.model.output_stride
    rows = -(-crop[0] // stride)
    if training and spatial > 1 and -(-rows // spatial) < LEAST_ROWS:
        raise ValueError(
            f"mesh.spatial={spatial} leaves fewer than {LEAST_ROWS} of the {rows} rows of features to a device (crops "
            f"of {crop[0]} rows, model.output_stride={stride}); choose at most {(rows - 1) // (LEAST_ROWS - 1)}."
        )
    if training:
        _check_phases(config.model, (rows, -(-rows // spatial) * spatial, -(-crop[1] // stride)), crop)
    for field, size in fields.items():
        if size % data:
            raise ValueError(f"{field}={size} does not divide over {data} devices of mesh.data; choose a multiple.")


def _check_phases(model: Mapping[str, Any], sides: tuple[int, ...], crop: tuple[int, int]) -> None:
    """Raise ValueError where dilated blocks shall run in phases, and maps of these `sides` do not divide into them."""
    stride, dilation = model["output_stride"], 32 // model["output_stride"]  # the last stage's
    if model["phases"] and any(side % dilation for side in sides):
        less = f" - {stride - 1}" if model["align_corners"] else ""
        raise ValueError(
            f"model.phases=True needs maps whose sides {dilation} divides; crops of {crop[0]} x {crop[1]} make them "
            f"{sides[1]} x {sides[2]}, {sides[0]} rows of them real. Choose crops of k * 32{less} pixels and "
            f"mesh.spatial that divides their rows of features, or model.phases=False."
        )


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
