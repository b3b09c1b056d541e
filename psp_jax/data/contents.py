"""Every pair that a data set has, sound or not, and the files that belong to no pair.

`Folder` and `Source` refuse a data set at the first thing that is wrong; this goes on, for a check that names all.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from psp_jax.classes import ClassTable
from psp_jax.data.builders import Pair
from psp_jax.data.builders.image_folder import IMAGE_SUFFIXES, Folder, folder_classes
from psp_jax.data.decode import NO_FILE
from psp_jax.data.source import Source, open_source, read_info

Pairs = dict[str, list[tuple[Path, Path]]]


class Problem(NamedTuple):
    """One thing that is wrong: its kind, the split, the file, and the whole sentence.

    The kind is a key of `findings.ERRORS`, or "unused", which training does not stumble over.
    """

    kind: str
    split: str
    name: str
    message: str


@dataclass(frozen=True)
class Contents:
    """The pairs of a data set.

    Attributes:
      where: the folder.
      classes: its class table.
      counts: {split: number of pairs}.
      pair: `pair(split, index)` reads one, in any thread; raises OSError or ValueError where it cannot be read.
      problems: files and folders that belong to no pair.
    """

    where: str
    classes: ClassTable
    counts: dict[str, int]
    pair: Callable[[str, int], Pair]
    problems: tuple[Problem, ...]


def open_contents(
    name: str, data_dir: str | Path, split: str, *, prepared_dir: str | Path = "data", classes: str | Path | None = None
) -> Contents:
    """Open a data set: an image_folder as it is, any other from its prepared records.

    Args:
      name, data_dir, prepared_dir, classes: see `builders.locate`.
      split: one that must be there, where records are read.

    Raises:
      FileNotFoundError, ValueError: no such data set, not prepared, damaged as a whole, or no class table.
    """
    if name == "image_folder":
        return _open_folder(Path(data_dir).expanduser(), classes)
    first = open_source(name, data_dir, split, prepared_dir=prepared_dir, classes=classes)
    directory = first.directory
    sources = {split: Source(directory, split) for split in read_info(directory)[0].splits}
    counts = {split: len(source) for split, source in sources.items()}
    return Contents(str(directory), first.classes, counts, lambda split, index: sources[split].pair(index), ())


def _open_folder(path: Path, classes: str | Path | None) -> Contents:
    pairs, problems = _list_pairs(path)
    try:
        Folder(path)
    except (FileNotFoundError, ValueError):
        if not pairs:  # the folder as a whole is none
            raise

    def pair(split: str, index: int) -> Pair:
        image, annotation = pairs[split][index]
        return Pair(image.name, image.read_bytes(), annotation.read_bytes(), str(image), str(annotation))

    counts = {split: len(found) for split, found in pairs.items()}
    return Contents(str(path), folder_classes(path, classes), counts, pair, tuple(problems))


def _list_pairs(path: Path) -> tuple[Pairs, list[Problem]]:
    """Return the pairs {split: [(image, annotation)]} of a folder, and a problem for every file that is in none."""
    pairs: Pairs = {}
    problems: list[Problem] = []
    for split in sorted(child.name for child in _children(path / "images") if child.is_dir()):
        images_dir, annotations_dir = path / "images" / split, path / "annotations" / split

        def report(file: Path, what: str, split: str = split) -> None:
            problems.append(Problem("layout", split, str(file), f"{file} {what}."))

        images: dict[str, Path] = {}
        for file in _children(images_dir):
            if file.suffix.lower() not in IMAGE_SUFFIXES:
                report(file, f"is none of {', '.join(IMAGE_SUFFIXES)}; convert it or move it away")
            elif file.stem in images:
                report(file, f"and {images[file.stem].name} have the same name; one annotation cannot serve both")
            else:
                images[file.stem] = file
        if not images:
            report(images_dir, "holds no images")
        elif not annotations_dir.is_dir():
            report(images_dir, f"holds images ({len(images):,}), but there is no folder {annotations_dir}")
            images = {}
        annotations = {file.stem: file for file in _children(annotations_dir) if file.suffix.lower() == ".png"}
        for stem in sorted(images.keys() ^ annotations.keys()):
            alone, other = (images[stem], annotations_dir) if stem in images else (annotations[stem], images_dir)
            report(alone, f"has no {'.png' if stem in images else 'image'} of the same name in {other}")
        found = [(images[stem], annotations[stem]) for stem in sorted(images.keys() & annotations.keys())]
        for file in (file for pair in found for file in pair if not file.is_file()):
            report(file, NO_FILE)
        pairs[split] = [pair for pair in found if all(file.is_file() for file in pair)]
    for folder in _children(path / "annotations"):
        if folder.is_dir() and folder.name not in pairs:
            message = f"{folder} has no folder of images {path / 'images' / folder.name}."
            problems.append(Problem("unused", folder.name, str(folder), message))
    return pairs, problems


def _children(folder: Path) -> list[Path]:
    """Return what a folder holds, hidden files left out, sorted; nothing where there is no such folder."""
    return sorted(child for child in folder.iterdir() if child.name[0] != ".") if folder.is_dir() else []
