"""Masks as they come: PNG files of class values, with or without a palette, or of colours."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from psp_jax.classes import MAX_CLASSES
from psp_jax.data import decode
from psp_jax.data.builders.base import Pair, check_same_size, encode_png
from psp_jax.data.frequencies import count_values
from psp_jax.data.headers import PNG_SIGNATURE

VALUES, COLOURS = "values", "colours"  # what masks are read as
Colour = tuple[int, int, int]


class MaskFacts(NamedTuple):
    """What one pair of image and mask is found to be.

    Attributes:
      problem: a sentence on why it cannot be used, or "".
      size: (height, width).
      read_as: VALUES or COLOURS.
      counts: pixels of each value (an int), or of each colour.
      palette: for a palette PNG that is read as values, the colour of each value that occurs.
    """

    problem: str
    size: tuple[int, int] = (0, 0)
    read_as: str = VALUES
    counts: Mapping[Any, int] = {}
    palette: Mapping[int, Colour] = {}


def inspect(image: Path, mask: Path, read_as: str | None) -> MaskFacts:
    """Decode an image and its mask; `read_as` is VALUES or COLOURS, None leaves it to each file's own kind."""
    try:
        pair = Pair(image.stem, image.read_bytes(), mask.read_bytes(), str(image), str(mask))
        pixels = decode.decode_image(pair.image, pair.image_name)
        kind = read_as or (VALUES if _holds_values(pair.annotation) else COLOURS)
        found: np.ndarray
        if kind == VALUES:
            found = decode.decode_annotation(pair.annotation, pair.annotation_name)
            pixels_of = count_values(found)
            counts: dict[Any, int] = {int(value): int(pixels_of[value]) for value in np.flatnonzero(pixels_of)}
        else:
            found = packed_colours(pair.annotation, pair.annotation_name)
            colours, numbers = np.unique(found, return_counts=True)
            if len(colours) > MAX_CLASSES + 1:
                raise ValueError(
                    f"{mask} holds {len(colours):,} colours, more than {MAX_CLASSES} classes and void: smoothed edges "
                    "or lossy compression make such masks; export it again as PNG without smoothing."
                )
            counts = {unpack(int(c)): int(n) for c, n in zip(colours, numbers, strict=True)}
        check_same_size(pair, pixels, found)
        palette = _palette(pair.annotation, list(counts)) if kind == VALUES else {}
    except (OSError, ValueError) as error:
        return MaskFacts(str(error))
    return MaskFacts("", (found.shape[0], found.shape[1]), kind, counts, palette)


def packed_colours(data: bytes, where: str) -> np.ndarray:
    """Return u32[H, W], 65536 red + 256 green + blue, of a PNG; palettes are looked up, alpha is left out.

    Raises:
      ValueError: not a PNG, 16 bits a channel, or unreadable; the sentence names `where`.
    """
    _require_png(data, where)
    if data[24] == 16:
        raise ValueError(f"{where} has 16 bits a channel, colours of classes have 8; save it again with 8.")
    try:
        with Image.open(io.BytesIO(data)) as image:
            rgb = np.asarray(image.convert("RGB")).astype(np.uint32)
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{where} cannot be read, it is damaged or too large ({error}); replace the file.") from None
    return rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]


def unpack(colour: int) -> Colour:
    """Return (red, green, blue) of a packed colour."""
    return colour >> 16, colour >> 8 & 255, colour & 255


def to_values(mask: Path, value_of: Mapping[Colour, int]) -> bytes:
    """Return a mask of colours as a PNG of values; every colour of it must be in `value_of`."""
    packed = packed_colours(mask.read_bytes(), str(mask))
    colours, inverse = np.unique(packed, return_inverse=True)
    values = np.array([value_of[unpack(int(colour))] for colour in colours], np.uint8)
    return encode_png(values[inverse].reshape(packed.shape))


def _holds_values(data: bytes) -> bool:
    """Tell grey-scale and palette PNGs from those of colours; what is no PNG is told when it is decoded."""
    return data[:8] != PNG_SIGNATURE or data[25:26] in (bytes([decode.PNG_GREY]), bytes([decode.PNG_PALETTE]))


def _require_png(data: bytes, where: str) -> None:
    if data[:8] != PNG_SIGNATURE or len(data) < 26:
        raise ValueError(f"{where} is not a PNG file; masks are PNG, since lossy formats change their values.")


def _palette(data: bytes, values: list[int]) -> dict[int, Colour]:
    if data[25] != decode.PNG_PALETTE:
        return {}
    with Image.open(io.BytesIO(data)) as image:
        flat = image.getpalette("RGB") or []
    colours = dict(enumerate(zip(flat[::3], flat[1::3], flat[2::3], strict=True)))
    return {value: colours[value] for value in values if value in colours}
