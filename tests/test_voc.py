"""PASCAL VOC 2012 with SBD, and PASCAL-Context, from archives in the official layouts."""

import tarfile
from pathlib import Path

import data_sets
import numpy as np
import pytest
from data_sets import VOC_IDS

from psp_jax import classes
from psp_jax.data.builders import voc2012
from psp_jax.data.builders.pascal_context import to_classes
from psp_jax.data.prepared import describe, ensure_prepared
from psp_jax.data.source import Source, open_source

VOC, SBD = "VOCtrainval_11-May-2012.tar", "benchmark.tgz"


def archives(folder: Path) -> Path:
    folder.mkdir()
    data_sets.write_tar(folder / VOC, data_sets.voc_members())
    data_sets.write_tar(folder / SBD, data_sets.sbd_members())
    return folder


def prepare(tmp_path: Path, folder: Path, name: str = "voc2012") -> Path:
    return ensure_prepared(name, tmp_path / "data", archive=folder, say=lambda text: None)


def contents(directory: Path, split: str) -> dict[str, np.ndarray]:
    source = Source(directory, split)
    return {example["id"]: example["label"] for example in map(source.__getitem__, range(len(source)))}


def check_voc(directory: Path) -> None:
    train, val = contents(directory, "train"), contents(directory, "validation")
    assert (list(train), list(val)) == (VOC_IDS[:3], VOC_IDS[3:5])
    aug = contents(directory, "train_aug")
    assert list(aug) == [*VOC_IDS[:3], *VOC_IDS[5:]]  # of VOC val nothing, though SBD has it
    for index, id in enumerate(VOC_IDS[:3]):  # VOC's own annotation also where SBD has one
        assert (train[id] == data_sets.voc_label(index)).all() and (aug[id] == train[id]).all()
        assert (train[id][0] == 255).all()
    for index in (5, 6):
        assert (aug[VOC_IDS[index]] == 20).all() and aug[VOC_IDS[index]].shape == data_sets.SIZES[index % 3]
    assert np.abs(Source(directory, "train_aug")[4]["image"].astype(int) - data_sets.image(6)).max() <= 2


def test_voc_from_archives(tmp_path: Path) -> None:
    directory = prepare(tmp_path, archives(tmp_path / "archives"))
    check_voc(directory)
    note = "Not the full PASCAL VOC 2012: 3 of 1,464 train and 2 of 1,449 validation and 5 of 10,582 train_aug images."
    assert describe(directory).endswith(f"21 classes. {note}")


