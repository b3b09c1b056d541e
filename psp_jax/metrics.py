"""Segmentation metrics from one confusion matrix, summed over the whole split.

Counting runs on the device in integers, everything derived from the counts on the host.
"""

import csv
import functools
import io
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from psp_jax.visualize import VOID_NAME

Array = jax.Array
CORNER = "label \\ prediction"  # the first cell of the CSV


def confusion_matrix(label: Array, prediction: Array, num_classes: int) -> Array:
    """Count pixels i32 [C, C], row = label, column = prediction; pixels whose label is not a class are left out.

    Args:
      label: integers, any shape.
      prediction: integers 0..C-1 of the same shape.

    A product of one-hot matrices runs on the matrix units and needs no scatter. A CPU adds one by one, which takes it a
    hundredth of the time. The product is exact in float32 up to 2^24 pixels a call; ValueError beyond that.
    """
    if label.size >= 1 << 24:
        raise ValueError(f"confusion_matrix counts at most {(1 << 24) - 1} pixels a call exactly, got {label.size}.")
    scatter, product = (
        functools.partial(way, num_classes=num_classes) for way in (_count_by_scatter, _count_by_product)
    )
    return lax.platform_dependent(label, prediction, cpu=scatter, default=product)


def _count_by_product(label: Array, prediction: Array, num_classes: int) -> Array:
    classes = jnp.arange(num_classes)
    rows = (label.reshape(-1, 1) == classes).astype(jnp.float32)
    columns = (prediction.reshape(-1, 1) == classes).astype(jnp.float32)
    return jnp.einsum("nr,nc->rc", rows, columns).astype(jnp.int32)


def _count_by_scatter(label: Array, prediction: Array, num_classes: int) -> Array:
    row, column = (part.reshape(-1).astype(jnp.int32) for part in (label, prediction))
    return jnp.zeros((num_classes, num_classes), jnp.int32).at[row, column].add(1, mode="drop")


def summarize(confusion: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Return scores from counts [C, C], row = label, column = prediction.

    A further column counts pixels predicted as void: errors of their label's class. A class that occurs neither in
    labels nor in predictions has no IoU: it is None and left out of the mean (hszhao/semseg counts it as 0, which is
    mean_iou_absent_as_zero). mean_accuracy averages over the classes that occur in the labels (likewise);
    frequency_weighted_iou weighs each class by its labelled pixels; ade20k_score is the challenge's mean of mean_iou
    and pixel_accuracy. All are fractions of 1, and None where nothing was counted.
    """
    counts = np.asarray(confusion, np.int64)
    hits, labelled, predicted = np.diag(counts), counts.sum(1), counts[:, : len(names)].sum(0)
    union, total = labelled + predicted - hits, int(counts.sum())

    iou = [_ratio(h, u) for h, u in zip(hits, union, strict=True)]
    present = [value for value in iou if value is not None]
    accuracy = [float(h / n) for h, n in zip(hits, labelled, strict=True) if n]
    weighted = sum(float(n) * (value or 0.0) for n, value in zip(labelled, iou, strict=True))
    mean_iou, pixel_accuracy = _ratio(sum(present), len(present)), _ratio(hits.sum(), total)
    return {
        "mean_iou": mean_iou,
        "mean_iou_absent_as_zero": _ratio(sum(present), len(names)) if total else None,
        "pixel_accuracy": pixel_accuracy,
        "mean_accuracy": _ratio(sum(accuracy), len(accuracy)),
        "mean_accuracy_absent_as_zero": _ratio(sum(accuracy), len(names)) if total else None,
        "frequency_weighted_iou": _ratio(weighted, total),
        "ade20k_score": None if mean_iou is None or pixel_accuracy is None else (mean_iou + pixel_accuracy) / 2,
        "per_class_iou": dict(zip(names, iou, strict=True)),
        "per_class_pixel_share": {name: _ratio(n, total) for name, n in zip(names, labelled, strict=True)},
        "pixels": total,
    }


def per_image_scores(hits: np.ndarray, labelled: np.ndarray, predicted: np.ndarray) -> list[dict[str, float | None]]:
    """Return {"mean_iou", "pixel_accuracy"} of each image from its pixels by class, all integers [B, C].

    Args:
      hits: labelled so and predicted so.
      labelled: labelled so, whatever the prediction.
      predicted: predicted so, whatever the label, on labelled pixels.

    mean_iou is over the classes that the image's labels or predictions hold; both are None where nothing is labelled.
    """
    scores: list[dict[str, float | None]] = []
    for h, n, p in zip(hits, labelled, predicted, strict=True):
        union = n + p - h
        present = [float(value) for value in h[union > 0] / union[union > 0]]
        scores.append({"mean_iou": _ratio(sum(present), len(present)), "pixel_accuracy": _ratio(h.sum(), n.sum())})
    return scores


def confusion_csv(confusion: np.ndarray, names: Sequence[str]) -> str:
    """Return a matrix of counts as CSV: column names first, then a row for each label, its name and whole numbers.

    `confusion` is [C, C], or [C, C + 1] with a last column of pixels predicted as void.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([CORNER, *names, *[VOID_NAME] * (np.shape(confusion)[1] - len(names))])
    writer.writerows([name, *map(int, row)] for name, row in zip(names, confusion, strict=True))
    return text.getvalue()


def _ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None
