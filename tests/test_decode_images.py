"""Images as users have them: every kind that a viewer shows comes out as shown there, or is refused by name."""

import io
import re
import struct
import zlib
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from psp_jax.data import decode, headers

RNG = np.random.default_rng(0)
ROWS, COLUMNS = np.mgrid[:24, :40]
SMOOTH = np.stack([ROWS * 10, COLUMNS * 6, ROWS + COLUMNS], -1).astype(np.uint8)  # lossy formats keep it
RGB = RNG.integers(0, 256, (24, 40, 3), np.uint8)
ALPHA = RNG.integers(0, 256, (24, 40), np.uint8)
RGB16 = RNG.integers(0, 65536, (24, 40, 3), np.uint16)


def save(image: np.ndarray | Image.Image, kind: str, **options: Any) -> bytes:
    """Encode with Pillow."""
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, kind, **options)
    return buffer.getvalue()


def tiff(pixels: np.ndarray, **tags: int) -> bytes:
    """Write pixels [H, W, C] as an RGB TIFF without compression; tags are named t338 and so on."""
    height, width, channels = pixels.shape
    bits = 8 * pixels.dtype.itemsize
    entries = {256: width, 257: height, 258: bits, 259: 1, 262: 2, 277: channels, 278: height, 279: pixels.nbytes}
    entries |= {int(name[1:]): value for name, value in tags.items()} | {273: 0}
    body = 8 + 2 + 12 * len(entries) + 4
    entries[273] = body + 2 * channels
    directory = b"".join(
        struct.pack("<HHII", tag, 3, channels, body) if tag == 258 else struct.pack("<HHII", tag, 4, 1, value)
        for tag, value in sorted(entries.items())
    )
    head = struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + directory + bytes(4)
    return head + struct.pack(f"<{channels}H", *[bits] * channels) + pixels.tobytes()


