"""What a training loop makes of each step's metrics: means in the log, and a record of the steps that were skipped."""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from psp_jax import processes
from psp_jax.atomic import naming
from psp_jax.compile_cache import CompileLog
from psp_jax.data.source import Source
from psp_jax.goodput import Goodput
from psp_jax.preemption import CODE
from psp_jax.progress import Progress
from psp_jax.report import write_report
from psp_jax.walltime import WallTime

Array = jax.Array


SKIPPED = "skipped.jsonl"
_SHOWN = 16  # names in a line


def some(images: list[str]) -> str:
    """Return the names of a batch as a line can hold them."""
    return ", ".join(images[:_SHOWN]) + (f" and {len(images) - _SHOWN} more" if len(images) > _SHOWN else "")


class Recorder:
    """Reads each step's metrics when they are ready, logs their means per interval, and tells of skipped steps.

    Means are those of the steps that were not skipped; `skipped` is how many were.

    Attributes:
      walltime: tells what the time goes into.
      interval: metrics of the steps since the last line of the log; a run that goes on begins with those it was saved
        with, so that its lines are those of a run that was never ended.
      row: how many steps were skipped in a row up to the last one read.
      skipped: how many were in the whole run; the schedule of the learning rate stands still in them.
      images: ids of the batch of the last step that was skipped.
      why: what was wrong with that step: a value that is not finite, or the number of invalid labels.
    """

    def __init__(
        self,
        progress: Progress,
        walltime: WallTime,
        goodput: Goodput | None,
        compiled: CompileLog,
        schedule: Callable[[int], Array],
        log_every_steps: int,
        last: int,
        source: Source,
        directory: Path,
        interval: list[dict[str, float]],
        skipped: int = 0,
    ) -> None:
        self.walltime, self._goodput, self.interval = walltime, goodput, interval
        self._progress, self._schedule, self._source, self._directory = progress, schedule, source, directory
        self._every, self._last = log_every_steps, last
        self.row, self.skipped, self.images, self.why = 0, skipped, list[str](), ""
        self._compiled, self._once = compiled, dict[str, float]()
        self._pending: tuple[int, dict[str, Array], np.ndarray] | None = None

    def push(self, step: int, metrics: dict[str, Array], index: np.ndarray) -> None:
        """Keep the metrics of `step` (counted from 1), made of the images `index`, until `settle`."""
        self._pending = (step, metrics, index)

    def settle(self) -> None:
        """Read the metrics pushed last, if they were not read yet."""
        if self._pending is None:
            return
        step, metrics, index = self._pending
        self._pending = None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if values["skipped"]:
            self._skip(step, values, index)
        else:
            self.row = 0
        self.interval.append(values)
        self._progress.advance(step)
        if self._goodput:
            self._goodput.keep()
        if step % self._every == 0 or step == self._last:
            taken = [v for v in self.interval if not v.get("skipped")]  # an older version's have none
            names = [name for name in values if name not in ("skipped", "invalid_labels")]
            means = {name: float(np.mean([v[name] for v in taken])) if taken else float("nan") for name in names}
            means["skipped"] = float(len(self.interval) - len(taken))
            means["invalid_labels"] = sum(v.get("invalid_labels", 0.0) for v in self.interval)
            # The one that this step was taken with: of the skipped steps those before it count.
            rate = {"learning_rate": float(self._schedule(step - 1 - self.skipped + int(values["skipped"])))}
            self._progress.log(step, means | rate | self.walltime.take() | self._once)
            self.interval, self._once = [], {}

    def _skip(self, step: int, values: dict[str, float], index: np.ndarray) -> None:
        """Tell which step was skipped, with which images; every process reads the same metrics, and calls this."""
        rows = multihost_utils.process_allgather(index.astype(np.int32)) if jax.process_count() > 1 else index
        self.images = [self._source.ids(int(i)) for i in dict.fromkeys(np.ravel(rows).tolist())]
        self.row, self.skipped = self.row + 1, self.skipped + 1
        why = {name: str(value) for name, value in values.items() if not np.isfinite(value)}
        if values.get("invalid_labels"):
            why["invalid_labels"] = str(int(values["invalid_labels"]))
        self.why = ", ".join(f"{name}={value}" for name, value in why.items())
        self._progress.say(
            f"step {step} is skipped and changes nothing ({self.why}), with the images {some(self.images)} "
            f"({self.row} in a row; {SKIPPED})"
        )
        if processes.is_primary():
            path = self._directory / SKIPPED
            with naming(path), path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "why": why, "images": self.images}) + "\n")

    def compiled(self) -> None:
        """Tell what was compiled up to the first step: on the console now, in the logs with the next line."""
        self._progress.say(self._compiled.words())
        self._once = self._compiled.values()
        if self._goodput:  # so that a start counts that is killed soon
            self._goodput.write()

    def validated(self, step: int, scores: dict[str, float | None]) -> None:
        """Log the scores of a validation and what the time went into, and write the report anew."""
        self._progress.validated(step, scores)
        if self._goodput:
            self._goodput.write()
            if step != self._last:  # the end tells them too
                self._progress.say(self._goodput.words())
        if processes.is_primary():
            write_report(self._directory)

    def stopped(self, step: int) -> None:
        """Tell that SIGTERM ends the run after `step`."""
        self._progress.say(f"SIGTERM: ending after step {step}; the same command goes on from there (exit code {CODE})")

    def show(self, step: int, name: str, picture: np.ndarray) -> None:
        """Log a picture of a validation."""
        self._progress.image(step, f"validation/{name}", picture)
