"""The paper's run: PSPNet on ADE20K, as in hszhao/semseg.

Variants: resnet50 (default), resnet101, resnet152, resnet269. They start from ImageNet's weights: GluonCV's v1s
networks, which have this stem, in timm's conversion; `--config.init.source=random` starts without. Of the 269 layers
there are no public weights, so that variant starts from random ones.
"""

from ml_collections import ConfigDict

from psp_jax.config import defaults

DEPTHS = {"resnet50": 50, "resnet101": 101, "resnet152": 152, "resnet269": 269}
IMAGENET = "https://github.com/rwightman/pytorch-pretrained-gluonresnet/releases/download/v0.1/"
FILES = {  # each name ends in the first digits of the SHA-256, which is checked
    "resnet50": "gluon_resnet50_v1s-1762acc0.pth",
    "resnet101": "gluon_resnet101_v1s-60fe0cc1.pth",
    "resnet152": "gluon_resnet152_v1s-dcc41b81.pth",
}


def get_config(variant: str = "resnet50") -> ConfigDict:
    """Return the configuration of `variant`."""
    if variant not in DEPTHS:
        raise ValueError(f"configs/ade20k.py has no variant {variant!r}; choose one of: {', '.join(DEPTHS)}.")
    config = defaults()
    config.data.update(name="ade20k", dir="data", num_workers=8)
    config.model.depth = DEPTHS[variant]
    config.model.dtype = "bfloat16"
    if variant in FILES:
        config.init.update(source="timm", path=IMAGENET + FILES[variant])
    config.train.update(epochs=100.0, batch_size=16, crop_size=(473,))  # 126,300 steps: 1263 an epoch
    config.eval.update(every_steps=12_630)
    config.checkpoint.update(every_steps=1263)
    return config
