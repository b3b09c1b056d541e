"""Takes training steps of a small network on this process's share of the devices and saves what they gave.

python tests/train_steps.py OUTPUT.npz [{"field": value, ...} [coordinator num_processes process_id]]
"""

import json
import sys

import jax
import numpy as np
from flax import traverse_util

from psp_jax import build, parallel, processes
from psp_jax.config import defaults
from psp_jax.losses import PixelLoss
from psp_jax.models import build_model
from psp_jax.train_step import create_state

BATCH, CLASSES, STEPS = 16, 5, 3


def configuration(fields: dict) -> object:
    """A ResNet-10 of 64-pixel crops with every part of the loss; `fields` ("mesh.spatial") differ."""
    config = defaults()
    config.model.update(depth=10, width=16, stem="32-32-64", head_channels=32, aux_channels=16, align_corners=False)
    config.train.update(crop_size=(64,), batch_size=BATCH, se_weight=0.2, ema_decay=0.9)
    config.loss.update(dice=0.5, lovasz=0.5)
    config.seed = 7
    config.update_from_flattened_dict(fields)
    return config


def batch(step: int, side: int, few: bool) -> dict[str, np.ndarray]:
    """The whole global batch; void pixels are spread unevenly over the images on purpose.

    With `few` every image lacks a class, or has it in its last pixel alone.
    """
    rng = np.random.default_rng(step)
    image = rng.integers(0, 256, (BATCH, side, side, 3)).astype(np.uint8)
    label = rng.integers(0, CLASSES, (BATCH, side, side)).astype(np.uint8)
    for i in range(BATCH):
        label[i, : side * i // BATCH] = 255
        if few:
            label[i][label[i] == i % CLASSES] = 255
            label[i, -1, -1] = i // 4 % CLASSES
    return {"image": image, "label": label}


def main(output: str, fields: str = "{}", *distributed: str) -> None:
    if distributed:
        processes.initialize(distributed[0], int(distributed[1]), int(distributed[2]))
    config = configuration(json.loads(fields))
    mesh = parallel.make_mesh(config.mesh.data, config.mesh.spatial)
    model = build_model(config.model, CLASSES)
    _, optimizer = build.build_optimizer(config, 10)
    loss = PixelLoss(**config.loss)
    step_fn = build.build_step(config, 255, model, optimizer, mesh, loss)
    state = create_state(model, optimizer, 0, mesh, average=True)
    sharding = parallel.batch_axis_sharding(mesh)
    index, count = parallel.share(sharding)
    mine = slice(index * BATCH // count, (index + 1) * BATCH // count)
    record: dict[str, np.ndarray] = {"devices": np.array(jax.device_count())}
    for step in range(STEPS):
        whole = batch(step, config.train.crop_size[0], config.model.head == "enc")
        local = {name: value[mine] for name, value in whole.items()}
        state, metrics = step_fn(state, parallel.to_global(local, sharding))
        record[f"loss{step}"] = np.asarray(metrics["loss"])
        if step == 0:  # later ones multiply the differences of rounding
            everywhere = parallel.placed(state, parallel.replicated(mesh))
            for name in ("batch_stats", "params", "averaged"):
                record |= flat(name, getattr(everywhere, name))
    record["compiles"] = np.array(step_fn._cache_size())
    if processes.is_primary():
        np.savez(output, **record)


def flat(name: str, tree: object) -> dict[str, np.ndarray]:
    return {"/".join((name, *path)): np.asarray(x) for path, x in traverse_util.flatten_dict(tree).items()}


if __name__ == "__main__":
    main(*sys.argv[1:])
