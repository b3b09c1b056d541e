"""EncNet on ADE20K, as PyTorch-Encoding trains it (its version 1.0.1).

Variants: resnet50 (default) and resnet101, and fcn, the baseline on ResNet-50, which has no auxiliary loss there. What
differs here: crops have a pixel more, since the network aligns corners (481 for 480, 577 for 576); images are resized
without antialiasing; padding is on both sides and of the mean colour, not black and at the bottom and right;
convolutions are in bfloat16; the ImageNet weights are GluonCV's v1s in timm's conversion, not its own. The published
numbers are of its own protocol, which adds up the exponentials of logits and pads the last window; `semseg`, with the
same scales and mirror images, comes near it.
"""

from typing import Any

from ml_collections import ConfigDict

from psp_jax.config import IMAGENET_V1S, defaults

VARIANTS = {  # depth, head, crop, and long side of images
    "resnet50": (50, "enc", 481, 520),
    "resnet101": (101, "enc", 577, 640),
    "fcn": (50, "fcn", 481, 520),
}
# Published there for the validation split, with several scales only.
EXPECTED: dict[str, dict[str, Any]] = {
    "resnet50": {"mean_iou_single": None, "mean_iou_multi": 41.5, "source": "PyTorch-Encoding, segmentation.rst"},
    "resnet101": {"mean_iou_single": None, "mean_iou_multi": 44.4, "source": "PyTorch-Encoding, segmentation.rst"},
    "fcn": {"mean_iou_single": None, "mean_iou_multi": 38.5, "source": "PyTorch-Encoding, segmentation.rst"},
}


def get_config(variant: str = "resnet50") -> ConfigDict:
    """Return the configuration of `variant`."""
    if variant not in VARIANTS:
        raise ValueError(f"configs/ade20k_encnet.py has no variant {variant!r}; choose one of: {', '.join(VARIANTS)}.")
    depth, head, crop, long_side = VARIANTS[variant]
    config = defaults()
    config.data.update(name="ade20k", dir="data", num_workers=8)
    config.augment.update(rotate_probability=0.0, blur_probability=0.0, base_size=(long_side,))
    config.model.update(depth=depth, head=head, first_block_dilation="contracted", dtype="bfloat16")
    config.init.update(source="timm", path=IMAGENET_V1S[depth])
    config.train.update(epochs=180.0, crop_size=(crop,), aux_weight=0.2, se_weight=0.2)  # 227,340 steps
    if head == "fcn":
        config.model.aux_head = False
        config.train.update(aux_weight=0.0, se_weight=0.0)
    config.optimizer.base_lr = 0.004
    config.eval.update(every_steps=12_630, base_size=(long_side,))
    config.checkpoint.update(every_steps=1263)
    return config
