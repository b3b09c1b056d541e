"""Segmentation metrics from one confusion matrix, summed over the whole split.

Counting runs on the device in integers, everything derived from the counts on the host.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def confusion_matrix(label: Array, prediction: Array, num_classes: int) -> Array:
    """Count pixels i32 [C, C], row = label, column = prediction; pixels whose label is not a class are left out.

    Args:
      label: integers, any shape.
      prediction: integers 0..C-1 of the same shape.

    A product of one-hot matrices runs on the matrix units and needs no scatter. Its sums are exact in float32 up to
    2^24 pixels a call; ValueError beyond that.
    """
    if label.size >= 1 << 24:
        raise ValueError(f"confusion_matrix counts at most {(1 << 24) - 1} pixels a call exactly, got {label.size}.")
    classes = jnp.arange(num_classes)
    rows = (label.reshape(-1, 1) == classes).astype(jnp.float32)
    columns = (prediction.reshape(-1, 1) == classes).astype(jnp.float32)
    return jnp.einsum("nr,nc->rc", rows, columns).astype(jnp.int32)


def summarize(confusion: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Return mean IoU, accuracies and IoU per class from counts [C, C], row = label, column = prediction.

    A class that occurs neither in labels nor in predictions has no IoU: it is reported as None and left out of the
    mean. mean_accuracy averages over the classes that occur in the labels. All fractions of 1; None where nothing
    was counted. (hszhao/semseg counts an absent class as 0: `mean_iou_absent_as_zero` is that figure.)
    """
    counts = np.asarray(confusion, np.int64)
    hits, labelled, predicted = np.diag(counts), counts.sum(1), counts.sum(0)
    union = labelled + predicted - hits
    iou = [float(h / u) if u else None for h, u in zip(hits, union, strict=True)]
    present = [value for value in iou if value is not None]
    accuracy = [float(h / n) for h, n in zip(hits, labelled, strict=True) if n]
    total = int(counts.sum())
    return {
        "mean_iou": float(np.mean(present)) if present else None,
        "mean_iou_absent_as_zero": float(sum(present) / len(names)) if total else None,
        "pixel_accuracy": float(hits.sum() / total) if total else None,
        "mean_accuracy": float(np.mean(accuracy)) if accuracy else None,
        "per_class_iou": dict(zip(names, iou, strict=True)),
        "pixels": total,
    }
