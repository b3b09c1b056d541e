"""Pictures of label maps: colours, overlays, legends and comparisons, in NumPy and Pillow.

Everywhere: images are u8[H, W, 3] RGB, label maps are integer [H, W] with train ids, palettes are u8[C, 3]. Any value
outside 0..C-1 is void (255 in our label maps) and drawn black. Small pictures are enlarged by a whole factor with
hard pixel edges, so that text beside them is readable and a pixel stays a pixel.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

U8 = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.integer]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Scalar = TypeVar("Scalar", bound=np.generic)  # the class-parameter syntax needs Python 3.12

VOID_COLOR = (0, 0, 0)
VOID_NAME = "unlabelled"
PAPER = (255, 255, 255)
INK = (34, 34, 38)
FAINT_INK = (118, 118, 126)
RIGHT_INK, WRONG_INK = (17, 74, 139), (176, 32, 26)  # of a confusion matrix: all pixels of a label, right or wrong
NO_PIXELS = (238, 238, 240)

_READABLE_HEIGHT = 384  # pixels; smaller pictures are enlarged to about this
_WIDEST_ENLARGED = 1600  # pixels; a panorama is not enlarged beyond this width


def colorize(label: Labels, palette: U8) -> U8:
    """Paint a label map [H, W] with its palette u8[C, 3]; returns u8[H, W, 3], void black."""
    colors = np.vstack([np.asarray(palette, np.uint8), np.array([VOID_COLOR], np.uint8)])
    return colors[_void_last(label, len(palette))]


def overlay(image: U8, label: Labels, palette: U8, alpha: float = 0.5) -> U8:
    """Blend the colours of a label map over its image: alpha 0 is the image, 1 the colours. Returns u8[H, W, 3].

    Raises:
      ValueError: the image and the label map differ in size.
    """
    _check_same_size(image, label, "label map")
    colors = colorize(label, palette)
    return cv2.addWeighted(image, 1.0 - alpha, colors, alpha, 0.0).astype(np.uint8, copy=False)


def overlay_with_legend(image: U8, label: Labels, names: Sequence[str], palette: U8, alpha: float = 0.5) -> U8:
    """Draw the overlay with outlined regions and, at its right, the classes that are present.

    Returns u8[H', W', 3], enlarged to a readable height. Raises ValueError when image and label differ in size.
    """
    factor = _enlargement(image.shape[0], image.shape[1])
    large_label = _enlarge(label, factor)
    picture = _outline(overlay(_enlarge(image, factor), large_label, palette, alpha), large_label)
    legend = legend_panel({"": label}, names, palette, picture.shape[0])
    return contact_sheet([[picture, legend]])


def side_by_side(image: U8, prediction: Labels, truth: Labels | None, names: Sequence[str], palette: U8) -> U8:
    """Draw image, ground truth (if there is one) and prediction next to each other, with captions and a legend.

    The prediction's caption tells the share of labelled pixels that it has right. Returns u8[H', W', 3].
    Raises ValueError when the maps and the image differ in size.
    """
    _check_same_size(image, prediction, "prediction")
    factor = _enlargement(image.shape[0], image.shape[1])
    panels = [("image", _enlarge(image, factor))]
    maps = {"prediction": prediction}
    caption = "prediction"
    if truth is not None:
        _check_same_size(image, truth, "ground truth")
        panels.append(("ground truth", colorize(_enlarge(truth, factor), palette)))
        maps = {"truth": truth, "prediction": prediction}
        labelled = (truth >= 0) & (truth < len(palette))
        if labelled.any():
            caption = f"prediction ({_percent(float(np.mean(prediction[labelled] == truth[labelled])))} right)"
    panels.append((caption, colorize(_enlarge(prediction, factor), palette)))
    height = panels[0][1].shape[0]
    pictures = [_captioned(panel, text, _font_size(height)) for text, panel in panels]
    return contact_sheet([[*pictures, legend_panel(maps, names, palette, pictures[0].shape[0])]])


def legend_panel(maps: Mapping[str, Labels], names: Sequence[str], palette: U8, height: int) -> U8:
    """Draw colour, name and pixel share of every class present in the maps, the largest first.

    Args:
      maps: column title -> label map [H, W]; one column of shares each. An empty title draws no heading.
      height: of the picture it stands beside, in pixels; sets the size of the text, and where the list wraps into a
        further column. The panel is taller where fewer than eight rows would fit.

    Returns u8[H', W', 3] with H' >= height.
    """
    size = _font_size(height)
    font, row, gap = _font(size), round(1.55 * size), size // 2
    shares = np.stack([_shares(label, len(palette)) for label in maps.values()])  # [maps, C + 1]
    present = [int(k) for k in np.argsort(-shares.sum(axis=0), kind="stable") if shares[:, k].any()]
    colors = [*(tuple(int(v) for v in color) for color in palette), VOID_COLOR]
    texts = [*names, VOID_NAME]
    titles = list(maps)
    heading = 1 if any(titles) else 0
    rows = max(8, height // row - heading)
    share_width = max(math.ceil(font.getlength(text)) for text in [*titles, "100.0 %"]) + 2 * gap
    name_width = max((math.ceil(font.getlength(texts[k])) for k in present), default=0)
    column_width = row + gap + name_width + len(titles) * share_width + 4 * gap
    columns = max(1, math.ceil(len(present) / rows))
    panel = Image.new("RGB", (columns * column_width, max(height, (heading + min(rows, len(present))) * row)), PAPER)
    draw = ImageDraw.Draw(panel)
    for column in range(columns):
        left = column * column_width
        right_edges = [left + row + gap + name_width + (i + 1) * share_width for i in range(len(titles))]
        for title, right in zip(titles, right_edges, strict=True):
            draw.text((right, row // 2), title, fill=FAINT_INK, font=font, anchor="rm")
        for line, k in enumerate(present[column * rows : (column + 1) * rows], start=heading):
            top, middle, inset = line * row, line * row + row // 2, max(1, row // 8)
            box = (left + inset, top + inset, left + row - inset, top + row - inset)
            draw.rounded_rectangle(box, radius=size // 5, fill=colors[k], outline=FAINT_INK, width=max(1, size // 16))
            draw.text((left + row + gap, middle), texts[k], fill=INK, font=font, anchor="lm")
            for share, right in zip(shares[:, k], right_edges, strict=True):
                draw.text((right, middle), _percent(share), fill=FAINT_INK, font=font, anchor="rm")
    return np.asarray(panel)


def confusion_picture(confusion: Labels, names: Sequence[str]) -> U8:
    """Draw pixel counts [C, C], row = label, column = prediction, as shares of each row; returns u8[H', W', 3].

    The right ones are blue, the wrong ones red, and the square root of the share sets the strength, so that a few
    per cent are seen. Rows without pixels are grey. A further column of the matrix is what was predicted as void.
    """
    counts = np.asarray(confusion, np.float64)
    rows, columns = counts.shape
    labelled = counts.sum(axis=1)
    shares = counts / np.maximum(labelled, 1)[:, None]
    cell = min(96, max(12, 760 // rows))
    size = min(16, cell - 1)
    font, gap = _font(size), size // 2 + 2
    sides = [*names, *[VOID_NAME] * (columns - rows)]
    margin = max(math.ceil(font.getlength(text)) for text in sides) + 2 * gap
    heading, left = round(1.8 * size), margin + round(1.8 * size)
    top = heading + margin
    width = left + max(columns * cell, round(font.getlength("wrong" + 5 * "  100 %")) + 6 * size) + 2 * gap
    sheet = Image.new("RGB", (width, top + rows * cell + 4 * heading), PAPER)
    sheet.paste(Image.fromarray(_cells(shares, labelled > 0, cell)), (left, top))
    draw = ImageDraw.Draw(sheet)
    for k, text in enumerate(sides):
        _draw_upwards(sheet, (left + k * cell + cell // 2, top - gap), text, font, INK)
    for k, text in enumerate(names):
        ink = INK if labelled[k] else FAINT_INK
        draw.text((left - gap, top + k * cell + cell // 2), text, fill=ink, font=font, anchor="rm")
    draw.text((left, heading // 2), "prediction", fill=FAINT_INK, font=font, anchor="lm")
    _draw_upwards(sheet, (heading // 2, top + round(font.getlength("label"))), "label", font, FAINT_INK)
    for i, j in np.argwhere(shares >= 0.005) if cell >= 30 else ():
        ink = PAPER if shares[i, j] > 0.3 else INK
        centre = (left + j * cell + cell // 2, top + i * cell + cell // 2)
        draw.text(centre, f"{100 * shares[i, j]:.0f}", fill=ink, font=_font(min(16, cell * 2 // 5)), anchor="mm")
    _draw_scale(draw, (left, top + rows * cell + heading), font, size)
    return np.asarray(sheet)


def contact_sheet(rows: Sequence[Sequence[U8]]) -> U8:
    """Lay pictures out in rows, top-left aligned on white with gaps between them; returns u8[H', W', 3].

    Raises:
      ValueError: there is no picture.
    """
    pictures = [picture for row in rows for picture in row]
    if not pictures:
        raise ValueError("A contact sheet needs at least one picture.")
    gap = max(8, _font_size(max(picture.shape[0] for picture in pictures)) * 3 // 4)
    heights = [max((picture.shape[0] for picture in row), default=0) for row in rows]
    widths = [sum(picture.shape[1] + gap for picture in row) for row in rows]
    sheet = np.full((sum(heights) + gap * (len(rows) + 1), gap + max(widths), 3), PAPER, np.uint8)
    top = gap
    for row, height in zip(rows, heights, strict=True):
        left = gap
        for picture in row:
            sheet[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
            left += picture.shape[1] + gap
        top += height + gap
    return sheet


def _strength(share: npt.NDArray[np.float64], ink: tuple[int, int, int]) -> U8:
    """Mix paper and ink: [...] shares -> u8[..., 3]."""
    paper = np.array(PAPER, np.float64)
    return np.round(paper + np.sqrt(share)[..., None] * (np.array(ink) - paper)).astype(np.uint8)


def _cells(shares: npt.NDArray[np.float64], labelled: npt.NDArray[np.bool_], cell: int) -> U8:
    """Paint the squares of a confusion matrix, with a faint line after each, or after every tenth of small ones."""
    rows, columns = shares.shape
    diagonal = np.eye(rows, columns, dtype=np.bool_)[..., None]
    colors = np.where(diagonal, _strength(shares, RIGHT_INK), _strength(shares, WRONG_INK))
    colors[~labelled] = NO_PIXELS
    picture = colors.repeat(cell, axis=0).repeat(cell, axis=1)
    step = cell if cell >= 20 else 10 * cell
    picture[step - 1 :: step] = picture[:, step - 1 :: step] = NO_PIXELS
    picture[[0, -1]] = picture[:, [0, -1]] = FAINT_INK
    return picture


def _draw_upwards(sheet: Image.Image, foot: tuple[int, int], text: str, font: Font, ink: tuple[int, int, int]) -> None:
    """Write from the bottom to the top, the middle of the first letter's edge at `foot`."""
    width, height = math.ceil(font.getlength(text)) + 2, 2 * math.ceil(font.getlength("M"))
    strip = Image.new("RGB", (width, height), PAPER)
    ImageDraw.Draw(strip).text((0, height // 2), text, fill=ink, font=font, anchor="lm")
    mask = Image.new("L", (width, height))
    ImageDraw.Draw(mask).text((0, height // 2), text, fill=255, font=font, anchor="lm")
    sheet.paste(strip.rotate(90, expand=True), (foot[0] - height // 2, foot[1] - width), mask.rotate(90, expand=True))


def _draw_scale(draw: ImageDraw.ImageDraw, corner: tuple[int, int], font: Font, size: int) -> None:
    """Explain the two colours by swatches from 1 to 100 %."""
    for line, (text, ink) in enumerate((("right", RIGHT_INK), ("wrong", WRONG_INK))):
        x, y = corner[0], corner[1] + line * round(1.5 * size)
        draw.text((x, y + size // 2), text, fill=INK, font=font, anchor="lm")
        x += round(font.getlength("wrong  "))
        for percent in (1, 5, 20, 50, 100):
            color = tuple(int(v) for v in _strength(np.array(percent / 100), ink))
            draw.rectangle((x, y, x + size, y + size), fill=color, outline=FAINT_INK)
            draw.text((x + size + size // 3, y + size // 2), f"{percent} %", fill=FAINT_INK, font=font, anchor="lm")
            x += size + round(font.getlength("100 %  "))


def _void_last(label: Labels, num_classes: int) -> npt.NDArray[np.intp]:
    """Give every void value the index after the last class."""
    index = label.astype(np.intp)
    return np.where((index < 0) | (index >= num_classes), num_classes, index)


def _shares(label: Labels, num_classes: int) -> npt.NDArray[np.float64]:
    """Share of the pixels per class, void last: f64[C + 1]."""
    counts = np.bincount(_void_last(label, num_classes).ravel(), minlength=num_classes + 1)
    return counts / max(1, label.size)


def _percent(share: float) -> str:
    """Tell a share so that a little is never shown as nothing, nor a miss as everything."""
    if 0 < share < 0.0005:
        return "<0.1 %"
    if 0.9995 <= share < 1:
        return ">99.9 %"
    return f"{100 * share:.1f} %"


def _check_same_size(image: U8, label: Labels, what: str) -> None:
    if image.shape[:2] != label.shape:
        raise ValueError(
            f"The {what} is {label.shape[0]}x{label.shape[1]} but its image is {image.shape[0]}x{image.shape[1]}: "
            "resize one of them to the other first."
        )


def _enlargement(height: int, width: int) -> int:
    return max(1, min(round(_READABLE_HEIGHT / height), _WIDEST_ENLARGED // width))


def _enlarge(pixels: npt.NDArray[Scalar], factor: int) -> npt.NDArray[Scalar]:
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)


def _outline(picture: U8, label: Labels) -> U8:
    """Draw a thin dark line where two classes meet, so that regions stay apart on an image of similar colours."""
    edge = np.zeros(label.shape, np.bool_)
    edge[:, 1:] |= label[:, 1:] != label[:, :-1]
    edge[1:] |= label[1:] != label[:-1]
    width = max(1, round(label.shape[0] / 600))
    wide = cv2.dilate(edge.astype(np.uint8), np.ones((width, width), np.uint8))
    return np.where(wide[..., None] > 0, picture // 3, picture)


def _captioned(picture: U8, text: str, size: int) -> U8:
    """Put a line of text above a picture."""
    strip = Image.new("RGB", (picture.shape[1], round(1.6 * size)), PAPER)
    ImageDraw.Draw(strip).text((0, 0.7 * size), text, fill=INK, font=_font(size), anchor="lm")
    return np.concatenate([np.asarray(strip), picture])


def _font_size(height: int) -> int:
    """Size of text beside a picture of this height, in pixels."""
    return min(64, max(15, height // 26))


@functools.lru_cache(maxsize=64)
def _font(size: int) -> Font:
    return ImageFont.load_default(size)
