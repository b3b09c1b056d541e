"""Reading archives by name: the same from every kind, from many threads, and in words where one is damaged."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import data_sets
import numpy as np
import pytest

from psp_jax.data.builders.files import Files, Part, find, locate, require

MEMBERS = {f"top/in/{index:03}.bin": np.random.default_rng(index).bytes(700 * index) for index in range(40)}
MEMBERS |= {"top/list.txt": b"b 1\n\na 2\nb 3\n", "elsewhere/in/000.bin": b"other"}


def write(tmp_path: Path, name: str) -> Path:
    if name == "folder":
        data_sets.unpack(tmp_path / name, MEMBERS)
        return tmp_path / name / "top"
    return (data_sets.write_zip if name.endswith("zip") else data_sets.write_tar)(tmp_path / name, MEMBERS)


KINDS = ["a.zip", "a.tar", "a.tgz", "a.tar.gz", "folder"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_files(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind)
    files = Files(path, "top")
    expected = {name.removeprefix("top/"): data for name, data in MEMBERS.items() if name.startswith("top/")}
    assert set(files.names) == set(expected)
    with ThreadPoolExecutor(8) as pool:
        names = list(expected) * 20
        assert list(pool.map(files.read, names)) == [expected[name] for name in names]
    assert files.ids("list.txt") == ["b", "a"]
    assert files.where("list.txt") == (f"{path}/list.txt" if kind == "folder" else f"{path}/top/list.txt")
    for name in ("none", "../elsewhere/in/000.bin", "in"):
        with pytest.raises(ValueError, match=rf"There is no .*{name} \(1 such files\): .* is incomplete; fetch"):
            files.read(name)


def test_of_a_tgz_only_what_is_needed_is_kept(tmp_path: Path) -> None:
    files = Files(write(tmp_path, "a.tgz"), "top", r"in/00|list\.txt$")
    assert sorted(files.names) == [*(f"in/{index:03}.bin" for index in range(10)), "list.txt"]
    assert files.read("in/007.bin") == MEMBERS["top/in/007.bin"]
    kept = sum(len(files.read(name)) for name in files.names)
    assert files._bytes and files._bytes.seek(0, 2) == kept


@pytest.mark.parametrize("kind", KINDS[:4])
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[: len(data) - 700],
        lambda data: data[:-3],
        lambda data: data[:512],
        lambda data: b"<html>Please log in</html>" * 400,
        lambda data: b"",
    ],
)
def test_truncated_archives_and_other_files(tmp_path: Path, kind: str, damage: Callable[[bytes], bytes]) -> None:
    path = write(tmp_path, kind)
    whole = path.read_bytes()
    end = len(whole.rstrip(b"\0")) if kind == "a.tar" else len(whole)  # padding is no loss
    path.write_bytes(damage(whole[:end]))
    with pytest.raises(ValueError, match=rf"^{path} \([\d,]+ bytes\) is truncated or not a {kind[2:]} file \(.*fetch"):
        Files(path, "top")


def test_a_damaged_header_in_the_middle_is_not_taken_for_the_end(tmp_path: Path) -> None:
    path = write(tmp_path, "a.tar")
    data = bytearray(path.read_bytes())
    at = data.index(b"top/in/020.bin")
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"truncated or not a tar file .its list of files breaks off at byte {at:,}"):
        Files(path, "top")


def test_a_damaged_member_of_a_zip_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "a.zip")
    data = bytearray(path.read_bytes())
    data[data.index(MEMBERS["top/in/009.bin"]) + 9] ^= 1
    path.write_bytes(data)
    files = Files(path, "top")
    assert files.read("in/010.bin") == MEMBERS["top/in/010.bin"]
    with pytest.raises(ValueError, match=r"a\.zip/top/in/009\.bin is damaged \(.*fetch the archive again"):
        files.read("in/009.bin")


def test_where_a_part_is_looked_for(tmp_path: Path) -> None:
    part = Part("b.zip", "x/y", "https://a.org/b.zip")
    assert locate(tmp_path, part) is None and find(tmp_path, part) is None
    with pytest.raises(
        FileNotFoundError, match=r"holds neither b\.zip nor the folder x/y .*fetch it from https://a\.or"
    ):
        require(tmp_path, part)
    inner = tmp_path / "x" / "y"
    inner.mkdir(parents=True)
    assert [locate(folder, part) for folder in (tmp_path, tmp_path / "x", inner)] == [inner] * 3
    assert locate(tmp_path.parent, part) is None
    archive = data_sets.write_zip(tmp_path / "b.zip", {"x/y/z": b"1", "x/other": b"2"})
    assert locate(tmp_path, part) == archive and list(require(tmp_path, part).names) == ["z"]
    data_sets.write_zip(archive, {"another/z": b"1"})
    with pytest.raises(ValueError, match=r"b\.zip has no folder x/y, it is another archive of that name"):
        find(tmp_path, part)
