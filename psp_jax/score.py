"""Score label maps saved as PNG files against annotations, without any network or device.

    python -m psp_jax.score --predictions DIR --annotations DIR --classes ade20k

For every annotation DIR/a/b.png the prediction is DIR/a/b.png in the data set's own values, as psp_jax.predict writes
them. Prints the scores as JSON.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from psp_jax import classes as class_tables
from psp_jax.classes import ClassTable
from psp_jax.command import run_command
from psp_jax.data.decode import decode_annotation
from psp_jax.metrics import summarize
from psp_jax.progress import track


def count(prediction: Path, annotation: Path, classes: ClassTable) -> np.ndarray:
    """Return the confusion matrix i64 [C, C + 1] of one image, row = label; the last column is predicted void.

    Raises:
      FileNotFoundError: there is no such prediction.
      ValueError: a file that is no label map of these classes, or sizes that differ.
    """
    if not prediction.is_file():
        raise FileNotFoundError(f"There is no prediction {prediction} for {annotation}.")
    truth, ours = (
        classes.to_train(decode_annotation(path.read_bytes(), str(path)), str(path))
        for path in (annotation, prediction)
    )
    if truth.shape != ours.shape:
        raise ValueError(
            f"{prediction} is {ours.shape[1]}x{ours.shape[0]} pixels but {annotation} is "
            f"{truth.shape[1]}x{truth.shape[0]}; save predictions at the annotation's size."
        )
    size = classes.num_classes
    valid = truth != classes.ignore_label
    columns = np.minimum(ours[valid].astype(np.int64), size)
    return np.bincount(truth[valid] * (size + 1) + columns, minlength=size * (size + 1)).reshape(size, size + 1)


def _read(path: Path, classes: ClassTable) -> np.ndarray:
    return classes.to_train(decode_annotation(path.read_bytes(), str(path)), str(path))


def score(predictions: Path, annotations: Path, classes: ClassTable) -> dict[str, Any]:
    """Return the scores of all annotations below `annotations`; see `metrics.summarize`."""
    files = sorted(annotations.rglob("*.png"))
    if not files:
        raise FileNotFoundError(f"There is no annotation *.png in {annotations}.")
    total = np.zeros((classes.num_classes, classes.num_classes + 1), np.int64)
    with track(len(files), "score") as advance:
        for file in files:
            total += count(predictions / file.relative_to(annotations), file, classes)
            advance(1)
    return summarize(total, classes.names) | {"images": len(files)}


def main() -> None:
    """Parse the flags and score."""
    parser = argparse.ArgumentParser(prog="python -m psp_jax.score", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--predictions", type=Path, required=True, help="folder of label maps")
    parser.add_argument("--annotations", type=Path, required=True, help="folder of annotations of the same names")
    parser.add_argument("--classes", required=True, help="a known class table, or the path of a classes.json")
    args = parser.parse_args()
    print(json.dumps(score(args.predictions, args.annotations, class_tables.get(args.classes)), indent=1))


if __name__ == "__main__":
    run_command(main)
