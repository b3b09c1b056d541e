"""Scoring saved label maps, against values worked out by hand."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from psp_jax import classes
from psp_jax.score import score

TABLE = classes.ClassTable.from_dict({"names": ["road", "tree", "sky"], "raw_ids": [1, 2, 3], "ignore": 0}, "three")


def write(path: Path, values: list[list[int]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(values, np.uint8)).save(path)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    predictions, annotations = tmp_path / "predictions", tmp_path / "annotations"
    write(annotations / "a.png", [[1, 1, 2], [2, 0, 0]])
    write(predictions / "a.png", [[1, 2, 2], [0, 1, 3]])  # one tree predicted as void: an error; void truth: no matter
    write(predictions / "a_overlay.png", [[9]])
    write(annotations / "deep" / "b.png", [[1, 2]])
    write(predictions / "deep" / "b.png", [[1, 2]])
    return predictions, annotations


def test_scores_by_hand(folders: tuple[Path, Path]) -> None:
    scores = score(*folders, TABLE)
    # road: 2 hits of 3; tree: 2 hits of 3 labelled and 3 predicted.
    assert scores["per_class_iou"] == {"road": 2 / 3, "tree": 2 / 4, "sky": None}
    assert scores["mean_iou"] == pytest.approx((2 / 3 + 2 / 4) / 2)
    assert scores["pixel_accuracy"] == pytest.approx(4 / 6)
    assert scores["mean_accuracy"] == pytest.approx(2 / 3)
    assert scores["frequency_weighted_iou"] == pytest.approx((3 * 2 / 3 + 3 * 2 / 4) / 6)
    assert scores["ade20k_score"] == pytest.approx((scores["mean_iou"] + 4 / 6) / 2)
    assert scores["per_class_pixel_share"] == {"road": 0.5, "tree": 0.5, "sky": 0.0}
    assert (scores["images"], scores["pixels"]) == (2, 6)


def test_missing_prediction_and_other_size_are_named(folders: tuple[Path, Path]) -> None:
    predictions, annotations = folders
    write(predictions / "deep" / "b.png", [[1, 2, 3]])
    with pytest.raises(ValueError, match=r"b\.png is 3x1 pixels but .*b\.png is 2x1"):
        score(predictions, annotations, TABLE)
    (predictions / "deep" / "b.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"There is no prediction .*b\.png"):
        score(predictions, annotations, TABLE)


def test_command_refuses_in_one_sentence(tmp_path: Path) -> None:
    flags = ["--predictions", tmp_path, "--annotations", tmp_path, "--classes", "ade20k"]
    command = [sys.executable, "-m", "psp_jax.score", *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert done.returncode == 1
    assert done.stderr == f"error: There is no annotation *.png in {tmp_path}.\n"
