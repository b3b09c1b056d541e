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
Scalar = TypeVar("Scalar", bound=np.generic)  # the class-parameter syntax needs Python 3.12

VOID_COLOR = (0, 0, 0)
VOID_NAME = "unlabelled"
PAPER = (255, 255, 255)
INK = (34, 34, 38)
FAINT_INK = (118, 118, 126)

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
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
