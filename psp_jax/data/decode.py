"""Decoding of image and annotation files, the same when a data set is checked, when it is read, and in prediction.

EXIF orientation is ignored for pairs on purpose: an annotation belongs to the stored pixels.
"""

import io
import os
import re
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from psp_jax.data.headers import JPEG_START, PNG_SIGNATURE, TIFF_STARTS, stored_pixels

# The most pixels of an image: 22,360 a side, 1.4 GiB at 3 bytes each (a satellite scene of 20,000 a side is read). A
# header of a few bytes may claim any size, and several threads decode at a time. Who sets the limit of OpenCV, 2^30
# else, sets this one too.
MAX_PIXELS = 500_000_000
OPENCV_LIMIT = "OPENCV_IO_MAX_IMAGE_PIXELS"
# What is said of something that has the name of an image.
NO_FILE = "is no file (but a folder, a pipe, a socket, a device or a link to nothing); move it away"
PNG_GREY, PNG_RGB, PNG_PALETTE = 0, 2, 3
EXIF_ORIENTATION = 0x0112
TIFF_EXTRA_SAMPLES = 338  # what the channels after the colours are: 1 is alpha that the colours are multiplied with,
EXTRA_PREMULTIPLIED, EXTRA_ALPHA = 1, 2  # 2 alpha of its own, anything else no transparency at all
# EXIF is a small TIFF; this is how it begins in JPEG, PNG and WebP (which has its length after the word).
EXIF_START = re.compile(rb"(?:Exif\0\0|eXIf|EXIF.{4}(?:Exif\0\0)?)(?=II\*\0|MM\0\*)", re.DOTALL)


def check_files(paths: Iterable[Path]) -> None:
    """Raise ValueError, which names it, where one of `paths` is no file: a pipe would be waited for without an end."""
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path} {NO_FILE}.")


def decode_image(data: bytes, where: str, upright: bool = False) -> np.ndarray:
    """Return u8[H, W, 3] RGB of an encoded image, as a browser shows it on a white page.

    Grey-scale becomes three equal channels, 16 bits per channel are divided by 257 and rounded, transparent pixels are
    laid over white, CMYK becomes RGB, and of several pages or of an animation the first counts. `upright` turns a photo
    by its EXIF orientation, as viewers do; only where no annotation belongs to it (a TIFF is turned always: its
    orientation belongs to the format, and no reader leaves it out).

    Raises:
      ValueError: not an image, damaged or truncated, of more than MAX_PIXELS (of other formats than those of
        `stored_pixels` OpenCV's own limit), or with values that have no white (floats); the sentence names `where`.
    """
    _check_pixels(data, where)
    if _is_plain(data):  # nearly all files: one call that does everything
        flags = cv2.IMREAD_COLOR_RGB | (0 if upright else cv2.IMREAD_IGNORE_ORIENTATION)
        return _readable(_imdecode(data, flags, where), data, where)
    image = _readable(_imdecode(data, cv2.IMREAD_UNCHANGED, where), data, where)
    is_tiff = data[:4] in TIFF_STARTS
    if image.dtype == np.uint16 and not is_tiff and data[:8] != PNG_SIGNATURE:
        # AVIF and JPEG 2000 of 10 or 12 bits: OpenCV knows how many when it makes 8 of them.
        image = _readable(_imdecode(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION, where), data, where)
    image = _to_rgb(image, _tiff_tag(data, TIFF_EXTRA_SAMPLES) if is_tiff else EXTRA_ALPHA, is_tiff, where)
    return _turn(image, exif_orientation(data)) if upright and not is_tiff else image


def decode_annotation(data: bytes, where: str) -> np.ndarray:
    """Return u8[H, W] of an encoded PNG, the numbers stored in it: grey values, or palette indices (not their colours).

    Raises:
      ValueError: not a PNG, a PNG of colours, values above 255, or unreadable; the sentence names `where`.
    """
    label = decode_numbers(data, where)
    if label.dtype != np.uint8:
        if label.max() > 255:
            raise ValueError(f"{where} holds the value {label.max()}; annotations have values 0-255.")
        label = label.astype(np.uint8)
    return label


def decode_numbers(data: bytes, where: str) -> np.ndarray:
    """Return u8[H, W], or u16 where a pixel has 16 bits, of a PNG of numbers: labels, palette indices, instances.

    Raises:
      ValueError: not a PNG, a PNG of colours, of more than MAX_PIXELS, or unreadable; the sentence names `where`.
    """
    _check_pixels(data, where)
    if data[:8] != PNG_SIGNATURE or len(data) < 26:
        raise ValueError(f"{where} is not a PNG file; annotations are PNG, since lossy formats change class values.")
    depth, colour = data[24], data[25]  # of the IHDR chunk, always the first one
    if colour not in (PNG_GREY, PNG_PALETTE):
        raise ValueError(
            f"{where} holds colours, not class values; save it as a grey-scale or palette PNG, one number per pixel."
        )
    numbers = _imdecode(data, cv2.IMREAD_UNCHANGED, where) if colour == PNG_GREY else None
    if numbers is None or numbers.ndim != 2:  # a palette, or grey with a transparent value: OpenCV makes colours of it
        numbers = _pillow_decode(data, where)
    if depth == 16:
        return numbers.astype(np.uint16, copy=False)
    if colour == PNG_GREY and depth < 8:
        return numbers.astype(np.uint8) // (255 // (2**depth - 1))  # decoders stretch few-bit greys to 0-255
    return numbers


