"""Files of named tensors: .npz, .safetensors, torch's .pth and Caffe's .caffemodel, none of which can run anything."""

import io
import math
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from psp_jax.command import one_line
from psp_jax.weights.archives import open_archive, read_entry
from psp_jax.weights.arrays import BFLOAT16, DTYPES, MAX_TENSORS, Unreadable, decode
from psp_jax.weights.caffe import read_caffe
from psp_jax.weights.fetch import was_downloaded
from psp_jax.weights.torch_files import read_torch

# Compressed weights are hardly smaller, but statistics of an untrained network are all zeros and ones.
NPZ_GROWTH = 16
SAFETENSORS_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": BFLOAT16,
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a file by name; nothing in the file is ever run, and memory stays near its size.

    A state dict under "state_dict" or "model" is unwrapped, and "module.", which torch's DataParallel puts before every
    name, removed. Blobs of a .caffemodel are named "<layer>/<index>". Arrays may be read-only; they have the file's
    dtype, bfloat16 becomes float32. Damage within the numbers shows where the format has checksums (.npz, .pth of torch
    1.6 and later); for other files compare a checksum of the whole.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged or hostile, or holds no weights: one sentence with its name.
    """
    if not path.exists():
        raise FileNotFoundError(f"There is no file {path}.")
    if not path.is_file() or path.suffix not in READERS:
        raise ValueError(f"{path} is not a file of weights; known are {', '.join(READERS)}.")
    with path.open("rb"):
        pass  # what the system refuses is its own error, not damage
    try:
        tensors = READERS[path.suffix](path)
        if not tensors:
            raise Unreadable("it holds no tensors")
    except Exception as error:  # a damaged file can make any parser raise anything
        problem = str(error) if isinstance(error, Unreadable) else f"it is damaged ({type(error).__name__}: {error})"
        remedy = "; should the download be to blame, remove that file and try again" if was_downloaded(path) else ""
        raise ValueError(f"Cannot read {path}: {one_line(problem[:300])}{remedy}.") from None
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a .npz or .safetensors; it gets its name when it has been read back and is the same.

    Raises:
      ValueError: an unknown suffix, a dtype that the formats do not share, or a file that reads back otherwise.
    """
    if path.suffix not in WRITERS:
        raise ValueError(f"Weights are written to {' or '.join(WRITERS)}, not to {path}.")
    for name, tensor in tensors.items():
        if tensor.dtype not in [np.dtype(dtype) for dtype in DTYPES]:
            raise ValueError(f"The tensor {name!r} has the dtype {tensor.dtype}; write one of {', '.join(DTYPES)}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    try:
        WRITERS[path.suffix](partial, {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()})
        found = READERS[path.suffix](partial)
        if found.keys() != tensors.keys() or not all(_same(found[name], tensors[name]) for name in tensors):
            raise ValueError(f"{path} did not read back as it was written; check the disk.")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    """Tell whether two arrays are the same bit for bit, NaN included."""
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    with open_archive(path, methods=(zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED), growth=NPZ_GROWTH) as archive:
        names = {entry: entry.removesuffix(".npy") for entry in archive.namelist()}
        if len(set(names.values())) < len(names):
            raise Unreadable("it holds two arrays of the same name, one with .npy and one without")
        return {name: _npy(entry, read_entry(archive, entry)) for entry, name in names.items()}


def _npy(name: str, raw: bytes) -> np.ndarray:
    """Decode a .npy file. NumPy's own reader makes room for the declared shape before it looks at the data."""
    stream = io.BytesIO(raw)
    version = np.lib.format.read_magic(stream)
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, columns_first, dtype = headers[version](stream)
    native = dtype.newbyteorder("=")
    if native not in [np.dtype(known) for known in DTYPES]:
        raise Unreadable(f"its array {name[:80]!r} has the dtype {dtype}; known are {', '.join(DTYPES)}")
    if math.prod(shape) * dtype.itemsize != len(raw) - stream.tell():
        raise Unreadable(f"its array {name[:80]!r} of the shape {shape} does not have the bytes for it")
    values = np.frombuffer(raw, dtype, offset=stream.tell()).astype(native, copy=False)
    return values.reshape(shape, order="F" if columns_first else "C")


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for name, entry in _safetensors().deserialize(path.read_bytes()):
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            raise Unreadable(f"its tensor {name[:80]!r} has the dtype {entry['dtype']}, which is not supported")
        arrays[name] = decode(entry["data"], SAFETENSORS_DTYPES[entry["dtype"]]).reshape(entry["shape"])
        if len(arrays) > MAX_TENSORS:
            raise Unreadable(f"it holds more than {MAX_TENSORS:,} tensors, more than any weights have")
    return arrays


def _write_npz(path: Path, tensors: dict[str, np.ndarray]) -> None:
    with zipfile.ZipFile(path, "w") as archive:  # np.savez cannot write a tensor that is called "file"
        for name, tensor in tensors.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
                np.lib.format.write_array(file, tensor, allow_pickle=False)


def _write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    _safetensors()
    from safetensors.numpy import save_file

    save_file(tensors, path)


def _safetensors() -> Any:
    """Return the package, an extra; Unreadable says how to get it."""
    try:
        import safetensors
    except ModuleNotFoundError:
        raise Unreadable("the package safetensors is missing, run pip install 'psp-jax[weights]'") from None
    return safetensors


READERS = {
    ".npz": _read_npz,
    ".safetensors": _read_safetensors,
    ".pth": read_torch,
    ".pt": read_torch,
    ".tar": read_torch,
    ".caffemodel": read_caffe,
}
WRITERS = {".npz": _write_npz, ".safetensors": _write_safetensors}
