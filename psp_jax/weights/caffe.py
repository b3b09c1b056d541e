"""Weights of a .caffemodel, read from protobuf's wire format: needs neither Caffe nor protobuf.

Field numbers are those of src/caffe/proto/caffe.proto.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from psp_jax.weights.arrays import MAX_TENSORS, Unreadable

# NetParameter's fields with layers -> the fields of such a layer with its name and with its blobs.
LAYERS = {100: (1, 7), 2: (4, 6)}  # LayerParameter, and V1LayerParameter of files from before 2015
DATA, SHAPE, DOUBLES = 5, 7, 8  # BlobProto's
LEGACY_SHAPE = (1, 2, 3, 4)  # BlobProto's num, channels, height, width
DIMENSIONS = 1  # BlobShape's
MAX_DIMENSIONS = 32  # Caffe's kMaxBlobAxes
MAX_BLOBS = 100  # of one layer; LSTM, with the most, has about ten
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types


def read_caffe(path: Path) -> dict[str, np.ndarray]:
    """Return every blob as float32 under "<layer>/<index>", the index counted from 0 in its layer.

    Raises:
      Unreadable: the file is no .caffemodel, or a damaged one.
    """
    blobs: dict[str, np.ndarray] = {}
    for number, layer in _fields(memoryview(path.read_bytes())):
        if number in LAYERS:
            name_field, blob_field = LAYERS[number]
            name, found = "", []
            for field, value in _fields(_bytes(layer)):
                if field == name_field:
                    name = bytes(_bytes(value)).decode()
                elif field == blob_field:
                    found.append(_blob(_bytes(value), name))
                if len(found) > MAX_BLOBS:
                    raise Unreadable(f"the layer {name[:80]!r} has more than {MAX_BLOBS} blobs")
            if found and (f"{name}/0" in blobs or len(blobs) + len(found) > MAX_TENSORS):
                raise Unreadable(f"it holds the layer {name[:80]!r} twice, or more layers than any network has")
            blobs |= {f"{name}/{index}": blob for index, blob in enumerate(found)}
    if not blobs:
        raise Unreadable("it is not a .caffemodel with weights")
    return blobs


def _blob(message: memoryview, layer: str) -> np.ndarray:
    """Decode a BlobProto."""
    legacy: dict[int, int] = {}
    shape: tuple[int, ...] | None = None
    values: np.ndarray | None = None
    for number, value in _fields(message):
        if number in LEGACY_SHAPE:
            legacy[number] = _integer(value)
        elif number == SHAPE:
            shape = _shape(_bytes(value))
        elif number in (DATA, DOUBLES):
            if values is not None:
                raise Unreadable(f"the layer {layer[:80]!r} has a blob whose values are not in one piece")
            values = np.frombuffer(_bytes(value), "<f4" if number == DATA else "<f8").astype(np.float32)
    if shape is None:
        shape = tuple(legacy.get(number, 0) for number in LEGACY_SHAPE)
    if values is None or math.prod(shape) != values.size:
        found = 0 if values is None else values.size
        raise Unreadable(f"the layer {layer[:80]!r} has a blob of the shape {shape} with {found:,} values")
    return values.reshape(shape)


def _shape(message: memoryview) -> tuple[int, ...]:
    sizes: list[int] = []
    for number, value in _fields(message):
        if number == DIMENSIONS and isinstance(value, int):
            sizes.append(value)
        elif number == DIMENSIONS:
            packed, at = _bytes(value), 0
            while at < len(packed) and len(sizes) <= MAX_DIMENSIONS:
                size, at = _varint(packed, at)
                sizes.append(size)
        if len(sizes) > MAX_DIMENSIONS:
            raise Unreadable(f"it has a blob of more than {MAX_DIMENSIONS} dimensions")
    return tuple(sizes)


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield the number and the value of each field: a number of type varint, or the bytes of any other type."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            value, at = _varint(message, at)
            yield number, value
            continue
        if kind not in (FIXED64, BYTES, FIXED32) or number == 0:
            raise Unreadable("it is not in protobuf's wire format")
        if kind == BYTES:
            size, at = _varint(message, at)
        else:
            size = 8 if kind == FIXED64 else 4
        if size > len(message) - at:
            raise Unreadable("it ends within a field; get the whole file")
        yield number, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """Return the number of 7 bits a byte, the lowest first, that begins at `at`, and where it ends."""
    value = 0
    for index, byte in enumerate(message[at : at + 10]):
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, at + index + 1
    raise Unreadable("it ends within a number, or is not in protobuf's wire format")


def _bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise Unreadable("it has a number where its format has a text or a message")
    return value


def _integer(value: int | memoryview) -> int:
    if not isinstance(value, int):
        raise Unreadable("it has a text or a message where its format has a number")
    return value
