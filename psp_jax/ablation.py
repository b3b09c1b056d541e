"""What the runs of an ablation say: means and spreads over seeds, as Markdown, CSV, JSON, a plot and a page."""

import csv
import io
import math
import os
import platform
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from psp_jax.dotplot import dot_plot
from psp_jax.models import variable_shapes
from psp_jax.report import write_page
from psp_jax.visualize import contact_sheet
from psp_jax.workdir import ModelCard, read_json, versions, write_json, write_png, write_text

SECONDS = ".seconds"  # beside each run's workdir: the seconds of every start, a line each
SCORES = {"mean_iou": "mean IoU", "pixel_accuracy": "pixel accuracy"}
REST = "other classes"  # those of no group


@dataclass(frozen=True)
class Plan:
    """What an ablation compares.

    Attributes:
      file: name of the configuration file.
      tables: {title: {variant: label}}; rows are compared with the first one.
      groups: {name: classes} whose IoU is averaged beside the mean over all.
      published: {title: {variant: mean IoU in percent}} of another source.
    """

    file: str
    tables: Mapping[str, Mapping[str, str]]
    groups: Mapping[str, Sequence[str]]
    published: Mapping[str, Mapping[str, float]]


def write_ablation(workdir: Path, plan: Plan) -> dict[str, Any] | None:
    """Write ablation.json, .csv, .md, .png and .html about the finished runs in `workdir`; None where there is none.

    Raises:
      ValueError: runs have different classes, a group names a class that they have not, or a file is damaged.
    """
    summary = summarise(workdir, plan)
    if summary is None:
        return None
    write_json(workdir / "ablation.json", summary)
    write_text(workdir / "ablation.csv", _csv(summary))
    write_text(workdir / "ablation.md", _markdown(summary))
    plots = [dot_plot(table["title"], *_plotted(summary, table)) for table in summary["tables"]]
    write_png(workdir / "ablation.png", Image.fromarray(contact_sheet([[plot] for plot in plots])))
    write_page(workdir / "ablation.html", "ablation", "Ablation", summary)
    return summary


def summarise(workdir: Path, plan: Plan) -> dict[str, Any] | None:
    """Return all numbers of the finished runs below `workdir` as JSON values; None where there is none.

    Each score is {"each": per seed, "mean", "deviation": of the sample, None of one seed}, as a fraction.
    """
    variants: dict[str, Any] = {}
    cards: list[ModelCard] = []
    record: dict[str, Any] = {}
    for variant in dict.fromkeys(name for rows in plan.tables.values() for name in rows):
        runs = _runs(workdir / variant)
        if not runs:
            continue
        cards.append(ModelCard.read(runs[0][1]))
        record = read_json(runs[0][1] / "config.json")
        variants[variant] = _variant(runs, cards[-1], plan.groups)
    if not variants:
        return None
    if len({card.classes.digest() for card in cards}) > 1:
        raise ValueError(f"The runs in {workdir} have different classes; choose a new --workdir.")
    classes, group_of = cards[0].classes, {name: group for group, names in plan.groups.items() for name in names}
    return {
        "file": plan.file,
        "data": classes.name,
        "steps": record["resolved"]["steps"],
        "batch_size": record["resolved"]["batch_size"],
        "machine": _machine(record["resolved"]),
        "versions": versions(),
        "columns": SCORES | {name: _spoken(name) for name in _groups(plan.groups, classes.names)},
        "tables": [
            {
                "title": title,
                "rows": [
                    {"variant": name, "label": label, "published": plan.published.get(title, {}).get(name)}
                    for name, label in rows.items()
                    if name in variants
                ],
            }
            for title, rows in plan.tables.items()
            if any(name in variants for name in rows)
        ],
        "variants": variants,
        "classes": [
            {"name": name, "color": color, "group": _spoken(group_of.get(name, REST)) if plan.groups else ""}
            for name, color in zip(classes.names, classes.palette.tolist(), strict=True)
        ],
    }


def is_finished(run: Path) -> bool:
    """Tell whether the run in a workdir was trained to its end and evaluated there."""
    metrics, record = run / "eval" / "metrics.json", run / "config.json"
    files = metrics.is_file() and record.is_file()
    return files and read_json(metrics)["step"] == read_json(record)["resolved"]["steps"]


def _runs(directory: Path) -> list[tuple[int, Path]]:
    """Return (seed, workdir) of the finished runs of a variant."""
    found = [(int(run.name.removeprefix("seed")), run) for run in directory.glob("seed*") if is_finished(run)]
    return sorted(found)


