"""Cityscapes (Cordts et al., CVPR 2016): fine and coarse annotations of 19 classes, as labelIds.

Splits: train (2,975 images) and validation (500) have fine annotations. With gtCoarse.zip there is also train_coarse,
the coarse annotations of the images in train, and with leftImg8bit_trainextra.zip train_extra, 19,998 more images with
coarse annotations less one that is all black. The test set has no public annotations.
"""

import re
from pathlib import Path
from typing import NamedTuple

import tensorflow_datasets as tfds

from psp_jax import classes as class_tables
from psp_jax.data.builders.base import Pair, PairBuilder, shortfall
from psp_jax.data.builders.files import Files, Part, find, require

FULL_COUNTS = {"train": 2_975, "validation": 500, "train_coarse": 2_975, "train_extra": 19_997}
BLACK = "troisdorf_000000_000073"  # its image is damaged: the data set's authors advise to leave it out
PAGE = "https://www.cityscapes-dataset.com/downloads/ (with a login)"
IMAGES = Part("leftImg8bit_trainvaltest.zip", "leftImg8bit", PAGE)
MORE_IMAGES = Part("leftImg8bit_trainextra.zip", "leftImg8bit", PAGE)
FINE = Part("gtFine_trainvaltest.zip", "gtFine", PAGE)
COARSE = Part("gtCoarse.zip", "gtCoarse", PAGE)
NAME = re.compile(r"([a-z_]+)/([\w-]+)/(\2_\d{6}_\d{6})_(leftImg8bit|gtFine_labelIds|gtCoarse_labelIds)\.png")


class Split(NamedTuple):
    """The folder of a split in two archives, and what ends the ids of its images."""

    folder: str
    images: Part
    annotations: Part
    suffix: str = ""


SPLITS = {
    "train": Split("train", IMAGES, FINE),
    "validation": Split("val", IMAGES, FINE),
    "train_coarse": Split("train", IMAGES, COARSE, "_coarse"),  # so that train+train_coarse has each id once
    "train_extra": Split("train_extra", MORE_IMAGES, COARSE),
}


class Example(NamedTuple):
    """Where a pair is."""

    id: str
    images: Files
    image: str
    annotations: Files
    annotation: str


class Cityscapes(PairBuilder):
    """Cityscapes, 19 classes."""

    name = "cityscapes"
    VERSION = tfds.core.Version("1.0.0")
    classes = class_tables.get("cityscapes")
    parts = (IMAGES, FINE)
    homepage = "https://www.cityscapes-dataset.com/"
    citation = (
        "Marius Cordts, Mohamed Omran, Sebastian Ramos, Timo Rehfeld, Markus Enzweiler, Rodrigo Benenson, Uwe Franke, "
        "Stefan Roth, Bernt Schiele: The Cityscapes Dataset for Semantic Urban Scene Understanding. CVPR 2016."
    )

    def __init__(self, *, folder: Path, data_dir: Path) -> None:
        """Find the files in `folder`; see `files.require` for the errors, ValueError also for unmatched files."""
        files = {part: require(folder, part) for part in (IMAGES, FINE)}
        files |= {part: found for part in (COARSE, MORE_IMAGES) if (found := find(folder, part))}
        self._examples: dict[str, list[Example]] = {}
        self.absent = {}
        for name, split in SPLITS.items():
            missing = [part.archive for part in (split.images, split.annotations) if not _has(files.get(part), split)]
            if not missing:
                self._examples[name] = _matched(split, files[split.images], files[split.annotations])
            elif split.annotations is FINE:
                raise ValueError(f"{folder}: no {split.folder} is in {' and '.join(missing)}; fetch it again.")
            else:
                self.absent[name] = f"{' and '.join(missing)} from {PAGE}"
        self.note = shortfall("Cityscapes", self._examples, FULL_COUNTS)
        super().__init__(data_dir=data_dir)

    def splits(self) -> dict[str, int]:
        """Return the number of pairs of each split."""
        return {split: len(examples) for split, examples in self._examples.items()}

    def pair(self, split: str, index: int) -> Pair:
        """Return pair `index` of `split`, in the order of file names."""
        id, images, image, annotations, annotation = self._examples[split][index]
        return Pair(
            id, images.read(image), annotations.read(annotation), images.where(image), annotations.where(annotation)
        )


def _found(files: Files, folder: str) -> dict[str, str]:
    """Return {city_sequence_frame: name} of the images or label maps in a folder, the black image left out."""
    matches = (NAME.fullmatch(name) for name in sorted(files.names))
    return {match[3]: match[0] for match in matches if match and match[1] == folder and match[3] != BLACK}


def _has(files: Files | None, split: Split) -> bool:
    return files is not None and bool(_found(files, split.folder))


def _matched(split: Split, images: Files, annotations: Files) -> list[Example]:
    """Return the pairs of a split; raise ValueError where an image has no label map, or the other way round."""
    pictures, labels = _found(images, split.folder), _found(annotations, split.folder)
    for ours, files, theirs, other in (
        (pictures, images, labels, annotations),
        (labels, annotations, pictures, images),
    ):
        if alone := sorted(ours.keys() - theirs.keys()):
            raise ValueError(
                f"{files.where(ours[alone[0]])} has no counterpart in {other.where(split.folder)} ({len(alone)} such "
                "files); an archive is incomplete or unpacked in part, fetch or unpack it again."
            )
    return [Example(id + split.suffix, images, pictures[id], annotations, labels[id]) for id in sorted(pictures)]
