"""Whether a checkpoint holds the arrays that were in memory, and still the files that were written.

Orbax checks no array that it reads: a bit that flips on the disk comes back as another parameter, without an error
(tensorstore's OCDBT has checksums of its indices alone). A number of each array, taken where it lives before it is
saved, is compared with that of what was written, and the checksum of each file is kept beside it. What is damaged
is set aside.
"""

import contextlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore

from psp_jax.command import cause
from psp_jax.workdir import read_json

CHECKSUMS = "checksums.json"
REPLACED = "replaced-"  # and the step, of a checkpoint that makes way for another of its step
_SMALL = 65536  # bytes of files that are read in any case, those of the scores among them
_BLOCK = 1 << 24
Array = jax.Array


def array_sums(tree: Any) -> list[int]:
    """Return a number of each array that changes with any one of its bits, sorted; the same on any devices.

    It is the sum of the elements' bits, each times an odd number of its place, modulo 2^32.
    """
    # One after another: CPU devices that share an array out wait for each other for ever where many programs are begun.
    return sorted(int(_sum(x)) for x in jax.tree.leaves(tree))


@jax.jit  # of one array: the momentum has the shapes of the parameters
def _sum(x: Array) -> Array:
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    place = jnp.arange(x.size, dtype=jnp.uint32).reshape(x.shape)
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)


def _host_sum(x: np.ndarray) -> int:
    bits = np.ascontiguousarray(x).reshape(-1).view(f"uint{8 * x.dtype.itemsize}").astype(np.uint32)
    return int(np.sum(bits * (2 * np.arange(bits.size, dtype=np.uint32) + 1), dtype=np.uint32))


def _arrays(item: Path) -> Iterator[np.ndarray]:
    """Yield the arrays that Orbax wrote into the folder of an item."""
    base = {"driver": "file", "path": f"{item}/"}
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    for key in store.list().result():
        name, _, last = key.decode().rpartition("/")
        if last == ".zarray":
            kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
            yield tensorstore.open({"driver": "zarr", "kvstore": kvstore}, open=True).result().read().result()


def seal(directory: Path, sums: Mapping[str, list[int]]) -> None:
    """Compare the arrays written into a checkpoint with those in memory, and write the checksums of its files.

    Args:
      directory: the checkpoint, complete but not yet under its own name.
      sums: `array_sums` of each item.

    Raises:
      ValueError: an array is not what it was in memory.
    """
    for item, expected in sums.items():
        if sorted(map(_host_sum, _arrays(directory / item))) != expected:
            raise ValueError(f"What was read back from {directory / item} is not what was written.")
    # Those of Orbax's own at the top change after this, and restoring needs none of them.
    write_checksums(
        directory, [path for folder in directory.iterdir() if folder.is_dir() for path in folder.rglob("*")]
    )


