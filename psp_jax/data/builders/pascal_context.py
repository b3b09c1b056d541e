"""PASCAL-Context (Mottaghi et al., CVPR 2014) on the images of PASCAL VOC 2010: the 59 most frequent classes.

Splits: train (4,998 images) and validation (5,105) are VOC 2010's ImageSets/Main/{train,val}.txt, as in mmsegmentation
and PyTorch-Encoding. The annotations number 459 objects; the 59 classes are those of the data set's 59_labels.txt, in
the order of their object numbers, which is the alphabet's, not that file's: so do mmsegmentation and PyTorch-Encoding.
Records hold 1 .. 59, and 0, void, for the other 400 objects.
"""

from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from psp_jax import classes as class_tables
from psp_jax.data.builders.base import Pair, PairBuilder, encode_png, shortfall
from psp_jax.data.builders.files import Part, require
from psp_jax.data.builders.voc2012 import read_matrix

FULL_COUNTS = {"train": 4_998, "validation": 5_105}
NUM_OBJECTS = 459
# The numbers of the 59 classes among the objects of labels.txt.
OBJECTS = (
    *(2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104, 105, 113, 115, 144, 158, 159),
    *(162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296, 308, 324, 326, 347, 349, 354, 355, 360, 366, 368),
    *(397, 415, 416, 420, 424, 427, 440, 445, 454, 458),
)
VOC = Part(
    "VOCtrainval_03-May-2010.tar",
    "VOCdevkit/VOC2010",
    "http://host.robots.ox.ac.uk/pascal/VOC/voc2010/VOCtrainval_03-May-2010.tar",
    size="1.3 GB",
    md5="da459979d0c395079b5c75ee67908abb",  # as in torchvision's datasets/voc.py
)
LABELS = Part(
    "trainval.tar.gz",
    "trainval",
    "https://cs.stanford.edu/~roozbeh/pascal-context/trainval.tar.gz",
    size="31 MB",  # no checksum is published
)


class PascalContext(PairBuilder):
    """PASCAL-Context, 59 classes without background."""

    name = "pascal_context"
    VERSION = tfds.core.Version("1.0.0")
    classes = class_tables.get("pascal_context")
    parts = (VOC, LABELS)
    homepage = "https://cs.stanford.edu/~roozbeh/pascal-context/"
    citation = (
        "Roozbeh Mottaghi, Xianjie Chen, Xiaobai Liu, Nam-Gyu Cho, Seong-Whan Lee, Sanja Fidler, Raquel Urtasun, Alan "
        "Yuille: The Role of Context for Object Detection and Semantic Segmentation in the Wild. CVPR 2014."
    )

    def __init__(self, *, folder: Path, data_dir: Path) -> None:
        """Find the files in `folder`; see `files.require` for the errors."""
        self._voc, self._labels = require(folder, VOC), require(folder, LABELS)
        self._ids = {
            split: self._voc.ids(f"ImageSets/Main/{name}.txt")
            for split, name in (("train", "train"), ("validation", "val"))
        }
        for ids in self._ids.values():
            self._voc.check(f"JPEGImages/{id}.jpg" for id in ids)
            self._labels.check(f"{id}.mat" for id in ids)
        self.note = shortfall("PASCAL-Context", self._ids, FULL_COUNTS)
        super().__init__(data_dir=data_dir)

    def splits(self) -> dict[str, int]:
        """Return the number of pairs of each split."""
        return {split: len(ids) for split, ids in self._ids.items()}

    def pair(self, split: str, index: int) -> Pair:
        """Return pair `index` of `split`, in the order of VOC's list."""
        id = self._ids[split][index]
        image, annotation = f"JPEGImages/{id}.jpg", f"{id}.mat"
        where = self._labels.where(annotation)
        label = encode_png(to_classes(read_matrix(self._labels.read(annotation), where, "LabelMap"), where))
        return Pair(id, self._voc.read(image), label, self._voc.where(image), where)


def to_classes(objects: np.ndarray, where: str) -> np.ndarray:
    """Map object numbers [H, W] to u8 [H, W]: 1 .. 59, and 0 for the others.

    Raises:
      ValueError: a number above 459; the sentence names `where`.
    """
    if objects.max() > NUM_OBJECTS:
        raise ValueError(f"{where} holds the object {objects.max()}; PASCAL-Context has 1-{NUM_OBJECTS}.")
    table = np.zeros(NUM_OBJECTS + 1, np.uint8)
    table[list(OBJECTS)] = np.arange(1, len(OBJECTS) + 1)
    return table[objects]
