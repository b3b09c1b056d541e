"""Zip archives of untrusted origin: looked through before anything is unpacked, and never unpacked to disk."""

import contextlib
import copy
import stat
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath

from psp_jax.weights.arrays import MAX_TENSORS, Unreadable


@contextlib.contextmanager
def open_archive(path: Path, methods: Collection[int], growth: int) -> Iterator[zipfile.ZipFile]:
    """Open the zip archive at `path`, of which every entry can then be read without a surprise.

    Args:
      path: the archive.
      methods: the compression methods that entries may have.
      growth: how many times the size of the file all entries together may have.

    Raises:
      Unreadable: an entry is encrypted, a link, there twice, outside of the archive, or compressed otherwise, or there
        is too much of them.
      zipfile.BadZipFile: the archive is damaged. Reading an entry whose checksum is wrong raises it too.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if len(entries) > MAX_TENSORS:
            raise Unreadable(f"it holds {len(entries):,} entries, more than any weights have")
        if len({entry.filename for entry in entries}) < len(entries):
            raise Unreadable("it holds two entries of the same name")
        for entry in entries:
            problem = _problem(entry, methods)
            if problem:
                raise Unreadable(f"its entry {entry.filename[:80]!r} {problem}")
        total, size = sum(entry.file_size for entry in entries), path.stat().st_size
        if total > growth * size:
            raise Unreadable(f"its {size:,} bytes would unpack to {total:,}, more than weights do")
        yield archive


def read_entry(archive: zipfile.ZipFile, name: str) -> bytes:
    """Return the bytes of an entry, unpacking one more than its header declares at most; Unreadable where it has more.

    `ZipFile.read` unpacks up to a gigabyte at a time before it cuts that to the declared size.
    """
    entry = archive.getinfo(name)
    longer = copy.copy(entry)
    longer.file_size += 1  # or the byte too many is cut off unseen
    with archive.open(longer) as file:
        content = file.read(longer.file_size)
    if len(content) != entry.file_size:
        raise Unreadable(f"its entry {name[:80]!r} does not have the {entry.file_size:,} bytes that it declares")
    return content


def _problem(entry: zipfile.ZipInfo, methods: Collection[int]) -> str:
    if entry.flag_bits & 1:
        return "is encrypted"
    if entry.compress_type not in methods:
        return "is compressed in a way that files of this kind are not"
    if stat.S_ISLNK(entry.external_attr >> 16):
        return "is a link"
    name = PurePosixPath(entry.filename.replace("\\", "/"))
    if name.is_absolute() or ".." in name.parts:
        return "points outside of the archive"
    return ""
