"""One self-contained page about an evaluated run: scores, classes, mistakes, training curves and pictures.

`write_report` reads what an evaluation left in a workdir and writes report.html, which needs no network: styles,
scripts and pictures are inside it. The page's own code is in `report_page/`; here the numbers are prepared. What a
workdir does not hold (no training log in an export, no gallery) is left out of the page.
"""

import base64
import csv
import hashlib
import html
import io
import json
import math
import string
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from psp_jax.classes import ClassTable
from psp_jax.config import flatten
from psp_jax.visualize import VOID_COLOR
from psp_jax.workdir import ModelCard, read_json, write_text

REPORT = "report.html"
SCORES = {
    "mean_iou": "Mean IoU",
    "pixel_accuracy": "Pixel accuracy",
    "mean_accuracy": "Mean accuracy",
    "frequency_weighted_iou": "Frequency weighted IoU",
    "ade20k_score": "ADE20K score",
}
TRAINING = ("loss", "main_loss", "aux_loss", "se_loss", "dice_loss", "lovasz_loss", "learning_rate")
VALIDATION = ("mean_iou", "pixel_accuracy", "mean_accuracy")
CURVE_POINTS = 500  # of one curve; more than a screen shows
WORST_PAIRS = 14
PHOTO_BYTES = 130_000  # 24 of them with their label maps stay below 8 MB
# The map of errors lies over the image: right pixels darken it, wrong ones are red, void is grey.
ERROR_COLORS = np.array([(12, 14, 18), (255, 59, 48), (128, 132, 140)], np.uint8)
ERROR_OPACITY = bytes([170, 255, 215])


def write_report(directory: Path) -> Path:
    """Write `directory`/report.html from what an evaluation left there, and return its path.

    Raises:
      FileNotFoundError: `directory` holds no model.json or no eval/metrics.json.
      ValueError: a file is damaged or its classes are not those of model.json.
    """
    run = read_run(directory)
    run["gallery"] = read_gallery(directory, ModelCard.read(directory).classes)
    return write_page(directory / REPORT, "report", run["name"], run)


def read_run(directory: Path) -> dict[str, Any]:
    """Return everything about an evaluated run that the page tells, except its pictures, as JSON values.

    Raises:
      FileNotFoundError: `directory` holds no model.json or no eval/metrics.json.
      ValueError: a file is damaged or its classes are not those of model.json.
    """
    path = directory / "eval" / "metrics.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{directory} holds no eval/metrics.json: run its training command with --mode=evaluate."
        )
    card, metrics = ModelCard.read(directory), read_json(path)
    classes = card.classes
    if list(metrics["per_class_iou"]) != list(classes.names):
        raise ValueError(f"{path} is of other classes than model.json beside it; evaluate again with --mode=evaluate.")
    confusion = _read_confusion(directory, classes)
    shown = [key for key in SCORES if key in metrics and (key != "ade20k_score" or classes.name == "ade20k")]
    config = directory / "config.json"
    return {
        "name": directory.resolve().name,
        "network": f"{str(card.model['head']).upper()} head on ResNet-{card.model['depth']}",
        "data": classes.name,
        **{key: metrics[key] for key in ("step", "split", "images", "protocol")},
        "scores": [{"name": SCORES[key], "value": metrics[key]} for key in shown],
        "classes": _class_rows(classes, metrics, confusion),
        "confusion": None if confusion is None else confusion.tolist(),
        "pairs": [] if confusion is None else worst_pairs(confusion),
        "training": _read_curves(directory / "metrics.jsonl", TRAINING),
        "validation": _read_curves(directory / "validation.jsonl", VALIDATION),
        "histogram": _histogram(directory / "eval" / "images.json"),
        "config": dict(flatten(read_json(config)["config"])) if config.is_file() else {},
    }


