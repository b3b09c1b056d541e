"""ADE20K scene parsing (Zhou et al., CVPR 2017): ADEChallengeData2016, 150 classes, 20,210 + 2,000 images.

Read straight from the zip file, or from the folder that it was unpacked to. Annotation 0 is "other", k is class k-1.
"""

import re
import tarfile
from pathlib import Path

import tensorflow_datasets as tfds

from psp_jax import classes as class_tables
from psp_jax.data.builders.base import Pair, PairBuilder, shortfall
from psp_jax.data.builders.files import Files

FULL_COUNTS = {"train": 20_210, "validation": 2_000}
KINDS = ("images", "annotations")
SPLIT_OF_FOLDER = {"training": "train", "validation": "validation"}
MEMBER = re.compile(r"(?:^|/)(images|annotations)/(training|validation)/([^/]+)\.(jpg|png)$")
OTHER_FLAVOURS = {
    "the full ADE20K data set (3,000 object names, *_seg.png)": re.compile(r"_seg\.png$|index_ade20k\.|ADE20K_20\d\d_"),
    "the instance segmentation labels of the 2017 challenge": re.compile(r"annotations_instance|ChallengeData2017"),
}


class Archive:
    """The files of ADEChallengeData2016, in a zip file or unpacked in a folder, by split and name.

    Attributes:
      names: {split: names without extension, sorted}.

    Raises:
      FileNotFoundError, ValueError: no such file, damaged, another data set, or files without a counterpart.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.exists():
            raise FileNotFoundError(f"There is no archive {path}; give the path of ADEChallengeData2016.zip.")
        if path.is_file() and tarfile.is_tarfile(path):
            _refuse_tar(path)
        self._files = Files(path)
        members = list(self._files.names)
        self._members: dict[tuple[str, str, str], str] = {}
        for member in members:
            match = MEMBER.search(member)
            if match and not match[3].startswith("."):
                kind, folder, name, _ = match.groups()
                self._members[kind, SPLIT_OF_FOLDER[folder], name] = member
        if len({key[:2] for key in self._members}) < 2 * len(FULL_COUNTS):
            self._refuse_other_flavours(members)
        self.names = {split: self._matched_names(split) for split in FULL_COUNTS}

    def read(self, kind: str, split: str, name: str) -> tuple[bytes, str]:
        """Return the bytes of one file and its full name; a zip member's checksum is verified."""
        member = self._members[kind, split, name]
        return self._files.read(member), self._files.where(member)

    def _refuse_other_flavours(self, members: list[str]) -> None:
        for what, pattern in OTHER_FLAVOURS.items():
            if found := next((member for member in members if pattern.search(member)), None):
                raise ValueError(
                    f"{self.path} is {what}, as {found} shows; this needs the scene parsing labels of "
                    "ADEChallengeData2016.zip (150 classes)."
                )

    def _matched_names(self, split: str) -> list[str]:
        """Return the sorted names of a split; raise ValueError unless every image has its annotation and vice versa."""
        folder = next(folder for folder, name in SPLIT_OF_FOLDER.items() if name == split)
        found: dict[str, set[str]] = {}
        for kind in KINDS:
            found[kind] = {name for k, s, name in self._members if (k, s) == (kind, split)}
            if not found[kind]:
                raise ValueError(
                    f"{self.path} has no {kind}/{folder}: it is incomplete, or not ADEChallengeData2016.zip "
                    "(images/ and annotations/, each with training/ and validation/)."
                )
        for kind, other in (KINDS, KINDS[::-1]):
            if alone := sorted(found[kind] - found[other]):
                raise ValueError(
                    f"{self.path}: {self._members[kind, split, alone[0]]} has no counterpart in {other}/{folder} "
                    f"({len(alone)} such files); the archive is incomplete."
                )
        return sorted(found["images"])


class Ade20k(PairBuilder):
    """ADE20K scene parsing, 150 classes."""

    name = "ade20k"
    VERSION = tfds.core.Version("1.0.0")
    classes = class_tables.get("ade20k")
    homepage = "http://sceneparsing.csail.mit.edu/"
    citation = (
        "Bolei Zhou, Hang Zhao, Xavier Puig, Sanja Fidler, Adela Barriuso, Antonio Torralba: "
        "Scene Parsing through ADE20K Dataset. CVPR 2017."
    )

    def __init__(self, *, archive: Archive, data_dir: Path) -> None:
        self.archive = archive
        self.note = shortfall("ADE20K", archive.names, FULL_COUNTS)
        super().__init__(data_dir=data_dir)

    def splits(self) -> dict[str, int]:
        """Return the number of pairs of each split."""
        return {split: len(names) for split, names in self.archive.names.items()}

    def pair(self, split: str, index: int) -> Pair:
        """Return pair `index` of `split`, in the order of file names."""
        name = self.archive.names[split][index]
        image, image_name = self.archive.read("images", split, name)
        annotation, annotation_name = self.archive.read("annotations", split, name)
        return Pair(name, image, annotation, image_name, annotation_name)


def _refuse_tar(path: Path) -> None:
    with tarfile.open(path) as tar:
        first = tar.next()
    seen = first.name if first else ""
    what = next((what for what, pattern in OTHER_FLAVOURS.items() if pattern.search(seen)), "a tar archive")
    raise ValueError(f"{path} is {what}; this needs ADEChallengeData2016.zip (or the folder unpacked from it).")
