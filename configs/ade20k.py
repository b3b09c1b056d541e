"""The paper's run: PSPNet on ADE20K, as in hszhao/semseg.

Variants: resnet50 (default), resnet101, resnet152, resnet269, and on ResNet-50 with the same recipe fcn (the paper's
baseline) and deeplabv3. They start from ImageNet's weights: GluonCV's v1s networks, which have this stem, in timm's
conversion; `--config.init.source=random` starts without. Of the 269 layers there are no public weights, so that variant
starts from random ones. What differs from semseg besides the file of these weights: convolutions are in bfloat16.
"""

from typing import Any

from ml_collections import ConfigDict

from psp_jax.config import IMAGENET_V1S, defaults

VARIANTS = {  # depth and head
    "resnet50": (50, "psp"),
    "resnet101": (101, "psp"),
    "resnet152": (152, "psp"),
    "resnet269": (269, "psp"),
    "fcn": (50, "fcn"),
    "deeplabv3": (50, "aspp"),
}
# Published for the validation split, by the protocol that `eval` sets; `single` of semseg includes mirror images. The
# paper's numbers are of 150,000 steps in Caffe and another code for testing.
EXPECTED: dict[str, dict[str, Any]] = {
    "resnet50": {"mean_iou_single": 41.89, "mean_iou_multi": 42.84, "source": "hszhao/semseg, README"},
    "resnet101": {"mean_iou_single": 43.10, "mean_iou_multi": 44.15, "source": "hszhao/semseg, README"},
    "resnet152": {"mean_iou_single": 42.62, "mean_iou_multi": 43.51, "source": "the paper"},
    "resnet269": {"mean_iou_single": 43.81, "mean_iou_multi": 44.94, "source": "the paper, from ImageNet weights"},
    "fcn": {"mean_iou_single": 37.23, "mean_iou_multi": None, "source": "the paper, baseline with auxiliary loss"},
    "deeplabv3": {"mean_iou_single": None, "mean_iou_multi": None, "source": "none for this recipe"},
}


def get_config(variant: str = "resnet50") -> ConfigDict:
    """Return the configuration of `variant`."""
    if variant not in VARIANTS:
        raise ValueError(f"configs/ade20k.py has no variant {variant!r}; choose one of: {', '.join(VARIANTS)}.")
    depth, head = VARIANTS[variant]
    config = defaults()
    config.data.update(name="ade20k", dir="data", num_workers=8)
    config.model.update(depth=depth, head=head, dtype="bfloat16")
    if depth in IMAGENET_V1S:
        config.init.update(source="timm", path=IMAGENET_V1S[depth])
    config.train.update(epochs=100.0, batch_size=16, crop_size=(473,))  # 126,300 steps: 1263 an epoch
    config.eval.update(every_steps=12_630)
    config.checkpoint.update(every_steps=1263)
    return config