def _variant(runs: list[tuple[int, Path]], card: ModelCard, groups: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return parameters, seeds, minutes, scores and IoU per class of the runs of one variant."""
    metrics = [read_json(run / "eval" / "metrics.json") for _, run in runs]
    found = {name: _spread([values[name] for values in metrics]) for name in SCORES}
    for group, names in _groups(groups, card.classes.names).items():
        found[group] = _spread([_mean([values["per_class_iou"][name] for name in names]) for values in metrics])
    classes = {name: _spread([values["per_class_iou"][name] for values in metrics]) for name in card.classes.names}
    parameters = variable_shapes(card.model, card.classes.num_classes)["params"]
    return {
        "seeds": [seed for seed, _ in runs],
        "minutes": [_minutes(run) for _, run in runs],
        "parameters": sum(math.prod(shape) for shape in _shapes(parameters)),
        "scores": found,
        "classes": classes,
    }


def _groups(groups: Mapping[str, Sequence[str]], names: Sequence[str]) -> dict[str, Sequence[str]]:
    """Return the groups, and as the last one the classes of none, where there are groups at all."""
    for group, members in groups.items():
        if unknown := [name for name in members if name not in names]:
            raise ValueError(f"The group {group} names the class {unknown[0]!r}, which the data set has not.")
    grouped = {name for members in groups.values() for name in members}
    rest = [name for name in names if name not in grouped]
    return dict(groups) | ({REST: rest} if groups and rest else {})


def _shapes(tree: Any) -> Iterator[tuple[int, ...]]:
    if isinstance(tree, Mapping):
        for value in tree.values():
            yield from _shapes(value)
    else:
        yield tree.shape


def _minutes(run: Path) -> float | None:
    file = run.with_suffix(SECONDS)
    return round(sum(map(float, file.read_text(encoding="utf-8").split())) / 60, 2) if file.is_file() else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _spread(values: list[float | None]) -> dict[str, Any]:
    known = [value for value in values if value is not None]
    deviation = statistics.stdev(known) if len(known) > 1 else None
    return {"each": values, "mean": _mean(values), "deviation": deviation}


def _machine(resolved: Mapping[str, Any]) -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "devices": f"{resolved['devices']} x {resolved['device_kind']}",
    }


def _spoken(name: str) -> str:
    return name.replace("_", " ")


def _percent(score: Mapping[str, Any]) -> str:
    if score["mean"] is None:
        return "n/a"
    spread = "" if score["deviation"] is None else f" ± {100 * score['deviation']:.1f}"
    return f"{100 * score['mean']:.1f}{spread}"


def _plotted(summary: dict[str, Any], table: dict[str, Any]) -> tuple[list[str], list[tuple[str, list[list[float]]]]]:
    """Return the titles of the columns, and (label, values of each column in percent) of every row."""
    columns = [name for name in summary["columns"] if name != "pixel_accuracy"]
    rows = []
    for row in table["rows"]:
        scores = summary["variants"][row["variant"]]["scores"]
        values = [[100 * value for value in scores[name]["each"] if value is not None] for name in columns]
        rows.append((row["label"], values))
    return [summary["columns"][name] for name in columns], rows


def _csv(summary: dict[str, Any]) -> str:
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


def _markdown(summary: dict[str, Any]) -> str:
    machine, runs = summary["machine"], sum(len(found["seeds"]) for found in summary["variants"].values())
    minutes = sum(sum(filter(None, found["minutes"])) for found in summary["variants"].values())
    parts = [
        f"{runs} runs of {summary['steps']} steps with {summary['batch_size']} images on {summary['data']} "
        f"(`{summary['file']}`), {minutes:.0f} minutes of runs, {machine['cores']} cores of {machine['cpu']}, "
        f"{machine['devices']} a run, jax {summary['versions']['jax']}. Percent, mean ± standard deviation over seeds; "
        "the difference is to the first row."
    ]
    parts += [f"## {table['title']}\n\n{_table(summary, table)}" for table in summary["tables"]]
    parts.append(f"## IoU of the classes\n\n{_class_table(summary, summary['tables'][0])}")
    return "\n\n".join(parts) + "\n"


def _table(summary: dict[str, Any], table: dict[str, Any]) -> str:
    published = any(row["published"] is not None for row in table["rows"])
    first = summary["variants"][table["rows"][0]["variant"]]["scores"]["mean_iou"]["mean"]
    main, *others = summary["columns"].values()
    lines = [["", "seeds", main, "difference", *(["published"] if published else []), *others, "parameters"]]
    for row in table["rows"]:
        found = summary["variants"][row["variant"]]
        score, *scores = (_percent(found["scores"][name]) for name in summary["columns"])
        difference = 100 * (found["scores"]["mean_iou"]["mean"] - first)
        line = [row["label"], str(len(found["seeds"])), score, f"{difference:+.1f}"]
        line += [f"{row['published'] or 'n/a'}"] if published else []
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
