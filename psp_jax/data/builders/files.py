"""The files of an official archive (.zip, .tar, .tgz), or of the folder that it was unpacked to, read by exact name.

Nothing is unpacked to a place that a name in an archive could choose: names are only looked up.
"""

import gzip
import os
import re
import shutil
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple, TypeVar

ID = re.compile(r"\w[\w-]*")  # the id of an image becomes part of file names, so nothing else is one
CHUNK = 1 << 20  # bytes
MAX_FILES, MAX_BYTES = 2_000_000, 1 << 28  # of an archive, and of one file in it
MAX_GROWTH = 200  # times the size of an archive that it may unpack to; label maps, were they plain, grow 120 times
Entry = TypeVar("Entry", zipfile.ZipInfo, tarfile.TarInfo)
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE)
_DAMAGES = (
    *(zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError),
    *(ValueError, struct.error, OverflowError),
)


class Part(NamedTuple):
    """One of the official archives that a data set consists of."""

    archive: str  # its file name
    inside: str  # the folder in it that holds what is needed
    url: str  # of the archive, or of the page behind whose login it is
    size: str = ""  # in words, where it can be fetched without a login
    md5: str = ""
    keep: str = ""  # pattern of the names that are needed, for a .tgz that holds much else
    instead: tuple["Part", ...] = ()  # any of them makes the archive unnecessary


class Files:
    """The files of an archive or of a folder. Safe to read from several threads at a time.

    A .tgz can only be read from its beginning to its end: that happens once, here, and what is kept of it goes to a
    temporary file without a name, so that memory holds a piece of one file at a time.

    Attributes:
      path: of the archive or the folder.
      names: of the files, relative to the folder, or to `inside` in an archive.
    """

    def __init__(self, path: Path, inside: str = "", keep: str = "") -> None:
        """Read the list of files.

        Args:
          path: a folder, or an archive; its kind is told by its suffix, .zip where that tells nothing.
          inside: the folder in an archive that names are relative to; files elsewhere in it do not count.
          keep: what the names begin with, a pattern, that are kept of a .tgz.

        Raises:
          ValueError: the archive is damaged, truncated or not one, or has no folder `inside`.
        """
        self.path = path
        self._prefix = f"{inside}/" if inside and not path.is_dir() else ""
        self._zip: zipfile.ZipFile | None = None
        self._bytes: IO[bytes] | None = None
        self._places: dict[str, tuple[int, int]] = {}  # offset and size in `_bytes`
        suffix = next((end for end in (".tgz", ".tar.gz", ".tar") if path.name.endswith(end)), ".zip")
        try:
            if path.is_dir():
                found = [file.relative_to(path).as_posix() for file in sorted(path.rglob("*")) if file.is_file()]
            elif suffix == ".zip":
                self._zip = zipfile.ZipFile(path)
                found = self._zip.namelist()
                _check_growth(path, len(found), sum(entry.file_size for entry in self._zip.infolist()))
            elif suffix == ".tar":
                self._bytes = path.open("rb")
                found = self._scan(self._bytes, None, keep)
            else:
                self._bytes = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as this object lives
                with gzip.open(path) as stream:
                    found = self._scan(_Cautious(stream, path), self._bytes, keep)  # type: ignore[arg-type]
        except _DAMAGES as error:
            raise ValueError(
                f"{path} ({path.stat().st_size:,} bytes) is truncated or not a {suffix[1:]} file ({error}); "
                "fetch it again."
            ) from None
        plain = {name.removeprefix("./"): name for name in found if not name.endswith("/")}
        self._stored = {name.removeprefix(self._prefix): plain[name] for name in plain if name.startswith(self._prefix)}
        self.names = self._stored.keys()
        if self._prefix and not self.names:
            raise ValueError(f"{path} has no folder {inside}, it is another archive of that name; fetch the right one.")

    def check(self, names: Iterable[str]) -> None:
        """Raise ValueError where a file is not there."""
        if absent := [name for name in names if name not in self._stored]:
            raise ValueError(
                f"There is no {self.where(absent[0])} ({len(absent)} such files): {self.path} is incomplete; "
                "fetch or unpack it again."
            )

    def where(self, name: str) -> str:
        """Return the full name of a file, for messages."""
        return f"{self.path}/{self._prefix}{name}"

    def read(self, name: str) -> bytes:
        """Return the bytes of a file; the checksum in a zip archive is verified.

        Raises:
          ValueError: there is no such file, or it is damaged.
        """
        self.check([name])
        try:
            if self._zip:
                entry = self._zip.getinfo(self._stored[name])
                with self._zip.open(_small(entry, entry.file_size)) as file:
                    return file.read(entry.file_size)  # `ZipFile.read` unpacks more than the entry declares
            if self._bytes:
                offset, size = self._places[self._stored[name]]
                return os.pread(self._bytes.fileno(), size, offset)
            return (self.path / name).read_bytes()
        except _DAMAGES as error:
            raise ValueError(f"{self.where(name)} is damaged ({error}); fetch the archive again.") from None

    def ids(self, name: str) -> list[str]:
        """Return the ids in a list: the first word of each line, each once.

        Raises:
          ValueError: see `read`; or a word is not an id, or there is none.
        """
        lines = self.read(name).decode("utf-8", "replace").splitlines()
        found = list(dict.fromkeys(line.split()[0] for line in lines if line.strip()))
        bad = next((word for word in found if not ID.fullmatch(word)), None)
        if bad or not found:
            raise ValueError(f"{self.where(name)} is not a list of images ({bad or 'it is empty'!r}); fetch it again.")
        return found

    def _scan(self, stream: IO[bytes], copy: IO[bytes] | None, keep: str) -> list[str]:
        """Note where the files of a tar archive are, in itself, or in `copy` which gets those whose names match."""
        wanted = re.compile(rf"(\./)?{re.escape(self._prefix)}({keep})")
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                if member.type in _REGULAR and wanted.match(member.name):
                    _small(member, member.size)
                    self._places[member.name] = (copy.tell() if copy else member.offset_data, member.size)
                    if copy and (file := tar.extractfile(member)):
                        shutil.copyfileobj(file, copy, CHUNK)
            stream.seek(tar.offset)
        # tarfile takes a header that is damaged or cut off for the end, which is blocks of zeros in fact.
        if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"its list of files breaks off at byte {tar.offset:,}")
        while stream.read(CHUNK):  # gzip verifies its checksum at the end
            pass
        if copy:
            copy.flush()
        return list(self._places)


