"""Files and folders that are there whole or not at all, whatever happens while they are written."""

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

_REMEDIES = {
    (errno.ENOSPC, errno.EDQUOT): "free space there, or raise the quota",
    (errno.EFBIG,): "raise the limit on the size of files (ulimit -f)",
    (errno.EACCES, errno.EPERM, errno.EROFS): "make it writable for this user",
    (errno.EEXIST, errno.ENOTDIR): "a file is in its way, move that or choose another folder",
}


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path to write to; at the end it becomes `path`, which so is there whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    make_folder(path.parent)
    with naming(path, partial):
        yield partial
        os.replace(partial, path)


@contextlib.contextmanager
def naming(path: Path, *also: Path) -> Iterator[None]:
    """Have a failure to write `path`, or the paths `also`, name `path` and what helps; a full disk names no file."""
    try:
        yield
    except OSError as error:
        named = {str(name) for name in (error.filename, error.filename2) if name is not None}
        if named <= {str(path), *map(str, also)} and any(error.errno in codes for codes in _REMEDIES):
            raise OSError(f"{path} could not be written ({remedy(error)}).") from error
        raise


def make_folder(path: Path) -> None:
    """Make a folder where there is none yet; a failure names it and what helps."""
    with naming(path, *path.parents):
        path.mkdir(parents=True, exist_ok=True)


def check_unused(folder: Path, what: str) -> None:
    """Raise FileExistsError where `folder`, which --output names for an export or a model, is a file or not empty."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file, and the {what} needs a folder; choose another --output.")
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; choose another --output.")


def remedy(error: BaseException) -> str:
    """Return what a failure to write says, and what helps where that is known.

    Libraries tell of the system's error in words of their own, tensorstore by the system's name of it.
    """
    causes: list[BaseException | None] = [error, error.__cause__, error.__context__]
    told = " ".join(str(cause) for cause in causes if cause is not None)
    for codes, help_words in _REMEDIES.items():
        for code in codes:
            if os.strerror(code) in told:
                return f"{os.strerror(code)}: {help_words}"
    return next(iter(str(error).splitlines()), "") or type(error).__name__


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield the path of a folder to make and fill; at the end it becomes `path`, and after a failure it is gone.

    `path` must be absolute, since "." has no name to write beside, and must not exist or be an empty folder.
    """
    make_folder(path.parent)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{path.name}.") as folder:
        partial = Path(folder) / path.name  # one below, since the folder is closed to others
        yield partial
        partial.replace(path)
