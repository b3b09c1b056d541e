"""A small PSPNet on generated scenes: minutes on two CPU cores, no download."""

from ml_collections import ConfigDict

from psp_jax.config import defaults


def get_config() -> ConfigDict:
    """Return the configuration."""
    config = defaults()
    config.data.update(name="context_scenes", dir="data")
    config.augment.update(scale_min=1.0, scale_max=1.0, rotate_probability=0.0, blur_probability=0.0)
    config.model.update(depth=10, stem="32-32-64", width=32, head_channels=64, aux_channels=32)
    config.train.update(steps=300, crop_size=(129,), log_every_steps=10)
    config.eval.update(every_steps=150)
    config.checkpoint.update(every_steps=100)
    return config
