"""What the check of a data set says of images in several splits, and of classes that a split lacks."""

import tracemalloc

import numpy as np
import pytest

from psp_jax.classes import ClassTable
from psp_jax.data.builders import Pair
from psp_jax.data.contents import Contents
from psp_jax.data.findings import Findings, first_look, off_by_one
from psp_jax.data.survey import Look, look

TABLE = ClassTable("t", ("road", "sky"), np.zeros((2, 3)), (0, 1), (255,))
TWO_SPLITS = "The same image in two splits"


def test_only_images_in_training_and_evaluation_are_in_two_splits_too_many() -> None:
    found = Findings(TABLE, ["train", "train_aug", "validation", "test"])
    places = {
        b"overlap": ("train/a", "train_aug/a"),
        b"leak": ("train/b", "train_aug/b", "validation/x"),  # not in the order of the splits that are asked for
        b"submitted": ("validation/y", "test/y"),
        b"own": ("validation/z",),
    }
    for digest, names in places.items():
        for name in names:
            found.add(Look(*name.split("/"), (), digest=digest))

    def items(*splits: str) -> dict[str, list[str]]:
        return {f.title: f.items for f in found.all(*splits) if f.title != "Few images to evaluate on"}

    leak, also = "train_aug/b and validation/x", "train/b and validation/x"
    assert items("train_aug", "validation") == {TWO_SPLITS: [leak]}
    assert items("train+train_aug", "validation") == {TWO_SPLITS: [also, leak]}
    assert items("train_aug+validation", "validation") == {TWO_SPLITS: [leak]}
    assert items("train", "test") == {}
    found.add(Look("validation", "w", (), digest=b"leak"))
    assert items("train_aug", "validation") == {
        TWO_SPLITS: [leak, "train_aug/b and validation/w"],
        "The same image twice in a split": ["validation/x and validation/w"],
    }


def test_values_that_begin_with_void_get_the_remedy() -> None:
    """As in ADE20K: 0 is void there and classes begin with 1, while this table has them begin with 0."""
    table = ClassTable.from_dict({"names": ["road", "tree", "sky"]}, "three")
    counts = np.zeros(256, np.int64)
    counts[:4] = 9
    assert '"raw_ids": [1, ..., 3], "ignore": 0' in off_by_one(table, counts)
    counts[2] = counts[0] = 0
    assert '"raw_ids": [1, ..., 3]' in off_by_one(table, counts) and "ignore" not in off_by_one(table, counts)


def test_a_first_look_at_prepared_labels_finds_the_shift() -> None:
    """The records hold what the table knows: labels 1 to 3 where it has 0 to 3, so that no value is refused."""
    table = ClassTable.from_dict({"names": ["void", "road", "tree", "sky"]}, "four")
    labels = [np.full((4, 5), index % 3 + 1, np.uint8) for index in range(100)]

    class Labels(list):
        classes = table
        label = list.__getitem__

    assert first_look(Labels(labels)).startswith("The value 0 (void) is the only class that never occurs")
    labels[40][0, 0] = 0
    assert first_look(Labels(labels), 100) == ""


def test_a_small_split_may_lack_a_class_by_chance() -> None:
    both, road = np.zeros(256, np.int64), np.zeros(256, np.int64)
    both[:2], road[0] = 5, 5

    def titles(lacking: int) -> list[str]:
        found = Findings(TABLE, ["train", "val"])
        for index in range(9 + lacking):
            split, values = ("train", both) if index < 9 else ("val", road)
            found.add(Look(split, str(index), (), values=values))
        return [finding.title for finding in found.all("train", "val") if "frequent" in finding.title]

    assert titles(1) == []  # one label of ten lacks the class: in one case of 10 it is that of val
    assert titles(4) == []  # 1 of 715
    assert titles(5) == ["Classes frequent in one split and absent in another"]  # 1 of 2002


def test_a_score_over_one_or_two_images_is_warned_of() -> None:
    found = Findings(TABLE, ["train", "val", "val2"])

    def few(*splits: str) -> list[str]:
        return [item for finding in found.all(*splits) if finding.title.startswith("Few") for item in finding.items]

    assert few("train", "val") == []  # a split that is not there is told elsewhere
    found.add(Look("val", "a", ()))
    assert few("train", "val") == ["val has 1 image"]
    found.add(Look("val2", "a", ()))
    assert few("train", "val+val2") == ["val+val2 has 2 images"]
    found.add(Look("val", "b", ()))
    assert few("train", "val+val2") == []


def test_a_look_copies_neither_image_nor_label(monkeypatch: pytest.MonkeyPatch) -> None:
    image, label = np.full((1000, 1500, 3), 7, np.uint8), np.zeros((1000, 1500), np.uint8)
    monkeypatch.setattr("psp_jax.data.decode.decode_image", lambda *_: image)
    monkeypatch.setattr("psp_jax.data.decode.decode_annotation", lambda *_: label)
    monkeypatch.setattr(ClassTable, "to_train", lambda *_: label)
    contents = Contents("here", TABLE, {"train": 9}, lambda *_: Pair("a", b"", b"", "a", "a"), ())
    look(contents, "train", 1)  # what is imported and kept once
    tracemalloc.start()
    seen = look(contents, "train", 1)  # the second of nine gets no picture
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seen.values is not None and seen.values[0] == label.size and seen.picture == b""
    assert peak < label.size, "bytes"
    first = seen.digest
    image[500, 700, 1] = 8
    assert look(contents, "train", 1).digest != first