@pytest.mark.parametrize("named", ["", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_voc_from_unpacked_folders(tmp_path: Path, named: str) -> None:
    root = data_sets.unpack(tmp_path / "unpacked", data_sets.voc_members())
    data_sets.unpack(root / named, data_sets.sbd_members())
    check_voc(prepare(tmp_path, root / named))


@pytest.mark.parametrize("place", ["SegmentationClassAug.zip", "SegmentationClassAug", "VOCdevkit/VOC2012"])
def test_segmentation_class_aug_in_place_of_sbd(tmp_path: Path, place: str) -> None:
    root = data_sets.unpack(tmp_path / "unpacked", data_sets.voc_members())
    members = {f"SegmentationClassAug/{VOC_IDS[i]}.png": data_sets.encode(data_sets.sbd_label(i)) for i in range(1, 7)}
    if place.endswith(".zip"):
        data_sets.write_zip(root / place, members)
    else:
        data_sets.unpack(root / place.removesuffix("SegmentationClassAug"), members)
    check_voc(prepare(tmp_path, root))


def test_without_sbd_there_is_no_train_aug(tmp_path: Path) -> None:
    data_sets.write_tar(tmp_path / VOC, data_sets.voc_members())
    directory = prepare(tmp_path, tmp_path)
    assert list(contents(directory, "train+validation")) == [
        *(f"train.{id}" for id in VOC_IDS[:3]),
        *(f"validation.{id}" for id in VOC_IDS[3:5]),
    ]
    message = rf"no split 'train_aug', it was prepared without benchmark\.tgz .* delete the folder {directory} and prep"
    for split in ("train_aug", "train+train_aug"):
        with pytest.raises(ValueError, match=message):
            open_source("voc2012", tmp_path / "data", split)
    with pytest.raises(ValueError, match=r"its splits are train, validation, and \+ joins several"):
        open_source("voc2012", tmp_path / "data", "trainval")


def test_the_lists_of_the_full_set_make_10582(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """VOC's 1,464 and 1,449 images, and SBD's 11,355, of which 2,237 are VOC's: lists alone, without pixels."""
    ids = [f"{index:04}_{index:06}" for index in range(12031)]
    train, val, others = ids[:1464], ids[1464:2913], ids[2913:]
    shared = train[:1000] + val[:1237]
    lists = {"train.txt": others[:7000] + shared, "val.txt": others[7000:]}
    root = data_sets.unpack(tmp_path, {f"benchmark_RELEASE/dataset/{k}": data_sets.lines(*v) for k, v in lists.items()})
    for name, part in (("train", train), ("val", val)):
        members = {f"VOCdevkit/VOC2012/ImageSets/Segmentation/{name}.txt": data_sets.lines(*part)}
        data_sets.unpack(root, members)
    monkeypatch.setattr("psp_jax.data.builders.files.Files.check", lambda self, names: None)
    monkeypatch.setattr("psp_jax.data.builders.files.Files.read", lambda self, name: (self.path / name).read_bytes())
    builder = voc2012.Voc2012(folder=root, data_dir=tmp_path / "data")
    assert builder.splits() == {"train": 1464, "validation": 1449, "train_aug": 10582} and builder.note == ""


TWENTY_ONE = {"Segmentation": np.full(data_sets.SIZES[2], 21, np.uint8)}


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("SegmentationClass/2001_000001.png", None, r"There is no .*SegmentationClass/2001_000001\.png \(1 such"),
        ("VOC2012/JPEGImages/2005_000005.jpg", None, r"no .*JPEGImages/2005_000005\.jpg .* incomplete; fetch"),
        ("cls/2006_000006.mat", None, r"There is no .*benchmark\.tgz/.*/cls/2006_000006\.mat \(1 such files\)"),
        ("dataset/val.txt", None, r"There is no .*benchmark\.tgz/benchmark_RELEASE/dataset/val\.txt"),
        ("Segmentation/val.txt", b"", r"Segmentation/val\.txt is not a list of images \('it is empty'\)"),
        ("Segmentation/val.txt", b"<html>", r"val\.txt is not a list of images \('<html>'\); fetch"),
        ("Segmentation/val.txt", b"../../a\n", r"is not a list of images \('\.\./\.\./a'\)"),
        ("Segmentation/val.txt", b"2009_999999\n", r"There is no .*JPEGImages/2009_999999\.jpg"),
        ("cls/2005_000005.mat", b"MATLAB", r"cls/2005_000005\.mat is not a readable \.mat label file \(.*fetch"),
        ("cls/2005_000005.mat", data_sets.matrix("x", 1), r"cls/2005_000005\.mat is not a readable"),
        ("cls/2005_000005.mat", data_sets.matrix("GTcls", "text"), r"2005_000005\.mat is not a readable"),
        ("cls/2005_000005.mat", data_sets.matrix("GTcls", TWENTY_ONE), r"2005_000005\.mat holds the value 21"),
        (
            "cls/2006_000006.mat",
            data_sets.matrix("GTcls", {"Segmentation": np.zeros((3, 4))}),
            r"2006_000006\.jpg is 32x24 pixels but its annotation .*2006_000006\.mat is 4x3",
        ),
        (
            "SegmentationClass/2001_000001.png",
            data_sets.encode(data_sets.annotation(1, 22)),
            r"tar/VOCdevkit/VOC2012/SegmentationClass/2001_000001\.png holds the value 21",
        ),
    ],
)
def test_unsuitable_content(tmp_path: Path, name: str, data: bytes | None, problem: str) -> None:
    for archive, members in ((VOC, data_sets.voc_members()), (SBD, data_sets.sbd_members())):
        changed = {key: data if key.endswith(name) else value for key, value in members.items()}
        data_sets.write_tar(tmp_path / archive, {key: value for key, value in changed.items() if value is not None})
    with pytest.raises(ValueError, match=problem):
        prepare(tmp_path, tmp_path)
    assert not list((tmp_path / "data").rglob("*.json"))


def test_a_damaged_matrix_is_named_whatever_the_reader_raises() -> None:
    whole = data_sets.matrix("GTcls", {"Segmentation": np.eye(40, dtype=np.uint8)})
    assert (voc2012.read_matrix(whole, "a.mat", "GTcls", "Segmentation") == np.eye(40)).all()
    damaged = [whole[:length] for length in range(0, len(whole), 7)]
    damaged += [whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :] for at in range(120, len(whole))]
    refused = 0
    for data in damaged:
        try:
            voc2012.read_matrix(data, "x/a.mat", "GTcls", "Segmentation")
        except ValueError as error:
            assert str(error).startswith("x/a.mat is not a readable .mat label file (")
            refused += 1
    assert refused > len(damaged) / 2


