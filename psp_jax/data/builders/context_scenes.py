"""context_scenes: generated pictures whose classes only the whole picture decides (see `psp_jax.data.scenes`)."""

import tensorflow_datasets as tfds

from psp_jax import classes as class_tables
from psp_jax.data import scenes
from psp_jax.data.builders.base import Pair, PairBuilder, encode_png

SEED = 0
COUNTS = {"train": 1998, "validation": 198}  # multiples of six: each class pair of each failure case equally often


class ContextScenes(PairBuilder):
    """Generated scenes of 128x128 pixels that hold the three failure cases of PSPNet (CVPR 2017, section 3.1)."""

    name = "context_scenes"
    VERSION = tfds.core.Version("1.1.0")  # 1.0.0 had other shares of light patches
    classes = class_tables.get("context_scenes")

    def splits(self) -> dict[str, int]:
        """Return the number of scenes of each split."""
        return COUNTS

    def pair(self, split: str, index: int) -> Pair:
        """Draw scene `index` of `split` and encode it."""
        image, label = scenes.scene(SEED, index, split=split)
        name = f"{split}_{index:05d}"
        where = f"{self.name}/{name}"
        return Pair(name, encode_png(image[..., ::-1]), encode_png(label), f"{where} image", f"{where} annotation")
