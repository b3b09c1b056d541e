"""What a run's directory holds: config.json (what ran), model.json (what the network is), checkpoints, results."""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TextIO

from PIL import Image

from psp_jax.atomic import make_folder, naming, replacing
from psp_jax.classes import ClassTable
from psp_jax.command import cause
from psp_jax.config import defaults, flatten

CHECKPOINTS = "checkpoints"
LOCK = ".lock"
_HOLDER_CHARACTERS = 200
# Fields of config.model that models written by version 0.1.0 lack, and how their networks are.
LATER_FIELDS = {
    "basic_dilation": "both",
    "stride_in": "3x3",
    "fcn_convs": 1,
    "fcn_concat": False,
    "bn_group_size": 0,
    "phases": False,
    "convolutions": "auto",
}
# What may change when a run goes on: nothing here changes what is learned.
_FREE_ON_RESUME = (
    "data.dir",
    "data.prepared_dir",
    "data.archive",
    "data.num_workers",
    "data.classes",
    "data.eval_split",
    "init.path",
    "init.sha256",
    "model.phases",
    "model.convolutions",
    "model.remat",
    "train.log_every_steps",
    "train.max_skipped",
    "eval.",
    "checkpoint.",
    "mesh.",
    "watchdog.",
    "log.",
)
PACKAGES = ("psp-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy")
VARIABLES = ("JAX_", "LIBTPU_", "NCCL_", "XLA_")  # what the names begin with


@dataclass(frozen=True)
class ModelCard:
    """All that turns parameters into a working model; written as model.json beside them.

    Attributes:
      model: the fields of `config.model`.
      classes: names, colours and label mapping.
      mean, std: RGB statistics on the 0..255 scale that images are normalised with.
      size: (height, width) of the canvas that images are fitted into.
      window: (height, width) of the training crops, and so of sliding windows.
      base_size: long side, in pixels, that the protocol semseg resizes images to.
    """

    model: dict[str, Any]
    classes: ClassTable
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int]
    window: tuple[int, int]
    base_size: int

    def write(self, directory: Path) -> None:
        """Write model.json into `directory`."""
        record = {
            "format": 1,
            "model": self.model,
            "classes": self.classes.as_dict(),
            "mean": self.mean,
            "std": self.std,
            "size": self.size,
            "window": self.window,
            "base_size": self.base_size,
        }
        write_json(directory / "model.json", record)

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Read model.json of a workdir or an export; FileNotFoundError says what else `directory` should be."""
        path = directory / "model.json"
        if not path.exists():
            raise FileNotFoundError(
                f"{directory} holds no model.json; give the workdir of a training run, or what psp_jax.export in the "
                "format orbax or psp_jax.import_weights wrote."
            )
        record = read_json(path)
        if not isinstance(record, dict) or record.get("format") != 1:
            found = record.get("format") if isinstance(record, dict) else None
            raise ValueError(f"{path} has the format {repr(found)[:50]}, this version of psp_jax reads format 1.")
        try:
            return cls._of(record)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({cause(error)}); restore it or start in a new workdir.") from None

    @classmethod
    def _of(cls, record: dict[str, Any]) -> Self:
        window = record.get("window", record["size"])  # runs of version 0.1.0 have none
        return cls(
            model=LATER_FIELDS | record["model"],
            classes=ClassTable.from_dict(record["classes"]),
            mean=tuple(record["mean"]),
            std=tuple(record["std"]),
            size=(record["size"][0], record["size"][1]),
            window=(window[0], window[1]),
            base_size=record.get("base_size", 512),
        )


def check_owner(
    directory: Path, config: Mapping[str, Any], classes: ClassTable, train_images: int, override: bool
) -> None:
    """Raise ValueError where `directory` is something else than a workdir of the run that `config` describes.

    Args:
      directory: the workdir; may be missing.
      config: the configuration as plain values.
      classes: of the training split.
      train_images: how many there are.
      override: accept changed fields, except those of the network, the classes, and whether parameters are averaged:
        the checkpoints could not be read.
    """
    path = directory / "config.json"
    if not path.exists():
        # A start that failed early, for want of a weight file say, leaves a lock and an empty folder of checkpoints.
        if directory.exists() and any(
            not file.name.startswith(LOCK) and not (file.name == CHECKPOINTS and not any(file.iterdir()))
            for file in directory.iterdir()
        ):
            raise ValueError(f"{directory} is not empty and holds no run (no config.json); choose a new --workdir.")
        return
    former = read_json(path)
    try:
        parts = {**former["resolved"], **former["config"]["train"], "classes_digest": former["classes_digest"]}
    except (LookupError, TypeError):
        parts = {}
    if not isinstance(parts.get("train_images"), int):
        raise ValueError(f"{path} is not of a run of psp_jax; choose a new --workdir.")
    if not any((directory / CHECKPOINTS).glob("*")):
        return  # ended before its first checkpoint: nothing to protect
    changed = changed_fields(former["config"], config)
    fixed = [field for field in changed if field.startswith("model.")]
    if former["classes_digest"] != classes.digest():
        fixed.append("the class names or the mapping of label values")
    if former["resolved"]["train_images"] != train_images:
        changed.append(f"training images: {former['resolved']['train_images']} -> {train_images}")
    if fixed:
        raise ValueError(f"{directory} holds another network ({_some(fixed)}); choose a new --workdir.")
    before, now = former["config"]["train"].get("ema_decay", 0), config["train"]["ema_decay"]
    if bool(before) != bool(now):
        raise ValueError(
            f"{directory} holds a run {'with' if before else 'without'} averaged parameters, which can neither begin "
            f"nor end on the way (train.ema_decay: {before} -> {now}); set it as it was, or choose a new --workdir."
        )
    if changed and not override:
        raise ValueError(
            f"{directory} belongs to a run with another configuration ({_some(changed)}); choose a new --workdir, "
            "give --resume=override to go on from its last checkpoint with these changes, or delete that folder to "
            "begin anew."
        )


def changed_fields(before: Mapping[str, Any], config: Mapping[str, Any], also: tuple[str, ...] = ()) -> list[str]:
    """Describe each field that changes what is learned and differs between a run's configuration and the new one.

    A field that an older version did not have counts as its default: that is what the run did. The fields `also` count
    although they change nothing of that.
    """
    old, new = (dict(flatten(defaults())) | dict(flatten(fields)) for fields in (before, config))
    return [
        f"{field}: {old.get(field)!r} -> {new.get(field)!r}"
        for field in sorted(old | new)
        if (field in also or not field.startswith(_FREE_ON_RESUME)) and _plain(old.get(field)) != _plain(new.get(field))
    ]


def _some(changes: list[str]) -> str:
    shown = [change if len(change) <= 100 else f"{change[:100]} ..." for change in changes[:8]]
    return "; ".join([*shown, *([f"and {len(changes) - 8} more"] if len(changes) > 8 else [])])


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@contextlib.contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Hold `directory` for this process; the system lets go of it when the process dies, however it dies.

    Raises:
      ValueError: another process holds it; the file tells which one.
      OSError: nothing can be written there.
    """
    make_folder(directory)
    with _taken(directory) as file:
        file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        file.write(f"; process {os.getpid()} on {socket.gethostname()} since {since}\n")
        file.flush()
        yield


