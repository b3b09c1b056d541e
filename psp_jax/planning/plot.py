"""A plot of the comparison of topologies: a row for each, a bar for each of three numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from psp_jax.visualize import FAINT_INK, INK, NO_PIXELS, PAPER, RIGHT_INK, WRONG_INK

_SCALE = 2  # pixels are drawn twice as fine as they are counted, for sharp text on dense screens
_ROW, _HEAD, _FOOT, _GAP, _BAR = 30, 64, 16, 26, 200
_VALUE = 74  # room right of a bar for its figure
_COLUMNS = (
    ("images_per_second", "images/s", ",.0f"),
    ("chip_hours", "chip-hours of the run", ",.1f"),
    ("memory_share", "memory, % of a chip's", ".0f"),
)


def bar_plot(title: str, rows: Sequence[Mapping[str, Any]]) -> npt.NDArray[np.uint8]:
    """Draw the speed, the chip-hours and the memory of each row, u8 [H, W, 3].

    A bar's length is its share of the longest in its column, for memory of all that a chip has. What does not fit is
    said in the place of its bars.
    """
    font, bold = ImageFont.load_default(13 * _SCALE), ImageFont.load_default(16 * _SCALE)
    labels = [f"{row['target']}  ({row['chips']} chips, batch {row['batch_size']})" for row in rows]
    margin = max(font.getlength(label) for label in labels) / _SCALE + 2 * _GAP
    columns = [column for column in _COLUMNS if any(_value(row, column[0]) is not None for row in rows)]
    lefts = [margin + i * (_BAR + _VALUE + _GAP) for i in range(len(columns))]
    width = max(round(margin + len(columns) * (_BAR + _VALUE + _GAP)), round(bold.getlength(title) / _SCALE + 2 * _GAP))
    sheet = Image.new("RGB", (width * _SCALE, (_HEAD + len(rows) * _ROW + _FOOT) * _SCALE), PAPER)
    draw = ImageDraw.Draw(sheet)

    def write(x: float, y: float, text: str, ink: tuple[int, int, int], anchor: str, big: bool = False) -> None:
        draw.text((_SCALE * x, _SCALE * y), text, fill=ink, font=bold if big else font, anchor=anchor)

    write(_GAP, 20, title, INK, "lm", big=True)
    for line, label in enumerate(labels):
        write(margin - _GAP, _HEAD + (line + 0.5) * _ROW, label, INK, "rm")
    for left, (name, head, form) in zip(lefts, columns, strict=True):
        write(left, 48, head, FAINT_INK, "lm")
        values = [_value(row, name) for row in rows]
        full = 100.0 if name == "memory_share" else max(value for value in values if value is not None)
        for line, (row, value) in enumerate(zip(rows, values, strict=True)):
            top = _HEAD + line * _ROW + 6
            ink = RIGHT_INK if row["fits"] else WRONG_INK
            if name == "memory_share":
                draw.rectangle([_SCALE * side for side in (left, top, left + _BAR, top + _ROW - 12)], fill=NO_PIXELS)
            if value is None:
                write(left + 6, top + _ROW / 2 - 6, "does not fit" if not row["fits"] else "not known", ink, "lm")
                continue
            length = max(_BAR * min(value / full, 1.0), 1.0)
            draw.rectangle([_SCALE * side for side in (left, top, left + length, top + _ROW - 12)], fill=ink)
            end = left + (_BAR if name == "memory_share" else length)
            write(end + 8, top + _ROW / 2 - 6, format(value, form), INK, "lm")
    return np.asarray(sheet)


def _value(row: Mapping[str, Any], name: str) -> float | None:
    if name != "memory_share":
        return None if row[name] is None else float(row[name])
    if row["memory_total"] is None or row["memory_limit"] is None:
        return None
    return 100 * float(row["memory_total"]) / float(row["memory_limit"])
