"""How long training waited for data: of each run, over all its steps, and in the worst of its log intervals.

    python benchmarks/data_wait.py runs/quickstart runs/camvid --output benchmarks/results/data_wait.json

A run is a workdir, of which the training command's own metrics.jsonl is read, or a record in results/ of a former one.
Date, versions and device (of a record: its machine) are those of the run, not of the reading.
"""

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.record import publish
from psp_jax.workdir import read_json


def read_rows(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics that tell a wait.

    Raises:
      FileNotFoundError: there is no such run.
      ValueError: it holds no such line.
    """
    path = run / "metrics.jsonl" if run.is_dir() else run
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}; train first, or name a record of results/.")
    lines = path.read_text("utf-8").splitlines() if run.is_dir() else []
    rows = [json.loads(line) for line in lines] if run.is_dir() else read_json(path)["training"]
    found = [row for row in rows if "data_wait" in row]
    if not found:
        raise ValueError(f"{path} has no data_wait; train for train.log_every_steps steps at least.")
    return found


def summary(run: Path) -> dict[str, Any]:
    """Return the wait of a run as shares of the time of its steps; intervals are of equal numbers of images."""
    rows = read_rows(run)
    seconds = [1 / row["images_per_second"] for row in rows]  # of an image
    waited = sum(s * row["data_wait"] for s, row in zip(seconds, rows, strict=True)) / sum(seconds)
    found = {"run": run.stem, "intervals": len(rows), "steps": rows[-1]["step"], "data_wait": waited}
    return found | {"images_per_second": len(rows) / sum(seconds), "worst": max(row["data_wait"] for row in rows)}


def provenance(run: Path) -> dict[str, Any]:
    """Return when, by what versions and on what a run was made; the date of a workdir is that of its last metrics."""
    if run.is_file():
        record = read_json(run)
        return {key: record[key] for key in ("date", "machine", "versions")}
    config = read_json(run / "config.json")
    date = time.strftime("%Y-%m-%d", time.localtime((run / "metrics.jsonl").stat().st_mtime))
    return {"date": date, "device": config["resolved"]["device_kind"], "versions": config["versions"]}


def as_markdown(record: dict[str, Any]) -> str:
    """Return the record as a table."""
    lines = ["| run | date | steps | images/s | waiting for data | worst interval |", "|---|---|---|---|---|---|"]
    for row in record["rows"]:
        shares = f"{100 * row['data_wait']:.2f} % | {100 * row['worst']:.2f} %"
        lines.append(f"| {row['run']} | {row['date']} | {row['steps']} | {row['images_per_second']:.1f} | {shares} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Parse the flags, read, print and record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="workdirs or records")
    parser.add_argument("--output", type=Path, help="JSON file to write, and a Markdown table beside it")
    args = parser.parse_args()
    rows = [summary(run) | provenance(run) for run in args.runs]
    record = {"command": shlex.join(["python", *sys.argv]), "rows": rows}
    publish(record, as_markdown(record), args.output)


if __name__ == "__main__":
    main()
