"""The summary of an ablation, made by `ablation.summarise`, as CSV and as Markdown."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any


def as_csv(summary: dict[str, Any]) -> str:
    """Return a line for each run: scores and the IoU of every class, as fractions."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [row["name"] for row in summary["classes"]]
    writer.writerow(["variant", "seed", "parameters", "minutes", *summary["columns"], *(f"iou {n}" for n in names)])
    for variant, found in summary["variants"].items():
        for i, (seed, minutes) in enumerate(zip(found["seeds"], found["minutes"], strict=True)):
            scores = [found["scores"][name]["each"][i] for name in summary["columns"]]
            classes = [found["classes"][name]["each"][i] for name in names]
            writer.writerow([variant, seed, found["parameters"], minutes, *scores, *classes])
    return text.getvalue()


def as_markdown(summary: dict[str, Any]) -> str:
    runs = sum(len(found["seeds"]) for found in summary["variants"].values())
    minutes = sum(sum(filter(None, found["minutes"])) for found in summary["variants"].values())
    steps, images, jax = (" and ".join(map(str, summary[key])) for key in ("steps", "batch_size", "jax"))
    parts = [
        f"{runs} runs of {steps} steps with {images} images on {summary['data']} (`{summary['file']}`), {minutes:.0f} "
        f"minutes of runs on {'; '.join(summary['machines'])}; jax {jax}. Percent, mean ± standard deviation over "
        "seeds; the difference is to the first row."
    ]
    for table in summary["tables"]:
        note = f"\n\nPublished: {summary['published_for']}." if _published(table) else ""
        parts.append(f"## {table['title']}\n\n{_table(summary, table)}{note}")
    parts.append(f"## IoU of the classes\n\n{_class_table(summary, summary['tables'][0])}")
    return "\n\n".join(parts) + "\n"


def _published(table: dict[str, Any]) -> bool:
    return any(row["published"] is not None for row in table["rows"])


def _table(summary: dict[str, Any], table: dict[str, Any]) -> str:
    published = _published(table)
    first = summary["variants"][table["rows"][0]["variant"]]["scores"]["mean_iou"]["mean"]
    main, *others = summary["columns"].values()
    lines = [["variant", "seeds", main, "difference", *(["published"] if published else []), *others, "parameters"]]
    for row in table["rows"]:
        found = summary["variants"][row["variant"]]
        score, *scores = (_percent(found["scores"][name]) for name in summary["columns"])
        difference = 100 * (found["scores"]["mean_iou"]["mean"] - first)
        line = [row["label"], str(len(found["seeds"])), score, f"{difference:+.1f}"]
        line += ["n/a" if row["published"] is None else f"{row['published']:.2f}"] if published else []
        lines.append([*line, *scores, f"{found['parameters']:,}"])
    return _lines(lines)


def _class_table(summary: dict[str, Any], table: dict[str, Any]) -> str:
    lines = [["class", "group", *(row["label"] for row in table["rows"])]]
    for entry in summary["classes"]:
        scores = [summary["variants"][row["variant"]]["classes"][entry["name"]] for row in table["rows"]]
        lines.append([entry["name"], entry["group"], *map(_percent, scores)])
    return _lines(lines)


def _lines(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table of which the first row is the head."""
    marks = ["---" if i == 0 else "--:" for i in range(len(rows[0]))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (rows[0], marks, *rows[1:]))


def _percent(score: Mapping[str, Any]) -> str:
    if score["mean"] is None:
        return "n/a"
    spread = "" if score["deviation"] is None else f" ± {100 * score['deviation']:.1f}"
    return f"{100 * score['mean']:.1f}{spread}"
