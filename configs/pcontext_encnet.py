"""EncNet on PASCAL Context (59 classes), as PyTorch-Encoding trains it (its version 1.0.1).

Variants: resnet50 (default) and resnet101. Both join the second and third stage to the last. What differs here: crops
have a pixel more, since the network aligns corners (481 for 480); images are resized without antialiasing; padding is
on both sides and of the mean colour, not black and at the bottom and right; convolutions are in bfloat16;
the ImageNet weights are GluonCV's v1s in timm's conversion, not its own. The published numbers are of its own protocol,
which adds up the exponentials of logits and pads the last window; `semseg`, with the same scales and mirror images,
comes near it.
"""

from typing import Any

from ml_collections import ConfigDict

from psp_jax.config import IMAGENET_V1S, defaults

VARIANTS = {"resnet50": 50, "resnet101": 101}
# Published there for the validation split, with several scales only.
EXPECTED: dict[str, dict[str, Any]] = {
    "resnet50": {"mean_iou_single": None, "mean_iou_multi": 51.0, "source": "PyTorch-Encoding, segmentation.rst"},
    "resnet101": {"mean_iou_single": None, "mean_iou_multi": 54.1, "source": "PyTorch-Encoding, segmentation.rst"},
}


def get_config(variant: str = "resnet50") -> ConfigDict:
    """Return the configuration of `variant`."""
    if variant not in VARIANTS:
        raise ValueError(
            f"configs/pcontext_encnet.py has no variant {variant!r}; choose one of: {', '.join(VARIANTS)}."
        )
    depth = VARIANTS[variant]
    config = defaults()
    config.data.update(name="pascal_context", num_workers=8)
    config.augment.update(rotate_probability=0.0, blur_probability=0.0, base_size=(520,))
    config.model.update(depth=depth, head="enc", lateral=True, first_block_dilation="contracted", dtype="bfloat16")
    config.init.update(source="timm", path=IMAGENET_V1S[depth])
    config.train.update(epochs=80.0, crop_size=(481,), aux_weight=0.2, se_weight=0.2)  # 24,960 steps: 312 an epoch
    config.optimizer.base_lr = 0.001
    config.eval.update(every_steps=2496, base_size=(520,))
    return config
