"""Files and folders that are there whole or not at all, whatever happens while they are written."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path to write to; at the end it becomes `path`, which so is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    yield partial
    os.replace(partial, path)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield the path of a folder to make and fill; at the end it becomes `path`, and after a failure it is gone.

    `path` must be absolute, since "." has no name to write beside, and must not exist or be an empty folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{path.name}.") as folder:
        partial = Path(folder) / path.name  # one below, since the folder is closed to others
        yield partial
        partial.replace(path)
