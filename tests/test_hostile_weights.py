"""Damaged and hostile weight files: one sentence each, nothing run, nothing written, memory near the file's size."""

import io
import json
import os
import random
import stat
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import weight_files
from hostile import COMMAND, WEIGHTS, Trap, refusal, understated
from weight_files import blob, field, layer, varint

from psp_jax.weights.formats import read_tensors


def write_npz(path: Path) -> Path:
    np.savez(path, **WEIGHTS)
    return path


def write_safetensors(path: Path) -> Path:
    header, data = {}, b""
    for name, values in WEIGHTS.items():
        span = [len(data), len(data) + values.nbytes]
        dtype = {"float32": "F32", "int64": "I64"}[values.dtype.name]
        header[name] = {"dtype": dtype, "shape": values.shape, "data_offsets": span}
        data += values.tobytes()
    return safetensors(path, header, data)


def safetensors(path: Path, header: Any, data: bytes = b"", size: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + data)
    return path


def write_caffemodel(path: Path) -> Path:
    return weight_files.write_caffemodel(path, {name: [values, values] for name, values in WEIGHTS.items()})


GOOD: dict[str, Callable[[Path], Path]] = {
    "a.pth": lambda path: weight_files.write_zip(path, weight_files.state_dict(WEIGHTS)),
    "b.pth": lambda path: weight_files.write_legacy(path, weight_files.state_dict(WEIGHTS)),
    "c.npz": write_npz,
    "d.safetensors": write_safetensors,
    "e.caffemodel": write_caffemodel,
}


@pytest.mark.parametrize("name", GOOD)
def test_what_is_damaged_below_is_whole_before(tmp_path: Path, name: str) -> None:
    found = read_tensors(GOOD[name](tmp_path / name))
    expected = {f"{key}/0" if name == "e.caffemodel" else key: values for key, values in WEIGHTS.items()}
    for key, values in expected.items():
        np.testing.assert_array_equal(found[key], values)


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("tenths", range(10))
def test_truncated(tmp_path: Path, name: str, tenths: int) -> None:
    path = GOOD[name](tmp_path / name)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * tenths // 10])
    refusal(path)


@pytest.mark.parametrize("name", GOOD)
def test_flipped_bits(tmp_path: Path, name: str) -> None:
    """Every flip is refused in one sentence, or changes numbers only where the format has no checksum."""
    path = GOOD[name](tmp_path / name)
    content, whole = path.read_bytes(), read_tensors(path)
    rng, refused = random.Random(0), 0
    for bit in rng.sample(range(8 * len(content)), 300):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            found = read_tensors(path)
        except ValueError as error:
            refused += 1
            assert str(path) in str(error) and str(error).isprintable()
            continue
        assert sum(values.nbytes for values in found.values()) <= 4 * len(content) + (1 << 20)
        if name in ("a.pth", "c.npz"):
            assert all(np.array_equal(found[key], whole[key]) for key in whole)
    assert refused >= 10


