"""What the header of an image file tells before any pixel is decoded."""

import struct

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_START = b"\xff\xd8"
TIFF_STARTS, BIG_TIFF_STARTS = (b"II*\0", b"MM\0*"), (b"II+\0", b"MM\0+")
TIFF_WIDTH, TIFF_HEIGHT = 256, 257
TIFF_TYPES = {3: "H", 4: "I", 16: "Q"}
OLD_BMP_HEADER = 12  # bytes of OS/2's, whose sides have 16 bits
# Markers of a JPEG: 0xC0 to 0xCF begin a frame, but for tables and an extension; some stand alone, without a length.
JPEG_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
JPEG_ALONE = {0x01, *range(0xD0, 0xD9)}


def stored_pixels(data: bytes) -> int:
    """Return width times height as the header of a PNG, JPEG, TIFF, BMP or GIF has them.

    0 of other formats, and where the header is damaged. (WebP has no more than 2^28 pixels.)
    """
    try:
        width, height = _size(data)
    except (struct.error, LookupError):
        return 0
    return abs(width * height)  # a BMP stored from the top has a negative height


def _size(data: bytes) -> tuple[int, int]:
    if data[:8] == PNG_SIGNATURE:
        return struct.unpack_from(">II", data, 16)
    if data[:2] == JPEG_START:
        return _jpeg_size(data)
    if data[:4] in TIFF_STARTS:
        return _tiff_size(data, 4, "I", "H", 12)
    if data[:4] in BIG_TIFF_STARTS:
        return _tiff_size(data, 8, "Q", "Q", 20)
    if data[:2] == b"BM":
        (header,) = struct.unpack_from("<I", data, 14)
        return struct.unpack_from("<HH" if header == OLD_BMP_HEADER else "<ii", data, 18)
    return struct.unpack_from("<HH", data, 6) if data[:4] == b"GIF8" else (0, 0)


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """Walk from marker to marker: previews inside of EXIF have frames of their own, which a search would find."""
    at = 2
    while (at := data.find(b"\xff", at)) >= 0:
        marker = data[at + 1]
        if marker in JPEG_FRAMES:
            height, width = struct.unpack_from(">HH", data, at + 5)
            return width, height
        at += 1  # fill bytes may stand before a marker
        if marker not in (0x00, 0xFF, *JPEG_ALONE):
            at += 1 + struct.unpack_from(">H", data, at + 1)[0]
    return 0, 0


def _tiff_size(data: bytes, at: int, word: str, short: str, entry: int) -> tuple[int, int]:
    """Look through the first directory of tags; the arguments are what differs between TIFF and BigTIFF."""
    order = "<" if data[:1] == b"I" else ">"
    (start,) = struct.unpack_from(order + word, data, at)
    (count,) = struct.unpack_from(order + short, data, start)
    first, sides = start + struct.calcsize(short), dict[int, int]()
    for at in range(first, min(first + count * entry, len(data)), entry):
        tag, kind = struct.unpack_from(order + "HH", data, at)
        if tag in (TIFF_WIDTH, TIFF_HEIGHT):
            (sides[tag],) = struct.unpack_from(order + TIFF_TYPES[kind], data, at + entry - struct.calcsize(word))
    return sides[TIFF_WIDTH], sides[TIFF_HEIGHT]
