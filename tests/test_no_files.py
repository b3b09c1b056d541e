"""What has the name of an image or a label but is no file, and folders on one side only: told by name."""

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import data_sets
import pytest
from conftest import ROOT

from psp_jax import classes, predict
from psp_jax.check_data import check_data
from psp_jax.config_file import read_config
from psp_jax.data.prepared import ensure_prepared
from psp_jax.new_dataset import new_dataset
from psp_jax.score import score

WORDS = r"is no file \(but a folder, a pipe, a socket, a device or a link to nothing\); move it away"


def pipe(path: Path) -> None:
    """Make a pipe that gives who reads it nothing, so that a test fails where it would hang."""
    os.mkfifo(path)
    threading.Thread(target=lambda: os.close(os.open(path, os.O_WRONLY)), daemon=True).start()


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(path.parent):  # a path has at most 107 characters
        server.bind(path.name)


MADE: dict[str, Callable[[Path], None]] = {
    "pipe": pipe,
    "socket": listening,
    "folder": Path.mkdir,
    "link to nothing": lambda path: path.symlink_to("nowhere"),
    "link to a device": lambda path: path.symlink_to("/dev/null"),
}


@pytest.fixture
def photos(tmp_path: Path) -> Iterator[Path]:
    yield data_sets.write_folder(tmp_path / "photos", {"train": 3, "val": 3})
    for path in tmp_path.rglob("*"):
        if path.is_fifo():  # let go of the thread that waits for a reader
            os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))


@pytest.mark.parametrize("part", ["images", "annotations"])
@pytest.mark.parametrize("kind", MADE)
def test_in_a_data_set(photos: Path, kind: str, part: str) -> None:
    (path,) = photos.glob(f"{part}/train/photo001.*")
    path.unlink()
    MADE[kind](path)
    with pytest.raises(ValueError, match=f"^{path} {WORDS}"):
        ensure_prepared("image_folder", photos, prepared_dir=photos.parent / "prepared", say=lambda _: None)
    data = read_config(str(ROOT / "configs" / "folder.py"), [f"--config.data.dir={photos}"]).data
    (found,) = [finding for finding in check_data(data, photos.parent / "check") if finding.level == "error"]
    assert [item.partition(" is no file")[0] for item in found.items] == [str(path)]


@pytest.mark.parametrize("kind", [kind for kind in MADE if kind != "folder"])  # folders of any name are searched
@pytest.mark.parametrize("part", ["images", "annotations"])
def test_among_images_and_masks(photos: Path, kind: str, part: str) -> None:
    path = photos / part / "train" / "other.png"
    MADE[kind](path)
    with pytest.raises(ValueError, match=f"^{path} {WORDS}"):
        new_dataset(photos / "images", photos / "annotations", photos.parent / "new")


@pytest.mark.parametrize("kind", MADE)
def test_among_annotations_to_score(photos: Path, kind: str) -> None:
    folder = photos / "annotations" / "train"
    MADE[kind](folder / "other.png")
    with pytest.raises(ValueError, match=f"^{folder}/other.png {WORDS}"):
        score(folder, folder, classes.get(photos / "classes.json"))


def test_among_images_to_label(photos: Path) -> None:
    folder = photos / "images" / "train"
    kinds = [kind for kind in MADE if kind != "folder"]
    for kind in kinds:
        MADE[kind](folder / f"{kind}.jpg")
    MADE["folder"](folder / "deep.jpg")
    images = predict.find_images([folder], photos / "out")
    read = dict(predict._read_ahead(images, 2))
    told = sorted(str(error) for error in read.values() if isinstance(error, ValueError))
    assert [line.partition(" is no file")[0] for line in told] == sorted(f"{folder}/{kind}.jpg" for kind in kinds)
    assert len(read) == len(kinds) + 3
    with pytest.raises(ValueError, match=r"/pipe\.jpg is neither a file nor a folder"):
        predict.find_images([folder / "pipe.jpg"], photos / "out")


def test_folders_on_one_side_only(photos: Path) -> None:
    data = read_config(str(ROOT / "configs" / "folder.py"), [f"--config.data.dir={photos}"]).data

    def told(level: str) -> list[str]:
        found = check_data(data, photos.parent / "check")
        return [item for f in found if f.level == level and "same image" not in f.title for item in f.items]

    assert told("error") == told("warning") == []
    images, annotations = photos / "images" / "extra", photos / "annotations" / "extra"
    data_sets.unpack(annotations, {"a.png": b""})
    assert (told("error"), told("warning")) == ([], [f"{annotations} has no folder of images {images}."])
    ensure_prepared("image_folder", photos, prepared_dir=photos.parent / "prepared", say=lambda _: None)
    annotations.rename(images)
    assert (told("error"), told("warning")) == (
        [f"{images} holds images (1), but there is no folder {annotations}."],
        [],
    )