def worst_pairs(confusion: np.ndarray) -> list[dict[str, Any]]:
    """Return the mistakes (label, prediction) that cost most, the costliest first.

    The cost is in mean IoU: what would be won if the n pixels of class r that were predicted as c were right. Class r
    then gains n / union_r; class c loses n from its union: tp_c / (union_c - n) - tp_c / union_c.

    Args:
      confusion: counts [C, C], row = label, column = prediction.
    """
    counts = confusion.astype(np.float64)
    hits = np.diag(counts)
    union = counts.sum(1) + counts.sum(0) - hits
    with np.errstate(divide="ignore", invalid="ignore"):
        won = counts / union[:, None] + np.nan_to_num(hits / (union - counts) - hits / union)
    np.fill_diagonal(won, 0)
    won = np.nan_to_num(won) / max(1, np.count_nonzero(union))
    order = np.argsort(-won, axis=None, kind="stable")[:WORST_PAIRS]
    found = [(int(i) // len(hits), int(i) % len(hits)) for i in order]
    return [
        {"label": r, "prediction": c, "pixels": int(confusion[r, c]), "cost": float(won[r, c])}
        for r, c in found
        if won[r, c] > 0
    ]


def read_gallery(directory: Path, classes: ClassTable) -> list[dict[str, Any]]:
    """Return the pictures of eval/gallery as data URIs, with the classes and mistakes that each shows.

    Per image: id, mean_iou, pixel_accuracy, width, height, layers {"image", "prediction", "truth", "errors"}, classes
    [[class, share of the labelled pixels]] and mistakes [[label, prediction, pixels]], both the largest first.
    """
    folder = directory / "eval" / "gallery"
    if not (folder / "index.json").is_file():
        return []
    return [_gallery_item(folder, entry, classes) for entry in read_json(folder / "index.json")]


def write_page(path: Path, kind: str, title: str, payload: dict[str, Any]) -> Path:
    """Write a page of a `kind`: report, compare, ablation or check_data; whole or not at all. Returns `path`.

    The payload travels as JSON without any "<", so that no text in it can end its element. The content security policy
    forbids all requests and every script but the page's own.
    """
    assets = resources.files("psp_jax").joinpath("report_page")
    names = ("dom.js", "table.js", "confusion.js", "curves.js", "gallery.js", "summary.js", f"{kind}.js")
    script = "\n".join(assets.joinpath(name).read_text("utf-8") for name in names)
    page = string.Template(assets.joinpath("page.html").read_text("utf-8")).substitute(
        title=html.escape(title),
        style=assets.joinpath("style.css").read_text("utf-8"),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        script=script,
        payload=json.dumps(payload, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
    )
    write_text(path, page)
    return path


def _read_confusion(directory: Path, classes: ClassTable) -> np.ndarray | None:
    """Read eval/confusion.csv as i64 [C, C], None where there is none; ValueError where it is of other classes."""
    path = directory / "eval" / "confusion.csv"
    if not path.is_file():
        return None
    with path.open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    if header[1:] != list(classes.names) or [row[0] for row in rows] != list(classes.names):
        raise ValueError(f"{path} is of other classes than model.json; evaluate again with --mode=evaluate.")
    return np.array([row[1:] for row in rows], np.int64)


def _class_rows(classes: ClassTable, metrics: dict[str, Any], confusion: np.ndarray | None) -> list[dict[str, Any]]:
    """Return name, color, iou, accuracy and share of each class; None where unknown."""
    shares, accuracy = metrics.get("per_class_pixel_share", {}), [None] * classes.num_classes
    if confusion is not None:
        labelled, total = confusion.sum(1).tolist(), int(confusion.sum())
        shares = {name: n / total if total else None for name, n in zip(classes.names, labelled, strict=True)}
        accuracy = [hit / n if n else None for hit, n in zip(np.diag(confusion).tolist(), labelled, strict=True)]
    return [
        {"name": n, "color": color, "iou": metrics["per_class_iou"][n], "accuracy": a, "share": shares.get(n)}
        for n, color, a in zip(classes.names, classes.palette.tolist(), accuracy, strict=True)
    ]


def _read_curves(path: Path, keys: Sequence[str]) -> dict[str, list[float | None]] | None:
    """Read the columns "step" and `keys` of a log, long ones as means over neighbours; None where there is no log."""
    records = []
    for line in path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue  # the half line of a run that was killed
    if not records:
        return None
    columns = ["step", *(key for key in keys if any(key in record for record in records))]
    rows = [[math.nan if record.get(key) is None else record[key] for key in columns] for record in records]
    values = np.ma.masked_invalid(np.array(rows, np.float64))
    means = [
        values[part].mean(0).filled(np.nan) for part in np.array_split(range(len(rows)), min(len(rows), CURVE_POINTS))
    ]
    return {
        key: [float(f"{value:.6g}") if math.isfinite(value) else None for value in column]
        for key, column in zip(columns, np.stack(means, 1), strict=True)
    }


def _histogram(path: Path) -> list[int] | None:
    """Count the images per twentieth of mean IoU, None where there is no list of images."""
    if not path.is_file():
        return None
    values = [image["mean_iou"] for image in read_json(path) if image["mean_iou"] is not None]
    return np.histogram(values, bins=20, range=(0, 1))[0].tolist() if values else None


def _gallery_item(folder: Path, entry: dict[str, Any], classes: ClassTable) -> dict[str, Any]:
    count = classes.num_classes
    prediction, truth = (
        np.minimum(np.asarray(Image.open(folder / f"{entry['name']}.{kind}.png")), count).astype(np.int64)
        for kind in ("prediction", "truth")
    )
    labelled = truth < count
    wrong = labelled & (prediction != truth)
    pairs, pixels = np.unique(truth[wrong] * (count + 1) + prediction[wrong], return_counts=True)
    mistakes = [[int(p) // (count + 1), int(p) % (count + 1), int(n)] for p, n in zip(pairs, pixels, strict=True)]
    shown = np.bincount(truth.ravel(), minlength=count + 1)[:count]
    present = np.flatnonzero(shown + np.bincount(prediction[labelled], minlength=count + 1)[:count])
    share = [[int(k), round(float(shown[k] / max(1, labelled.sum())), 4)] for k in present]
    palette = np.vstack([classes.palette, [VOID_COLOR]]).astype(np.uint8)
    return {
        **{key: entry[key] for key in ("id", "mean_iou", "pixel_accuracy")},
        "width": truth.shape[1],
        "height": truth.shape[0],
        "layers": {
            "image": _photo(folder / f"{entry['name']}.jpg"),
            "prediction": _palette_png(prediction, palette),
            "truth": _palette_png(truth, palette),
            "errors": _palette_png(np.where(labelled, wrong, 2), ERROR_COLORS, ERROR_OPACITY),
        },
        "classes": sorted(share, key=lambda item: -item[1]),
        "mistakes": sorted((m for m in mistakes if m[1] < count), key=lambda item: -item[2]),
    }


def _photo(path: Path) -> str:
    """Return a JPEG as a data URI, compressed more where the file is too large to have many on a page."""
    data = path.read_bytes()
    for quality in (82, 72, 60):
        if len(data) <= PHOTO_BYTES:
            break
        buffer = io.BytesIO()
        Image.open(path).save(buffer, "JPEG", quality=quality, optimize=True)
        data = buffer.getvalue()
    return _data_uri("image/jpeg", data)


def _palette_png(index: np.ndarray, palette: np.ndarray, opacity: bytes | None = None) -> str:
    """Return indices [H, W] as a data URI of a PNG with palette u8 [N, 3] and, if given, N bytes of opacity."""
    picture = Image.fromarray(index.astype(np.uint8))
    picture.putpalette(palette.tobytes())
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True, **({} if opacity is None else {"transparency": opacity}))
    return _data_uri("image/png", buffer.getvalue())


def _data_uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
