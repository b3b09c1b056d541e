"""What a run's directory holds: config.json (what ran), model.json (what the network is), checkpoints, results."""

import importlib.metadata
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from psp_jax.classes import ClassTable

CHECKPOINTS = "checkpoints"
PACKAGES = ("psp-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy")


@dataclass(frozen=True)
class ModelCard:
    """All that turns parameters into a working model; written as model.json beside them.

    Attributes:
      model: the fields of `config.model`.
      classes: names, colours and label mapping.
      mean, std: RGB statistics on the 0..255 scale that images are normalised with.
      size: (height, width) of the canvas that images are fitted into.
    """

    model: dict[str, Any]
    classes: ClassTable
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int]

    def write(self, directory: Path) -> None:
        """Write model.json into `directory`."""
        record = {
            "format": 1,
            "model": self.model,
            "classes": self.classes.as_dict(),
            "mean": self.mean,
            "std": self.std,
            "size": self.size,
        }
        write_json(directory / "model.json", record)

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Read model.json of a workdir or an export; FileNotFoundError says what else `directory` should be."""
        path = directory / "model.json"
        if not path.exists():
            raise FileNotFoundError(
                f"{directory} holds no model.json; give the workdir of a training run or the output of psp_jax.export."
            )
        record = read_json(path)
        return cls(
            model=record["model"],
            classes=ClassTable.from_dict(record["classes"]),
            mean=tuple(record["mean"]),
            std=tuple(record["std"]),
            size=(record["size"][0], record["size"][1]),
        )


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` so that the file is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_json(path: Path) -> Any:
    """Read a JSON file; ValueError names it where it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); restore it or start in a new workdir.") from None


def versions() -> dict[str, str]:
    """Versions of the packages that a result may depend on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
