"""A plot of scores over seeds: a row for each variant, a column for each score, a dot for each seed."""

import math
import statistics
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from psp_jax.visualize import FAINT_INK, INK, NO_PIXELS, PAPER, RIGHT_INK

_SCALE = 2  # pixels are drawn twice as fine as they are counted, for sharp text on dense screens
_ROW, _HEAD, _FOOT, _GAP, _DOT = 30, 64, 30, 26, 4
_WIDTHS = (330, 190)  # of the first column, which matters most, and of the others
_VALUE = 52  # room right of a column for the mean in figures


def dot_plot(
    title: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Sequence[float]]]]
) -> npt.NDArray[np.uint8]:
    """Draw each seed as a dot, their mean as a bar with its figure; all columns share one axis of percent.

    Args:
      title: of the plot.
      columns: a title for each.
      rows: label, and for each column the values of all seeds, 0..100; a column may have none.

    Returns:
      u8 [H, W, 3].
    """
    font, bold = ImageFont.load_default(13 * _SCALE), ImageFont.load_default(16 * _SCALE)
    margin = max(font.getlength(label) for label, _ in rows) / _SCALE + 2 * _GAP
    widths = [_WIDTHS[0 if i == 0 else 1] for i in range(len(columns))]
    lefts = [margin + sum(widths[:i]) + i * (_GAP + _VALUE) for i in range(len(columns))]
    size = (round(lefts[-1] + widths[-1] + _VALUE + _GAP), _HEAD + len(rows) * _ROW + _FOOT)
    sheet = Image.new("RGB", (size[0] * _SCALE, size[1] * _SCALE), PAPER)
    draw = ImageDraw.Draw(sheet)
    values = [value for _, cells in rows for cell in cells for value in cell]
    low = 10 * math.floor(min(values) / 10)
    high = max(low + 10, 10 * math.ceil(max(values) / 10))
    _text(draw, (_GAP, 20), title, INK, bold, "lm")
    for column, (left, width) in enumerate(zip(lefts, widths, strict=True)):
        _text(draw, (left, 48), columns[column], FAINT_INK, font, "lm")
        _axis(draw, left, width, (low, high), len(rows), font)
        for line, (_, cells) in enumerate(rows):
            y = _HEAD + line * _ROW + _ROW / 2
            places = [left + width * (value - low) / (high - low) for value in cells[column]]
            for x in places:
                box = (x - _DOT, y - _DOT, x + _DOT, y + _DOT)
                draw.ellipse([_SCALE * side for side in box], fill=FAINT_INK)
            if places:
                x = statistics.fmean(places)
                draw.rectangle([_SCALE * side for side in (x - 1.5, y - 9, x + 1.5, y + 9)], fill=RIGHT_INK)
                mean = f"{statistics.fmean(cells[column]):.1f}"
                _text(draw, (left + width + 10, y), mean, INK, font, "lm")
    for line, (label, _) in enumerate(rows):
        _text(draw, (margin - _GAP, _HEAD + line * _ROW + _ROW / 2), label, INK, font, "rm")
    return np.asarray(sheet)


def _axis(
    draw: ImageDraw.ImageDraw,
    left: float,
    width: float,
    span: tuple[int, int],
    rows: int,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    """Draw a line at every tenth percent, few enough to have room for their figures."""
    low, high = span
    step = 10 * math.ceil((high - low) / 10 / (width / 36))
    bottom = _HEAD + rows * _ROW
    for tick in range(low, high + 1, step):
        x = left + width * (tick - low) / (high - low)
        draw.line([_SCALE * side for side in (x, _HEAD, x, bottom)], fill=NO_PIXELS, width=_SCALE)
        _text(draw, (x, bottom + 12), str(tick), FAINT_INK, font, "mm")


def _text(
    draw: ImageDraw.ImageDraw,
    place: tuple[float, float],
    text: str,
    ink: tuple[int, int, int],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    anchor: str,
) -> None:
    draw.text((_SCALE * place[0], _SCALE * place[1]), text, fill=ink, font=font, anchor=anchor)
