"""The files that an evaluation leaves in eval/: scores, confusion matrix, scores of each image, a gallery."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from psp_jax.classes import ClassTable
from psp_jax.metrics import confusion_csv, per_image_scores, summarize
from psp_jax.tally import Tally
from psp_jax.visualize import confusion_picture
from psp_jax.workdir import write_json, write_png, write_text

GALLERY_SIDE = 1024  # pixels; larger pictures are shrunk to this

Scores = list[dict[str, Any]]


def write_scores(
    directory: Path, tally: Tally, classes: ClassTable, ids: Sequence[str], record: dict[str, Any]
) -> dict[str, Any]:
    """Write metrics.json (with `record`), confusion.csv, confusion.png and images.json; return what metrics.json says.

    Args:
      directory: the run's eval/.
      tally: counts of all images.
      ids: of the images, in the order of the tally.
      record: what was evaluated, and how.
    """
    results = summarize(tally.confusion, classes.names) | record
    directory.mkdir(parents=True, exist_ok=True)
    write_text(directory / "confusion.csv", confusion_csv(tally.confusion, classes.names))
    write_png(directory / "confusion.png", Image.fromarray(confusion_picture(tally.confusion, classes.names)))
    scores = image_scores(tally)
    write_json(directory / "images.json", [{"id": name} | score for name, score in zip(ids, scores, strict=True)])
    write_json(directory / "metrics.json", results)
    return results


def image_scores(tally: Tally) -> Scores:
    """Return mean_iou and pixel_accuracy of each image."""
    return per_image_scores(tally.images[:, 0], tally.images[:, 1], tally.images[:, 2])


def choose_gallery(scores: Scores, count: int) -> list[int]:
    """Choose at most `count` images, worst first: a third each of the worst, the best, and spread over the split.

    The last third is the same for every model, so that two runs can be compared by it.
    """
    order = sorted(
        (i for i, score in enumerate(scores) if score["mean_iou"] is not None), key=lambda i: scores[i]["mean_iou"]
    )
    if len(order) <= count:
        return order
    third = count // 3
    spread = np.linspace(0, len(scores) - 1, count - 2 * third).round().astype(int)
    chosen = {*order[:third], *order[len(order) - third :], *spread.tolist()}
    return [i for i in order if i in chosen]


class Gallery:
    """Pictures of some images, for the report: eval/gallery, made anew by each evaluation.

    Use `add` for each image, then `close`, which makes the new gallery take the place of the former.
    """

    def __init__(self, directory: Path) -> None:
        self._target, self._fresh = directory / "gallery", directory / "gallery.new"
        shutil.rmtree(self._fresh, ignore_errors=True)
        self._fresh.mkdir(parents=True)
        self._entries: Scores = []

    def add(
        self, name: str, image: np.ndarray, prediction: np.ndarray, truth: np.ndarray, score: dict[str, Any]
    ) -> None:
        """Add an image u8 [H, W, 3] with its prediction and ground truth u8 [H, W] (train ids) and its scores."""
        stem = f"{len(self._entries):03}"  # ids may hold any character
        height, width = truth.shape
        factor = min(1.0, GALLERY_SIDE / max(height, width))
        size = (max(round(factor * width), 1), max(round(factor * height), 1))
        small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        Image.fromarray(small).save(self._fresh / f"{stem}.jpg", quality=90)
        for kind, label in (("prediction", prediction), ("truth", truth)):
            nearest = cv2.resize(label, size, interpolation=cv2.INTER_NEAREST)
            Image.fromarray(nearest).save(self._fresh / f"{stem}.{kind}.png")
        self._entries.append({"id": name, "name": stem, **score})

    def close(self) -> None:
        """Put the new gallery in its place."""
        write_json(self._fresh / "index.json", self._entries)
        shutil.rmtree(self._target, ignore_errors=True)
        self._fresh.rename(self._target)
