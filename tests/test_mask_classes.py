"""The classes of a new data set: of the values in its masks, or of their colours."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from mask_sets import BLACK, GREEN, HEIGHT, RED, classes, coloured, mask, save, write, written

from psp_jax.classes import get
from psp_jax.data.mask_classes import read_colours
from psp_jax.new_dataset import new_dataset


@pytest.mark.parametrize(
    ("values", "void", "names", "expected"),
    [
        ((0, 1, 2), None, None, (["class 0", "class 1", "class 2"], [0, 1, 2], 255)),
        ((0, 1, 255), None, "road\ntree\n", (["road", "tree"], [0, 1], 255)),
        ((0, 255), None, "off\non", (["off", "on"], [0, 255], 254)),  # 255 is a class: else one alone were left
        ((0, 1, 255), -1, None, (["class 0", "class 1", "class 255"], [0, 1, 255], 254)),
        ((0, 3, 9), 3, "a\nb", (["a", "b"], [0, 9], 3)),
        ((0, 1, 3), None, "a\nb\nc\nd", (["a", "b", "c", "d"], [0, 1, 2, 3], 255)),  # one name more: value 2 is absent
        ((0, 1, 3, 255), None, "a\nb\nc\nd", (["a", "b", "c", "d"], [0, 1, 2, 3], 255)),
        ((0, 1, 4), 0, "a\nb\nc\nd", (["a", "b", "c", "d"], [1, 2, 3, 4], 0)),
        ((0, 1, 5), 2, "a\nb\nc\nd\ne", (["a", "b", "c", "d", "e"], [0, 1, 3, 4, 5], 2)),
    ],
)
def test_values_and_their_names(
    tmp_path: Path, values: tuple, void: int | None, names: str | None, expected: tuple
) -> None:
    where = write(tmp_path, [mask(i, values) for i in range(3)])
    if names:
        (tmp_path / "names.txt").write_text(names)
    new_dataset(**where, void=void, names=tmp_path / "names.txt" if names else None)
    assert classes(where["output"]) == dict(zip(("names", "raw_ids", "ignore"), expected, strict=True))
    assert get(where["output"] / "classes.json").num_classes == len(expected[0])


def test_palettes_give_the_colours_and_may_not_contradict(tmp_path: Path) -> None:
    palette = [0, 0, 0, *RED, *GREEN]
    where = write(tmp_path, [mask(i, (0, 1, 2)) for i in range(3)], palette=palette)
    new_dataset(**where)
    assert classes(where["output"])["palette"] == [[0, 0, 0], [*RED], [*GREEN]]
    for name, pixels in written(where["output"]).items():
        np.testing.assert_array_equal(pixels, mask(int(name[-2:]), (0, 1, 2)))
    save(where["mask_folder"] / "p02.png", mask(2, (0, 1, 2)), [0, 0, 0, *GREEN, *RED])
    again = where | {"output": tmp_path / "again"}
    with pytest.raises(
        ValueError, match=r"value [12] has different colours in the palettes of .*p0\d\.png and .*p02\.png"
    ):
        new_dataset(**again)
    new_dataset(**again, read_as="values")
    assert "palette" not in classes(tmp_path / "again")
    (tmp_path / "table.csv").write_text("name,r,g,b\nground,0,0,0\nred,200,0,0\ngreen,0,160,0\n")
    config = new_dataset(**where | {"output": tmp_path / "third"}, colours=tmp_path / "table.csv")
    assert config.is_file()
    swapped = np.array([0, 2, 1], np.uint8)[mask(2, (0, 1, 2))]  # by colour, 1 and 2 change places in the last mask
    assert any(
        np.array_equal(found, swapped) for name, found in written(tmp_path / "third").items() if name[-2:] == "02"
    )


def test_masks_of_colours_ask_for_names_once_and_are_converted(tmp_path: Path) -> None:
    where = write(tmp_path, [coloured(i) for i in range(3)], ending="_mask")
    with pytest.raises(ValueError, match=r"hold 3 colours: fill in their names in .*out_colours\.csv"):
        new_dataset(**where)
    template = tmp_path / "out_colours.csv"
    rows = list(csv.DictReader(template.open()))
    counted = {tuple(int(row[c]) for c in "rgb"): int(row["pixels"]) for row in rows}
    assert counted == {
        color: HEIGHT * sum(int((coloured(i)[0] == color).all(1).sum()) for i in range(3)) for color in counted
    }
    assert set(counted) == {BLACK, RED, GREEN} and not where["output"].exists()
    with pytest.raises(ValueError, match="row 1: fill in a name"):
        new_dataset(**where, colours=template)
    names = {BLACK: "void", RED: "car", GREEN: "tree"}
    filled = "name,r,g,b\n" + "".join(f"{names[color]},{','.join(map(str, color))}\n" for color in (GREEN, BLACK, RED))
    template.write_text(filled)
    with pytest.raises(ValueError, match="run again"):
        new_dataset(**where)
    assert template.read_text() == filled  # a filled template is not written over
    new_dataset(**where, colours=template)
    assert classes(where["output"]) == {"names": ["tree", "car"], "palette": [[*GREEN], [*RED]], "ignore": 255}
    for name, pixels in written(where["output"]).items():
        np.testing.assert_array_equal(pixels, np.array([255, 1, 0])[mask(int(name[-2:]), (0, 1, 2))])


def test_tables_of_colours(tmp_path: Path) -> None:
    where = write(tmp_path, [coloured(i) for i in range(3)])
    table = tmp_path / "table.json"
    rows = [{"name": n, "r": r, "g": g, "b": b} for n, (r, g, b) in zip("aba", (BLACK, RED, GREEN), strict=True)]
    table.write_text(json.dumps(rows))
    new_dataset(**where, colours=table)  # two colours of one name
    assert classes(where["output"]) == {"names": ["a", "b"], "palette": [[*BLACK], [*RED]], "ignore": 255}
    again = where | {"output": tmp_path / "again"}
    for bad, message in (
        (rows[:2], r"p00\.png holds the colour 0,160,0 \(\d+ pixels\), which the table"),
        ([*rows, rows[0]], "row 4: the colour 0,0,0 stands there twice"),
        ([{"name": "a", "r": 0}], "row 1: it must have name, r, g, b"),
        ([{"name": "a", "r": 0, "g": 256, "b": 0}], "row 1: .*numbers 0-255"),
        ({"a": [0, 0, 0]}, "row 1: it must have"),
    ):
        table.write_text(json.dumps(bad))
        with pytest.raises(ValueError, match=message):
            new_dataset(**again, colours=table)
    assert not (tmp_path / "again").exists()


def test_void_in_a_table_is_no_class_however_it_is_written(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("name,r,g,b\n Void ,0,0,0\nVOID,1,1,1\ncar,200,0,0\nTree,0,160,0\n")
    assert read_colours(table) == {BLACK: "void", (1, 1, 1): "void", RED: "car", GREEN: "Tree"}


def test_tables_that_cannot_be_read(tmp_path: Path) -> None:
    for name, content, message in (
        ("a.csv", "name,r,g,b\nStraße,0,0,0\n".encode("latin-1"), r"a\.csv is not UTF-8 text; save it as CSV UTF-8"),
        ("a.json", '[{"name": "Straße"}]'.encode("latin-1"), r"a\.json is not UTF-8 text; save it as JSON UTF-8"),
        ("b.json", b"[", r"b\.json is not readable as JSON: "),
        ("b.csv", b"name,r,g,b\n" + b"x" * 200_000, r"b\.csv is not readable as CSV: field larger than"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_colours(tmp_path / name)


def test_grey_values_that_were_saved_as_colours(tmp_path: Path) -> None:
    where = write(tmp_path, [np.repeat(mask(i)[..., None], 3, axis=2) for i in range(3)])
    new_dataset(**where)
    assert classes(where["output"])["raw_ids"] == [0, 1, 2]
    for name, pixels in written(where["output"]).items():
        np.testing.assert_array_equal(pixels, mask(int(name[-2:])))


def test_names_that_may_include_void_are_refused(tmp_path: Path) -> None:
    where = write(tmp_path, [mask(i, (0, 1, 2)) for i in range(3)])
    (tmp_path / "names.txt").write_text("background\ncat\ndog\n")  # not: 1 background, 2 cat, and dog never occurs
    with pytest.raises(ValueError, match=r"3 names, but .* 2 values beside the void value 0; leave void out"):
        new_dataset(**where, void=0, names=tmp_path / "names.txt")


def test_names_that_do_not_fit(tmp_path: Path) -> None:
    where = write(tmp_path, [mask(i, (0, 4, 9)) for i in range(3)])
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\n")
    with pytest.raises(ValueError, match=r"There are 4 names, but the masks hold 3 values beside void \(0, 4, 9\)"):
        new_dataset(**where, names=tmp_path / "names.txt")
    with pytest.raises(FileNotFoundError, match="There is no file of names"):
        new_dataset(**where, names=tmp_path / "nowhere.txt")
