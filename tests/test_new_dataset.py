"""A data set of anyone's images and masks: paired, checked, split, named, and ready to train on."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, run_module
from mask_sets import HEIGHT, WIDTH, classes, coloured, mask, save, write, written

from psp_jax import config as configuration
from psp_jax import new_dataset as dataset_module
from psp_jax.checks import check_values, crop_size, total_steps
from psp_jax.config_file import read_config
from psp_jax.data.source import open_source
from psp_jax.new_dataset import config_text, new_dataset


def test_masks_of_values_become_a_data_set(tmp_path: Path) -> None:
    where = write(tmp_path, [mask(i) for i in range(12)])
    config = new_dataset(**where, validation=0.3)
    assert classes(where["output"]) == {"names": ["class 0", "class 1", "class 2"], "raw_ids": [0, 1, 2], "ignore": 255}
    found = written(where["output"])
    assert sorted(name.split("/")[1] for name in found) == [f"p{i:02}" for i in range(12)]
    for name, pixels in found.items():
        np.testing.assert_array_equal(pixels, mask(int(name[-2:])))
        image = where["output"] / "images" / f"{name}.jpg"
        assert os.path.samefile(image, where["images"] / image.name)  # a hard link takes no space
    fields = read_config(str(config), [])
    configuration.check_fields(fields)
    check_values(fields)
    assert (fields.data.dir, fields.data.eval_split) == (str(where["output"].resolve()), "val")


def test_folders_of_splits_are_kept(tmp_path: Path) -> None:
    where = write(tmp_path / "a", [mask(i) for i in range(4)], "training/street/{}")
    write(tmp_path / "a", [mask(i) for i in range(2)], "Validation/{}")
    new_dataset(**where)
    names = [*(f"train/street_{i}" for i in range(4)), "val/0", "val/1"]
    assert sorted(written(where["output"])) == names
    shutil.move(where["images"] / "Validation", where["images"] / "test")
    shutil.move(where["mask_folder"] / "Validation", where["mask_folder"] / "test")
    config = new_dataset(**where | {"output": tmp_path / "again"})
    assert read_config(str(config), []).data.eval_split == "test"


def test_names_that_collide_without_folders_are_refused(tmp_path: Path) -> None:
    where = write(tmp_path, [mask(i) for i in range(3)], "a/b_{}")
    write(tmp_path, [mask(0)], "a_b/{}")
    with pytest.raises(ValueError, match="would both be named a_b_0"):
        new_dataset(**where)


def test_links(tmp_path: Path) -> None:
    where = write(tmp_path, [mask(i) for i in range(3)])
    new_dataset(**where, link=True)
    files = [*where["output"].glob("images/*/*"), *where["output"].glob("annotations/*/*")]
    assert len(files) == 6 and all(file.is_symlink() and file.is_file() for file in files)


def spoil(where: dict[str, Path], name: str) -> None:
    """Make one kind of bad input of a good one."""
    images, masks, first = where["images"], where["mask_folder"], where["mask_folder"] / "p00.png"
    if name == "no masks":
        shutil.rmtree(masks)
        masks.mkdir()
    elif name == "no pairs":
        for file in masks.iterdir():
            file.rename(masks / f"other{file.name}")
    elif name == "no folder":
        shutil.rmtree(images)
    elif name == "image":
        (images / "p00.jpg").write_bytes(b"x")
    elif name == "mask":
        first.write_bytes(first.read_bytes()[:60])
    elif name == "size":
        save(first, mask(0)[:-1])
    elif name == "lossy":
        first.unlink()
        save(masks / "p00.jpg", mask(0))
    elif name == "classes":
        save(first, np.arange(HEIGHT * WIDTH).astype(np.uint8).reshape(HEIGHT, WIDTH))
    elif name == "colours":
        save(first, np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8))
    elif name == "mixed":
        save(first, coloured(0))
    elif name == "one class":
        for index in range(3):
            save(masks / f"p{index:02}.png", np.full((HEIGHT, WIDTH), 7, np.uint8))
    elif name == "output":
        save(where["output"] / "mine.png", mask(0))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no masks", r"/m holds no masks"),
        ("no pairs", r"No image below .*/i \(3, such as p00\.jpg\) has a mask of its name below .*otherp00\.png"),
        ("no folder", r"There is no folder .*/i\."),
        ("image", r"i/p00\.jpg is not a readable image .*1 of 3 pairs"),
        ("mask", r"m/p00\.png cannot be read, it is damaged or truncated .*1 of 3 pairs"),
        ("size", r"p00\.jpg is 60x44 pixels but its annotation .*p00\.png is 60x43"),
        ("lossy", r"m/p00\.jpg is not a PNG file; annotations are PNG, since lossy formats change class values"),
        ("classes", r"give 255 classes; at most 254 are possible"),
        ("colours", r"m/p00\.png holds 2,6\d\d colours, more than 254 classes"),
        ("mixed", r"p01\.png holds values and .*p00\.png colours; masks must be of one kind"),
        ("one class", r"give 1 classes beside void; there must be two"),
        ("output", r"out exists and is not empty; name another folder"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(tmp_path: Path, name: str, message: str) -> None:
    where = write(tmp_path, [mask(i) for i in range(3)])
    spoil(where, name)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        new_dataset(**where)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_failure_while_writing_leaves_nothing_and_no_original_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a file system that takes capitals for small letters: two names are one there."""
    where = write(tmp_path, [mask(i) for i in range(3)])
    pictures = {path: path.read_bytes() for path in where["images"].iterdir()}
    before = sorted(tmp_path.rglob("*"))
    place = dataset_module._place
    monkeypatch.setattr(
        dataset_module, "_place", lambda source, target, link: place(source, target.with_stem("same"), link)
    )
    with pytest.raises(FileExistsError):
        new_dataset(**where)
    assert sorted(tmp_path.rglob("*")) == before
    assert {path: path.read_bytes() for path in where["images"].iterdir()} == pictures


