"""What the runs of an ablation say: means and spreads over seeds, as Markdown, CSV, JSON, a plot and a page."""

import json
import math
import platform
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from psp_jax.ablation_text import as_csv, as_markdown
from psp_jax.dotplot import dot_plot
from psp_jax.models import variable_shapes
from psp_jax.report import write_page
from psp_jax.visualize import contact_sheet
from psp_jax.workdir import ModelCard, changed_fields, read_json, write_json, write_png, write_text

STARTS = ".starts.jsonl"  # beside each run's workdir: seconds, exit code, cpu and cores of every start
EVALUATED = ("data.eval_split", "eval.size")  # fields that decide what a score means, though not what is learned
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
      published_for: what these are for, in words.
    """

    file: str
    tables: Mapping[str, Mapping[str, str]]
    groups: Mapping[str, Sequence[str]]
    published: Mapping[str, Mapping[str, float]]
    published_for: str


def write_ablation(workdir: Path, plan: Plan) -> dict[str, Any] | None:
    """Write ablation.json, .csv, .md, .png and .html about the finished runs in `workdir`; None where there is none.

    Raises:
      ValueError: runs were trained or evaluated so that they cannot stand in one table, a group names a class that they
        have not, or a file is damaged.
    """
    summary = summarise(workdir, plan)
    if summary is None:
        return None
    write_json(workdir / "ablation.json", summary)
    write_text(workdir / "ablation.csv", as_csv(summary))
    write_text(workdir / "ablation.md", as_markdown(summary))
    plots = [dot_plot(table["title"], *_plotted(summary, table)) for table in summary["tables"]]
    write_png(workdir / "ablation.png", Image.fromarray(contact_sheet([[plot] for plot in plots])))
    write_page(workdir / "ablation.html", "ablation", "Ablation", summary)
    return summary


def summarise(workdir: Path, plan: Plan) -> dict[str, Any] | None:
    """Return all numbers of the finished runs below `workdir` as JSON values; None where there is none.

    Each score is {"each": per seed, "mean", "deviation": of the sample, None of one seed}, as a fraction.
    """
    names = dict.fromkeys(name for rows in plan.tables.values() for name in rows)
    found = {name: runs for name in names if (runs := _runs(workdir / name))}
    if not found:
        return None
    everything = [run for runs in found.values() for run in runs]
    first = everything[0]
    for runs in found.values():
        for run in runs:
            _check_comparable(first, runs[0], run)
    classes = first.card.classes
    group_of = {name: group for group, members in plan.groups.items() for name in members}
    return {
        "file": plan.file,
        "data": classes.name,
        "published_for": plan.published_for,
        **{
            key: sorted({run.resolved[key] for runs in found.values() for run in runs})
            for key in ("steps", "batch_size")
        },
        "machines": sorted({run.machine for runs in found.values() for run in runs}),
        "jax": sorted({run.versions["jax"] for runs in found.values() for run in runs}),
        "versions": first.versions,
        "columns": SCORES | {name: _spoken(name) for name in _groups(plan.groups, classes.names)},
        "tables": [
            {
                "title": title,
                "rows": [
                    {"variant": name, "label": label, "published": plan.published.get(title, {}).get(name)}
                    for name, label in rows.items()
                    if name in found
                ],
            }
            for title, rows in plan.tables.items()
            if any(name in found for name in rows)
        ],
        "variants": {name: _variant(runs, plan.groups) for name, runs in found.items()},
        "classes": [
            {"name": name, "color": color, "group": _spoken(group_of.get(name, REST)) if plan.groups else ""}
            for name, color in zip(classes.names, classes.palette.tolist(), strict=True)
        ],
    }


@dataclass(frozen=True)
class _Run:
    """What a finished run left."""

    path: Path
    seed: int
    card: ModelCard
    config: dict[str, Any]
    resolved: dict[str, Any]
    versions: dict[str, str]
    metrics: dict[str, Any]
    starts: list[dict[str, Any]]

    @property
    def machine(self) -> str:
        """Device, and where the run was started by an ablation the processor and its share of the cores."""
        devices = f"{self.resolved['devices']} x {self.resolved['device_kind']}"
        if not self.starts:
            return devices
        cores = self.starts[-1]["cores"]
        return f"{cores} core{'s' if cores > 1 else ''} of {self.starts[-1]['cpu']}, {devices}"


def is_finished(run: Path) -> bool:
    """Tell whether the run in a workdir was trained to its end and evaluated there."""
    metrics, record = run / "eval" / "metrics.json", run / "config.json"
    files = metrics.is_file() and record.is_file()
    return files and read_json(metrics)["step"] == read_json(record)["resolved"]["steps"]


def _runs(directory: Path) -> list[_Run]:
    """Return the finished runs of a variant."""
    found = []
    for path in directory.glob("seed*"):
        name = re.fullmatch(r"seed(\d+)", path.name)
        if name and is_finished(path):
            record, metrics = read_json(path / "config.json"), read_json(path / "eval" / "metrics.json")
            log = path.with_suffix(STARTS)
            starts = [json.loads(line) for line in log.read_text("utf-8").splitlines()] if log.is_file() else []
            parts = (record["config"], record["resolved"], record["versions"])
            found.append(_Run(path, int(name[1]), ModelCard.read(path), *parts, metrics, starts))
    return sorted(found, key=lambda run: run.seed)


def _check_comparable(first: _Run, sibling: _Run, run: _Run) -> None:
    """Raise ValueError unless `run` was evaluated as `first` of all runs, and trained as `sibling` of its variant."""
    differences = [
        f"{what}: {run.metrics.get(what)} in place of {first.metrics.get(what)}"
        for what in ("split", "images", "protocol")
        if run.metrics.get(what) != first.metrics.get(what)
    ]
    if run.card.classes.digest() != first.card.classes.digest():
        differences.append("other classes")
    if differences:
        raise ValueError(
            f"{run.path} was not evaluated as {first.path} ({'; '.join(differences)}); evaluate it again in the same "
            "way, or delete it."
        )
    if changed := changed_fields(sibling.config, run.config | {"seed": sibling.seed}):
        raise ValueError(f"{run.path} was not trained as {sibling.path} ({'; '.join(changed)}); delete one of them.")


def _variant(runs: list[_Run], groups: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return parameters, seeds, minutes, scores and IoU per class of the runs of one variant."""
    card, metrics = runs[0].card, [run.metrics for run in runs]
    found = {name: _spread([values[name] for values in metrics]) for name in SCORES}
    for group, names in _groups(groups, card.classes.names).items():
        found[group] = _spread([_mean([values["per_class_iou"][name] for name in names]) for values in metrics])
    classes = {name: _spread([values["per_class_iou"][name] for values in metrics]) for name in card.classes.names}
    parameters = variable_shapes(card.model, card.classes.num_classes)["params"]
    seconds = [sum(start["seconds"] for start in run.starts) for run in runs]
    return {
        "seeds": [run.seed for run in runs],
        "minutes": [round(each / 60, 2) if each else None for each in seconds],
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


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _spread(values: list[float | None]) -> dict[str, Any]:
    known = [value for value in values if value is not None]
    deviation = statistics.stdev(known) if len(known) > 1 else None
    return {"each": values, "mean": _mean(values), "deviation": deviation}


def cpu() -> str:
    """Name of this machine's processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _spoken(name: str) -> str:
    return name.replace("_", " ")


def _plotted(summary: dict[str, Any], table: dict[str, Any]) -> tuple[list[str], list[tuple[str, list[list[float]]]]]:
    """Return the titles of the columns, and (label, values of each column in percent) of every row."""
    columns = [name for name in summary["columns"] if name != "pixel_accuracy"]
    rows = []
    for row in table["rows"]:
        scores = summary["variants"][row["variant"]]["scores"]
        values = [[100 * value for value in scores[name]["each"] if value is not None] for name in columns]
        rows.append((row["label"], values))
    return [summary["columns"][name] for name in columns], rows
