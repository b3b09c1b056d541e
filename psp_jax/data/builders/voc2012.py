"""PASCAL VOC 2012 segmentation (Everingham et al., IJCV 2010, 2015) with SBD (Hariharan et al., ICCV 2011), 21 classes.

Splits: train (1,464 images) and validation (1,449) are those of VOC. train_aug (10,582) is the usual training set: the
images of VOC train, and those that SBD annotates in its train.txt or val.txt, without those of VOC val. An image of VOC
train keeps VOC's annotation, which has void (255) along the edges of objects; the other 9,118 have SBD's, without void.
All images are VOC's JPEGs. In place of SBD's archive SegmentationClassAug serves, which others have made of it, a zip
file or a folder, or a folder in VOCdevkit/VOC2012: every PNG in it that is not of VOC val counts. Without either there
is no train_aug. The sets of 2,913 and of 12,031 images used for test submissions are train+validation and
train_aug+validation.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from psp_jax import classes as class_tables
from psp_jax.data.builders.base import Pair, PairBuilder, encode_png, shortfall
from psp_jax.data.builders.files import ID, Files, Part, find, require

FULL_COUNTS = {"train": 1_464, "validation": 1_449, "train_aug": 10_582}
# The MD5 sums are those in torchvision's datasets/voc.py and sbd.py.
VOC = Part(
    "VOCtrainval_11-May-2012.tar",
    "VOCdevkit/VOC2012",
    "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
    size="2 GB",
    md5="6cd6e144f989b92b3379bac3b3de84fd",
)
AUG = (
    Part("SegmentationClassAug.zip", "SegmentationClassAug", url=""),
    Part("", "VOCdevkit/VOC2012/SegmentationClassAug", url=""),
)
SBD = Part(
    "benchmark.tgz",
    "benchmark_RELEASE/dataset",
    "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz",
    size="1.4 GB",
    md5="82b4d87ceb2ed10f6038a1cba92111cb",
    keep=r"cls/|train\.txt$|val\.txt$",
    instead=AUG,
)


class Example(NamedTuple):
    """Where the annotation of an image is."""

    id: str
    files: Files
    annotation: str


class Voc2012(PairBuilder):
    """PASCAL VOC 2012 segmentation, 21 classes, with the annotations of SBD where they are there."""

    name = "voc2012"
    VERSION = tfds.core.Version("1.0.0")
    classes = class_tables.get("voc2012")
    parts = (VOC, SBD)
    homepage = "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/"
    citation = (
        "Mark Everingham, Luc Van Gool, Christopher Williams, John Winn, Andrew Zisserman: The PASCAL Visual Object "
        "Classes Challenge. IJCV 2010. Bharath Hariharan, Pablo Arbelaez, Lubomir Bourdev, Subhransu Maji, Jitendra "
        "Malik: Semantic Contours from Inverse Detectors. ICCV 2011."
    )

    def __init__(self, *, folder: Path, data_dir: Path) -> None:
        """Find the files in `folder`; see `files.require` for the errors."""
        self._voc = require(folder, VOC)
        lists = {
            split: self._voc.ids(f"ImageSets/Segmentation/{name}.txt")
            for split, name in (("train", "train"), ("validation", "val"))
        }
        self._examples = {
            split: [Example(id, self._voc, f"SegmentationClass/{id}.png") for id in ids] for split, ids in lists.items()
        }
        if more := self._more(folder):
            later = [more[id] for id in sorted(more.keys() - {id for ids in lists.values() for id in ids})]
            self._examples["train_aug"] = self._examples["train"] + later
        else:
            self.absent = {"train_aug": f"{SBD.archive} of SBD from {SBD.url}"}
        for examples in self._examples.values():
            self._voc.check(f"JPEGImages/{example.id}.jpg" for example in examples)
            for files in {example.files for example in examples}:
                files.check(example.annotation for example in examples if example.files is files)
        self.note = shortfall("PASCAL VOC 2012", self._examples, FULL_COUNTS)
        super().__init__(data_dir=data_dir)

    def splits(self) -> dict[str, int]:
        """Return the number of pairs of each split."""
        return {split: len(examples) for split, examples in self._examples.items()}

    def pair(self, split: str, index: int) -> Pair:
        """Return pair `index` of `split`: in the order of VOC's list, then of SBD's ids."""
        id, files, annotation = self._examples[split][index]
        image, where = f"JPEGImages/{id}.jpg", files.where(annotation)
        data = files.read(annotation)
        if annotation.endswith(".mat"):
            data = encode_png(read_matrix(data, where, "GTcls", "Segmentation"))
        return Pair(id, self._voc.read(image), data, self._voc.where(image), where)

    def _more(self, folder: Path) -> Mapping[str, Example]:
        """Return what SBD, or else SegmentationClassAug, annotates, by id; nothing without either."""
        if sbd := find(folder, SBD):
            ids = sbd.ids("train.txt") + sbd.ids("val.txt")
            return {id: Example(id, sbd, f"cls/{id}.mat") for id in ids}
        if aug := find(folder, AUG[0]) or find(folder, AUG[1]):
            ids = [name.removesuffix(".png") for name in aug.names if name.endswith(".png")]
            return {id: Example(id, aug, f"{id}.png") for id in ids if ID.fullmatch(id)}
        return {}


def read_matrix(data: bytes, where: str, variable: str, field: str = "") -> np.ndarray:
    """Return the label map u8 or u16 [H, W] in a .mat file: a variable, or a field of one.

    Raises:
      ValueError: the file is damaged, or has no such matrix of whole numbers 0 .. 65,535; the sentence names `where`.
    """
    from scipy.io import loadmat  # here, since worker processes import this module and never read a .mat file

    try:
        matrix = loadmat(io.BytesIO(data), variable_names=[variable])[variable]
        label = np.asarray(matrix[field][0, 0] if field else matrix)
        if label.ndim != 2 or not label.size or label.min() < 0 or label.max() > 65_535 or (label % 1).any():
            raise ValueError(f"it holds {label.dtype} {list(label.shape)}, not a matrix of class values")
    except Exception as error:  # the reader raises whatever a damaged file leads it to
        raise ValueError(f"{where} is not a readable .mat label file ({error}); fetch the archive again.") from None
    return label.astype(np.uint8 if label.max() < 256 else np.uint16)
