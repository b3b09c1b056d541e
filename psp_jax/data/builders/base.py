"""What all our data sets share when they are written: the features, the check of every pair, the metadata.

A builder names its class table and answers two questions: how many pairs a split has, and what pair number i is.
Everything else (features, checks in parallel, progress, sizes, class table in the metadata) happens here.
"""

from collections.abc import Iterator, Mapping, Sized
from typing import Any, NamedTuple

import cv2
import numpy as np
import tensorflow_datasets as tfds
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from psp_jax.classes import ClassTable
from psp_jax.data import decode
from psp_jax.data.builders.files import Part
from psp_jax.data.threads import map_ahead


class Pair(NamedTuple):
    """One image with its annotation, both encoded, and the names under which an error reports them."""

    id: str
    image: bytes  # a JPEG or PNG file, as found
    annotation: bytes  # a PNG file of raw class values, as found; records hold it packed anew
    image_name: str
    annotation_name: str


class PairBuilder(tfds.core.GeneratorBasedBuilder):
    """Writes pairs of image and annotation as ArrayRecord, in the order of their index, each checked once.

    Subclasses set `VERSION` and `classes`, and implement `splits()` and `pair()`. The metadata of the records is
    {"classes": ClassTable.as_dict(), "max_size": {split: [largest height, largest width]}, "note": a sentence or "",
    "absent": {split: what it needs}}.
    """

    code_path = None  # where TFDS would look for lists of downloads, with a package that it does not declare
    classes: ClassTable
    note = ""  # a sentence for whoever reads the data set's summary
    absent: Mapping[str, str] = {}  # splits that the data set has, but not these records, and the files they need
    parts: tuple[Part, ...] = ()  # the official archives that a data set made of several is read from
    homepage = ""
    citation = ""

    def splits(self) -> dict[str, int]:
        """Return the number of pairs of each split."""
        raise NotImplementedError

    def pair(self, split: str, index: int) -> Pair:
        """Return pair `index` of `split`. Called from several threads at a time, once for each index."""
        raise NotImplementedError

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(None, None, 3), doc="RGB, encoded as it came"),
                "annotation": tfds.features.Image(shape=(None, None, 1), doc="raw class values, a grey-scale PNG"),
                "id": tfds.features.Text(),
            }
        )
        return tfds.core.DatasetInfo(
            builder=self,
            description=(self.__doc__ or "").strip(),
            features=features,
            homepage=self.homepage or None,
            citation=self.citation or None,
            metadata=tfds.core.MetadataDict(
                classes=self.classes.as_dict(), max_size={}, note=self.note, absent=dict(self.absent)
            ),
            disable_shuffling=True,  # records keep the order of the files; the training pipeline shuffles
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # archives are found or fetched before the builder is made
        return {split: self._generate_examples(split, count) for split, count in self.splits().items()}

    def _generate_examples(self, split: str, count: int) -> Iterator[tuple[int, dict[str, Any]]]:  # type: ignore[override]
        height = width = 0
        for index, (pair, size) in enumerate(self._checked(split, count)):
            height, width = max(height, size[0]), max(width, size[1])
            yield index, {"image": pair.image, "annotation": pair.annotation, "id": pair.id}
        self.info.metadata["max_size"][split] = [height, width]

    def _checked(self, split: str, count: int) -> Iterator[tuple[Pair, tuple[int, int]]]:
        """Yield each pair with its size (H, W), in order; threads read and check ahead (OpenCV lets go of the GIL)."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task(f"{self.name} {split}", total=count)
            for checked in map_ahead(lambda index: self._read_and_check(split, index), range(count)):
                yield checked
                progress.advance(task)

    def _read_and_check(self, split: str, index: int) -> tuple[Pair, tuple[int, int]]:
        pair = self.pair(split, index)
        label = check_pair(pair, self.classes)
        return pair._replace(annotation=encode_annotation(label)), (label.shape[0], label.shape[1])


def check_pair(pair: Pair, classes: ClassTable) -> np.ndarray:
    """Decode both files of a pair and return the class values u8[H, W] of the annotation.

    Raises:
      ValueError: names the file: unreadable or truncated, colours in place of class values, sizes that differ, or a
        value that the class table does not know.
    """
    image = decode.decode_image(pair.image, pair.image_name)
    label = decode.decode_annotation(pair.annotation, pair.annotation_name)
    check_same_size(pair, image, label)
    classes.to_train(label, pair.annotation_name)
    return label


def check_same_size(pair: Pair, image: np.ndarray, label: np.ndarray) -> None:
    """Raise ValueError where the decoded image [H, W, 3] and annotation [H, W] of a pair differ in size."""
    if image.shape[:2] == label.shape:
        return
    hint = ""
    if image.shape[:2] == label.shape[::-1] and decode.exif_orientation(pair.image) > 4:
        hint = (
            "; viewers turn this photo by its EXIF orientation, but here its pixels are read as they are stored: "
            "turn the pixels themselves (`exiftran -ai` does) and drop the tag"
        )
    raise ValueError(
        f"{pair.image_name} is {image.shape[1]}x{image.shape[0]} pixels but its annotation {pair.annotation_name} "
        f"is {label.shape[1]}x{label.shape[0]}; both must have the same size{hint}."
    )


def shortfall(title: str, found: Mapping[str, Sized], full: Mapping[str, int]) -> str:
    """Return a sentence on the splits whose numbers of images are not the official ones, or ""."""
    wrong = [f"{len(found[split]):,} of {full[split]:,} {split}" for split in found if len(found[split]) != full[split]]
    return f"Not the full {title}: {' and '.join(wrong)} images." if wrong else ""


def encode_annotation(label: np.ndarray) -> bytes:
    """Encode class values u8[H, W] as the PNG that is decoded fastest, which matters as it is once an epoch.

    Without a filter zlib finds the runs of a class by itself: ADE20K's annotations are decoded in a third of the time
    that the files of its archive take.
    """
    options = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_DEFAULT]
    return bytes(cv2.imencode(".png", label, [*options, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE])[1])


def encode_png(pixels: np.ndarray) -> bytes:
    """Encode u8[H, W] or u8[H, W, 3] BGR, fast rather than small."""
    return bytes(cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1])
