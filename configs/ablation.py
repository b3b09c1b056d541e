"""Is context worth points? The paper's Tables 1 and 2 and four networks, small, on generated scenes that need context.

    python -m psp_jax.ablate --config configs/ablation.py --workdir runs/ablation

trains every variant of `VARIANTS` with several seeds and writes tables, a plot and a page. Each variant is a run by
itself too: `python -m psp_jax.main --config configs/ablation.py:fcn --workdir runs/fcn`. A file of your own with the
same names (`get_config`, `TABLES`, and if you like `GROUPS`, `PUBLISHED`, `PUBLISHED_FOR`) compares other networks on
other data.
"""

from typing import Any

from ml_collections import ConfigDict

from psp_jax.config import defaults
from psp_jax.data.scenes import FAILURE_CASES

# How each variant differs from PSPNet. B1 pools the whole map, B1236 also its halves, thirds and sixths.
VARIANTS: dict[str, dict[str, Any]] = {
    "fcn": {"model.head": "fcn"},
    "psp": {},
    "deeplabv3": {"model.head": "aspp"},
    "encnet": {"model.head": "enc", "train.se_weight": 0.2},
    "b1_max": {"model.bins": (1,), "model.pool": "max", "model.reduce": False},
    "b1_average": {"model.bins": (1,), "model.reduce": False},
    "b1236_max": {"model.pool": "max", "model.reduce": False},
    "b1236_average": {"model.reduce": False},
    "b1236_max_reduced": {"model.pool": "max"},
    "fcn_aux00": {"model.head": "fcn", "model.aux_head": False, "train.aux_weight": 0.0},
    "fcn_aux03": {"model.head": "fcn", "train.aux_weight": 0.3},
    "fcn_aux06": {"model.head": "fcn", "train.aux_weight": 0.6},
    "fcn_aux09": {"model.head": "fcn", "train.aux_weight": 0.9},
}
# The rows of each table, by variant; the first row is what the others are compared with.
TABLES = {
    "Networks": {"fcn": "FCN", "psp": "PSPNet", "deeplabv3": "DeepLabV3", "encnet": "EncNet"},
    "Pyramid pooling (Table 1 of the paper)": {
        "fcn": "baseline",
        "b1_max": "B1, max",
        "b1_average": "B1, average",
        "b1236_max": "B1236, max",
        "b1236_average": "B1236, average",
        "b1236_max_reduced": "B1236, max, reduced",
        "psp": "B1236, average, reduced",
    },
    "Weight of the auxiliary loss (Table 2 of the paper)": {
        "fcn_aux00": "0",
        "fcn_aux03": "0.3",
        "fcn": "0.4",
        "fcn_aux06": "0.6",
        "fcn_aux09": "0.9",
    },
}
# Mean IoU in percent, and what it is for. The paper's rows of max pooling could not be looked up.
PUBLISHED_FOR = "ResNet-50 on ADE20K by Zhao et al. (CVPR 2017): compare the order of the rows, not the numbers"
PUBLISHED = {
    "Pyramid pooling (Table 1 of the paper)": {"fcn": 37.23, "b1_average": 40.07, "b1236_average": 41.07, "psp": 41.68},
    "Weight of the auxiliary loss (Table 2 of the paper)": {
        "fcn_aux00": 35.82,
        "fcn_aux03": 37.01,
        "fcn": 37.23,
        "fcn_aux06": 37.09,
        "fcn_aux09": 36.99,
    },
}
# Classes whose IoU is averaged in a column of its own: what context decides, by failure case.
GROUPS = FAILURE_CASES


def get_config(variant: str = "psp") -> ConfigDict:
    """Return the configuration of `variant`."""
    if variant not in VARIANTS:
        raise ValueError(f"configs/ablation.py has no variant {variant!r}; choose one of: {', '.join(VARIANTS)}.")
    config = defaults()
    config.data.update(name="context_scenes", dir="data", num_workers=0)
    config.augment.update(scale_min=1.0, scale_max=1.0, rotate_probability=0.0, blur_probability=0.0)
    config.model.update(depth=10, width=16, stem="32-32-64", head_channels=48, aux_channels=24, align_corners=False)
    config.train.update(steps=400, crop_size=(128,), log_every_steps=20)
    config.optimizer.update(base_lr=0.05, head_lr_multiplier=1.0)
    config.eval.update(base_size=(128,), gallery=12)
    config.checkpoint.update(every_steps=100, keep_latest=1, keep_best=0)
    config.log.update(tensorboard=False, images=0)
    config.update_from_flattened_dict(VARIANTS[variant])
    return config
