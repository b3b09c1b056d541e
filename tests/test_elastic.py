"""A run goes on with other devices than it was saved with, bit for bit, and has the losses of an undisturbed one.

What several processes make of it is in test_preemption.py and test_processes.py.
"""

import contextlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import Run
from jax.sharding import Mesh
from test_preemption import interrupted, lines
from train_steps import CLASSES, batch, configuration

from psp_jax import build, parallel
from psp_jax.checkpoint import Checkpoints
from psp_jax.losses import PixelLoss
from psp_jax.models import build_model
from psp_jax.train_step import StepFunction, TrainState, create_state

# With the usual rate one ReLU that rounding switches in the first step moves the later losses by a thousandth.
CONFIG = configuration(
    {
        "optimizer.base_lr": 1e-4,
        "train.crop_size": [32],
        "train.se_weight": 0.0,
        "model.width": 8,
        "model.head": "fcn",
        "model.aux_head": False,
        "loss.dice": 0.0,
        "loss.lovasz": 0.0,
    }
)


MODEL, (_, OPTIMIZER) = build_model(CONFIG.model, CLASSES), build.build_optimizer(CONFIG, 10)


def step_on(count: int) -> tuple[Mesh, StepFunction]:
    """The training step on the first `count` of this process's devices."""
    mesh = parallel.make_mesh(devices=jax.devices()[:count])
    return mesh, build.build_step(CONFIG, 255, MODEL, OPTIMIZER, mesh, PixelLoss(**CONFIG.loss))


def take(step_fn: StepFunction, mesh: Mesh, state: TrainState) -> tuple[TrainState, float]:
    data = batch(int(state.step), CONFIG.train.crop_size[0], False)
    state, metrics = step_fn(state, parallel.to_global(data, parallel.batch_axis_sharding(mesh)))
    return state, float(metrics["loss"])


def saved(directory: Path, state: TrainState) -> list[np.ndarray]:
    with contextlib.closing(Checkpoints(directory, keep_latest=3)) as checkpoints:
        checkpoints.save(int(state.step), state, None)
    return [np.asarray(x) for x in jax.tree.leaves(state)]


def spread_over(tree: Any) -> int:
    """Over how many devices the array of a tree that is divided most is spread."""
    return max(x.size // x.addressable_shards[0].data.size for x in jax.tree.leaves(tree))


@pytest.mark.slow
def test_eight_devices_then_two_then_eight(tmp_path: Path) -> None:
    eight, two = step_on(8), step_on(2)
    state, losses = create_state(MODEL, OPTIMIZER, 0, eight[0], average=True), []
    for _ in range(3):
        state, loss = take(eight[1], eight[0], state)
        losses.append(loss)
        if len(losses) == 1:
            former = saved(tmp_path, state)
    for mesh, step_fn in (two, eight):
        like, _ = build.abstract_arguments(CONFIG, MODEL, OPTIMIZER, mesh)
        with contextlib.closing(Checkpoints(tmp_path, keep_latest=3)) as checkpoints:
            state = checkpoints.restore(checkpoints.latest_step(), like)
        for ours, theirs in zip(jax.tree.leaves(state), former, strict=True):
            np.testing.assert_array_equal(np.asarray(ours), theirs)
        assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, like)
        assert spread_over(state.opt_state) == mesh.size
        state, loss = take(step_fn, mesh, state)
        assert loss == pytest.approx(losses[int(state.step) - 1], rel=1e-5)
        former = saved(tmp_path, state)


@pytest.mark.slow
def test_the_command_on_eight_devices_then_four_then_sixteen(finished_run: Run, tmp_path: Path) -> None:
    """SIGTERM ends each start two steps later; that the images are the same ones shows in the losses."""
    flags = ("--config.model.head=fcn", "--config.model.aux_head=False", "--config.optimizer.base_lr=1e-4")
    flags += ("--config.train.batch_size=16", "--config.eval.batch_size=16", "--config.train.log_every_steps=1")
    flags += ("--config.data.num_workers=0",)
    interrupted(finished_run, tmp_path / "stayed", "Recorder.push:6", *flags, devices=8)
    outputs = [
        interrupted(finished_run, tmp_path / "moved", "Recorder.push:2", *flags, devices=count) for count in (8, 4, 16)
    ]
    for output, words in zip(
        outputs,
        ("on 8 x cpu\nstarting", "on 4 x cpu\ngoing on after step 2", "on 16 x cpu\ngoing on after step 4"),
        strict=True,
    ):
        assert words in output
    stayed, moved = (lines(tmp_path / name, "metrics.jsonl") for name in ("stayed", "moved"))
    assert [line["step"] for line in moved] == [line["step"] for line in stayed] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in moved] == pytest.approx([line["loss"] for line in stayed], rel=1e-5)
