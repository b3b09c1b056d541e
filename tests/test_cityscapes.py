"""Cityscapes' scores, against the official package on random maps and against values worked out by hand."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from psp_jax.cityscapes import AVERAGE_SIZES, CityscapesScores

SIZE = (37, 53)


def random_maps(rng: np.random.Generator, label_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw prediction, label and instances of one image: blocks of one id, predicted rightly in two pixels of three."""
    blocks = np.kron(rng.integers(0, len(label_ids), (5, 7)), np.ones((8, 8), np.int64))[: SIZE[0], : SIZE[1]]
    label = label_ids[blocks]
    prediction = np.where(rng.random(SIZE) < 0.67, label, rng.integers(0, 34, SIZE))
    # Of the classes with instances some blocks are groups, which bear the bare label id.
    number = np.kron(rng.integers(-1, 3, (5, 7)), np.ones((8, 8), np.int64))[: SIZE[0], : SIZE[1]]
    instances = np.where((label >= 24) & (number >= 0), label * 1000 + number, label)
    return prediction.astype(np.uint8), label.astype(np.uint8), instances.astype(np.uint16)


def official(folder: Path, maps: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """Score the maps by cityscapesScripts, from files as it wants them."""
    module = pytest.importorskip(
        "cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling", reason="needs cityscapesscripts"
    )
    predictions, labels = [], []
    for k, (prediction, label, instances) in enumerate(maps):
        stem = folder / f"bonn_{k:06}_000019"
        for name, values in (("_pred", prediction), ("_gtFine_labelIds", label), ("_gtFine_instanceIds", instances)):
            Image.fromarray(values).save(f"{stem}{name}.png")
        predictions.append(f"{stem}_pred.png")
        labels.append(f"{stem}_gtFine_labelIds.png")
    module.args.quiet, module.args.JSONOutput = True, False
    return module.evaluateImgLists(predictions, labels, module.args)  # type: ignore[no-any-return]


def same(ours: float | None, theirs: float) -> bool:
    return math.isnan(theirs) if ours is None else ours == theirs


@pytest.mark.parametrize("absent", [(), (7, 24, 31, 27), tuple(range(24, 34)), tuple(range(7, 34))], ids=str)
def test_agrees_with_the_official_tool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, absent: tuple[int, ...]
) -> None:
    """Ids 0-33 hold void, caravan and trailer; the absent ones occur in predictions only, and 31 not even there."""
    rng = np.random.default_rng(len(absent))
    label_ids = np.setdiff1d(np.arange(34), absent)
    maps = [random_maps(rng, label_ids) for _ in range(5)]
    if 31 in absent:
        for prediction, _, _ in maps:
            prediction[prediction == 31] = 0
    monkeypatch.setattr(np, "in1d", np.isin, raising=False)  # cityscapesScripts 2.2.4 wants it, NumPy 2.4 dropped it
    theirs = official(tmp_path, maps)
    scores = CityscapesScores()
    for k, (prediction, label, instances) in enumerate(maps):
        scores.add(prediction, label, instances, f"image {k}")
    ours = scores.results()
    assert (scores.confusion == np.array(theirs["confMatrix"], np.int64)).all()
    for level, key in (("classes", "class"), ("categories", "category")):
        end = level.capitalize()
        for ours_name, theirs_name in (("iou", f"{key}Scores"), ("iiou", f"{key}InstScores")):
            for name, value in theirs[theirs_name].items():
                assert same(ours[level][ours_name].get(name), value), (level, ours_name, name)
        assert same(ours[level]["mean_iou"], theirs[f"averageScore{end}"])
        assert same(ours[level]["mean_iiou"], theirs[f"averageScoreInst{end}"])
    assert (None in ours["classes"]["iou"].values()) == bool(absent)
    json.dumps(ours, allow_nan=False)


def test_class_sizes_are_the_official_ones() -> None:
    module = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling", reason="not installed")
    ignored = ("caravan", "trailer")
    assert {name: size for name, size in module.args.avgClassSize.items() if name not in ignored} == AVERAGE_SIZES


def test_scores_by_hand() -> None:
    """One row: a car of 4 pixels, a car of 2, a group of cars, a road, void, and what was predicted there."""
    label = np.array([[26, 26, 26, 26, 26, 26, 26, 7, 7, 0]], np.uint8)
    instances = np.array([[26000, 26000, 26000, 26000, 26001, 26001, 26, 7, 7, 0]], np.uint16)
    prediction = np.array([[26, 26, 26, 27, 26, 30, 26, 26, 7, 26]], np.uint8)
    scores = CityscapesScores()
    scores.add(prediction, label, instances, "a")
    results = scores.results()
    classes, categories = results["classes"], results["categories"]
    # Five of seven car pixels, and one of road called car; what is predicted on void does not matter.
    assert classes["iou"]["car"] == 5 / 8 and classes["iou"]["road"] == 1 / 2 and classes["iou"]["truck"] == 0
    assert classes["iou"]["bus"] is None and classes["mean_iou"] == (1 / 2 + 5 / 8 + 0) / 3
    # Three of the four pixels of the first car, one of the two of the second; every car weighs the same.
    size = AVERAGE_SIZES["car"]
    assert classes["iiou"]["car"] == pytest.approx((3 / 4 + 1 / 2) * size / (2 * size + 1), rel=1e-14)
    # A truck is a vehicle; a trailer is one only where instances are weighed.
    assert categories["iou"]["vehicle"] == 6 / 8 and categories["iou"]["flat"] == 1 / 2
    assert categories["iiou"] == {"human": None, "vehicle": pytest.approx(2 * size / (2 * size + 1), rel=1e-14)}
    assert scores.class_confusion()[13].tolist() == [0] * 13 + [5, 1, 0, 0, 0, 0, 1]


def test_without_instances_there_is_no_iiou() -> None:
    scores = CityscapesScores()
    assert scores.results()["classes"]["mean_iou"] is None
    person = np.full((2, 2), 24, np.uint8)
    scores.add(person, person, None, "a")
    results = scores.results()
    assert results["classes"]["iou"]["person"] == 1 and results["categories"]["mean_iou"] == 1
    assert results["classes"]["mean_iiou"] is None and results["categories"]["iiou"]["human"] is None
    with pytest.raises(ValueError, match="b has instance ids, unlike the images before it"):
        scores.add(person, person, person.astype(np.uint16), "b")


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("prediction", 255, r"The prediction of bonn holds the value 255; Cityscapes' label ids are 0-33"),
        ("label", 34, r"The label of bonn holds the value 34"),
        ("instances", 7001, r"bonn has the instance 7001, but label id 7 has no instances"),
        ("instances", 65535, r"bonn has the instance 65535, but label id 65 has no instances"),
    ],
)
def test_ids_that_do_not_exist_are_refused(name: str, value: int, problem: str) -> None:
    maps = {name: np.full((2, 3), 7, np.uint16) for name in ("prediction", "label", "instances")}
    maps[name][1, 1] = value
    with pytest.raises(ValueError, match=f"^{problem}"):
        CityscapesScores().add(maps["prediction"], maps["label"], maps["instances"], "bonn")


def test_sizes_that_differ_are_refused() -> None:
    wide, narrow = np.zeros((2, 3), np.uint8), np.zeros((2, 2), np.uint8)
    with pytest.raises(ValueError, match="The prediction of bonn is 2x2 pixels but its label is 3x2"):
        CityscapesScores().add(narrow, wide, None, "bonn")
    with pytest.raises(ValueError, match="The instance map of bonn is 2x2 pixels"):
        CityscapesScores().add(wide, wide, narrow.astype(np.uint16), "bonn")
