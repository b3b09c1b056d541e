"""TFDS builders that write ArrayRecord, without TensorFlow: a class for each data set, on the common `PairBuilder`."""

from pathlib import Path

from psp_jax import classes as class_tables
from psp_jax.data.builders.ade20k import Ade20k
from psp_jax.data.builders.base import Pair, PairBuilder
from psp_jax.data.builders.cityscapes import Cityscapes
from psp_jax.data.builders.context_scenes import ContextScenes
from psp_jax.data.builders.image_folder import ImageFolder, open_folder
from psp_jax.data.builders.pascal_context import PascalContext
from psp_jax.data.builders.voc2012 import Voc2012

__all__ = ["BUILDERS", "Pair", "PairBuilder", "locate"]

BUILDERS: dict[str, type[PairBuilder]] = {
    "ade20k": Ade20k,
    "cityscapes": Cityscapes,
    "context_scenes": ContextScenes,
    "image_folder": ImageFolder,
    "pascal_context": PascalContext,
    "voc2012": Voc2012,
}


def locate(
    name: str, data_dir: str | Path, *, prepared_dir: str | Path = "data", classes: str | Path | None = None
) -> Path:
    """Return the folder that the records of a data set are in, or will be in.

    Args:
      name: of the data set, a key of `BUILDERS`.
      data_dir: for image_folder the folder of images and annotations, for all others the folder of prepared data sets.
      prepared_dir: the folder of prepared data sets for image_folder.
      classes: name or path of a class table, needed for an image_folder without classes.json.

    Raises:
      ValueError: unknown data set (the known are listed), or classes that are not those of the data set.
      FileNotFoundError: there is no such folder of images.
    """
    if name.split(":")[0].split("/")[0] == "scene_parse150":
        raise ValueError(
            "The data set scene_parse150 holds the instance labels of the 2017 challenge, not the 150 classes of scene "
            "parsing; use the data set ade20k."
        )
    if name not in BUILDERS:
        raise ValueError(f"No data set {name}; known are {', '.join(BUILDERS)}.")
    builder = BUILDERS[name]
    if builder is ImageFolder:
        folder, table = open_folder(data_dir, classes)
        return Path(prepared_dir).expanduser() / folder.record_name(table) / name / str(builder.VERSION)
    if classes and class_tables.get(classes).digest() != builder.classes.digest():
        raise ValueError(f"The data set {name} has its own classes; leave the class table {classes} out.")
    return Path(data_dir).expanduser() / name / str(builder.VERSION)
