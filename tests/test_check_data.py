"""The check of a data set finds every defect, names its file, counts right, and leaves a sound data set in peace."""

import json
from pathlib import Path

import data_sets
import numpy as np
import pytest
from conftest import ROOT, run_module
from ml_collections import ConfigDict
from PIL import Image

from psp_jax import check_data
from psp_jax.classes import ClassTable
from psp_jax.config_file import read_config
from psp_jax.data.findings import off_by_one
from psp_jax.data.prepared import ensure_prepared

FOLDER = ROOT / "configs" / "folder.py"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Eight pairs of three classes with noise for images, so that no two are the same."""
    folder = data_sets.write_folder(tmp_path / "photos", {"train": 5, "val": 3})
    rng = np.random.default_rng(0)
    for file in sorted(folder.glob("images/*/*.jpg")):
        height, width = data_sets.SIZES[int(file.stem[-3:]) % 3]
        Image.fromarray(rng.integers(0, 256, (height, width, 3)).astype(np.uint8)).save(file)
    return folder


def settings(folder: Path, **fields: str) -> ConfigDict:
    data = read_config(str(FOLDER), [f"--config.data.dir={folder}"]).data
    data.update(fields)
    return data


def findings(folder: Path, **fields: str) -> dict[str, check_data.Finding]:
    """Check a folder; returns the findings by title, as check.json has them too."""
    output = folder.parent / "check"
    found = check_data.check_data(settings(folder, **fields), output)
    written = json.loads((output / "check.json").read_text())["findings"]
    assert [vars(finding) for finding in found] == written
    return {finding.title: finding for finding in found}


def rewrite(path: Path, pixels: np.ndarray) -> Path:
    Image.fromarray(pixels).save(path)
    return path


def label(path: Path) -> np.ndarray:
    return np.array(Image.open(path))


def only(found: dict[str, check_data.Finding], title: str, level: str, *words: str) -> None:
    """There is exactly one finding, in one file or of one class, and its sentence has the words."""
    assert list(found) == [title]
    assert (found[title].level, found[title].total) == (level, 1)
    for word in words:
        assert word in found[title].items[0]


def test_a_sound_folder_has_no_findings_and_true_numbers(photos: Path) -> None:
    assert findings(photos) == {}
    facts = json.loads((photos.parent / "check" / "check.json").read_text())
    images = [np.array(Image.open(file)) for file in sorted(photos.glob("images/train/*"))]
    labels = [label(file) for file in sorted(photos.glob("annotations/train/*"))]
    train = facts["splits"][0]
    pixels = np.concatenate([image.reshape(-1, 3) for image in images]).astype(float)
    assert (train["name"], train["pairs"], train["images"], train["labels"]) == ("train", 5, 5, 5)
    np.testing.assert_allclose(train["mean"], pixels.mean(0), atol=0.01)  # two JPEG decoders
    np.testing.assert_allclose(train["deviation"], pixels.std(0), atol=0.01)
    assert (train["widths"], train["heights"]) == ([20, 32], [24, 40])
    assert train["sizes"] == [[32, 24, 2], [20, 40, 2], [30, 30, 1]]
    assert (train["void_share"], train["unknown_share"]) == (0, 0)
    for value, row in enumerate(facts["classes"]):
        counted = sum(int((pixels == value).sum()) for pixels in labels)
        assert (row["value"], row["splits"][0][0], row["splits"][0][2]) == (value, counted, 5)
        assert row["splits"][0][1] == pytest.approx(counted / sum(pixels.size for pixels in labels))
        assert row["images"] == 8


def test_unreadable_image_and_label(photos: Path) -> None:
    image = photos / "images" / "train" / "photo001.jpg"
    image.write_bytes(image.read_bytes()[:-40])
    found = findings(photos)
    only(found, "Images that cannot be read", "error", str(image), "damaged or truncated")
    mask = photos / "annotations" / "val" / "photo002.png"
    mask.write_bytes(mask.read_bytes()[:50])
    found = findings(photos)
    assert str(mask) in found["Labels that are no maps of class values"].items[0]
    assert len(found) == 2  # the second problem is told beside the first


def test_labels_of_colours_of_16_bits_and_of_another_format(photos: Path) -> None:
    folder = photos / "annotations" / "train"
    rgb = rewrite(folder / "photo000.png", np.zeros((24, 32, 3), np.uint8))
    deep = rewrite(folder / "photo001.png", np.full((40, 20), 1000, np.uint16))
    (folder / "photo002.png").write_bytes(data_sets.encode(np.zeros((30, 30), np.uint8), "JPEG"))
    found = findings(photos)
    finding = found.pop("Labels that are no maps of class values")
    assert not found and finding.total == 3
    assert str(rgb) in finding.items[0] and "colours" in finding.items[0]
    assert str(deep) in finding.items[1] and "1000" in finding.items[1]
    assert "not a PNG" in finding.items[2]


def test_palette_labels_are_read_by_index(photos: Path) -> None:
    mask = photos / "annotations" / "train" / "photo000.png"
    picture = Image.fromarray(label(mask))
    picture.putpalette([200, 100, 50, 7, 8, 9, 90, 91, 92])
    picture.save(mask)
    assert Image.open(mask).mode == "P"
    assert findings(photos) == {}


def test_label_of_another_size(photos: Path) -> None:
    mask = rewrite(photos / "annotations" / "train" / "photo000.png", data_sets.annotation(1, 3))
    found = findings(photos)
    only(found, "Labels of another size than their image", "error", str(mask), "32x24", "20x40")


def test_values_outside_the_table_are_counted(photos: Path) -> None:
    folder = photos / "annotations" / "train"
    pixels = label(folder / "photo001.png")
    pixels[0, :4], pixels[1, :2] = 77, 9
    rewrite(folder / "photo001.png", pixels)
    pixels = label(folder / "photo003.png")
    pixels[0, :5] = 77
    rewrite(folder / "photo003.png", pixels)
    found = findings(photos)
    finding = found.pop("Values that the class table does not know")
    assert not found and (finding.level, finding.total) == ("error", 2)
    assert "photo001.png holds the value 9, 77" in finding.items[0]
    unknown = json.loads((photos.parent / "check" / "check.json").read_text())["unknown_values"]
    assert unknown == [
        {"value": 9, "pixels": 2, "images": 1, "files": ["train/photo001.jpg"]},
        {"value": 77, "pixels": 9, "images": 2, "files": ["train/photo001.jpg", "train/photo003.jpg"]},
    ]


def test_files_without_partner_and_files_that_are_no_images(photos: Path) -> None:
    (photos / "annotations" / "train" / "photo000.png").unlink()
    (photos / "images" / "val" / "photo001.jpg").unlink()
    (photos / "images" / "val" / "notes.txt").write_text("x")
    (photos / "images" / "train" / "photo002.png").write_bytes(data_sets.encode(data_sets.image(2)))
    (photos / "images" / "empty").mkdir()
    found = findings(photos)
    finding = found["Files that belong to no pair"]
    assert finding.level == "error"
    for words in ("photo000.jpg has no .png", "photo001.png has no image", "notes.txt is none of", "empty holds no"):
        assert sum(words in item for item in finding.items) == 1
    assert any("photo002.png and photo002.jpg have the same name" in item for item in finding.items)
    assert finding.total == 5


def test_split_that_is_not_there(photos: Path) -> None:
    found = findings(photos, eval_split="validation")
    only(found, "Splits that are not there", "error", "data.eval_split names validation", "are train, val")


def test_the_same_image_twice(photos: Path) -> None:
    train, val = photos / "images" / "train", photos / "images" / "val"
    # The same pixels in another file format and at another place; sizes 0 and 3 are the same.
    pixels = np.random.default_rng(1).integers(0, 256, (24, 32, 3)).astype(np.uint8)
    for old, new in ((train / "photo000.jpg", "photo000.png"), (val / "photo000.jpg", "photo000.png")):
        old.unlink()
        Image.fromarray(pixels).save(old.with_name(new), compress_level=9 if old.parent == val else 1)
    found = findings(photos)
    only(found, "The same image in two splits", "warning", "train/photo000.png and val/photo000.png")
    (train / "photo003.jpg").unlink()
    Image.fromarray(pixels).save(train / "photo003.png")
    found = findings(photos)
    assert found["The same image twice in a split"].items == ["train/photo000.png and train/photo003.png"]


def test_void_labels_and_turned_images(photos: Path) -> None:
    rewrite(photos / "annotations" / "train" / "photo000.png", np.full((24, 32), 255, np.uint8))
    found = findings(photos)
    only(found, "Labels that are void everywhere", "warning", "train/photo000.jpg")
    exif = Image.Exif()
    exif[0x0112] = 3
    path = photos / "images" / "train" / "photo001.jpg"
    Image.open(path).save(path, exif=exif)
    found = findings(photos)
    assert found["Images that viewers turn by their EXIF orientation"].items == ["train/photo001.jpg"]


def test_classes_that_never_occur_or_only_outside_training(photos: Path) -> None:
    table = {"names": ["road", "tree", "sky", "boat"], "ignore": 255}
    (photos / "classes.json").write_text(json.dumps(table))
    only(findings(photos), "Classes that never occur", "warning", "boat (value 3)")
    mask = photos / "annotations" / "val" / "photo001.png"
    pixels = label(mask)
    pixels[0, 0] = 3
    rewrite(mask, pixels)
    only(findings(photos), "Classes that the training split lacks", "warning", "boat occurs in 1 labels of val")


def test_one_class_nearly_everywhere(photos: Path) -> None:
    for mask in sorted(photos.glob("annotations/val/*")):
        pixels = np.ones_like(label(mask))
        pixels[0, :2] = 0, 2
        rewrite(mask, pixels)
    found = findings(photos)
    share = 100 * (1 - 6 / (24 * 32 + 40 * 20 + 30 * 30))
    only(found, "A class covers nearly everything", "warning", f"val: {share:.2f} %", "tree")


def test_class_frequent_in_one_split_and_absent_in_another(tmp_path: Path) -> None:
    folder = data_sets.write_folder(tmp_path / "photos", {"train": 12, "val": 10})
    for index, file in enumerate(sorted(folder.glob("images/*/*.jpg"))):
        rewrite(file, np.full((*data_sets.SIZES[int(file.stem[-3:]) % 3], 3), 9 * index, np.uint8))
    for file in sorted(folder.glob("annotations/val/*")):
        rewrite(file, np.minimum(label(file), 1))
    found = findings(folder)
    only(found, "Classes frequent in one split and absent in another", "warning", "sky is in 100 %", "none of val")
    # In a third of 12 labels, 10 others may lack it: 12! 18! / (8! 22!) = 6.8 %.
    for index, file in enumerate(sorted(folder.glob("annotations/train/*"))):
        if index % 3:
            rewrite(file, np.minimum(label(file), 1))
    assert findings(folder) == {}


@pytest.mark.parametrize(
    ("raw_ids", "ignore", "values", "begin"),
    [
        ((0, 1, 2), (255,), (1, 2, 3), "The value 0 (a) never occurs, but 3 does"),
        ((1, 2, 3), (255,), (0, 1, 2), "The value 3 never occurs, but 0 does"),
        ((0, 1, 2), (255,), (1, 2), "The value 0 (a) is the only class that never occurs"),
        ((0, 1, 2), (255,), (0, 1, 2, 3), "The values 0 to 3 occur, one more than there are classes"),
        ((0, 1, 2), (255,), (1,), ""),
        ((0, 1, 2), (3,), (1, 2, 3), "The value 0 (a) is the only"),  # 3 is void, as in CamVid 11
        ((1, 2, 3), (0,), (0, 1, 2), ""),  # 0 is void, class 3 is rare
        ((0, 1, 7), (255,), (1, 7, 8), ""),  # values with gaps are not counted from anywhere
    ],
)
def test_off_by_one(raw_ids: tuple, ignore: tuple, values: tuple, begin: str) -> None:
    table = ClassTable("t", ("a", "b", "c"), np.zeros((3, 3)), raw_ids, ignore)
    counts = np.zeros(256, np.int64)
    counts[list(values)] = 5
    sentence = off_by_one(table, counts)
    assert sentence.startswith(begin) and bool(sentence) == bool(begin)


def test_labels_that_begin_with_one(photos: Path) -> None:
    for mask in sorted(photos.glob("annotations/*/*")):
        rewrite(mask, label(mask) + 1)
    found = findings(photos)
    assert "labels seem to begin with 1" in found["Labels that seem to count from another number"].text
    assert found["Values that the class table does not know"].total == 8


def test_prepared_records(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psp_jax.data.builders.context_scenes.COUNTS", {"train": 7, "validation": 3})
    fields = {"name": "context_scenes", "eval_split": "validation"}
    with pytest.raises(FileNotFoundError, match="prepare it"):
        findings(tmp_path / "data", **fields)
    ensure_prepared("context_scenes", tmp_path / "data")
    found = findings(tmp_path / "data", **fields)
    assert all(finding.level == "warning" for finding in found.values())
    facts = json.loads((tmp_path / "check" / "check.json").read_text())
    assert [(row["name"], row["images"], row["sizes"]) for row in facts["splits"]] == [
        ("train", 7, [[128, 128, 7]]),
        ("validation", 3, [[128, 128, 3]]),
    ]


def test_flags_that_are_wrong(photos: Path) -> None:
    with pytest.raises(FileNotFoundError, match="There is no configuration file nowhere"):
        read_config("nowhere.py", [])
    with pytest.raises(ValueError, match=r"Unknown configuration field data\.dri; known fields: data\.archive"):
        read_config(str(FOLDER), ["--config.data.dri=x"])
    with pytest.raises(ValueError, match="Unexpected argument --workdir=x"):
        read_config(str(FOLDER), ["--workdir=x"])
    with pytest.raises(ValueError, match=r"config\.data\.dir is empty"):
        check_data.check_data(settings(photos, dir=""), photos)
    (photos / "classes.json").unlink()
    with pytest.raises(FileNotFoundError, match="write one such as"):
        findings(photos)


def test_command_tells_by_its_exit_code(photos: Path, tmp_path: Path) -> None:
    flags = ("--config", FOLDER, f"--config.data.dir={photos}", "--output", tmp_path / "out")
    sound = run_module("psp_jax.check_data", *flags)
    assert (sound.returncode, sound.stderr) == (0, "")
    assert sound.stdout.splitlines()[-1].startswith("0 errors, 0 warnings; see")
    mask = photos / "annotations" / "train" / "photo000.png"
    mask.write_bytes(b"no picture")
    broken = run_module("psp_jax.check_data", *flags)
    assert broken.returncode == 1 and "Traceback" not in broken.stderr
    assert f"  {mask} is not a PNG file" in broken.stdout
    assert (tmp_path / "out" / "check.html").is_file()