def check_free(directory: Path) -> None:
    """Raise the errors of `lock` where `directory` is one that another process holds; nothing is changed there."""
    if (directory / LOCK).is_file():
        with _taken(directory):
            pass


@contextlib.contextmanager
def _taken(directory: Path) -> Iterator[TextIO]:
    """Hold the lock, which is let go of with its file."""
    with naming(directory / LOCK):
        held = (directory / LOCK).open("a+")
    with held as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"Another process is working in {directory} (training or evaluating"
                f"{file.read(_HOLDER_CHARACTERS).strip()}); wait for it, or end it."
            ) from None
        except OSError as error:
            raise ValueError(
                f"{directory} is on a file system that cannot lock files ({error.strerror}); choose a --workdir "
                "elsewhere, or mount it with locks (Lustre: -o flock)."
            ) from error
        yield file


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text so that the file is there whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Mapping[str, Any] | list[Any]) -> None:
    """Write `value` so that the file is there whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_png(path: Path, picture: Image.Image) -> None:
    """Write a PNG so that the file is there whole or not at all."""
    with replacing(path) as partial:
        picture.save(partial, format="PNG")


def read_json(path: Path) -> Any:
    """Read a JSON file; ValueError names it where it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); restore it or start in a new workdir.") from None


def environment() -> dict[str, str]:
    """Return the variables that are set and change what JAX, XLA and NCCL do, with their values."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES) and value}


def versions() -> dict[str, str]:
    """Versions of the packages that a result may depend on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
