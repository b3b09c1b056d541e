"""Decoding and checking one pair: every kind of image and annotation file, and what is refused."""

import io
import struct
import zlib
from pathlib import Path

import data_sets
import numpy as np
import pytest
from PIL import Image

from psp_jax import classes
from psp_jax.data import decode
from psp_jax.data.builders.base import Pair, check_pair, encode_annotation
from psp_jax.data.headers import PNG_SIGNATURE

SHARED = Path(__file__).resolve().parents[2] / "shared"
THREE = classes.ClassTable.from_dict({"names": ["road", "tree", "sky"], "ignore": 255}, "three")


def pair(image: bytes, annotation: bytes) -> Pair:
    return Pair("a", image, annotation, "images/a.jpg", "annotations/a.png")


def test_check_pair_names_file_and_value() -> None:
    photo, label = data_sets.encode(data_sets.image(0), "JPEG"), data_sets.encode(data_sets.annotation(0, 3))
    assert check_pair(pair(photo, label), THREE).shape == (24, 32)
    for image, annotation, problem in (
        (photo[:-40], label, r"^images/a\.jpg is not a readable image \(\d+ bytes\): damaged or truncated"),
        (b"", label, r"^images/a\.jpg is not a readable image \(0 bytes\)"),
        (b"GIF89a", label, r"^images/a\.jpg is not a readable image"),
        (photo, label[: len(label) // 2], r"^annotations/a\.png cannot be read"),
        (photo, photo, r"^annotations/a\.png is not a PNG file"),
        (photo, data_sets.encode(data_sets.image(0)), r"^annotations/a\.png holds colours, not class values"),
        (
            photo,
            data_sets.encode(data_sets.annotation(0, 4)),
            r"^annotations/a\.png holds the value 3, .* classes are 0-2",
        ),
        (
            photo,
            data_sets.encode(data_sets.annotation(1, 3)),
            r"^images/a\.jpg is 32x24 pixels but its annotation annotations/a\.png is 20x40; both must have the same",
        ),
    ):
        with pytest.raises(ValueError, match=problem):
            check_pair(pair(image, annotation), THREE)


def test_orientation_is_ignored_and_explained() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(data_sets.image(0)).save(buffer, "JPEG", exif=exif)
    assert decode.decode_image(buffer.getvalue(), "a.jpg").shape == (24, 32, 3)
    check_pair(pair(buffer.getvalue(), data_sets.encode(data_sets.annotation(0, 3))), THREE)
    turned = data_sets.encode(np.ascontiguousarray(data_sets.annotation(0, 3).T))
    with pytest.raises(ValueError, match="EXIF orientation"):
        check_pair(pair(buffer.getvalue(), turned), THREE)


def test_grey_photos_have_three_equal_channels() -> None:
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    decoded = decode.decode_image(data_sets.encode(grey), "a.png")
    assert (decoded == grey[..., None]).all() and decoded.shape == (8, 8, 3)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palette_annotations_are_indices(bits: int) -> None:
    values = np.arange(64, dtype=np.uint8).reshape(8, 8) % min(2**bits, 64)
    image = Image.fromarray(values).convert("P")
    image.putpalette([255 - v // 3 for v in range(768)])
    image.putdata(values.reshape(-1).tolist())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", bits=bits, transparency=0)
    assert buffer.getvalue()[24:26] == bytes([bits, 3])
    assert (decode.decode_annotation(buffer.getvalue(), "a.png") == values).all()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_few_bit_grey_annotations_are_not_stretched(bits: int) -> None:
    """A grey PNG of few bits, made by hand: Pillow writes none but 1 bit."""
    values = np.arange(64, dtype=np.uint8).reshape(8, 8) % 2**bits
    rows = [np.packbits(np.unpackbits(row[:, None], axis=1)[:, 8 - bits :].reshape(-1)).tobytes() for row in values]

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 8, 8, bits, 0, 0, 0, 0)
    packed = zlib.compress(b"".join(b"\0" + row for row in rows))
    png = PNG_SIGNATURE + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    assert (decode.decode_annotation(png, "a.png") == values).all()
    transparent = png.replace(chunk(b"IDAT", packed), chunk(b"tRNS", b"\0\1") + chunk(b"IDAT", packed))
    assert (decode.decode_annotation(transparent, "a.png") == values).all()


def test_16_bit_annotations() -> None:
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 4
    decoded = decode.decode_annotation(data_sets.encode(values), "a.png")
    assert decoded.dtype == np.uint8 and (decoded == values).all()
    with pytest.raises(ValueError, match=r"a\.png holds the value 504"):
        decode.decode_annotation(data_sets.encode(values * 2), "a.png")


def test_records_hold_annotations_as_grey_values() -> None:
    label = data_sets.annotation(0, 3)
    packed = encode_annotation(decode.decode_annotation(data_sets.palette_png(label), ""))
    assert packed[24:26] == bytes([8, decode.PNG_GREY])  # bits of a pixel, colour type
    np.testing.assert_array_equal(decode.decode_annotation(packed, ""), label)
