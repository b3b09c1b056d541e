"""Put two evaluated runs side by side on one page.

    python -m psp_jax.compare W1 W2 --output compare.html

The page tells which scores and classes moved, which fields of the configuration differ, the curves of both, and shows
the images that both galleries have with a slider between the two predictions.
"""

import argparse
from pathlib import Path
from typing import Any

from psp_jax.command import run_command
from psp_jax.report import read_gallery, read_run, write_page
from psp_jax.workdir import ModelCard

# What the page needs of each run beside what is paired here.
RUN_FIELDS = ("name", "network", "data", "step", "split", "images", "protocol", "classes", "training", "validation")


def compare(first: Path, second: Path, output: Path) -> Path:
    """Write the page about the runs in two workdirs to `output` and return it.

    Raises:
      FileNotFoundError: a directory holds no evaluation.
      ValueError: the runs have different classes, or a file is damaged.
    """
    runs = [read_run(directory) for directory in (first, second)]
    names = [[row["name"] for row in run["classes"]] for run in runs]
    if names[0] != names[1]:
        raise ValueError(f"{first} and {second} have different classes, so their scores are of different things.")
    if runs[0]["name"] == runs[1]["name"]:
        runs[0]["name"], runs[1]["name"] = str(first), str(second)
    classes = ModelCard.read(first).classes
    galleries = [read_gallery(directory, classes) for directory in (first, second)]
    title = f"{runs[0]['name']} and {runs[1]['name']}"
    payload = {
        "runs": [{key: run[key] for key in RUN_FIELDS} for run in runs],
        "warnings": _warnings(*runs),
        "scores": _scores(*runs),
        "fields": _fields(runs[0]["config"], runs[1]["config"]),
        "classes": _classes(*runs),
        "gallery": _common(*galleries),
    }
    return write_page(output, "compare", title, payload)


def _warnings(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Say where the two evaluations did not measure the same thing."""
    found = []
    if first["protocol"] != second["protocol"]:
        found.append("The evaluation protocols differ: a part of every difference comes from the way of measuring.")
    if (first["split"], first["images"]) != (second["split"], second["images"]):
        found.append(
            f"The images differ: {first['split']} with {first['images']} images against {second['split']} with "
            f"{second['images']} images; the scores are not comparable."
        )
    return found


def _scores(first: dict[str, Any], second: dict[str, Any]) -> list[dict[str, Any]]:
    """Pair the scores that both runs have."""
    other = {score["name"]: score["value"] for score in second["scores"]}
    return [
        {"name": score["name"], "values": [score["value"], other[score["name"]]]}
        for score in first["scores"]
        if score["name"] in other
    ]


def _fields(first: dict[str, Any], second: dict[str, Any]) -> list[dict[str, Any]]:
    """List the fields of two flat configurations that differ; a missing one is None."""
    return [
        {"field": field, "values": [first.get(field), second.get(field)]}
        for field in sorted(first | second)
        if first.get(field) != second.get(field)
    ]


def _classes(first: dict[str, Any], second: dict[str, Any]) -> list[dict[str, Any]]:
    """Pair the IoU of every class, in the order of the training ids."""
    return [
        {"name": a["name"], "color": a["color"], "iou": [a["iou"], b["iou"]]}
        for a, b in zip(first["classes"], second["classes"], strict=True)
    ]


def _common(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join the entries of two galleries that show the same image."""
    others = {item["id"]: item for item in second}
    return [_joined(item, others[item["id"]]) for item in first if item["id"] in others]


def _joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    present = dict(second["classes"]) | dict(first["classes"])
    return {
        **{key: first[key] for key in ("id", "width", "height")},
        "mean_iou": [first["mean_iou"], second["mean_iou"]],
        "classes": sorted(present.items(), key=lambda item: -item[1]),
        "mistakes": [],
        "layers": {
            "image": first["layers"]["image"],
            "truth": first["layers"]["truth"],
            "first": first["layers"]["prediction"],
            "second": second["layers"]["prediction"],
            "errors_first": first["layers"]["errors"],
            "errors_second": second["layers"]["errors"],
        },
    }


def main() -> None:
    """Parse the flags and write the page."""
    parser = argparse.ArgumentParser(prog="python -m psp_jax.compare", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("first", type=Path, metavar="W1", help="workdir of an evaluated run")
    parser.add_argument("second", type=Path, metavar="W2", help="workdir of the run to compare it with")
    parser.add_argument("--output", type=Path, default=Path("compare.html"), help="the page to write")
    args = parser.parse_args()
    print(compare(args.first, args.second, args.output))


if __name__ == "__main__":
    run_command(main)
