"""EncNet on ADE20K, as PyTorch-Encoding trains it (its version 1.0.1).

Variants: resnet50 (default) and resnet101. Published there, with multi-scale testing: 41.5 mIoU and 80.1 % of pixels,
44.4 and 81.3 %. What differs here: crops have a pixel more, since the network aligns corners (481 for 480, 577 for
576); images are scaled by 0.5 to 2 from their own size, not from a long side of 520 or 640; padding is of the mean
colour, not black.
"""

from ml_collections import ConfigDict

from psp_jax.config import defaults

IMAGENET = "https://github.com/rwightman/pytorch-pretrained-gluonresnet/releases/download/v0.1/"
VARIANTS = {  # depth, weights to start from, crop, and long side of evaluated images
    "resnet50": (50, "gluon_resnet50_v1s-1762acc0.pth", 481, 520),
    "resnet101": (101, "gluon_resnet101_v1s-60fe0cc1.pth", 577, 640),
}


def get_config(variant: str = "resnet50") -> ConfigDict:
    """Return the configuration of `variant`."""
    if variant not in VARIANTS:
        raise ValueError(f"configs/ade20k_encnet.py has no variant {variant!r}; choose one of: {', '.join(VARIANTS)}.")
    depth, file, crop, long_side = VARIANTS[variant]
    config = defaults()
    config.data.update(name="ade20k", dir="data", num_workers=8)
    config.augment.update(rotate_probability=0.0, blur_probability=0.0)
    config.model.update(depth=depth, head="enc", first_block_dilation="contracted", dtype="bfloat16")
    config.init.update(source="timm", path=IMAGENET + file)
    config.train.update(epochs=180.0, crop_size=(crop,), aux_weight=0.2, se_weight=0.2)  # 227,340 steps
    config.optimizer.base_lr = 0.004
    config.eval.update(every_steps=12_630, base_size=(long_side,))
    config.checkpoint.update(every_steps=1263)
    return config