def archive(path: Path, entries: list[tuple[Any, bytes]], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in entries:
            file.writestr(name, content)
    return path


def npy(values: Any, header: str | None = None, **save: Any) -> bytes:
    """Return a .npy file, or one with another header before the same data."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.asarray(values), **save)
    if header is None:
        return stream.getvalue()
    data = np.asarray(values).tobytes()
    return np.lib.format.magic(1, 0) + struct.pack("<H", len(header) + 1) + header.encode() + b"\n" + data


def link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


def encrypted(path: Path) -> Path:
    """Set the flag of encryption in both headers of the only entry."""
    content = bytearray(archive(path, [("a.npy", npy(np.ones(3)))]).read_bytes())
    content[6] |= 1
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    return path


def header(shape: str, descr: str = "'<f4'") -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}"


ONES = np.ones(3, np.float32)
HOSTILE_NPZ: dict[str, tuple[list[tuple[Any, bytes]], str]] = {
    "objects": ([("a.npy", npy(np.array([Trap()], object), allow_pickle=True))], "has the dtype object"),
    "outside": ([("../a.npy", npy(ONES))], "'../a.npy' points outside"),
    "backslash": ([("..\\a.npy", npy(ONES))], "points outside"),
    "absolute": ([("/etc/a.npy", npy(ONES))], "points outside"),
    "link": ([(link("a.npy"), b"/etc/passwd")], "is a link"),
    "no array": ([("a.txt", b"text")], "damaged"),
    "terabytes": ([("a.npy", npy(ONES, header("(1099511627776,)")))], "does not have the bytes"),
    "many dimensions": ([("a.npy", npy(ONES, header(str((1,) * 90 + (3,)))))], "dimension"),
    "negative": ([("a.npy", npy(ONES, header("(-1, -3)")))], "damaged"),
    "unknown size": ([("a.npy", npy(ONES, header("(-1,)")))], "does not have the bytes"),
    "complex": ([("a.npy", npy(ONES.astype(complex)))], "dtype complex128"),
    "text": ([("a.npy", npy(np.array(["abc"])))], "has the dtype <U3"),
    "records": ([("a.npy", npy(ONES, header("(3,)", "[('x', '<f4')]")))], "has the dtype"),
    "code": ([("a.npy", npy(ONES, header(f"__import__('os').system('{COMMAND}')")))], "damaged"),
    "brackets": ([("a.npy", npy(ONES, header("(" * 300)))], "damaged"),
    "long header": ([("a.npy", npy(ONES, header("(3,)") + " " * 20_000))], "damaged .*large"),
    "short data": ([("a.npy", npy(ONES)[:-1])], "does not have the bytes"),
    "long data": ([("a.npy", npy(ONES) + b"x")], "does not have the bytes"),
    "version": ([("a.npy", npy(ONES).replace(b"NUMPY\x01", b"NUMPY\x09"))], "damaged"),
}


@pytest.mark.parametrize("case", HOSTILE_NPZ)
def test_hostile_npz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.chdir(tmp_path)
    entries, message = HOSTILE_NPZ[case]
    path = archive(tmp_path / "a.npz", entries)
    with pytest.raises(ValueError, match=message):
        read_tensors(path)
    refusal(path)


def test_hostile_archives(tmp_path: Path) -> None:
    bomb = npy(np.zeros(50_000_000, np.uint8))
    assert "would unpack to 50,000,128" in refusal(archive(tmp_path / "a.npz", [("a.npy", bomb)], zipfile.ZIP_DEFLATED))
    assert "compressed in a way" in refusal(archive(tmp_path / "a.npz", [("a.npy", npy(ONES))], zipfile.ZIP_LZMA))
    assert "is encrypted" in refusal(encrypted(tmp_path / "a.npz"))
    with pytest.warns(UserWarning, match="Duplicate name"):
        twice = archive(tmp_path / "a.npz", [("a.npy", npy(ONES)), ("a.npy", npy(ONES))])
    assert "two entries of the same name" in refusal(twice)
    same = archive(tmp_path / "a.npz", [("w", npy(ONES)), ("w.npy", npy(ONES))])
    assert "two arrays of the same name" in refusal(same)
    torch_entries = [("a/data.pkl", bytes(50_000_000))]
    assert "compressed in a way" in refusal(archive(tmp_path / "a.pth", torch_entries, zipfile.ZIP_DEFLATED))
    assert "no data.pkl" in refusal(archive(tmp_path / "b.pth", [("x", b"y")]))
    assert "no data.pkl" in refusal(archive(tmp_path / "c.pth", [("a/data.pkl", b"y"), ("b/data.pkl", b"y")]))
    good = weight_files.state_dict(WEIGHTS)
    assert "TorchScript" in refusal(weight_files.write_zip(tmp_path / "d.pth", good, {"constants.pkl": b"x"}))
    assert "big-endian" in refusal(weight_files.write_zip(tmp_path / "e.pth", good, {"byteorder": b"big"}))
    assert "KeyError" in refusal(weight_files.write_zip(tmp_path / "f.pth", {}, data=weight_files.pickled(good)[0]))
    short = weight_files.write_zip(tmp_path / "g.pth", good, {"data/0": b"1234"})
    assert "needs 108 elements, its data are shorter" in refusal(short)
    outside = {"../../evil": b"x"}
    assert "points outside" in refusal(weight_files.write_zip(tmp_path / "h.pth", good, outside))


@pytest.mark.parametrize(
    ("suffix", "method"), [(".npz", zipfile.ZIP_STORED), (".npz", zipfile.ZIP_DEFLATED), (".pth", zipfile.ZIP_STORED)]
)
@pytest.mark.parametrize("more", [b"x", bytes(50_000_000)], ids=["a byte", "a bomb"])
def test_entries_that_unpack_to_more_than_they_declare(tmp_path: Path, suffix: str, method: int, more: bytes) -> None:
    whole, name = (npy(ONES), "a/a.npy") if suffix == ".npz" else (b"\x80\x02N.", "a/data.pkl")
    path = archive(tmp_path / f"a{suffix}", [(name, whole + more)], method)
    assert "Bad CRC-32" in refusal(understated(path, whole, len(whole)))
    one_more = (whole + more)[: len(whole) + 1]
    assert f"does not have the {len(whole)} bytes that" in refusal(understated(path, one_more, len(whole)))


def entry(dtype: str, shape: list[int], *span: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": span}


HOSTILE_SAFETENSORS: dict[str, tuple[Any, bytes, int | None]] = {
    "header of exabytes": ({}, b"", 1 << 60),
    "header of 99 megabytes": ({}, b"", 99_000_000),
    "not JSON": (b"{'a': 1}", b"", None),
    "deep JSON": (b'{"a":' * 20_000 + b"1" + b"}" * 20_000, b"", None),
    "terabytes": ({"a": entry("F32", [1 << 40], 0, 1 << 42)}, bytes(4), None),
    "overflow": ({"a": entry("F32", [1 << 62, 1 << 62], 0, 4)}, bytes(4), None),
    "shape of another size": ({"a": entry("F32", [2], 0, 4)}, bytes(4), None),
    "overlap": ({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 0, 4)}, bytes(4), None),
    "hole": ({"a": entry("F32", [1], 4, 8)}, bytes(8), None),
    "backwards": ({"a": entry("F32", [1], 4, 0)}, bytes(4), None),
    "more data": ({"a": entry("F32", [1], 0, 4)}, bytes(8), None),
    "unknown dtype": ({"a": entry("F77", [1], 0, 4)}, bytes(4), None),
    "other dtype": ({"a": entry("U32", [1], 0, 4)}, bytes(4), None),
}


@pytest.mark.parametrize("case", HOSTILE_SAFETENSORS)
def test_hostile_safetensors(tmp_path: Path, case: str) -> None:
    refusal(safetensors(tmp_path / "a.safetensors", *HOSTILE_SAFETENSORS[case]))


FLOATS = np.ones(6, np.float32)
HOSTILE_CAFFE: dict[str, tuple[bytes, str]] = {
    "text": (b'name: "PSPNet"\nlayer { name: "conv1" }', "wire format"),
    "no weights": (layer("data", []), "not a .caffemodel with weights"),
    "huge length": (b"\xa2\x06" + varint(1 << 62) + b"x", "ends within a field"),
    "endless number": (b"\xff" * 100, "number, or is not"),
    "group": (b"\xa3\x06\x0a\x00", "wire format"),
    "field 0": (b"\x02\x00", "wire format"),
    "layer that is a number": (field(100, 5), "a number where"),
    "huge shape": (layer("a", [blob(FLOATS, (1 << 40,))]), r"'a' has a blob of the shape \(1099511627776,\) with 6"),
    "overflowing shape": (layer("a", [blob(FLOATS, (1 << 62, 4))]), "with 6 values"),
    "negative shape": (layer("a", [blob(FLOATS, (-2, -3))]), "with 6 values"),
    "a thousand dimensions": (layer("a", [blob(FLOATS, (1,) * 1000 + (6,))]), "more than 32 dimensions"),
    "a million dimensions": (layer("a", [field(7, field(1, b"\x01" * 2_000_000))]), "more than 32 dimensions"),
    "many blobs": (layer("a", [b"\x2a\x00"] * 100_000), "'a' has more than 100 blobs"),
    "no values": (layer("a", [field(7, field(1, b"\x06"))]), "with 0 values"),
    "no shape": (layer("a", [field(5, bytes(24))]), "with 6 values"),
    "shape that is a text": (layer("a", [field(1, b"x") + field(5, bytes(4))]), "text or a message where"),
    "broken floats": (
        layer("a", [field(7, field(1, b"\x01")) + field(5, bytes(5))]),
        "damaged .* multiple of element size",
    ),
    "values in pieces": (layer("a", [blob(FLOATS) + field(5, bytes(4))]), "not in one piece"),
    "single values": (layer("a", [field(7, field(1, b"\x01")) + b"\x2d\x00\x00\x80\x3f" * 2]), "not in one piece"),
    "layer twice": (layer("a", [blob(FLOATS)]) * 2, "holds the layer 'a' twice"),
    "name that is no text": (field(100, field(1, b"\xff\xfe") + field(7, blob(FLOATS))), "decode"),
}


@pytest.mark.parametrize("case", HOSTILE_CAFFE)
def test_hostile_caffemodels(tmp_path: Path, case: str) -> None:
    content, message = HOSTILE_CAFFE[case]
    path = tmp_path / "a.caffemodel"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_tensors(path)
    refusal(path)


SUFFIXES = (".npz", ".safetensors", ".pth", ".pt", ".tar", ".caffemodel")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<!DOCTYPE html>\n<title>Sign in</title>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        bytes(5000),
        random.Random(1).randbytes(5000),
    ],
    ids=["empty", "a web page", "a pointer of LFS", "zeros", "random"],
)
def test_other_files(tmp_path: Path, suffix: str, content: bytes) -> None:
    (tmp_path / f"a{suffix}").write_bytes(content)
    refusal(tmp_path / f"a{suffix}")


def test_no_tensors(tmp_path: Path) -> None:
    assert "it holds no tensors" in refusal(archive(tmp_path / "a.npz", []))
    assert "it holds no tensors" in refusal(safetensors(tmp_path / "a.safetensors", {}))


def test_no_files(tmp_path: Path) -> None:
    (tmp_path / "a.pth").mkdir()
    os.mkfifo(tmp_path / "b.pth")
    (tmp_path / "c.pkl").write_bytes(b"")
    for name in ("a.pth", "b.pth", "c.pkl"):
        assert "known are .npz, .safetensors, .pth, .pt, .tar, .caffemodel." in refusal(tmp_path / name)
