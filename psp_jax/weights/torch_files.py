"""Files of torch.save, without torch: state dicts of the zip format (1.6 and later) and of the format before it."""

import io
import math
import mmap
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from psp_jax.weights.archives import open_archive, read_entry
from psp_jax.weights.arrays import BFLOAT16, MAX_TENSORS, Unreadable, decode, itemsize
from psp_jax.weights.pickles import Named, read_pickle

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
STORAGES = {
    "torch.DoubleStorage": "float64",
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": BFLOAT16,
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
}
WRAPPERS = ("state_dict", "model")  # where training programs put the state dict, beside the optimizer and counters
# Views may share one storage, as tied weights do; a few such, but not a small storage as a thousand large tensors.
MAX_SHARING = 4
SMALL = 1 << 20  # bytes that may be shared in any way
MAX_DIMENSIONS = 64  # NumPy's; a thousand sizes would take long to multiply


@dataclass(frozen=True, eq=False, slots=True)
class Storage:
    """Elements `begin` to `begin + count` of the file's storage `key`; `kind` is torch's name of its class."""

    kind: str
    key: str
    begin: int
    count: int


@dataclass(frozen=True, eq=False, slots=True)
class Tensor:
    """A view into a storage, as the pickle describes it: nothing of it is checked yet."""

    storage: Any
    offset: Any
    size: Any
    stride: Any