@pytest.mark.parametrize(
    ("sizes", "crop", "batch", "epochs", "long_side", "smaller"),
    [
        ([(512, 683)] * 400, 473, 16, 100, 683, ()),  # 25 batches an epoch
        ([(360, 480)] * 367, 353, 16, 100, 480, ()),  # 22 batches an epoch
        ([(1024, 2048)] * 2975, 713, 16, 100, 2048, ()),
        ([(3000, 4000)] * 50, 713, 16, 667, 2048, (2048,)),  # 3 batches; 1536 pixels are left of 3000
        ([(30, 33), (20, 20), (28, 40)], 41, 2, 2000, 33, ()),
        ([(100, 50)] * 9, 49, 8, 2000, 100, ()),
    ],
)
def test_the_configuration_suits_the_images(
    tmp_path: Path, sizes: list, crop: int, batch: int, epochs: int, long_side: int, smaller: tuple
) -> None:
    path = tmp_path / "config.py"
    path.write_text(config_text(sizes, "val"))
    config = read_config(str(path), [])
    check_values(config)
    assert crop_size(config) == (crop, crop)
    assert (config.train.batch_size, config.train.epochs) == (batch, epochs)
    assert (tuple(config.eval.base_size), tuple(config.augment.base_size)) == ((long_side,), smaller)
    steps = total_steps(config, len(sizes))
    assert steps >= 2000 and f"# {steps:,} steps" in path.read_text()
    assert config.eval.every_steps == steps // 10


def test_command_says_what_is_left_out_and_what_comes_next(tmp_path: Path) -> None:
    where = write(tmp_path, [mask(i) for i in range(3)])
    save(where["images"] / "lonely.png", mask(0))
    flags = ("--images", where["images"], "--masks", where["mask_folder"], "--output", where["output"])
    wrong = run_module("psp_jax.new_dataset", *flags, "--void", "300")
    assert (wrong.returncode, wrong.stderr) == (1, "error: --void=300 must be a number 0-255, or none.\n")
    done = run_module("psp_jax.new_dataset", *flags)
    assert done.returncode == 0, done.stderr
    assert "3 pairs of image and mask\n  1 images without mask, left out: " in done.stdout
    assert f"python -m psp_jax.main --config {where['output']}/config.py --workdir runs/out" in done.stdout


@pytest.mark.slow
def test_from_photos_to_a_trained_network(tmp_path: Path) -> None:
    where = write(tmp_path, [coloured(i) for i in range(8)])
    (tmp_path / "table.csv").write_text("name,r,g,b\nground,0,0,0\ncar,200,0,0\ntree,0,160,0\n")
    config = new_dataset(**where, colours=tmp_path / "table.csv", validation=0.25)
    flags = (f"--config={config}", f"--config.data.prepared_dir={tmp_path / 'prepared'}", "--config.data.num_workers=0")
    checked = run_module("psp_jax.check_data", flags[0], "--output", tmp_path / "check")
    assert checked.returncode == 0, checked.stdout
    more = (*TINY, "--config.train.steps=4", "--workdir", tmp_path / "w")
    done = run_module("psp_jax.main", *flags, *more, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    scores = json.loads((tmp_path / "w" / "eval" / "metrics.json").read_text())
    assert list(scores["per_class_iou"]) == ["ground", "car", "tree"]
    source = open_source("image_folder", where["output"], "train", prepared_dir=tmp_path / "prepared")
    index = int(source[0]["id"][1:])
    np.testing.assert_array_equal(source[0]["label"], mask(index, (0, 1, 2)))
