"""Scoring saved label maps, against values worked out by hand."""

import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from psp_jax import classes, predict
from psp_jax.metrics import confusion_csv, confusion_matrix, summarize
from psp_jax.score import PICTURES, score, score_cityscapes

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


@pytest.mark.parametrize("name", ["cityscapes", "ade20k", "camvid"])
def test_saved_predictions_score_as_their_evaluation(tmp_path: Path, name: str) -> None:
    """Counted on the device in training ids, or from files of the data set's own values: the same to the last digit."""
    table, rng = classes.get(name), np.random.default_rng(0)
    total = np.zeros((table.num_classes, table.num_classes), np.int64)
    for k in range(3):
        prediction, truth = rng.integers(0, table.num_classes, (2, 40, 50)).astype(np.uint8)
        truth[:9] = 255
        total += np.asarray(confusion_matrix(jnp.asarray(truth), jnp.asarray(prediction), table.num_classes))
        for folder, labels in (("predictions", prediction), ("annotations", truth)):
            write(tmp_path / folder / f"{k}.png", table.to_raw(labels).tolist())
    csv_file = tmp_path / "new" / "confusion.csv"
    scores = score(tmp_path / "predictions", tmp_path / "annotations", table, csv_file)
    assert scores == summarize(total, table.names) | {"images": 3}
    assert csv_file.read_text("utf-8") == confusion_csv(total, table.names)
    assert np.asarray(Image.open(csv_file.with_suffix(".png"))).ndim == 3


def test_confusion_file_tells_what_was_predicted_void(folders: tuple[Path, Path], tmp_path: Path) -> None:
    score(*folders, TABLE, tmp_path / "c.csv")
    lines = ["label \\ prediction,road,tree,sky,unlabelled", "road,2,1,0,0", "tree,0,2,0,1", "sky,0,0,0,0"]
    assert (tmp_path / "c.csv").read_text("utf-8") == "\n".join(lines) + "\n"
    with pytest.raises(OSError, match=r"c\.csv could not be written .*: a file is in its way"):
        score(*folders, TABLE, tmp_path / "c.csv" / "c.csv")


@pytest.fixture
def cities(tmp_path: Path) -> tuple[Path, Path]:
    """Two images in the layout of gtFine/val, and predictions as psp_jax.predict leaves them."""
    predictions, annotations = tmp_path / "predictions", tmp_path / "gtFine" / "val"
    for city, label, prediction in (
        ("bonn", [[26, 26, 26, 7, 0]], [[26, 26, 7, 7, 26]]),
        ("ulm", [[7, 7, 24, 24, 9]], [[7, 4, 24, 24, 7]]),
    ):
        stem = f"{city}_000001_000019"
        write(annotations / city / f"{stem}_gtFine_labelIds.png", label)
        for ending in ("", "_color", "_overlay", "_confidence"):
            write(predictions / city / f"{stem}_leftImg8bit{ending}.png", prediction)
        instances = np.array([[1000 * i if i > 23 else i for i in label[0]]], np.uint16)
        Image.fromarray(instances).save(annotations / city / f"{stem}_gtFine_instanceIds.png")
    return predictions, annotations


def test_cityscapes_by_hand(cities: tuple[Path, Path], tmp_path: Path) -> None:
    scores = score_cityscapes(*cities, tmp_path / "c.csv")
    # Road: 2 of 3 right, and one of a car called so. Car: 2 of 3, and what is called so on void does not count.
    iou = {name: value for name, value in scores["per_class_iou"].items() if value is not None}
    assert iou == {"road": 2 / 4, "person": 1.0, "car": 2 / 3}
    assert scores["cityscapes"]["classes"]["mean_iou"] == scores["mean_iou"] == sum(iou.values()) / 3
    assert scores["cityscapes"]["classes"]["iiou"]["car"] == pytest.approx(2 / 3, rel=1e-15)
    assert scores["images"] == 2 and json.loads(json.dumps(scores, allow_nan=False)) == scores
    assert (tmp_path / "c.csv").read_text("utf-8").splitlines()[1] == "road,2" + 18 * ",0" + ",1"


def test_cityscapes_without_instances_has_no_iiou(cities: tuple[Path, Path]) -> None:
    first, second = sorted(cities[1].rglob("*instanceIds.png"))
    second.unlink()
    with pytest.raises(ValueError, match=r"ulm_000001_000019_gtFine_labelIds\.png has no instance ids, unlike"):
        score_cityscapes(*cities)
    first.unlink()
    assert score_cityscapes(*cities)["cityscapes"]["classes"]["mean_iiou"] is None


def test_cityscapes_predictions_must_be_there_once(cities: tuple[Path, Path]) -> None:
    predictions, annotations = cities
    (predictions / "ulm").rename(predictions / "elsewhere")
    assert score_cityscapes(predictions, annotations)["images"] == 2
    write(predictions / "ulm_000001_000019.png", [[0]])
    with pytest.raises(ValueError, match=r"ulm_000001_000019\.png are both predictions for .*ulm.*; keep one"):
        score_cityscapes(predictions, annotations)
    for path in predictions.rglob("ulm*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"There is no prediction ulm_000001_000019\*\.png below"):
        score_cityscapes(predictions, annotations)
    with pytest.raises(FileNotFoundError, match=r"There is no \*_gtFine_labelIds\.png in .*; give a folder such as"):
        score_cityscapes(predictions, predictions)


def test_pictures_of_predict_are_no_label_maps() -> None:
    assert {name.removesuffix(".png") for name in PICTURES} == {predict.COLOR, predict.OVERLAY, predict.CONFIDENCE}


def test_command_refuses_in_one_sentence(tmp_path: Path) -> None:
    flags = ["--predictions", tmp_path, "--annotations", tmp_path]
    for more, sentence in (
        (["--classes", "ade20k"], f"There is no annotation *.png in {tmp_path}."),
        ([], "Give --classes TABLE or --protocol cityscapes (which has its own classes), one of the two."),
    ):
        command = [sys.executable, "-m", "psp_jax.score", *map(str, flags), *more]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
        assert (done.returncode, done.stderr) == (1, f"error: {sentence}\n")
