"""Class tables: the one mapping between annotation values and training ids."""

import json
from pathlib import Path

import numpy as np
import pytest

from psp_jax import classes
from psp_jax.classes import ClassTable

SHARED = Path(__file__).resolve().parents[2] / "shared"
NUM_CLASSES = {
    **{"ade20k": 150, "camvid": 11, "cityscapes": 19, "context_scenes": 15, "pascal_context": 59},
    "voc2012": 21,
}


def row(*values: int) -> np.ndarray:
    return np.array([values], np.uint8)


@pytest.mark.parametrize(
    ("name", "raw", "train"),
    [
        ("ade20k", (0, 1, 2, 150), (255, 0, 1, 149)),
        ("camvid", (0, 10, 11), (0, 10, 255)),
        ("cityscapes", (0, 7, 8, 9, 26, 30, 31, 33, 255), (255, 0, 1, 255, 13, 255, 16, 18, 255)),
        ("pascal_context", (0, 1, 59), (255, 0, 58)),
        ("voc2012", (0, 20, 255), (0, 20, 255)),
        ("context_scenes", (0, 14, 255), (0, 14, 255)),
    ],
)
def test_to_train(name: str, raw: tuple[int, ...], train: tuple[int, ...]) -> None:
    mapped = classes.get(name).to_train(row(*raw), "a.png")
    assert mapped.dtype == np.uint8
    assert mapped.tolist() == [list(train)]
    mapped[0, 0] = 3  # augmentation writes into labels


@pytest.mark.parametrize("name", classes.NAMES)
def test_tables_are_consistent_and_round_trip(name: str) -> None:
    table = classes.get(name)
    assert table.num_classes == len(table.raw_ids) == NUM_CLASSES[name]
    assert table.palette.shape == (table.num_classes, 3) and table.palette.dtype == np.uint8
    train = np.arange(table.num_classes, dtype=np.uint8).reshape(1, -1)
    assert (table.to_train(table.to_raw(train), name) == train).all()
    assert table.to_raw(row(255)).tolist() == [[table.void_ids[0]]]


@pytest.mark.parametrize("name", ["ade20k", "camvid", "cityscapes", "voc2012"])
def test_names_and_palettes_are_the_published_ones(name: str) -> None:
    facts = SHARED / "data" / "classes" / f"{name}.json"
    if not facts.is_file():
        pytest.skip(f"needs {facts}")
    expected = json.loads(facts.read_text())
    table = classes.get(name)
    assert list(table.names) == expected["names"]
    assert table.palette.tolist() == expected["palette"]


def test_unknown_values_are_named_with_the_file_and_the_legal_ones() -> None:
    with pytest.raises(
        ValueError, match=r"^x/a\.png holds the value 151, 200, .*ade20k.* classes are 1-150, void is 0;"
    ):
        classes.get("ade20k").to_train(row(0, 150, 200, 151), "x/a.png")
    with pytest.raises(ValueError, match="holds the value 255"):  # CamVid's void is 11, and nothing else
        classes.get("camvid").to_train(row(11, 255), "a.png")


def test_a_table_travels_as_json() -> None:
    table = classes.get("cityscapes")
    copy = ClassTable.from_dict(json.loads(json.dumps(table.as_dict())))
    assert copy.as_dict() == table.as_dict()
    assert copy.digest() == table.digest()


def test_digest_follows_the_mapping_only() -> None:
    table = {"names": ["a", "b"], "ignore": 255}
    digest = ClassTable.from_dict(table).digest()
    assert ClassTable.from_dict({**table, "name": "other", "palette": [[1, 2, 3], [4, 5, 6]]}).digest() == digest
    assert ClassTable.from_dict({**table, "ignore": 2}).digest() != digest
    assert ClassTable.from_dict({**table, "raw_ids": [1, 0]}).digest() != digest
    assert ClassTable.from_dict({**table, "names": ["a", "c"]}).digest() != digest


def test_default_palette_is_that_of_pascal_voc_without_its_black() -> None:
    assert (classes.default_palette(20) == classes.get("voc2012").palette[1:]).all()
    assert len(np.unique(classes.default_palette(254), axis=0)) == 254


def test_get_reads_a_file_and_names_it_after_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "streets" / "classes.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"names": ["road", "tree"], "ignore": [7, 9]}))
    table = classes.get(path)
    assert (table.name, table.raw_ids, table.void_ids) == ("streets", (0, 1), (7, 9))
    assert table.to_train(row(1, 7, 0, 9), "a.png").tolist() == [[1, 255, 0, 255]]


def test_get_refuses_in_words(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"No class table ade2k: give one of ade20k, camvid, .* or the path"):
        classes.get("ade2k")
    path = tmp_path / "classes.json"
    for text, problem in (("{names", "not readable as JSON"), ("[1, 2]", "must hold a JSON object")):
        path.write_text(text)
        with pytest.raises(ValueError, match=problem):
            classes.get(path)


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ({"classes": ["a"]}, "unknown field 'classes'; its fields are name, names, palette"),
        ({"ignore": 0}, "no list of names"),
        ({"names": "ab"}, "no list of names"),
        ({"names": []}, "has 0 classes"),
        ({"names": [f"c{i}" for i in range(255)]}, "has 255 classes"),
        ({"names": ["a", "a"]}, "names must be texts that differ"),
        ({"names": ["a", 3]}, "names must be texts"),
        ({"names": ["a", "b"], "palette": [[0, 0, 0]]}, "palette must hold 2 colours"),
        ({"names": ["a"], "palette": [[0, 0, 256]]}, "palette must hold 1 colours"),
        ({"names": ["a", "b"], "palette": [[0, 0, 0], [1]]}, "palette must be a list"),
        ({"names": ["a", "b"], "raw_ids": [1]}, "raw_ids has 1 values for 2 names"),
        ({"names": ["a", "b"], "raw_ids": [1, 1]}, "different whole numbers"),
        ({"names": ["a", "b"], "ignore": 1}, "different whole numbers"),
        ({"names": ["a"], "ignore": 256}, "different whole numbers"),
        ({"names": ["a"], "ignore": []}, "different whole numbers"),
    ],
)
def test_a_table_that_contradicts_itself_is_refused(table: dict[str, object], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        ClassTable.from_dict(table, "mine")
