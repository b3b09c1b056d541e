"""A workdir as an evaluation leaves it, made of small known pictures, for the tests of the pages about runs."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

HEIGHT, WIDTH, VOID_ROWS = 48, 64, 6
GREY = (120, 120, 120)  # every photo
SCRIPT_NAME = "</script><b>x</b>"
NAMES = ("road", SCRIPT_NAME, "tree & sky", "absent")
PALETTE = ((200, 0, 200), (0, 160, 0), (0, 0, 220), (240, 200, 0))
WHOLE = {"name": "whole", "description": "one forward pass of each image", "size": [41, 41], "flip": False}


def label_maps(index: int, wrong: int) -> tuple[np.ndarray, np.ndarray]:
    """Return truth and prediction u8 [HEIGHT, WIDTH] of image `index`.

    The left half is class 0; the right half is class 1 in even images, 2 in odd ones; the first VOID_ROWS rows are
    void. The prediction has it right but for the last `wrong * (index + 1)` rows, where all is class 0.
    """
    truth = np.zeros((HEIGHT, WIDTH), np.uint8)
    truth[:, WIDTH // 2 :] = 1 + index % 2
    prediction = truth.copy()
    prediction[HEIGHT - wrong * (index + 1) :] = 0
    truth[:VOID_ROWS] = 255
    return truth, prediction


def count(pairs: Sequence[tuple[np.ndarray, np.ndarray]], classes: int) -> np.ndarray:
    """Count pixels i64 [classes, classes], row = label."""
    total = np.zeros((classes, classes), np.int64)
    for truth, prediction in pairs:
        np.add.at(total, (truth[truth < classes], prediction[truth < classes]), 1)
    return total


def class_iou(confusion: np.ndarray) -> list[float | None]:
    """Return the IoU of every class, None for those that occur nowhere."""
    hits, union = np.diag(confusion), confusion.sum(0) + confusion.sum(1) - np.diag(confusion)
    return [float(hit / whole) if whole else None for hit, whole in zip(hits, union, strict=True)]


def mean_iou(confusion: np.ndarray) -> float:
    """Return the mean over the classes that have an IoU."""
    return float(np.mean([value for value in class_iou(confusion) if value is not None]))


def write_workdir(
    directory: Path, *, wrong: int = 2, images: int = 4, names: Sequence[str] = NAMES, data: str = "folder"
) -> Path:
    """Write everything that training and evaluation leave in a workdir, except checkpoints, and return it."""
    gallery = directory / "eval" / "gallery"
    gallery.mkdir(parents=True)
    palette = [list(PALETTE[i] if i < len(PALETTE) else (i, 90, 90)) for i in range(len(names))]
    pairs = [label_maps(i, wrong) for i in range(images)]
    entries: list[dict[str, Any]] = []
    for i, (truth, prediction) in enumerate(pairs):
        own = count(pairs[i : i + 1], len(names))
        accuracy = float(np.diag(own).sum() / own.sum())
        entries.append({"id": f"scene/<{i}>", "name": f"n{i}", "mean_iou": mean_iou(own), "pixel_accuracy": accuracy})
        Image.new("RGB", (WIDTH, HEIGHT), GREY).save(gallery / f"n{i}.jpg", quality=90)
        Image.fromarray(prediction).save(gallery / f"n{i}.prediction.png")
        Image.fromarray(truth).save(gallery / f"n{i}.truth.png")
    confusion = count(pairs, len(names))
    with (directory / "eval" / "confusion.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([["label \\ prediction", *names], *zip(names, *confusion.T.tolist(), strict=True)])
    accuracy = float(np.diag(confusion).sum() / confusion.sum())
    metrics = {
        "mean_iou": mean_iou(confusion),
        "pixel_accuracy": accuracy,
        "ade20k_score": (mean_iou(confusion) + accuracy) / 2,
        "per_class_iou": dict(zip(names, class_iou(confusion), strict=True)),
        "step": 12,
        "split": "val",
        "images": images,
        "protocol": WHOLE,
    }
    classes = {"name": data, "names": list(names), "palette": palette}
    card = {"format": 1, "model": {"head": "psp", "depth": 18}, "classes": classes}
    write(directory / "model.json", card | {"mean": [0, 0, 0], "std": [1, 1, 1], "size": [41, 41]})
    write(directory / "config.json", {"config": {"seed": 0, "optimizer": {"base_lr": 0.01 * wrong}}})
    write(directory / "eval" / "metrics.json", metrics)
    write(directory / "eval" / "images.json", [{key: e[key] for key in ("id", "mean_iou")} for e in entries])
    write(gallery / "index.json", entries)
    steps = [{"step": s, "loss": 3 / s, "main_loss": 2 / s, "learning_rate": 0.01} for s in range(1, 13)]
    lines = [json.dumps(step | {"loss": None if step["step"] == 5 else step["loss"]}) for step in steps]
    (directory / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 13, "lo']))
    (directory / "validation.jsonl").write_text(json.dumps({"step": 12, "mean_iou": metrics["mean_iou"]}) + "\n")
    return directory


def write(path: Path, value: Any) -> None:
    """Write JSON."""
    path.write_text(json.dumps(value), encoding="utf-8")
