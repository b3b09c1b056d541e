"""Decoding of image and annotation files, the same when a data set is checked and when it is read.

EXIF orientation is ignored for pairs on purpose: an annotation belongs to the stored pixels.
"""

import io

import cv2
import numpy as np
from PIL import Image

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_GREY, PNG_PALETTE = 0, 3
EXIF_ORIENTATION = 0x0112


def decode_image(data: bytes, where: str, upright: bool = False) -> np.ndarray:
    """Return u8[H, W, 3] RGB of an encoded image; grey-scale becomes three equal channels.

    `upright` turns a photo by its EXIF orientation, as viewers do; only where no annotation belongs to it.

    Raises:
      ValueError: not an image; the sentence names `where`.
    """
    image = _imdecode(data, cv2.IMREAD_COLOR_RGB | (0 if upright else cv2.IMREAD_IGNORE_ORIENTATION))
    if image is None:
        raise ValueError(f"{where} is not a readable image ({len(data)} bytes); replace the file or remove the pair.")
    return image


def decode_annotation(data: bytes, where: str) -> np.ndarray:
    """Return u8[H, W] of an encoded PNG, the numbers stored in it: grey values, or palette indices (not their colours).

    Raises:
      ValueError: not a PNG, a PNG of colours, values above 255, or unreadable; the sentence names `where`.
    """
    if data[:8] != PNG_SIGNATURE or len(data) < 26:
        raise ValueError(f"{where} is not a PNG file; annotations are PNG, since lossy formats change class values.")
    depth, colour = data[24], data[25]  # of the IHDR chunk, always the first one
    if colour not in (PNG_GREY, PNG_PALETTE):
        raise ValueError(
            f"{where} holds colours, not class values; save it as a grey-scale or palette PNG, one number per pixel."
        )
    label = _imdecode(data, cv2.IMREAD_UNCHANGED) if colour == PNG_GREY else None
    if label is None or label.ndim != 2:  # a palette, or grey with a transparent value, which OpenCV turns into colours
        label = _pillow_decode(data, where)
    if label.dtype == np.uint16 or label.dtype == np.int32:  # 16 bits per pixel
        if label.max() > 255:
            raise ValueError(f"{where} holds the value {label.max()}; annotations have values 0-255.")
        label = label.astype(np.uint8)
    if colour == PNG_GREY and depth < 8:
        label = label.astype(np.uint8) // (255 // (2**depth - 1))  # decoders stretch few-bit greys to 0-255
    return label


def check_complete(data: bytes, where: str) -> None:
    """Raise ValueError naming `where` if an image file is damaged: OpenCV fills what is missing in a JPEG with grey."""
    _pillow_decode(data, where)


def exif_orientation(data: bytes) -> int:
    """Return the EXIF orientation 1-8 of an encoded image; 5-8 swap height and width."""
    return int(Image.open(io.BytesIO(data)).getexif().get(EXIF_ORIENTATION, 1))


def _imdecode(data: bytes, flags: int) -> np.ndarray | None:
    return cv2.imdecode(np.frombuffer(data, np.uint8), flags) if data else None


def _pillow_decode(data: bytes, where: str) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{where} cannot be read, it is damaged or truncated ({error}); replace the file.") from None
