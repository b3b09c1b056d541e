"""The paper's run: PSPNet on ADE20K, as in hszhao/semseg.

Variants: resnet50 (default), resnet101, resnet152, resnet269.
"""

from ml_collections import ConfigDict

from psp_jax.config import defaults

DEPTHS = {"resnet50": 50, "resnet101": 101, "resnet152": 152, "resnet269": 269}


def get_config(variant: str = "resnet50") -> ConfigDict:
    """Return the configuration of `variant`."""
    if variant not in DEPTHS:
        raise ValueError(f"configs/ade20k.py has no variant {variant!r}; choose one of: {', '.join(DEPTHS)}.")
    config = defaults()
    config.data.update(name="ade20k", dir="data", num_workers=8)
    config.model.depth = DEPTHS[variant]
    config.model.dtype = "bfloat16"
    config.train.update(epochs=100.0, batch_size=16, crop_size=(473,))  # 126,300 steps: 1263 an epoch
    config.eval.update(every_steps=12_630)
    config.checkpoint.update(every_steps=1263)
    return config
