"""Look at every image and label of a data set before a network is trained on them.

    python -m psp_jax.check_data --config configs/folder.py --config.data.dir=DIR [--output check]

An image_folder is read as it is, before any preparation, and every problem is told, not only the first; of other data
sets the prepared records are read. Writes check.json and the page check.html. Exit code 1 where training would fail:
unreadable files, sizes that differ, values outside the class table. What is merely suspicious is a warning.
"""

import argparse
import base64
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from psp_jax.atomic import make_folder
from psp_jax.classes import ClassTable
from psp_jax.command import run_command
from psp_jax.config_file import read_config
from psp_jax.data.contents import Contents, Problem, open_contents
from psp_jax.data.findings import Finding, Findings
from psp_jax.data.survey import Tally, survey
from psp_jax.progress import track
from psp_jax.report import write_page

SHOWN = 5  # files of a finding in the terminal; the page and check.json have more
SIZES = 5  # of a split, the most frequent


def check_data(data: ConfigDict, output: Path) -> list[Finding]:
    """Read a data set once, write `output`/check.json and check.html, and return what was found, errors first.

    Args:
      data: the section `data` of a configuration.
      output: a folder; made if missing.

    Raises:
      FileNotFoundError, ValueError: there is no such data set, it has no class table, or is not prepared.
    """
    if not data.dir:
        raise ValueError("config.data.dir is empty; set --config.data.dir=DIR to the folder of your data set.")
    where: dict[str, Any] = {"prepared_dir": data.prepared_dir, "classes": data.classes or None}
    contents = open_contents(data.name, data.dir, data.train_split, **where)
    make_folder(output)  # before the work, in case that it cannot be
    found = Findings(contents.classes, list(contents.counts))
    for field in ("train_split", "eval_split"):
        names = data[field].split("+")
        for split in names:
            if names.count(split) > 1:
                found.problem(Problem("split", split, split, f"config.data.{field} names {split} twice."))
            if split not in contents.counts:
                known = ", ".join(contents.counts)
                message = f"config.data.{field} names {split}, but the splits of {contents.where} are {known}."
                found.problem(Problem("split", split, split, message))
    for problem in contents.problems:
        found.problem(problem)
    examples = []
    with track(sum(contents.counts.values()), "check") as advance:
        for seen in survey(contents):
            found.add(seen)
            if seen.picture:
                picture = f"data:image/jpeg;base64,{base64.b64encode(seen.picture).decode()}"
                examples.append({"split": seen.split, "name": seen.name, "picture": picture})
            advance(1)
    findings = found.all(data.train_split, data.eval_split)
    facts = describe(data.name, contents, found, findings)
    (output / "check.json").write_text(json.dumps(facts, indent=1, allow_nan=False), "utf-8")
    write_page(output / "check.html", "check_data", f"Check of {contents.where}", facts | {"examples": examples})
    return findings


def describe(name: str, contents: Contents, found: Findings, findings: list[Finding]) -> dict[str, Any]:
    """Return everything that check.json tells, as JSON values."""
    return {
        "data": name,
        "where": contents.where,
        "findings": [vars(finding) for finding in findings],
        "unknown_values": found.unknown_values(),
        "splits": [
            _split_row(split, contents.counts[split], contents.classes, tally) for split, tally in found.tallies.items()
        ],
        "classes": _class_rows(contents.classes, list(found.tallies.values())),
    }


def _split_row(name: str, pairs: int, classes: ClassTable, tally: Tally) -> dict[str, Any]:
    """Return the numbers of one split; mean and deviation are of RGB 0-255, sizes (width, height, images)."""
    total = max(1, int(tally.values.sum()))
    known = list(classes.raw_ids)
    void = int(tally.values[list(classes.void_ids)].sum())
    heights, widths = zip(*tally.sizes, strict=True) if tally.sizes else ((), ())
    return {
        "name": name,
        "pairs": pairs,
        "images": tally.images,
        "labels": tally.labels,
        "mean": np.round(tally.mean(), 3).tolist(),
        "deviation": np.round(tally.deviation(), 3).tolist(),
        "widths": [min(widths), max(widths)] if widths else None,
        "heights": [min(heights), max(heights)] if heights else None,
        "sizes": [[width, height, count] for (height, width), count in tally.sizes.most_common(SIZES)],
        "void_share": void / total,
        "unknown_share": (int(tally.values.sum()) - void - int(tally.values[known].sum())) / total,
    }


def _class_rows(classes: ClassTable, tallies: Sequence[Tally]) -> list[dict[str, Any]]:
    """Return of each class name, color, value, pixels and images, and of each split [pixels, share, images].

    Shares are of the labelled pixels; None where a split has none.
    """
    known = list(classes.raw_ids)
    labelled = [int(tally.values[known].sum()) for tally in tallies]

    def share(pixels: int, total: int) -> float | None:
        return pixels / total if total else None

    rows = []
    for raw, name, color in zip(known, classes.names, classes.palette.tolist(), strict=True):
        pixels = [int(tally.values[raw]) for tally in tallies]
        images = [int(tally.present[raw]) for tally in tallies]
        shares = [share(part, total) for part, total in zip(pixels, labelled, strict=True)]
        rows.append(
            {
                "name": name,
                "color": color,
                "value": raw,
                "pixels": sum(pixels),
                "share": share(sum(pixels), sum(labelled)),
                "images": sum(images),
                "splits": [list(row) for row in zip(pixels, shares, images, strict=True)],
            }
        )
    return rows


def _print(finding: Finding) -> None:
    print(f"{finding.level}: {finding.title} ({finding.total:,}). {finding.text}".rstrip())
    for item in finding.items[:SHOWN]:
        print(f"  {item}")
    if finding.total > SHOWN:
        print(f"  ... and {finding.total - SHOWN:,} more")


def main() -> None:
    """Parse the flags, check, and leave with 1 where there is an error."""
    parser = argparse.ArgumentParser(prog="python -m psp_jax.check_data", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", required=True, help="configuration file, as for psp_jax.main")
    parser.add_argument(
        "--output", type=Path, default=Path("check"), help="folder of check.json and check.html (check)"
    )
    args, rest = parser.parse_known_args()
    findings = check_data(read_config(args.config, rest).data, args.output)
    for finding in findings:
        _print(finding)
    errors, warnings = (sum(f.total for f in findings if f.level == level) for level in ("error", "warning"))
    print(f"{errors:,} errors, {warnings:,} warnings; see {args.output}/check.html", flush=True)
    if errors:
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
