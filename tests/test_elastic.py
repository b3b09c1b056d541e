"""A run goes on with other devices than it was saved with, bit for bit, and has the losses of an undisturbed one.

What several processes make of it is in test_preemption.py.
"""

import contextlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from train_steps import CLASSES, batch, configuration

from psp_jax import build, parallel
from psp_jax.checkpoint import Checkpoints
from psp_jax.losses import PixelLoss
from psp_jax.models import build_model
from psp_jax.train_step import TrainState, create_state

# With the usual rate one ReLU that rounding switches in the first step moves the later losses by a thousandth.
CONFIG = configuration(
    {
        "optimizer.base_lr": 1e-4,
        "train.crop_size": [32],
        "train.se_weight": 0.0,
        "model.head": "fcn",
        "model.aux_head": False,
        "loss.lovasz": 0.0,
    }
)


class Devices:
    """The training step on the first `count` of this process's devices."""

    def __init__(self, count: int) -> None:
        self.mesh = parallel.make_mesh(devices=jax.devices()[:count])
        model, (_, optimizer) = build_model(CONFIG.model, CLASSES), build.build_optimizer(CONFIG, 10)
        self.step = build.build_step(CONFIG, 255, model, optimizer, self.mesh, PixelLoss(**CONFIG.loss))
        self.first = create_state(model, optimizer, 0, self.mesh, average=True)

    def take(self, state: TrainState) -> tuple[TrainState, float]:
        sharding = parallel.batch_axis_sharding(self.mesh)
        data = parallel.to_global(batch(int(state.step), CONFIG.train.crop_size[0], False), sharding)
        state, metrics = self.step(state, data)
        return state, float(metrics["loss"])


def test_eight_devices_then_two_then_four(tmp_path: Path) -> None:
    def save(state: TrainState) -> list[np.ndarray]:
        with contextlib.closing(Checkpoints(tmp_path, keep_latest=3)) as checkpoints:
            checkpoints.save(int(state.step), state, None)
        return [np.asarray(x) for x in jax.tree.leaves(state)]

    eight = Devices(8)
    state, losses = eight.first, []
    for _ in range(3):
        state, loss = eight.take(state)
        losses.append(loss)
        if len(losses) == 1:
            saved = save(state)
    for devices, former in ((Devices(2), 1), (Devices(4), 2)):
        with contextlib.closing(Checkpoints(tmp_path, keep_latest=3)) as checkpoints:
            state = checkpoints.restore(former, devices.first)
        for ours, theirs in zip(jax.tree.leaves(state), saved, strict=True):
            np.testing.assert_array_equal(np.asarray(ours), theirs)
        shardings = jax.tree.map(lambda x: x.sharding, (state, devices.first))
        assert shardings[0] == shardings[1] and spread_over(state.opt_state) == len(devices.mesh.devices)
        state, loss = devices.take(state)
        assert loss == pytest.approx(losses[former], rel=1e-5)
        saved = save(state)


def spread_over(tree: Any) -> int:
    """Over how many devices the array of a tree that is divided most is spread."""
    return max(x.size // x.addressable_shards[0].data.size for x in jax.tree.leaves(tree))