def over_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Lay u8 colours over white, in exact arithmetic."""
    share = alpha[..., None].astype(np.float64) / 255
    return np.round(rgb * share + 255 * (1 - share)).astype(np.uint8)


OPAQUE = {
    "grey": save(ALPHA, "PNG"),
    "one bit": save(Image.fromarray(ALPHA > 127), "PNG"),
    "one bit tiff": save(Image.fromarray(ALPHA > 127), "TIFF"),
    "palette": save(Image.fromarray(RGB).quantize(16), "PNG"),
    "palette tiff": save(Image.fromarray(RGB).quantize(16), "TIFF"),
    "bmp": save(RGB, "BMP"),
    "webp": save(SMOOTH, "WEBP"),
    "tiff": save(RGB, "TIFF", compression="tiff_lzw"),
    "cmyk tiff": save(Image.fromarray(SMOOTH).convert("CMYK"), "TIFF"),
    "jpeg": save(SMOOTH, "JPEG", quality=95),
    "grey jpeg": save(SMOOTH[..., 1].copy(), "JPEG"),
    "animated webp": save(Image.fromarray(RGB), "WEBP", save_all=True, append_images=[Image.fromarray(255 - RGB)]),
    "animated png": save(Image.fromarray(RGB), "PNG", save_all=True, append_images=[Image.fromarray(255 - RGB)]),
    "pages": save(Image.fromarray(RGB), "TIFF", save_all=True, append_images=[Image.fromarray(255 - RGB)]),
    "1 x 1": save(RGB[:1, :1].copy(), "PNG"),
    "7 x 4000": save(np.tile(RGB[:7], (1, 100, 1)), "PNG"),
    "4000 x 7": save(np.tile(SMOOTH[:, :7], (200, 1, 1))[:4000], "JPEG"),
}


@pytest.mark.parametrize("kind", OPAQUE)
def test_as_pillow_converts_it(kind: str) -> None:
    expected = np.asarray(Image.open(io.BytesIO(OPAQUE[kind])).convert("RGB"))
    decoded = decode.decode_image(OPAQUE[kind], "a", upright=True)
    assert decoded.dtype == np.uint8 and decoded.shape == expected.shape
    assert np.abs(decoded.astype(int) - expected).max() <= 1, "rounding of lossy formats may differ by one"


@pytest.mark.parametrize("kind", ["adobe", "ycck", "no marker"])
def test_cmyk_jpeg(kind: str) -> None:
    """Pillow writes Adobe's inverted CMYK; the marker's last byte, or its absence, makes the other two."""
    data = save(Image.fromarray(SMOOTH).convert("CMYK"), "JPEG", quality=95)
    start = data.index(b"\xff\xee\x00\x0eAdobe")
    if kind == "ycck":
        data = data[: start + 15] + b"\x02" + data[start + 16 :]
    elif kind == "no marker":
        data = data[:start] + data[start + 16 :]
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert kind != "adobe" or np.abs(expected - SMOOTH).max() < 20
    assert np.abs(decode.decode_image(data, "a.jpg") - expected).max() <= 1


@pytest.mark.parametrize("kind", [".png", ".tif"])
def test_16_bits_are_scaled_and_rounded(kind: str) -> None:
    expected = np.round(RGB16 / 257).astype(np.uint8)
    decoded = decode.decode_image(cv2.imencode(kind, RGB16[..., ::-1])[1].tobytes(), "a")
    assert (decoded == expected).all()
    grey = decode.decode_image(cv2.imencode(kind, RGB16[..., 0])[1].tobytes(), "a")
    assert (grey == expected[..., :1]).all() and grey.shape == RGB.shape


def test_transparency_shows_white() -> None:
    rgba, expected = np.dstack([RGB, ALPHA]), over_white(RGB, ALPHA)
    for data in (
        save(rgba, "PNG"),
        save(rgba, "WEBP", lossless=True, exact=True),
        cv2.imencode(".png", rgba[..., [2, 1, 0, 3]] * np.uint16(257))[1].tobytes(),
    ):
        assert (decode.decode_image(data, "a") == expected).all()
    grey = save(Image.fromarray(np.dstack([RGB[..., 0], ALPHA]), "LA"), "PNG")
    assert (decode.decode_image(grey, "a.png") == over_white(RGB[..., :1], ALPHA)).all()
    palette = Image.fromarray(RGB).quantize(16)
    shown = np.array(palette.convert("RGB"))
    shown[np.asarray(palette) == 3] = 255
    assert (decode.decode_image(save(palette, "PNG", transparency=3), "a.png") == shown).all()
    # Not in the oldest OpenCV that serves, where a GIF is refused by name.
    if re.search(r"GIF: +YES", cv2.getBuildInformation()):
        assert (decode.decode_image(save(palette, "GIF", transparency=3), "a.gif") == shown).all()


@pytest.mark.parametrize("scale", [1, 257], ids=["8 bits", "16 bits"])
def test_fourth_channel_of_a_tiff_is_what_its_tag_says(scale: int) -> None:
    depth = np.uint8 if scale == 1 else np.uint16
    rgba, expected = (np.dstack([RGB, ALPHA]) * depth(scale)).astype(depth), over_white(RGB, ALPHA)
    own = decode.decode_image(tiff(rgba, t338=2), "a.tif")
    assert np.abs(own.astype(int) - expected).max() <= 1, "8 bits are rounded twice"
    ratio = ALPHA[..., None] / 255
    multiplied = np.dstack([np.round(RGB * ratio), ALPHA]).astype(depth) * depth(scale)
    assert np.abs(decode.decode_image(tiff(multiplied, t338=1), "a.tif").astype(int) - expected).max() <= 1
    for infrared in (tiff(rgba, t338=0), tiff(rgba)):
        assert (decode.decode_image(infrared, "a.tif") == RGB).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "alpha", "16 bits"])
def test_upright_photos(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.dstack([SMOOTH, np.full_like(ALPHA, 255)]) if kind == "alpha" else SMOOTH
    format = {"alpha": "PNG", "16 bits": "PNG"}.get(kind, kind)
    options: dict[str, Any] = {"tiffinfo": {274: orientation}} if kind == "TIFF" else {"exif": exif}
    data = save(SMOOTH[..., 0].astype(np.uint16) * 257 if kind == "16 bits" else pixels, format, **options)
    turned = Image.open(io.BytesIO(save(SMOOTH, "PNG", exif=exif)))
    expected = np.asarray(ImageOps.exif_transpose(turned))
    expected = expected[..., :1] if kind == "16 bits" else expected
    upright = decode.decode_image(data, "a", upright=True)
    assert upright.shape[:2] == expected.shape[:2] and upright.flags.c_contiguous
    assert np.abs(upright.astype(int) - expected).max() <= (30 if kind in ("JPEG", "WEBP") else 0)
    if kind == "TIFF":
        assert (decode.decode_image(data, "a") == upright).all()
    else:
        assert decode.decode_image(data, "a").shape == SMOOTH.shape and decode.exif_orientation(data) == orientation


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (save(RGB[..., 0].astype(np.float32), "TIFF"), r"holds float32 values, which have no white"),
        (save(RGB[..., 0].astype(np.int32), "TIFF"), r"holds int32 values"),
        (cv2.imencode(".hdr", RGB.astype(np.float32))[1].tobytes(), r"holds float32 values"),
        (tiff(RGB16[..., [0, 1, 2, 0, 1]]), r"is not a readable image"),
        (b"\0\0\0\x18ftypheic" + bytes(200), r"is not a readable image \(212 bytes\)"),
        (b"", r"is not a readable image \(0 bytes\)"),
        (headers.PNG_SIGNATURE, r"is not a readable image \(8 bytes\)"),
        (headers.JPEG_START, r"is not a readable image \(2 bytes\)"),
    ],
)
def test_what_is_no_image_is_refused_by_name(data: bytes, problem: str) -> None:
    with pytest.raises(ValueError, match=rf"^photos/a\.tif {problem}"):
        decode.decode_image(data, "photos/a.tif")


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 3}], ids=str)
def test_every_truncated_jpeg_is_refused(options: dict[str, Any]) -> None:
    whole = save(RGB, "JPEG", **options)
    for length in [*range(2, len(whole), 29), *range(len(whole) - 5, len(whole))]:
        with pytest.raises(ValueError, match=rf"not a readable image \({length} bytes\): damaged or truncated"):
            decode.decode_image(whole[:length], "a.jpg")


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "BMP", "GIF"])
def test_truncated_files_of_other_formats_are_refused(kind: str) -> None:
    whole = save(RGB, kind)
    for length in (len(whole) // 2, len(whole) - 20):
        with pytest.raises(ValueError, match=r"^a is not a readable image"):
            decode.decode_image(whole[:length], "a")


def huge(width: int, height: int) -> dict[str, bytes]:
    """Return files that are little more than a header, and claim these sides."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    ihdr = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    files = {"png": headers.PNG_SIGNATURE + chunk(b"IHDR", ihdr) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")}
    exif = Image.Exif()
    exif[0x010E] = "\xff\xc0\0\x11\x08\0\x02\0\x02"  # as if a preview of 2 x 2 were in it
    for kind in ("plain", "progressive"):
        jpeg = save(RGB, "JPEG", exif=exif, progressive=kind == "progressive")
        files[kind] = jpeg.replace(struct.pack(">HH", *RGB.shape[:2]), struct.pack(">HH", height, width))
    files["tiff"] = tiff(RGB, t256=width, t257=height)
    big = b"".join(struct.pack("<HHQQ", tag, 4, 1, side) for tag, side in ((256, width), (257, height)))
    files["big tiff"] = b"II+\0" + struct.pack("<HHQQ", 8, 0, 16, 2) + big
    bmp, gif = save(RGB, "BMP"), save(Image.fromarray(ALPHA), "GIF")
    files["bmp"] = bmp[:18] + struct.pack("<ii", width, -height) + bmp[26:]
    files["old bmp"] = bmp[:14] + struct.pack("<IHHHH", 12, width, height, 1, 24) + bmp[26:]
    files["gif"] = gif[:6] + struct.pack("<HH", width, height) + gif[10:]
    return files


