"""Writers of weight files byte by byte, so that readers are tested without torch, Caffe and protobuf."""

import io
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

KINDS = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "int64": "LongStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}


class Global:
    """Stands for a function or class of another package in a pickle."""

    def __init__(self, name: str) -> None:
        self.module, self.name = name.rsplit(".", 1)

    def __call__(self) -> None:
        raise AssertionError("only its name is written")


class Made:
    """Stands for what `maker(*arguments)` gives, with attributes `state`."""

    def __init__(self, maker: str, *arguments: Any, state: Any = None) -> None:
        self.parts = (Global(maker), arguments, state)

    def __reduce__(self) -> Any:
        return self.parts if self.parts[2] is not None else self.parts[:2]


class Storage:
    """A torch storage of the elements of `values`; `identity` is what torch writes in its place."""

    def __init__(self, key: str, values: np.ndarray, kind: str = "", count: int | None = None) -> None:
        self.key, self.raw = key, values.astype(values.dtype.newbyteorder("<")).tobytes()
        self.count = values.size if count is None else count
        self.kind = Global(f"torch.{kind or KINDS[values.dtype.name]}")

    def identity(self, legacy: bool) -> tuple[Any, ...]:
        return ("storage", self.kind, self.key, "cpu", self.count, *((None,) if legacy else ()))


class _Pickler(pickle._Pickler):
    """Writes `Global` by its name, whether or not that can be imported, and `Storage` as torch does."""

    def __init__(self, file: io.BytesIO, protocol: int, legacy: bool) -> None:
        super().__init__(file, protocol)
        self.legacy, self.storages = legacy, {}

    def save_named(self, named: Global) -> None:
        self.write(f"c{named.module}\n{named.name}\n".encode())

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, Storage):
            return None
        self.storages[value.key] = value
        return value.identity(self.legacy)

    dispatch: ClassVar = {**pickle._Pickler.dispatch, Global: save_named}


def pickled(value: Any, protocol: int = 2, legacy: bool = False) -> tuple[bytes, dict[str, Storage]]:
    """Return the pickle of `value`, and the storages in it."""
    file = io.BytesIO()
    pickler = _Pickler(file, protocol, legacy)
    pickler.dump(value)
    return file.getvalue(), pickler.storages


def tensor(values: np.ndarray, key: str, **storage: Any) -> Made:
    """Return a whole C-ordered array as torch.save describes it."""
    steps = tuple(step // values.itemsize for step in np.ascontiguousarray(values).strides)[: values.ndim]
    return view(Storage(key, values, **storage), 0, values.shape, steps)


def view(storage: Any, offset: Any, size: Any, stride: Any) -> Made:
    """Return a tensor that sees `storage` from `offset` on."""
    hooks = Made("collections.OrderedDict")
    return Made("torch._utils._rebuild_tensor_v2", storage, offset, size, stride, False, hooks)


def state_dict(tensors: Mapping[str, np.ndarray]) -> dict[str, Made]:
    """Return what torch.save would be given for these tensors."""
    return {name: tensor(values, str(index)) for index, (name, values) in enumerate(tensors.items())}


def write_zip(path: Path, value: Any, extra: Mapping[str, bytes] | None = None, data: bytes | None = None) -> Path:
    """Write what torch.save writes since 1.6, with `extra` entries, or with `data` for the pickle."""
    content, storages = pickled(value)
    entries = {"data.pkl": content if data is None else data, "byteorder": b"little", "version": b"3\n"}
    entries |= {f"data/{key}": storage.raw for key, storage in storages.items()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, raw in {**entries, **(extra or {})}.items():
            archive.writestr(f"archive/{name}", raw)
    return path


def write_legacy(path: Path, value: Any, magic: int = 0x1950A86A20F9469CFC6C, little_endian: bool = True) -> Path:
    """Write what torch.save wrote before 1.6."""
    content, storages = pickled(value, legacy=True)
    system = {"protocol_version": 1001, "little_endian": little_endian, "type_sizes": {"short": 2}}
    heads = [pickled(part)[0] for part in (magic, 1001, system)]
    file = [*heads, content, pickled(sorted(storages))[0]]
    for key in sorted(storages):
        file += [struct.pack("<q", storages[key].count), storages[key].raw]
    path.write_bytes(b"".join(file))
    return path


def varint(value: int) -> bytes:
    """Encode an unsigned number, or a negative one as 64 bits."""
    value %= 1 << 64
    encoded = b""
    while value >= 0x80:
        encoded, value = encoded + bytes([value & 0x7F | 0x80]), value >> 7
    return encoded + bytes([value])


def field(number: int, content: bytes | int) -> bytes:
    """Encode a field of protobuf: a number, or bytes."""
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    return varint(number << 3 | 2) + varint(len(content)) + content


def blob(values: np.ndarray, shape: tuple[int, ...] | None = None) -> bytes:
    """Encode a BlobProto; `shape` may claim another one than the values have."""
    sizes = b"".join(varint(size) for size in (values.shape if shape is None else shape))
    return field(7, field(1, sizes)) + field(5, values.astype("<f4").tobytes())


def layer(name: str, blobs: list[bytes], kind: str = "Convolution") -> bytes:
    """Encode a LayerParameter as a field of NetParameter."""
    return field(
        100, field(1, name.encode()) + field(2, kind.encode()) + b"".join(field(7, content) for content in blobs)
    )


def write_caffemodel(path: Path, layers: Mapping[str, list[np.ndarray]]) -> Path:
    """Write a .caffemodel of these layers, each with its blobs, behind a data layer without any."""
    content = field(1, b"net") + layer("data", [], "Input")
    path.write_bytes(content + b"".join(layer(name, [blob(b) for b in blobs]) for name, blobs in layers.items()))
    return path
