"""PSPNet on Cityscapes (2,975 finely labelled images), as in hszhao/semseg.

Variants: resnet50 (default) and resnet101, and resnet101_coarse, which adds the 19,997 coarsely labelled images of
train_extra. What differs here: the ImageNet weights are GluonCV's v1s in timm's conversion, not semseg's own;
convolutions are in bfloat16. How long the paper trains with coarse labels it does not say, so the steps of that variant
are a choice of this file.
"""

from typing import Any

from ml_collections import ConfigDict

from psp_jax.config import IMAGENET_V1S, defaults

VARIANTS = {  # depth, training split, steps
    # 200 epochs of 186 steps: semseg fills the last batch up.
    "resnet50": (50, "train", 37_200),
    "resnet101": (101, "train", 37_200),
    "resnet101_coarse": (101, "train+train_extra", 90_000),
}
# Published there for the validation split, by the protocol that `eval` sets; `single` includes mirror images.
EXPECTED: dict[str, dict[str, Any]] = {
    "resnet50": {"mean_iou_single": 77.30, "mean_iou_multi": 78.38, "source": "hszhao/semseg, README"},
    "resnet101": {"mean_iou_single": 78.63, "mean_iou_multi": 79.29, "source": "hszhao/semseg, README"},
    "resnet101_coarse": {
        "mean_iou_single": None,
        "mean_iou_multi": None,
        "source": "none for the validation split; the paper has 80.2 for the test split",
    },
}


def get_config(variant: str = "resnet50") -> ConfigDict:
    """Return the configuration of `variant`."""
    if variant not in VARIANTS:
        raise ValueError(f"configs/cityscapes.py has no variant {variant!r}; choose one of: {', '.join(VARIANTS)}.")
    depth, split, steps = VARIANTS[variant]
    config = defaults()
    config.data.update(name="cityscapes", train_split=split, num_workers=8)
    config.model.update(depth=depth, dtype="bfloat16")
    config.init.update(source="timm", path=IMAGENET_V1S[depth])
    config.train.update(steps=steps, crop_size=(713,))
    config.eval.update(every_steps=steps // 10, size=(713, 1425), batch_size=8, base_size=(2048,))
    return config
