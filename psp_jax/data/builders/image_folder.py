"""A folder of images and annotations: images/SPLIT/*.{jpg,png}, annotations/SPLIT/*.png and classes.json.

An image and its annotation have the same name up to the extension. A data set of one's own needs nothing more.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from psp_jax import classes as class_tables
from psp_jax.classes import ClassTable
from psp_jax.data.builders.base import Pair, PairBuilder
from psp_jax.data.decode import check_files

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
LAYOUT = "images/SPLIT/*.jpg, annotations/SPLIT/*.png and classes.json"


class Folder:
    """The pairs of a folder.

    Attributes:
      pairs: {split: [(image path, annotation path)], sorted by name}.

    Raises:
      FileNotFoundError, ValueError: the folder or a part of it is missing, or files without a partner; names the path.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        for part in (path, path / "images", path / "annotations"):
            if not part.is_dir():
                raise FileNotFoundError(f"There is no folder {part}; a folder of images holds {LAYOUT}.")
        splits = sorted(split.name for split in _visible(path / "images") if split.is_dir())
        if not splits:
            raise ValueError(
                f"{path / 'images'} has no folder for a split such as train or val; the layout is {LAYOUT}."
            )
        self.pairs = {split: _pairs(path, split) for split in splits}

    def record_name(self, table: ClassTable) -> str:
        """Return the folder's name and 12 hexadecimal digits of its class table and each file's name, size and time.

        A changed folder gets another name, and so is prepared anew. Content is not read: it may be many gigabytes.
        """
        digest = hashlib.sha256(json.dumps(table.as_dict()).encode())
        for pair in (pair for pairs in self.pairs.values() for pair in pairs):
            for file in pair:
                stat = file.stat()
                digest.update(f"{file.relative_to(self.path)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        return f"{self.short_name()}-{digest.hexdigest()[:12]}"

    def short_name(self) -> str:
        """Return the folder's own name, with `_` for what is awkward in a path."""
        return re.sub(r"[^A-Za-z0-9_.]", "_", self.path.resolve().name) or "folder"


class ImageFolder(PairBuilder):
    """A folder of images and annotations."""

    name = "image_folder"
    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, folder: Folder, classes: ClassTable, data_dir: Path) -> None:
        self.folder = folder
        self.classes = classes
        super().__init__(data_dir=data_dir)

    def splits(self) -> dict[str, int]:
        """Return the number of pairs of each split."""
        return {split: len(pairs) for split, pairs in self.folder.pairs.items()}

    def pair(self, split: str, index: int) -> Pair:
        """Return pair `index` of `split`, in the order of file names."""
        image, annotation = self.folder.pairs[split][index]
        return Pair(image.stem, image.read_bytes(), annotation.read_bytes(), str(image), str(annotation))


def open_folder(path: str | Path, classes: str | Path | None) -> tuple[Folder, ClassTable]:
    """Return the folder and its class table: the one named, or else the classes.json in the folder.

    Raises:
      FileNotFoundError, ValueError: see `Folder` and `folder_classes`.
    """
    folder = Folder(Path(path).expanduser())
    return folder, folder_classes(folder.path, classes)


def folder_classes(path: Path, classes: str | Path | None) -> ClassTable:
    """Return the class table named, or else the one in the folder's classes.json.

    Raises:
      FileNotFoundError, ValueError: see `classes.get`; no classes named and no classes.json.
    """
    own = path / "classes.json"
    if not classes and not own.is_file():
        raise FileNotFoundError(
            f'There is no {own}; write one such as {{"names": ["road", "tree"], "ignore": 255}}, or name a class table '
            f"({', '.join(class_tables.NAMES)} or the path of a JSON file)."
        )
    return class_tables.get(classes or own)


def _visible(path: Path) -> Iterator[Path]:
    return (file for file in path.iterdir() if not file.name.startswith("."))


def _pairs(path: Path, split: str) -> list[tuple[Path, Path]]:
    """Return the (image, annotation) paths of a split; raise where one has no partner."""
    images_dir, annotations_dir = path / "images" / split, path / "annotations" / split
    if not annotations_dir.is_dir():
        raise FileNotFoundError(f"There is no folder {annotations_dir} for the images in {images_dir}.")
    images: dict[str, Path] = {}
    for file in _visible(images_dir):
        if file.suffix.lower() not in IMAGE_SUFFIXES:
            raise ValueError(f"{file} is none of {', '.join(IMAGE_SUFFIXES)}; convert it or move it away.")
        if file.stem in images:
            raise ValueError(
                f"{file} and {images[file.stem].name} have the same name; one annotation cannot serve both."
            )
        images[file.stem] = file
    annotations = {file.stem: file for file in _visible(annotations_dir) if file.suffix.lower() == ".png"}
    if not images:
        raise ValueError(f"{images_dir} has no images ({', '.join(IMAGE_SUFFIXES)}).")
    check_files([*images.values(), *annotations.values()])
    for ours, theirs, other in ((images, annotations, annotations_dir), (annotations, images, images_dir)):
        if alone := sorted(ours.keys() - theirs.keys()):
            raise ValueError(f"{ours[alone[0]]} has no file of the same name in {other} ({len(alone)} such files).")
    return [(images[stem], annotations[stem]) for stem in sorted(images)]
