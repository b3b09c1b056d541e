"""What a skipped step began with: enough to take it again, on any devices."""

import contextlib
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from psp_jax import checks, processes
from psp_jax.checkpoint import Checkpoints
from psp_jax.data.pipeline import train_batches
from psp_jax.data.source import Source
from psp_jax.data.transforms import AugmentSettings
from psp_jax.train_step import TrainState
from psp_jax.workdir import CHECKPOINTS, write_json

BATCH, STEP = "batch.npz", "step.json"


class TrainingDiverged(FloatingPointError):
    """Loss or gradient is no longer finite."""


def write_bundle(
    workdir: Path, config: ConfigDict, source: Source, done: int, state: TrainState, images: list[str]
) -> Path:
    """Write the folder not_finite/STEP of a workdir, on all processes, and return it.

    It holds the run's config.json and model.json, step.json (the step, counted from 1, and the ids of its images),
    batch.npz (the images and labels of all processes, made anew: a batch is a function of seed and step), and the
    checkpoint of what the step began with.

    Args:
      workdir: of the run.
      config: checked and complete.
      source: of the training split.
      done: the step, which changed nothing.
      state: after it, and so before it but for its number.
      images: ids of its batch.
    """
    folder = workdir / "not_finite" / str(done)
    if processes.is_primary():
        shutil.rmtree(folder, ignore_errors=True)  # of the same step, before the run was started again
        folder.mkdir(parents=True)
        for name in ("config.json", "model.json"):
            shutil.copy(workdir / name, folder)
        write_json(folder / STEP, {"step": done, "images": images})
        batches = train_batches(
            source,
            crop_size=checks.crop_size(config),
            batch_size=config.train.batch_size,
            seed=config.seed,
            start_step=done - 1,
            num_steps=1,
            augment=AugmentSettings(**config.augment),
        )
        with contextlib.closing(batches):
            batch = next(batches)
        np.savez(folder / BATCH, image=batch["image"], label=batch["label"])
    with contextlib.closing(Checkpoints(folder / CHECKPOINTS, keep_latest=1)) as checkpoints:
        checkpoints.save(done - 1, replace(state, step=state.step - 1), None)
    return folder
