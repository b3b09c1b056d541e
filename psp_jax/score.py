"""Score label maps saved as PNG files against annotations, without any network or device.

    python -m psp_jax.score --predictions DIR --annotations DIR --classes ade20k
    python -m psp_jax.score --predictions DIR --annotations gtFine/val --protocol cityscapes

For every annotation DIR/a/b.png the prediction is DIR/a/b.png in the data set's own values, as psp_jax.predict writes
them. The protocol `cityscapes` gives the official tool's scores, too: IoU, and iIoU where CITY_SEQUENCE_FRAME_gtFine_
instanceIds.png stand beside the labels; the prediction is the only PNG whose name begins with CITY_SEQUENCE_FRAME,
anywhere below --predictions. Prints the scores as JSON.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from psp_jax import classes as class_tables
from psp_jax.atomic import make_folder
from psp_jax.cityscapes import CityscapesScores
from psp_jax.classes import ClassTable
from psp_jax.command import run_command
from psp_jax.data.decode import check_files, decode_annotation, decode_numbers
from psp_jax.metrics import confusion_csv, summarize
from psp_jax.progress import track
from psp_jax.visualize import confusion_picture

PROTOCOLS = ("pixels", "cityscapes")
LABELS, INSTANCES = "_gtFine_labelIds.png", "_gtFine_instanceIds.png"
PICTURES = ("_color.png", "_overlay.png", "_confidence.png")  # what psp_jax.predict writes beside a label map


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
    # Bytes times a whole number stay bytes in NumPy 2, and overflow.
    rows, columns = truth[valid].astype(np.int64), np.minimum(ours[valid], size)
    return np.bincount(rows * (size + 1) + columns, minlength=size * (size + 1)).reshape(size, size + 1)


def score(
    predictions: Path, annotations: Path, classes: ClassTable, confusion_file: Path | None = None
) -> dict[str, Any]:
    """Return the scores of all annotations below `annotations`; see `metrics.summarize`.

    `confusion_file` is where to write the confusion matrix as CSV, and its picture beside it as PNG.
    """
    files = _files(annotations, "*.png")
    if not files:
        raise FileNotFoundError(f"There is no annotation *.png in {annotations}.")
    total = np.zeros((classes.num_classes, classes.num_classes + 1), np.int64)
    with track(len(files), "score") as advance:
        for file in files:
            total += count(predictions / file.relative_to(annotations), file, classes)
            advance(1)
    return _finish(total, classes, confusion_file) | {"images": len(files)}


def score_cityscapes(predictions: Path, annotations: Path, confusion_file: Path | None = None) -> dict[str, Any]:
    """Return `metrics.summarize` of the 19 classes, and {"cityscapes": CityscapesScores.results()}, of a gtFine split.

    Raises:
      FileNotFoundError: no labels, or a label without prediction.
      ValueError: several predictions for one label, or what CityscapesScores refuses.
    """
    labels = _files(annotations, f"*{LABELS}")
    if not labels:
        raise FileNotFoundError(f"There is no *{LABELS} in {annotations}; give a folder such as gtFine/val.")
    found = [path for path in _files(predictions, "*.png") if not path.name.endswith(PICTURES)]
    pairs = [(_only_prediction(label, found, predictions), label) for label in labels]
    scores = CityscapesScores()
    with track(len(pairs), "score") as advance:
        for prediction, label in pairs:
            instances = label.with_name(label.name.removesuffix(LABELS) + INSTANCES)
            scores.add(
                decode_annotation(prediction.read_bytes(), str(prediction)),
                decode_annotation(label.read_bytes(), str(label)),
                decode_numbers(instances.read_bytes(), str(instances)) if instances.is_file() else None,
                f"{prediction} against {label}",
            )
            advance(1)
    summary = _finish(scores.class_confusion(), class_tables.get("cityscapes"), confusion_file)
    return summary | {"cityscapes": scores.results(), "images": len(labels)}


def _files(folder: Path, pattern: str) -> list[Path]:
    """Return what is below a folder, sorted; ValueError names what is no file."""
    found = sorted(folder.rglob(pattern))
    check_files(found)
    return found


def _only_prediction(label: Path, found: list[Path], folder: Path) -> Path:
    frame = label.name.removesuffix(LABELS)
    matching = [path for path in found if path.name.startswith(frame)]
    if not matching:
        raise FileNotFoundError(f"There is no prediction {frame}*.png below {folder} for {label}.")
    if len(matching) > 1:
        raise ValueError(f"{matching[0]} and {matching[1]} are both predictions for {label}; keep one of them.")
    return matching[0]


def _finish(confusion: np.ndarray, classes: ClassTable, file: Path | None) -> dict[str, Any]:
    """Write the matrix [C, C + 1], without its last column where nothing was predicted void, and return its scores."""
    if file is not None:
        shown = confusion if confusion[:, -1].any() else confusion[:, :-1]
        make_folder(file.parent)
        file.write_text(confusion_csv(shown, classes.names), "utf-8")
        Image.fromarray(confusion_picture(shown, classes.names)).save(file.with_suffix(".png"))
    return summarize(confusion, classes.names)


def main() -> None:
    """Parse the flags and score."""
    parser = argparse.ArgumentParser(prog="python -m psp_jax.score", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--predictions", type=Path, required=True, help="folder of label maps")
    parser.add_argument("--annotations", type=Path, required=True, help="folder of annotations, or gtFine/SPLIT")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="pixels", help="cityscapes: the official tool's rules")
    parser.add_argument(
        "--classes", help="a known class table, or the path of a classes.json; Cityscapes brings its own"
    )
    parser.add_argument("--confusion", type=Path, metavar="FILE.csv", help="write the confusion matrix and its picture")
    args = parser.parse_args()
    if (args.classes is None) == (args.protocol == "pixels"):
        raise ValueError("Give --classes TABLE or --protocol cityscapes (which has its own classes), one of the two.")
    if args.confusion and args.confusion.suffix != ".csv":
        raise ValueError(f"--confusion must name a .csv file, not {args.confusion}; the picture comes to be beside it.")
    if args.protocol == "cityscapes":
        scores = score_cityscapes(args.predictions, args.annotations, args.confusion)
    else:
        scores = score(args.predictions, args.annotations, class_tables.get(args.classes), args.confusion)
    print(json.dumps(scores, indent=1))


if __name__ == "__main__":
    run_command(main)
