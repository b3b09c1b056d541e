"""From what the compiler tells of a program to what a run takes, time and money: as values, text and tables."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from psp_jax.planning.chips import Chip
from psp_jax.planning.programs import Evaluation, Program

GIB = 2**30

CAVEAT = (
    "Times are the compiler's estimate of the computation alone: waiting for collectives, for data and for the host is "
    "not in them. The bound for collectives is their bytes over the published bandwidth of a chip's links; what of it "
    "runs beside the computation costs no time."
)


def training_summary(
    program: Program,
    chip: Chip | None,
    chips: int,
    batch_size: int,
    steps: int,
    flops: float,
    price: float | None,
) -> dict[str, Any]:
    """Return what training takes; None is what cannot be told.

    Args:
      program: the training step.
      chip: None for the machine at hand, of which nothing is known.
      chips: how many share a step.
      batch_size: images of a step.
      steps: of the run.
      flops: operations of a step, of all chips together.
      price: USD of a chip-hour.
    """
    seconds = program.cost.cycles / chip.clock if chip and program.cost.cycles else None
    hours = steps * seconds / 3600 if seconds else None
    chip_hours = hours * chips if hours else None
    return {
        "compile_seconds": round(program.seconds, 1),
        **_memory(program, chip),
        "flops": flops,
        "flops_an_image": flops / batch_size,
        "compiled_flops_a_chip": program.flops,
        "cycles": program.cost.cycles or None,
        "without_estimate": dict(program.cost.unpriced) if program.cost.cycles else {},
        "step_seconds": seconds,
        "images_per_second": batch_size / seconds if seconds else None,
        "mfu": flops / (chips * chip.peak * seconds) if chip and seconds else None,
        **_links(program, chip),
        "hours": hours,
        "chip_hours": chip_hours,
        "price": chip_hours * price if chip_hours and price is not None else None,
    }


def evaluation_summary(found: Evaluation, chip: Chip | None, size: tuple[int, int]) -> dict[str, Any]:
    """Return what evaluating images of `size` (height, width) takes."""
    program = found.program
    seconds = found.cycles / chip.clock if chip and found.cycles else None
    return {
        "compile_seconds": round(program.seconds, 1),
        **_memory(program, chip),
        "image": list(size),
        "windows": found.windows,
        "images_a_run": found.images,
        "images_per_second": found.images / seconds if seconds else None,
    }


def _memory(program: Program, chip: Chip | None) -> dict[str, Any]:
    limit = chip.hbm if chip else None
    total = program.total
    fits = total is not None and (limit is None or total <= limit)
    return {
        "memory": program.memory,
        "memory_total": total,
        "memory_limit": limit,
        "fits": fits,
        "refusal": program.refusal,
    }


def _links(program: Program, chip: Chip | None) -> dict[str, Any]:
    collectives: dict[str, dict[str, Any]] = {
        kind: {
            "count": found.count,
            "bytes": found.bytes,
            "least_link_bytes": found.least,
            "chips": sorted(found.groups),
        }
        for kind, found in sorted(program.cost.traffic.items())
        if found.groups != {1}
    }
    least = sum(entry["least_link_bytes"] for entry in collectives.values())
    return {
        "collectives": collectives,
        "least_link_seconds": least / chip.links if chip and not program.refusal else None,
    }


def as_text(row: Mapping[str, Any]) -> str:
    """Return a row as paragraphs to read."""
    crop = " x ".join(map(str, row["crop"]))
    shown = [
        f"{row['target']}: {row['chips']} chips of {row['hosts']} hosts, mesh.data={row['data']}, "
        f"mesh.spatial={row['spatial']}",
        f"{row['steps']:,} steps of {row['batch_size']} crops of {crop}, {row['dtype']}",
        "",
    ]
    shown += _memory_lines("memory of a chip while training", row)
    if not row["refusal"]:
        shown += _work_lines(row)
    if row.get("largest_batch_size") is not None:
        shown.append(f"largest train.batch_size that fits: {row['largest_batch_size']}")
    if evaluation := row.get("evaluation"):
        height, width = evaluation["image"]
        shown += ["", *_memory_lines(f"memory of a chip while evaluating {height} x {width}", evaluation)]
        if rate := evaluation["images_per_second"]:
            shown.append(f"evaluation: {evaluation['windows']} windows an image, {rate:,.1f} images/s")
    if row["cycles"]:
        shown += ["", CAVEAT]
    return "\n".join(shown) + "\n"


def _memory_lines(title: str, row: Mapping[str, Any]) -> list[str]:
    if row["refusal"]:
        return [f"{title}: does not fit. {row['refusal']}"]
    kinds = row["memory"] | {"total": row["memory_total"]}
    lines = [f"  {kind:<34}{size / 2**20:11,.2f} MiB" for kind, size in kinds.items()]
    if limit := row["memory_limit"]:
        lines[-1] += f" of {limit / 2**20:,.0f}: {'fits' if row['fits'] else 'does not fit'}"
    return [title, *lines]


def _work_lines(row: Mapping[str, Any]) -> list[str]:
    lines = [
        f"FLOPs of a step: {row['flops'] / 1e9:,.2f} G, {row['flops_an_image'] / 1e9:,.2f} G an image; the compiled "
        f"program counts {row['compiled_flops_a_chip'] / 1e9:,.2f} G a chip"
    ]
    if row["step_seconds"]:  # of chips that are known
        lines.append(
            f"estimated cycles of a step: {row['cycles'] / 1e6:,.2f} M = {1e3 * row['step_seconds']:,.2f} ms, "
            f"{row['images_per_second']:,.0f} images/s, MFU {100 * row['mfu']:.1f} %"
        )
        lines.append(f"all steps: {row['hours']:,.2f} hours, {row['chip_hours']:,.1f} chip-hours" + _usd(row["price"]))
    if row["without_estimate"]:
        listed = ", ".join(f"{count} {operation}" for operation, count in row["without_estimate"].items())
        lines.append(f"  without an estimate, and so not in it: {listed}")
    for kind, found in row["collectives"].items():
        groups = " or ".join(map(str, found["chips"]))
        lines.append(f"collectives: {found['count']} {kind}, {found['bytes'] / 1e6:,.2f} MB, among {groups} chips")
    if row["least_link_seconds"]:
        lines.append(
            f"  at least {1e3 * row['least_link_seconds']:,.3f} ms of a step on the links, not in the times above"
        )
    return lines


def _usd(price: float | None) -> str:
    return "" if price is None else f", {price:,.2f} USD"


# Columns of the comparison: title, and text of a row's value.
_COLUMNS: dict[str, tuple[str, float, str]] = {  # field: (title, unit, format)
    "chips": ("chips", 1, ",d"),
    "batch_size": ("batch", 1, ",d"),
    "memory_total": ("GiB a chip", GIB, ",.2f"),
    "memory_limit": ("of GiB", GIB, ",.2f"),
    "step_seconds": ("ms a step", 1e-3, ",.2f"),
    "images_per_second": ("images/s", 1, ",.0f"),
    "mfu": ("MFU %", 1e-2, ".1f"),
    "least_link_seconds": ("links, at least ms", 1e-3, ",.3f"),
    "hours": ("hours", 1, ",.2f"),
    "chip_hours": ("chip-hours", 1, ",.1f"),
    "price": ("USD", 1, ",.2f"),
}


def table(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the comparison of rows as text cells, the head first; columns without a value are left out."""
    fields = [name for name in _COLUMNS if any(row[name] is not None for row in rows)]
    cells = [["topology", *(_COLUMNS[name][0] for name in fields)]]
    for row in rows:
        name = row["target"] + ("" if row["fits"] else " (does not fit)")
        cells.append([name, *(_cell(row[field], *_COLUMNS[field][1:]) for field in fields)])
    return cells


def _cell(value: float | None, unit: float, form: str) -> str:
    if value is None:
        return "-"
    return format(value if unit == 1 else value / unit, form)


def as_columns(cells: Sequence[Sequence[str]]) -> str:
    """Return a table as aligned lines."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = (
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in cells
    )
    return "\n".join(line.rstrip() for line in lines)


def as_markdown(cells: Sequence[Sequence[str]]) -> str:
    """Return a table as Markdown, with the caveat."""
    marks = ["---" if i == 0 else "--:" for i in range(len(cells[0]))]
    lines = [f"| {' | '.join(line)} |" for line in (cells[0], marks, *cells[1:])]
    return "\n".join(lines) + f"\n\n{CAVEAT}\n"


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the comparison with plain numbers: bytes, seconds, fractions."""
    text = io.StringIO()
    fields = ["target", "data", "spatial", *_COLUMNS, "fits"]
    writer = csv.DictWriter(text, fields, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