class _Cautious:
    """The unpacked side of a .tgz as tarfile reads it, with limits: a header may declare itself of any size."""

    def __init__(self, stream: gzip.GzipFile, path: Path) -> None:
        self._stream, self._path = stream, path
        self.tell = stream.tell

    def read(self, size: int) -> bytes:
        if size > CHUNK:
            raise tarfile.ReadError(f"it has a header of {size:,} bytes")
        return self._stream.read(self._within(size, self.tell()))

    def seek(self, position: int) -> int:
        return self._stream.seek(self._within(position, 0))

    def _within(self, size: int, begin: int) -> int:
        _check_growth(self._path, 0, begin + size)
        return size


def _check_growth(path: Path, files: int, size: int) -> None:
    """Raise ValueError where an archive holds too many `files`, or unpacks to too many bytes."""
    if files > MAX_FILES:
        raise ValueError(f"it holds {files:,} files, more than any data set")
    if size > MAX_BYTES + MAX_GROWTH * path.stat().st_size:
        raise ValueError(f"it would unpack to {size:,} bytes, which images and labels do not")


def _small(entry: Entry, size: int) -> Entry:
    """Return an entry of an archive; ValueError where it is too large for an image or a list."""
    if size > MAX_BYTES:
        raise ValueError(f"a file of it has {size:,} bytes, more than an image or a list")
    return entry


def locate(folder: Path, part: Part) -> Path | None:
    """Return the path of the archive in `folder`, or else of the folder unpacked from it there; None without either.

    `folder` may also be one of those unpacked: with `inside` VOCdevkit/VOC2012 VOCdevkit, or VOC2012 in VOCdevkit.
    """
    if (folder / part.archive).is_file():
        return folder / part.archive
    parts = PurePosixPath(part.inside).parts
    for depth in range(len(parts) + 1):
        unpacked = folder.joinpath(*parts[depth:])
        if folder.parts[len(folder.parts) - depth :] == parts[:depth] and unpacked.is_dir():
            return unpacked
    return None


def find(folder: Path, part: Part) -> Files | None:
    """Return the files of what `locate` finds; raise ValueError as `Files` does."""
    path = locate(folder, part)
    return Files(path, part.inside, part.keep) if path else None


def require(folder: Path, part: Part) -> Files:
    """Return what `find` finds.

    Raises:
      ValueError: see `find`.
      FileNotFoundError: neither archive nor folder is there; says where to fetch it.
    """
    if found := find(folder, part):
        return found
    raise FileNotFoundError(
        f"{folder} holds neither {part.archive} nor the folder {part.inside} unpacked from it; fetch it from "
        f"{part.url} and put it there, or name as the archive the folder that holds it."
    )
