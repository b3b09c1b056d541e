"""PSPNet on your own images and masks, without code.

    python -m psp_jax.main --config configs/folder.py --config.data.dir=DIR --workdir runs/mine

DIR holds images/train/NAME.jpg, images/val/..., annotations/train/NAME.png (class indices, 255 = void),
annotations/val/..., and classes.json: {"names": ["road", "tree", ...]}, with "palette" and "ignore" if you like.
"""

from ml_collections import ConfigDict

from psp_jax.config import defaults


def get_config() -> ConfigDict:
    """Return the configuration."""
    config = defaults()
    config.data.update(name="image_folder", dir="", eval_split="val")
    config.train.update(epochs=100.0)
    return config
