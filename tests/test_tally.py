"""What an interrupted evaluation has counted, read back."""

from pathlib import Path

import numpy as np
import pytest

from psp_jax.tally import Tally


def counted() -> Tally:
    tally = Tally(4, 3)
    tally.add(np.full((3, 3), 7), np.arange(18).reshape(2, 3, 3), np.array([3, 1]))
    return tally


def test_a_tally_goes_on_where_it_was(tmp_path: Path) -> None:
    counted().save(tmp_path / "partial.npz", "mine")
    tally = Tally(4, 3)
    assert tally.load(tmp_path / "none.npz", "mine") == ""
    assert tally.load(tmp_path / "partial.npz", "mine") == "going on after 2 of 4 images"
    tally.add(np.ones((3, 3), np.int64), np.ones((2, 3, 3)), np.array([0, -1]))
    assert tally.confusion.tolist() == [[8] * 3] * 3 and tally.done.tolist() == [True, True, False, True]
    assert tally.load(tmp_path / "partial.npz", "other").endswith("is of another evaluation; starting anew")


def compressed_by_an_unknown_method(data: bytes) -> bytes:
    return data.replace(b"PK\1\2\x2d\3\x2d\0\0\0\0\0", b"PK\1\2\x2d\3\x2d\0\0\0\x62\0")


@pytest.mark.parametrize("kind", ["cut", "empty", "method", "bit", "shape", "dtype", "missing"])
def test_a_damaged_tally_is_told_and_changes_nothing(kind: str, tmp_path: Path) -> None:
    tally, path = counted(), tmp_path / "partial.npz"
    if kind == "shape":
        tally.confusion = np.zeros((2**16, 2), np.int64)
    if kind == "dtype":
        tally.images = tally.images.astype(np.float64)
    tally.save(path, "mine")
    data = path.read_bytes()
    at = data.index(b"confusion.npy") + 200
    changed = {
        "cut": data[:-30],
        "empty": b"",
        "method": compressed_by_an_unknown_method(data),
        "bit": data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :],
        "missing": data.replace(b"images", b"image2"),
    }.get(kind, data)
    assert (changed != data) == (kind not in ("shape", "dtype"))
    path.write_bytes(changed)
    fresh = Tally(4, 3)
    words = fresh.load(path, "mine")
    assert str(path) in words and "damaged" in words and words.endswith("; starting anew") and "\n" not in words
    assert not fresh.done.any() and not fresh.confusion.any() and fresh.images.dtype == np.int32
