"""PSPNet on CamVid (11 classes, 367 training images of 360 x 480).

Variants: resnet50 (default), and small, a narrow ResNet-18 that two CPU cores can train.
"""

from ml_collections import ConfigDict

from psp_jax.config import defaults


def get_config(variant: str = "resnet50") -> ConfigDict:
    """Return the configuration of `variant`."""
    if variant not in ("resnet50", "small"):
        raise ValueError(f"configs/camvid.py has no variant {variant!r}; choose one of: resnet50, small.")
    config = defaults()
    config.data.update(name="image_folder", dir="data/camvid", classes="camvid", eval_split="val")
    config.train.update(epochs=200.0, crop_size=(345,))
    config.eval.update(size=(361, 481), batch_size=8, base_size=(480,))
    if variant == "small":
        config.model.update(depth=18, stem="32-32-64", width=24, head_channels=128, aux_channels=64)
        config.train.update(epochs=70.0, crop_size=(217, 289), batch_size=8, log_every_steps=10)
        config.optimizer.base_lr = 0.02
    return config