def read_torch(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of the state dict in a file of torch.save; only what belongs to them is read.

    Raises:
      Unreadable: saying what the file holds instead, or what is wrong with it. Other exceptions: it is damaged.
    """
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"PK\x03\x04":
        return _read_zip(path)
    if start[:1] == b"\x80":
        return _read_legacy(path)
    raise Unreadable("it is not a file of torch.save; save the state dict with a version of torch from 0.4 on")


def _read_zip(path: Path) -> dict[str, np.ndarray]:
    with open_archive(path, methods=(zipfile.ZIP_STORED,), growth=1) as archive:
        names = set(archive.namelist())
        tops = [name.removesuffix("data.pkl") for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(tops) != 1:
            raise Unreadable("it is a zip archive, but not one of torch.save (no data.pkl)")
        if f"{tops[0]}constants.pkl" in names:
            raise Unreadable("it is a TorchScript program; save the state_dict() of its model")
        if f"{tops[0]}byteorder" in names and read_entry(archive, f"{tops[0]}byteorder") != b"little":
            raise Unreadable("it was saved on a big-endian machine; save it again on another")
        root = read_pickle(io.BytesIO(read_entry(archive, f"{tops[0]}data.pkl")), CALLS, _storage)

        def read(storage: Storage) -> bytes:
            return read_entry(archive, f"{tops[0]}data/{storage.key}")

        return _arrays(_state_dict(root), read, path.stat().st_size)


def _read_legacy(path: Path) -> dict[str, np.ndarray]:
    """Read pickles one after another (a magic number, versions, the object, storage keys), then the storages."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        stream = cast(IO[bytes], data)
        roots: dict[str, Storage] = {}

        def persistent(identity: Any) -> Storage:
            storage = _storage(identity)
            roots[storage.key] = storage
            return storage

        magic, _, system, content, keys = (read_pickle(stream, CALLS, persistent) for _ in range(5))
        if magic != LEGACY_MAGIC:
            raise Unreadable("it is a pickle, but not one of torch.save")
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise Unreadable("it was saved on a big-endian machine; save it again on another")
        tensors = _state_dict(content)
        places: dict[str, tuple[int, int]] = {}
        for key in cast(list[str], keys):
            if roots[key].kind not in STORAGES:
                raise Unreadable(f"it holds a {roots[key].kind[:80]!r}, which is not supported")
            size = int.from_bytes(data.read(8), "little") * itemsize(STORAGES[roots[key].kind])
            if key in places or size > len(data) - data.tell():
                raise Unreadable("it ends within its tensors; get the whole file")
            places[key] = data.tell(), size
            data.seek(size, io.SEEK_CUR)

        def read(storage: Storage) -> bytes:
            begin, size = places[storage.key]
            return data[begin : begin + size]

        return _arrays(tensors, read, len(data))


def _storage(identity: Any) -> Storage:
    """Return the storage of a persistent id ("storage", class, key, device, elements[, view: key, begin, elements])."""
    if not isinstance(identity, tuple) or identity[:1] != ("storage",):
        raise Unreadable("it holds a whole model, not weights; save its state_dict()")
    if len(identity) > 6:
        raise Unreadable("it describes a storage in a way that torch does not")
    _, kind, key, _, count, *view = identity
    begin = 0
    if view and view[0] is not None:
        _, begin, count = view[0]
    if not isinstance(kind, Named) or not isinstance(key, str) or not _sizes((begin, count)):
        raise Unreadable("it describes a storage in a way that torch does not")
    return Storage(kind.name, key, begin, count)


def _state_dict(content: Any) -> dict[str, Tensor]:
    """Find the tensors by name in what was saved."""
    for _ in WRAPPERS:
        inner = [content[key] for key in WRAPPERS if key in content] if isinstance(content, dict) else []
        content = inner[0] if inner and not isinstance(inner[0], Tensor) else content
    if not isinstance(content, dict):
        what = content.name if isinstance(content, Named) else type(content).__name__
        raise Unreadable(f"it holds an object of the class {what[:80]!r}, not a state dict; save its state_dict()")
    if not content or len(content) > MAX_TENSORS:
        raise Unreadable(f"its state dict has {len(content):,} entries")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            what = value.name if isinstance(value, Named) else type(value).__name__
            raise Unreadable(f"its entry {str(key)[:80]!r} is of the class {what[:80]!r}, not a tensor")
    return content


def _arrays(tensors: dict[str, Tensor], read: Callable[[Storage], bytes], file_size: int) -> dict[str, np.ndarray]:
    """Read what the tensors need, every storage one time, and return them as read-only views."""
    raws: dict[str, bytes] = {}
    storages: dict[tuple[str, str], np.ndarray] = {}
    arrays = {}
    room = MAX_SHARING * file_size + SMALL
    for name, tensor in tensors.items():
        storage = tensor.storage
        if not isinstance(storage, Storage) or storage.kind not in STORAGES:
            what = storage.kind if isinstance(storage, Storage) else type(storage).__name__
            raise Unreadable(f"its tensor {name[:80]!r} is in a {what[:80]!r}, which is not supported")
        dtype, place = STORAGES[storage.kind], (storage.key, storage.kind)
        if storage.key not in raws:
            raws[storage.key] = read(storage)
        if place not in storages:
            storages[place] = decode(raws[storage.key], dtype)
        values = storages[place][storage.begin : storage.begin + storage.count]
        if len(values) != storage.count:
            raise Unreadable(f"its tensor {name[:80]!r} needs {storage.count:,} elements, its data are shorter")
        room -= math.prod(tensor.size) * itemsize(dtype) if _sizes(tensor.size) else 0
        if room < 0:
            raise Unreadable(f"its tensor {name[:80]!r} repeats elements to more than weights need")
        arrays[name] = _view(name, tensor, values)
    return arrays


def _view(name: str, tensor: Tensor, values: np.ndarray) -> np.ndarray:
    """Return the tensor's elements of its storage `values` [n]."""
    offset, size, stride = tensor.offset, tensor.size, tensor.stride
    if not _sizes((offset,)) or not _sizes(size) or not _sizes(stride) or len(size) != len(stride):
        raise Unreadable(f"its tensor {name[:80]!r} has no proper shape, or too many dimensions")
    empty = 0 in size
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if not empty and last >= len(values):
        raise Unreadable(f"its tensor {name[:80]!r} of the shape {size} reaches beyond its data")
    if empty:
        return np.empty(size, values.dtype)
    steps = tuple(step * values.itemsize for step in stride)
    return np.lib.stride_tricks.as_strided(values[offset:], size, steps, writeable=False)


def _sizes(values: Any) -> bool:
    if not isinstance(values, tuple) or len(values) > MAX_DIMENSIONS:
        return False
    return all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _rebuild(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    return Tensor(storage, offset, size, stride)


def _unwrap(tensor: Any, *_: Any) -> Any:
    return tensor


CALLS: dict[str, Callable[..., object]] = {
    "torch._utils._rebuild_tensor": _rebuild,
    "torch._utils._rebuild_tensor_v2": _rebuild,
    "torch._utils._rebuild_parameter": _unwrap,
    "torch._utils._rebuild_parameter_with_state": _unwrap,
    "torch.nn.parameter.Parameter": _unwrap,  # versions before 0.4
    "torch.autograd.variable.Variable": _unwrap,
}
