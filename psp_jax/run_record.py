"""What config.json and the first lines on the console tell of a training run."""

from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from psp_jax import checks
from psp_jax.config import plain
from psp_jax.data.findings import first_look
from psp_jax.data.source import Source
from psp_jax.losses import PixelLoss
from psp_jax.train_step import IMAGENET_MEAN, IMAGENET_STD, TrainState
from psp_jax.workdir import ModelCard, environment, versions


def record(config: ConfigDict, card: ModelCard, steps: int, images: int, loss: PixelLoss) -> dict[str, Any]:
    """Return what config.json tells."""
    return {
        "config": plain(config),
        "resolved": {
            "steps": steps,
            "train_images": images,
            "batch_size": config.train.batch_size,
            "epochs": steps * config.train.batch_size / images,
            "backbone_lr": config.optimizer.base_lr,
            "head_lr": config.optimizer.base_lr * config.optimizer.head_lr_multiplier,
            "class_weights": loss.class_weights,
            "devices": jax.device_count(),
            "device_kind": jax.devices()[0].device_kind,
            "processes": jax.process_count(),
        },
        "classes_digest": card.classes.digest(),
        "versions": versions(),
        "environment": environment(),
    }


def _state_of(start: int, steps: int, owed: bool) -> str:
    if owed:
        return f"going on with the validation after step {start}, which SIGTERM broke off,"
    if start >= steps:
        return f"finished already at step {start}: validate with --mode=evaluate, or add steps with --resume=override"
    return f"going on after step {start}" if start else "starting"


def opening(
    config: ConfigDict,
    mesh: Mesh,
    directory: Path,
    span: tuple[int, int],
    owed: bool,
    source: Source,
    state: TrainState,
    origin: str,
) -> str:
    """Return what the console tells first: the network, the steps of `span` (taken, all), what is done in `directory`.

    A run that begins also tells where labels look as if their values were shifted.

    Args:
      config: checked and complete.
      mesh: the devices.
      directory: the workdir.
      span: steps taken, steps of the whole run.
      owed: whether a validation was broken off.
      source: the training split.
      state: the first one.
      origin: where its weights come from.
    """
    (start, steps), images = span, len(source)
    doubt = "" if start else first_look(source)
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    model = config.model
    return (
        f"{model.head.upper()} head on ResNet-{model.depth}, output stride {model.output_stride}: "
        f"{parameters / 1e6:.1f} M parameters, {model.dtype}\n"
        f"{steps} steps of {config.train.batch_size} crops {checks.crop_size(config)} from {images} images "
        f"({steps * config.train.batch_size / images:.1f} epochs) on {mesh.size} x {jax.devices()[0].device_kind}\n"
        f"{_state_of(start, steps, owed)} in {directory}{origin}" + (f"\nwarning: {doubt}" if doubt else "")
    )


def card(config: ConfigDict, source: Source) -> ModelCard:
    """Return what turns the parameters of a run into a model."""
    return ModelCard(
        model=config.model.to_dict(),
        classes=source.classes,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        size=checks.eval_size(config),
        window=checks.crop_size(config),
        base_size=config.eval.base_size[0] if len(config.eval.base_size) == 1 else 512,
    )