@pytest.mark.parametrize("kind", huge(1, 1))
def test_more_pixels_than_memory_is_meant_for_are_refused_by_the_header(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(decode.OPENCV_LIMIT, raising=False)
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("the pixels were decoded"))
    data = huge(25_000, 20_001)[kind]
    with pytest.raises(ValueError, match=r"^a has 500,025,000 pixels, more than 500,000,000, .* 1\.4 GiB .*into tiles"):
        decode.decode_image(data, "a")
    if kind == "png":
        with pytest.raises(ValueError, match=r"^a has 500,025,000 pixels"):
            decode.decode_annotation(data, "a")
    monkeypatch.setattr(cv2, "imdecode", lambda *_: SMOOTH)
    assert decode.decode_image(huge(20_000, 20_000)[kind], "a").shape == SMOOTH.shape, "a large satellite scene"
    monkeypatch.setenv(decode.OPENCV_LIMIT, "2000000000")
    assert decode.decode_image(data, "a").shape == SMOOTH.shape, "OpenCV's limit counts where the user sets it"


def test_more_pixels_than_opencv_reads_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(decode.OPENCV_LIMIT, "1073741824")  # as it is by itself
    with pytest.raises(
        ValueError, match=r"^a\.png cannot be read in one piece .*into tiles, .*set OPENCV_IO_MAX_IMAGE"
    ):
        decode.decode_image(huge(40_000, 40_000)["png"], "a.png")


def test_headers_tell_the_size_of_the_image() -> None:
    for kind, data in OPAQUE.items():
        expected = 0 if "webp" in kind else np.prod(Image.open(io.BytesIO(data)).size)
        assert headers.stored_pixels(data) == expected, kind
        for length in range(0, len(data), 7):
            assert headers.stored_pixels(data[:length]) in (0, expected), "a truncated header"