def test_context_from_archives_and_folders(tmp_path: Path) -> None:
    images, labels = data_sets.context_members()
    folder = tmp_path / "archives"
    folder.mkdir()
    data_sets.write_tar(folder / "VOCtrainval_03-May-2010.tar", images)
    data_sets.write_tar(folder / "trainval.tar.gz", labels)
    unpacked = data_sets.unpack(tmp_path / "unpacked", images | labels)
    for place in (folder, unpacked):
        directory = prepare(tmp_path / place.name, place, "pascal_context")
        assert "Not the full PASCAL-Context: 3 of 4,998 train and 2 of 5,105 validation" in describe(directory)
        source = Source(directory, "validation")
        assert (len(source), source.ids(0)) == (2, "2010_000003")
        label = source[0]["label"]
        # Objects 1, 2, 9 and 458 of the data set's labels.txt: accordion (no class), aeroplane, bag, wood.
        assert [label.flat[n - 1] for n in (1, 2, 9, 458, 459)] == [255, 0, 1, 58, 255]
        assert {source.classes.names[label.flat[n - 1]] for n in (284, 23, 360)} == {"person", "bicycle", "sky"}
        counts = np.bincount(label.ravel()[:459], minlength=256)
        assert (counts[:59] == 1).all() and counts[255] == 400


def test_context_refuses_in_words(tmp_path: Path) -> None:
    images, labels = data_sets.context_members()
    data_sets.write_tar(tmp_path / "VOCtrainval_03-May-2010.tar", images)
    with pytest.raises(FileNotFoundError, match=r"neither trainval\.tar\.gz nor the folder trainval .*roozbeh"):
        prepare(tmp_path, tmp_path, "pascal_context")
    data_sets.write_tar(tmp_path / "trainval.tar.gz", {k: v for k, v in labels.items() if "000004" not in k})
    with pytest.raises(ValueError, match=r"There is no .*trainval\.tar\.gz/trainval/2010_000004\.mat"):
        prepare(tmp_path, tmp_path, "pascal_context")
    with pytest.raises(ValueError, match=r"^a\.mat holds the object 460; PASCAL-Context has 1-459\.$"):
        to_classes(np.array([[1, 460]]), "a.mat")


def test_context_classes_are_in_the_order_of_the_alphabet() -> None:
    names = classes.get("pascal_context").names
    assert list(names) == sorted(names) and len(names) == 59


def test_links_and_names_that_lead_elsewhere_are_harmless(tmp_path: Path) -> None:
    folder = archives(tmp_path / "archives")
    with tarfile.open(folder / VOC, "a") as tar:
        link = tarfile.TarInfo(f"VOCdevkit/VOC2012/JPEGImages/{VOC_IDS[0]}.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        tar.addfile(tarfile.TarInfo("VOCdevkit/VOC2012/JPEGImages/../../../../evil.jpg"))
        tar.addfile(tarfile.TarInfo("/tmp/evil.jpg"))
    check_voc(prepare(tmp_path, folder))
    assert not list(tmp_path.rglob("*evil*"))
