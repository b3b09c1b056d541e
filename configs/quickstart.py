"""A small PSPNet on generated scenes: minutes on two CPU cores, no download."""

from ml_collections import ConfigDict

from psp_jax.config import defaults


def get_config() -> ConfigDict:
    """Return the configuration."""
    config = defaults()
    config.data.update(name="context_scenes", dir="data")
    config.augment.update(scale_min=1.0, scale_max=1.0, rotate_probability=0.0, blur_probability=0.0)
    # Scenes are 128 x 128: without align_corners they fit the network's grid as they are.
    config.model.update(depth=10, width=24, stem="32-32-64", head_channels=64, aux_channels=32, align_corners=False)
    config.train.update(steps=480, aux_weight=0.2, crop_size=(128,), log_every_steps=10)
    # Nothing is pretrained, so head and backbone learn at the same rate.
    config.optimizer.update(base_lr=0.05, head_lr_multiplier=1.0)
    config.eval.update(every_steps=160, base_size=(128,))
    config.checkpoint.update(every_steps=160)
    return config