def exif_orientation(data: bytes) -> int:
    """Return the EXIF orientation 1-8 of an encoded JPEG, PNG or WebP; 5-8 swap height and width."""
    found = EXIF_START.search(data)
    orientation = _tiff_tag(data[found.end() :], EXIF_ORIENTATION) if found else 1
    return orientation if 1 <= orientation <= 8 else 1


def _is_plain(data: bytes) -> bool:
    """Tell whether OpenCV alone makes the right RGB: any JPEG, or a PNG of at most 8 bits without transparency."""
    if data[:2] == JPEG_START:
        return True
    if data[:8] != PNG_SIGNATURE or len(data) < 26 or data[24] > 8:
        return False
    return data[25] in (PNG_GREY, PNG_RGB, PNG_PALETTE) and data.find(b"tRNS", 0, data.find(b"IDAT")) < 0


def _check_pixels(data: bytes, where: str) -> None:
    pixels = stored_pixels(data)
    if pixels > MAX_PIXELS and OPENCV_LIMIT not in os.environ:
        raise ValueError(
            f"{where} has {pixels:,} pixels, more than {MAX_PIXELS:,}, and would take {3 * pixels / 2**30:.1f} GiB of "
            f"memory at once: cut it into tiles, or, where memory is ample, set {OPENCV_LIMIT} to the most pixels of "
            "an image."
        )


def _imdecode(data: bytes, flags: int, where: str) -> np.ndarray | None:
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), flags) if data else None
    except cv2.error as error:
        raise ValueError(
            f"{where} cannot be read in one piece ({error.err}): cut it into tiles, or, where it has too many pixels "
            f"and memory is ample, set {OPENCV_LIMIT} to the most pixels of an image."
        ) from None


def _readable(image: np.ndarray | None, data: bytes, where: str) -> np.ndarray:
    if image is None:
        raise ValueError(
            f"{where} is not a readable image ({len(data)} bytes): damaged or truncated, or of an unknown format; "
            "save it again as JPEG or PNG, or leave it out."
        )
    return image


def _to_rgb(image: np.ndarray, alpha_kind: int, is_tiff: bool, where: str) -> np.ndarray:
    """Make u8[H, W, 3] RGB of what OpenCV reads: grey, BGR, or BGR and a fourth channel, of 8 or 16 bits."""
    if image.dtype not in (np.uint8, np.uint16):
        raise ValueError(
            f"{where} holds {image.dtype} values, which have no white; save it with 8 or 16 bits per channel."
        )
    # OpenCV's TIFF reader has multiplied 8-bit colours with their alpha already, 16-bit colours not.
    premultiplied = alpha_kind == EXTRA_PREMULTIPLIED or (is_tiff and image.dtype == np.uint8)
    if image.dtype == np.uint16:
        image = cv2.convertScaleAbs(image, alpha=1 / 257)
    if image.ndim == 2:
        return cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
    rgb = cv2.cvtColor(image, cv2.COLOR_BGR2RGB if image.shape[2] == 3 else cv2.COLOR_BGRA2RGB)
    if image.shape[2] == 3 or alpha_kind not in (EXTRA_PREMULTIPLIED, EXTRA_ALPHA):
        return rgb
    alpha = cv2.cvtColor(image[..., 3], cv2.COLOR_GRAY2RGB)
    if premultiplied:
        return cv2.add(rgb, cv2.bitwise_not(alpha))
    return cv2.bitwise_not(cv2.multiply(cv2.bitwise_not(rgb), alpha, scale=1 / 255))


def _turn(image: np.ndarray, orientation: int) -> np.ndarray:
    """Turn the stored pixels [H, W, 3] as EXIF says."""
    if orientation >= 5:
        image = image.transpose(1, 0, 2)
    rows = slice(None, None, -1 if orientation in (3, 4, 7, 8) else 1)
    columns = slice(None, None, -1 if orientation in (2, 3, 6, 7) else 1)
    return np.ascontiguousarray(image[rows, columns])


def _tiff_tag(data: bytes, tag: int) -> int:
    """Return the first value of a TIFF's tag, 0 where there is none or the tags are damaged."""
    tags = Image.Exif()  # the only reader of Pillow's that looks at no pixels and knows no limit on their number
    try:
        tags.load(data)
        value = tags.get(tag, 0)
        return int(value[0] if isinstance(value, tuple) else value)
    except (OSError, SyntaxError, ValueError, TypeError, LookupError):
        return 0


def _pillow_decode(data: bytes, where: str) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{where} has too many pixels for a palette PNG ({error}); save it as grey-scale.") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{where} cannot be read, it is damaged or truncated ({error}); replace the file.") from None
