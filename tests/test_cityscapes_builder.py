"""Cityscapes from its archives and folders: fine and coarse annotations, and training on several splits at once."""

import zipfile
from pathlib import Path

import data_sets
import numpy as np
import pytest

from psp_jax.data.builders.cityscapes import BLACK
from psp_jax.data.pipeline import train_batches
from psp_jax.data.prepared import describe, ensure_prepared
from psp_jax.data.source import Source, open_source

ARCHIVES = {
    "leftImg8bit_trainvaltest.zip": ("leftImg8bit", {"train": 3, "val": 2, "test": 1}),
    "gtFine_trainvaltest.zip": ("gtFine", {"train": 3, "val": 2, "test": 1}),
    "gtCoarse.zip": ("gtCoarse", {"train": 3, "val": 2, "train_extra": 4}),
    "leftImg8bit_trainextra.zip": ("leftImg8bit", {"train_extra": 4}),
}


def write(folder: Path, number: int = 4) -> Path:
    """Write the first of the archives."""
    folder.mkdir(exist_ok=True)
    for name in list(ARCHIVES)[:number]:
        kind, counts = ARCHIVES[name]
        data_sets.write_zip(folder / name, data_sets.cityscapes_members(kind, **counts))
    return folder


def prepare(tmp_path: Path, folder: Path) -> Path:
    return ensure_prepared("cityscapes", tmp_path / "data", archive=folder, say=lambda text: None)


def train_ids(index: int) -> np.ndarray:
    """Return the label of example `index` from the table in cityscapesScripts' labels.py."""
    table = np.full(34, 255)
    table[[7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]] = np.arange(19)
    return table[data_sets.annotation(index, 34)]


def test_all_four_archives(tmp_path: Path) -> None:
    directory = prepare(tmp_path, write(tmp_path / "archives"))
    assert describe(directory).endswith(
        "19 classes. Not the full Cityscapes: 3 of 2,975 train and 2 of 500 validation and 3 of 2,975 train_coarse and "
        "4 of 19,997 train_extra images."
    )
    order = [0, 2, 1, 3]  # by city: aachen has the even ones
    for split, count in (("train", 3), ("validation", 2), ("train_coarse", 3), ("train_extra", 4)):
        source = Source(directory, split)
        assert len(source) == count
        for position, index in enumerate([index for index in order if index < count]):
            city = ("aachen", "bad-honnef")[index % 2]
            example = source[position]
            assert example["id"].removesuffix("_coarse") == f"{city}_00000{index}_000019"
            assert example["id"].endswith("_coarse") == (split == "train_coarse")
            assert (example["label"] == train_ids(index)).all()
            assert (example["image"] == data_sets.image(index)).all()


def test_fine_annotations_alone_and_unpacked(tmp_path: Path) -> None:
    root = tmp_path / "unpacked"
    for archive in sorted(write(tmp_path / "archives", 2).glob("*.zip")):
        with zipfile.ZipFile(archive) as file:
            file.extractall(root)
    directory = prepare(tmp_path, root)
    assert [len(Source(directory, split)) for split in ("train", "validation")] == [3, 2]
    for split, missing in (("train_coarse", "gtCoarse.zip"), ("train_extra", "leftImg8bit_trainextra.zip and gtCoa")):
        with pytest.raises(ValueError, match=f"no split '{split}', it was prepared without {missing}.*delete the fold"):
            open_source("cityscapes", tmp_path / "data", f"train+{split}")


def test_the_black_image_is_left_out(tmp_path: Path) -> None:
    for name, (kind, counts) in ARCHIVES.items():
        members = data_sets.cityscapes_members(kind, **counts)
        if name == "leftImg8bit_trainextra.zip":
            members[f"leftImg8bit/train_extra/troisdorf/{BLACK}_leftImg8bit.png"] = b"damaged"
        data_sets.write_zip(tmp_path / name, members)
    assert len(Source(prepare(tmp_path, tmp_path), "train_extra")) == 4


@pytest.mark.parametrize(
    ("archive", "without", "problem"),
    [
        ("gtFine_trainvaltest.zip", "bad-honnef_000001_000019_gtFine_labelIds", r"leftImg8bit/train/bad-honnef/.*"
         r"_leftImg8bit\.png has no counterpart in .*gtFine_trainvaltest\.zip/gtFine/train \(1 such files\)"),
        ("leftImg8bit_trainextra.zip", "000002_000019", r"gtCoarse_labelIds\.png has no counterpart in .*train_extra"),
        ("gtFine_trainvaltest.zip", "/val/", r"no val is in gtFine_trainvaltest\.zip; fetch it again"),
        ("gtFine_trainvaltest.zip", "gtFine/", r"gtFine_trainvaltest\.zip has no folder gtFine, it is another archive"),
    ],
)  # fmt: skip
def test_incomplete_archives(tmp_path: Path, archive: str, without: str, problem: str) -> None:
    write(tmp_path)
    kind, counts = ARCHIVES[archive]
    members = data_sets.cityscapes_members(kind, **counts)
    data_sets.write_zip(tmp_path / archive, {name: data for name, data in members.items() if without not in name})
    with pytest.raises(ValueError, match=problem):
        prepare(tmp_path, tmp_path)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_several_splits_train_as_one(tmp_path: Path, num_workers: int) -> None:
    directory = prepare(tmp_path, write(tmp_path / "archives"))
    source = Source(directory, "validation+train+train_coarse+train_extra")
    parts = [Source(directory, split) for split in ("validation", "train", "train_coarse", "train_extra")]
    assert (len(source), source.max_size, source.split) == (12, (40, 32), "validation+train+train_coarse+train_extra")
    assert source.max_size == tuple(np.max([part.max_size for part in parts], axis=0))
    assert source.sizes() == [size for part in parts for size in part.sizes()]
    examples = [(part.split, part[index]) for part in parts for index in range(len(part))]
    for index, (split, example) in enumerate(examples):
        assert source.ids(index) == source[index]["id"] == f"{split}.{example['id']}"
        assert (source[index]["image"] == example["image"]).all() and (source[index]["label"] == example["label"]).all()
    assert len({source.ids(index) for index in range(12)}) == 12
    with pytest.raises(IndexError, match=r"no example 12 in validation\+train"):
        source[12]
    batches = train_batches(source, crop_size=(16, 16), batch_size=4, seed=1, num_steps=3, num_workers=num_workers)
    seen = np.concatenate([batch["index"] for batch in batches])
    assert sorted(seen) == list(range(12))  # one epoch: each example once


def test_splits_are_named_once_and_exist(tmp_path: Path) -> None:
    prepare(tmp_path, write(tmp_path / "archives"))
    for split, problem in (
        ("train+train", r"The split train stands twice in train\+train; name each once"),
        ("train+", r"has no split ''; its splits are train, validation, train_coarse, train_extra, and \+ joins"),
        ("train[:1]", r"has no split 'train\[:1\]'"),
    ):
        with pytest.raises(ValueError, match=problem):
            open_source("cityscapes", tmp_path / "data", split)


def test_image_folders_join_splits_with_the_same_names(tmp_path: Path) -> None:
    photos = data_sets.write_folder(tmp_path / "photos", {"train": 2, "val": 1})
    ensure_prepared("image_folder", photos, prepared_dir=tmp_path / "data", say=lambda text: None)
    source = open_source("image_folder", photos, "train+val", prepared_dir=tmp_path / "data")
    assert [source.ids(index) for index in range(3)] == ["train.photo000", "train.photo001", "val.photo000"]
