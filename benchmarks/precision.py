"""The same training in bfloat16 and in float32, by the training command: two curves of loss and of mean IoU.

    python benchmarks/precision.py --config configs/camvid.py:small --workdir runs/precision \
        --output benchmarks/results/precision.json --config.data.dir=data/camvid --config.eval.every_steps=450

Seeds, batches and schedule are the same; only model.dtype differs. A finished run is not trained again, an interrupted
one goes on, as with the command itself. --config.FIELD=VALUE is passed on to it.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from benchmarks.record import header, publish, without_places
from psp_jax.workdir import write_png

ROOT = Path(__file__).resolve().parent.parent
INKS = {"float32": (31, 119, 180), "bfloat16": (214, 39, 40)}
SMOOTHED = 10  # log intervals that a point of the loss curve is the mean of
WIDTH, HEIGHT, MARGIN = 640, 300, 44  # of a panel, in pixels


def train(config: str, workdir: Path, dtype: str, overrides: list[str]) -> None:
    """Run the training command for one dtype."""
    command = [sys.executable, "-m", "psp_jax.main", f"--config={config}", f"--workdir={workdir}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([*command, f"--config.model.dtype={dtype}", *overrides], env=environment, check=True)


def read_curve(path: Path, key: str) -> list[tuple[int, float]]:
    """Return (step, value) of every line of a log that has `key`."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None]


def smoothed(curve: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return a curve whose points are means of the last `SMOOTHED` ones."""
    return [
        (step, float(np.mean([value for _, value in curve[max(i + 1 - SMOOTHED, 0) : i + 1]])))
        for i, (step, _) in enumerate(curve)
    ]


def draw(panels: dict[str, dict[str, list[tuple[int, float]]]]) -> Image.Image:
    """Draw a panel for each quantity, one under the other, with a line for each dtype."""
    sheet = Image.new("RGB", (WIDTH, HEIGHT * len(panels)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (title, curves) in enumerate(panels.items()):
        points = [point for curve in curves.values() for point in curve]
        last, low, high = max(s for s, _ in points), min(v for _, v in points), max(v for _, v in points)
        span, bottom = (high - low) or 1.0, (number + 1) * HEIGHT - MARGIN
        pen.text((MARGIN, bottom - HEIGHT + MARGIN + 8), title, fill="black")
        pen.line([(MARGIN, bottom), (WIDTH - 8, bottom)], fill="gray")
        pen.text((WIDTH - 70, bottom + 6), f"step {last}", fill="black")
        for value in (low, high):
            pen.text((4, bottom - 6 - (value - low) / span * (HEIGHT - 2 * MARGIN)), f"{value:.3g}", fill="black")
        for i, (dtype, curve) in enumerate(curves.items()):
            places = [
                (MARGIN + (WIDTH - MARGIN - 8) * s / last, bottom - (v - low) / span * (HEIGHT - 2 * MARGIN))
                for s, v in curve
            ]
            pen.line(places, fill=INKS[dtype], width=2)
            pen.text((WIDTH - 160 + 80 * i, bottom - HEIGHT + MARGIN + 8), dtype, fill=INKS[dtype])
    return sheet


def as_markdown(record: dict[str, Any]) -> str:
    """Return the record as a table of the validations, with the last smoothed loss."""
    dtypes = list(record["mean_iou"])
    lines = [f"| | {' | '.join(dtypes)} |", "|---" * (len(dtypes) + 1) + "|"]
    for (step, _), *_ in zip(*record["mean_iou"].values(), strict=True):
        values = " | ".join(f"{100 * dict(record['mean_iou'][dtype])[step]:.2f}" for dtype in dtypes)
        lines.append(f"| mean IoU at step {step}, % | {values} |")
    losses = " | ".join(f"{record['loss'][dtype][-1][1]:.4f}" for dtype in dtypes)
    lines.append(f"| loss, mean of the last {SMOOTHED} intervals | {losses} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Parse the flags, train twice, print and record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default="configs/camvid.py:small")
    parser.add_argument("--workdir", type=Path, required=True, help="folder of the two runs")
    parser.add_argument(
        "--output", type=Path, required=True, help="JSON file; a table and a plot are written beside it"
    )
    args, overrides = parser.parse_known_args()
    given = {"config": without_places(args.config), "overrides": [*map(without_places, overrides)]}
    record = header() | given | {"loss": {}, "mean_iou": {}}
    for dtype in INKS:
        workdir = args.workdir / dtype
        train(args.config, workdir, dtype, overrides)
        record["loss"][dtype] = smoothed(read_curve(workdir / "metrics.jsonl", "loss"))
        record["mean_iou"][dtype] = read_curve(workdir / "validation.jsonl", "mean_iou")
    publish(record, as_markdown(record), args.output)
    write_png(args.output.with_suffix(".png"), draw({"loss": record["loss"], "mean IoU": record["mean_iou"]}))


if __name__ == "__main__":
    main()
