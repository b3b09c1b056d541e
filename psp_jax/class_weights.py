"""The class weights of a run: those that it began with, or new ones from the pixels of its training split."""

import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from psp_jax import processes
from psp_jax.data.frequencies import count_pixels, inverse_log_frequency
from psp_jax.data.source import Source
from psp_jax.losses import PixelLoss
from psp_jax.progress import track
from psp_jax.workdir import changed_fields, read_json


def complete(
    loss: PixelLoss, config: Mapping[str, Any], source: Source, directory: Path, start: int, steps: int
) -> PixelLoss:
    """Return `loss` with the class weights that its class_weighting asks for.

    A run that goes on keeps those of its config.json, whatever became of the labels since; one that begins, or goes on
    with other data or another weighting, reads every label of `source`, unless it has no step left to take.

    Args:
      loss: as the configuration describes it.
      config: the configuration as plain values.
      source: the images to train on.
      directory: the run's workdir.
      start, steps: steps taken, and steps to take in all.

    Raises:
      ValueError: a label cannot be read, or the processes of the run count differently.
    """
    if loss.class_weighting == "none":
        return loss
    weights = recorded(directory, config, len(source)) if start else ()
    if not weights and start < steps:
        weights = inverse_log_frequency(_count(source))
    return replace(loss, class_weights=weights, class_weighting="none")


def recorded(directory: Path, config: Mapping[str, Any], images: int) -> tuple[float, ...]:
    """Return the weights in config.json, () where they are of other data or of another weighting."""
    former = read_json(directory / "config.json")
    fields = changed_fields(former["config"], config)
    if former["resolved"]["train_images"] != images or any(
        field.startswith(("data.", "loss.class_weighting")) for field in fields
    ):
        return ()
    return tuple(former["resolved"]["class_weights"])


def _count(source: Source) -> np.ndarray:
    with track(len(source), "class frequencies", primary=processes.is_primary()) as advance:
        pixels = count_pixels(source, advance)
    if not processes.agree(zlib.crc32(pixels.tobytes()) >> 1):
        raise ValueError(f"{source.directory} differs between the processes of this run; prepare it alike for all.")
    return pixels
