"""PSPNet on PASCAL VOC 2012 with the 10,582 images of train_aug, as in hszhao/semseg.

Variants: resnet50 (default) and resnet101. What differs here: the ImageNet weights are GluonCV's v1s in timm's
conversion, not semseg's own; convolutions are in bfloat16.
"""

from typing import Any

from ml_collections import ConfigDict

from psp_jax.config import IMAGENET_V1S, defaults

VARIANTS = {"resnet50": 50, "resnet101": 101}
# Published there for the validation split, by the protocol that `eval` sets; `single` includes mirror images.
EXPECTED: dict[str, dict[str, Any]] = {
    "resnet50": {"mean_iou_single": 77.05, "mean_iou_multi": 78.02, "source": "hszhao/semseg, README"},
    "resnet101": {"mean_iou_single": 79.07, "mean_iou_multi": 79.63, "source": "hszhao/semseg, README"},
}


def get_config(variant: str = "resnet50") -> ConfigDict:
    """Return the configuration of `variant`."""
    if variant not in VARIANTS:
        raise ValueError(f"configs/voc2012.py has no variant {variant!r}; choose one of: {', '.join(VARIANTS)}.")
    depth = VARIANTS[variant]
    config = defaults()
    config.data.update(name="voc2012", train_split="train_aug", num_workers=8)
    config.model.update(depth=depth, dtype="bfloat16")
    config.init.update(source="timm", path=IMAGENET_V1S[depth])
    config.train.update(epochs=50.0, crop_size=(473,))  # 33,050 steps: 661 an epoch
    config.eval.every_steps = 3305
    return config