def write_checksums(directory: Path, paths: Iterable[Path]) -> None:
    """Write sizes and checksums of those of `paths` that are files into CHECKSUMS of `directory`, which holds them."""
    files = sorted(path for path in paths if path.is_file())
    found = {str(path.relative_to(directory)): [path.stat().st_size, _checksum(path)] for path in files}
    with (directory / CHECKSUMS).open("w") as file:
        json.dump(found, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def damage(directory: Path, thorough: bool = True) -> str:
    """Return what is wrong with a checkpoint, "" where nothing is.

    Args:
      directory: the checkpoint.
      thorough: whether every byte is read, not only small files; sizes are compared in any case.
    """
    try:
        if not (directory / CHECKSUMS).exists():
            return _damage_of_old(directory, thorough)
        sums = read_json(directory / CHECKSUMS)
        if missing := {"variables", "training"} - {name.partition("/")[0] for name in sums}:
            return f"{CHECKSUMS} has nothing of {' and '.join(sorted(missing))}"
        return _damage_of_files(directory, sums, thorough)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return f"it cannot be read: {error}"


def _damage_of_files(directory: Path, sums: Any, thorough: bool) -> str:
    for name, (size, checksum) in sums.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes of {size}"
        if (thorough or size <= _SMALL) and _checksum(path) != checksum:
            return f"{name} is not what was written"
    return ""


@contextlib.contextmanager
def checked(directory: Path) -> Iterator[None]:
    """Read parameters inside, after a look at their checksums (those of versions up to 0.1.0 have none).

    Raises:
      ValueError: they are damaged, or reading them fails; names `directory` and the remedy.
    """
    try:
        if (directory / CHECKSUMS).exists():
            words = _damage_of_files(directory, read_json(directory / CHECKSUMS), True)
            if words:
                raise ValueError(words)
        yield
    except Exception as error:  # Orbax and tensorstore raise their own kinds, with pages of shapes
        raise ValueError(
            f"{directory} is damaged, or holds another network than the model.json beside it ({cause(error)}); export "
            "it again, or restore it from a copy."
        ) from error


def score(directory: Path) -> float:
    """Return the mean IoU that a checkpoint was saved with, -1 where there is none to be read."""
    try:
        return float(read_json(directory / "metrics" / "metrics")["mean_iou"])
    except (OSError, ValueError, KeyError, TypeError):
        return -1.0


def _damage_of_old(directory: Path, thorough: bool) -> str:
    """Return what can be found wrong with a checkpoint of a version that wrote no checksums."""
    # A later version may have gone on from it, but it cannot have come after one.
    sealed = [step for step in steps_in(directory.parent) if (directory.parent / str(step) / CHECKSUMS).exists()]
    if directory.name.isdecimal() and any(step < int(directory.name) for step in sealed):
        return f"{CHECKSUMS} is missing"
    for item in ("variables", "training"):
        if not (directory / item).is_dir():
            return f"{item} is missing"
    for name in ("metrics/metrics", "notes/metadata"):
        if (directory / name).exists():
            read_json(directory / name)
    if thorough:
        for folder in directory.iterdir():
            if (folder / "manifest.ocdbt").exists() and not list(map(_host_sum, _arrays(folder))):
                return f"{folder.name} holds no array"
    return ""


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            value = zlib.crc32(block, value)
    return value


def steps_in(directory: Path) -> list[int]:
    """Return the steps that something in `directory` is named after, the newest first."""
    names = [path.name for path in directory.iterdir()] if directory.exists() else []
    return sorted((int(name) for name in names if name.isdecimal() and str(int(name)) == name), reverse=True)


def move_damaged(directory: Path, step: int) -> Path:
    """Rename the checkpoint of `step` in `directory`, over one that had that name, and return where it is."""
    aside = directory / f"damaged-{step}"
    if aside.is_dir():
        shutil.rmtree(aside, ignore_errors=True)
    else:
        aside.unlink(missing_ok=True)
    (directory / str(step)).rename(aside)
    return aside


def bring_back(directory: Path, say: Callable[[str], None]) -> None:
    """Give checkpoints that made way their names again; where there is a new one, and it is whole, delete them."""
    for path in list(directory.glob(f"{REPLACED}*")):
        former = directory / path.name.removeprefix(REPLACED)
        if not former.name.isdecimal():
            continue  # none of ours
        if former.exists():
            if not (words := damage(former)):
                shutil.rmtree(path)
                continue
            say(_aside(former.name, words, move_damaged(directory, int(former.name))))
        path.rename(former)


def set_aside(directory: Path, say: Callable[[str], None]) -> int | None:
    """Rename what is damaged, so that neither Orbax nor a step that is saved anew comes across it.

    Returns:
      The step of the newest that is whole, if there are checkpoints.

    Raises:
      ValueError: there are, and every one is damaged.
    """
    whole, wrong = None, dict[int, str]()
    for step in steps_in(directory):
        if found := damage(directory / str(step), thorough=whole is None):
            wrong[step] = found
        elif whole is None:
            whole = step
    if wrong and whole is None:
        found = "; ".join(f"{step}: {words}" for step, words in wrong.items())
        raise ValueError(
            f"Every checkpoint in {directory} is damaged ({found}); restore one of them from a copy, or "
            "choose a new --workdir."
        )
    for step, words in wrong.items():
        say(_aside(str(step), words, move_damaged(directory, step)))
    return whole


def _aside(step: str, words: str, aside: Path) -> str:
    return f"The checkpoint of step {step} is damaged ({words}) and set aside: {aside}"
