"""What the loop tells of its steps: the learning rate that each was taken with, and why a run ends."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from psp_jax import loop
from psp_jax.bundle import TrainingDiverged
from psp_jax.recorder import Recorder
from psp_jax.walltime import WallTime


class Told:
    """Stands in for Progress, and keeps the learning rates."""

    def __init__(self) -> None:
        self.rates = list[float]()

    def log(self, step: int, values: dict[str, float]) -> None:
        self.rates.append(values["learning_rate"])

    def advance(self, step: int) -> None:
        pass

    def say(self, line: str) -> None:
        pass


def recorder(told: Told, directory: Path) -> Recorder:
    source: Any = SimpleNamespace(ids=lambda i: f"image{i}")
    compiled: Any = None
    progress: Any = told
    return Recorder(progress, WallTime(), None, compiled, lambda count: np.float32(count), 1, 9, source, directory, [])


def test_a_skipped_step_has_the_rate_that_it_was_taken_with(tmp_path: Path) -> None:
    """The schedule here is the number of updates so far; the steps 2 and 3 make none."""
    told = Told()
    made = recorder(told, tmp_path)
    for step, skipped in ((1, 0), (2, 1), (3, 1), (4, 0), (5, 0)):
        made.push(step, {"loss": np.nan if skipped else 1.0, "skipped": float(skipped)}, np.array([step]))
        made.settle()
    assert told.rates == [0, 1, 1, 1, 2]


def test_a_full_disk_does_not_hide_why_a_run_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recorder(Told(), tmp_path)
    made.push(7, {"loss": 1.0, "invalid_labels": 12.0, "skipped": 1.0}, np.array([3]))
    made.settle()
    (line,) = (tmp_path / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 7, "why": {"invalid_labels": "12"}, "images": ["image3"]}
    activities = []

    def full(*_: object) -> Path:
        activities.append(made.walltime.activity)
        raise OSError("no space.")

    monkeypatch.setattr(loop, "write_bundle", full)
    nothing: Any = None
    run = loop.Run(nothing, tmp_path, nothing, nothing, nothing, made, nothing, nothing, nothing, nothing)
    told = (
        r"Steps 7 to 7 were skipped, the last for invalid_labels=12 with .* image3; .* could not be kept: no space\.$"
    )
    with pytest.raises(TrainingDiverged, match=told):
        run.give_up(7, nothing)
    assert activities == ["checkpoint"]
