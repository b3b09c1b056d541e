"""Takes two training steps of a small network on this process's share of the devices and saves what they gave.

python tests/train_steps.py OUTPUT.npz [spatial [head [coordinator num_processes process_id]]]
"""

import sys

import jax
import numpy as np
from flax import traverse_util

from psp_jax import parallel, processes
from psp_jax.config import defaults
from psp_jax.losses import PixelLoss
from psp_jax.models import build_model
from psp_jax.optimizer import poly_schedule, sgd
from psp_jax.train_step import create_state, make_train_step

BATCH, SIDE, CLASSES = 16, 64, 5


def batch(step: int, few: bool) -> dict[str, np.ndarray]:
    """The whole global batch; void pixels are spread unevenly over the images on purpose.

    With `few` every image lacks a class, or has it in its last pixel alone.
    """
    rng = np.random.default_rng(step)
    image = rng.integers(0, 256, (BATCH, SIDE, SIDE, 3)).astype(np.uint8)
    label = rng.integers(0, CLASSES, (BATCH, SIDE, SIDE)).astype(np.uint8)
    for i in range(BATCH):
        label[i, : SIDE * i // BATCH] = 255
        if few:
            label[i][label[i] == i % CLASSES] = 255
            label[i, -1, -1] = i // 4 % CLASSES
    return {"image": image, "label": label}


def main(output: str, spatial: str = "1", head: str = "psp", *distributed: str) -> None:
    if distributed:
        processes.initialize(distributed[0], int(distributed[1]), int(distributed[2]))
    mesh = parallel.make_mesh(-1, int(spatial))
    settings = defaults().model
    settings.update(depth=10, width=16, stem="32-32-64", head_channels=32, aux_channels=16, align_corners=False)
    settings.update(head=head, lateral=head == "enc")
    model = build_model(settings, CLASSES)
    options = {"momentum": 0.9, "weight_decay": 1e-4, "decay_bn_and_bias": True, "head_lr_multiplier": 10.0}
    optimizer = sgd(poly_schedule(0.01, 0.9, 10), **options)
    step_fn = jax.jit(
        make_train_step(
            model,
            optimizer,
            mean=(120.0, 120.0, 120.0),
            std=(60.0, 60.0, 60.0),
            aux_weight=0.4,
            se_weight=0.2,
            pixel_loss=PixelLoss(dice=0.5, lovasz=0.5),
            ema_decay=0.9,
            align_corners=False,
            ignore_label=255,
            dropout_seed=7,
            constrain=parallel.constrain_maps(mesh),
        ),
        donate_argnums=0,
    )
    state = create_state(model, optimizer, 0, parallel.replicated(mesh), average=True)
    rows = BATCH // jax.process_count()
    mine = slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)
    record: dict[str, np.ndarray] = {"devices": np.array(jax.device_count())}
    for step in range(2):
        local = {name: value[mine] for name, value in batch(step, head == "enc").items()}
        state, metrics = step_fn(state, parallel.to_global(local, parallel.batch_sharding(mesh)))
        record[f"loss{step}"] = np.asarray(metrics["loss"])
        if step == 0:  # later ones multiply the differences of rounding
            for name in ("batch_stats", "params", "averaged"):
                record |= flat(name, getattr(state, name))
    record["compiles"] = np.array(step_fn._cache_size())
    if processes.is_primary():
        np.savez(output, **record)


def flat(name: str, tree: object) -> dict[str, np.ndarray]:
    return {"/".join((name, *path)): np.asarray(x) for path, x in traverse_util.flatten_dict(tree).items()}


if __name__ == "__main__":
    main(*sys.argv[1:])
