"""What a training loop makes of each step's metrics: means in the log, and an end where they are not finite."""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from psp_jax import processes
from psp_jax.compile_cache import CompileLog
from psp_jax.data.source import Source
from psp_jax.goodput import Goodput
from psp_jax.preemption import CODE
from psp_jax.progress import Progress
from psp_jax.report import write_report
from psp_jax.walltime import WallTime

Array = jax.Array


class TrainingDiverged(FloatingPointError):
    """Loss or gradient is no longer finite."""


class Recorder:
    """Reads each step's metrics when they are ready, logs their means per interval, stops on what is not finite.

    Attributes:
      walltime: tells what the time goes into.
      interval: metrics of the steps since the last line of the log; a run that goes on begins with those it was saved
        with, so that its lines are those of a run that was never ended.
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
    ) -> None:
        self.walltime, self._goodput, self.interval = walltime, goodput, interval
        self._progress, self._schedule, self._source, self._directory = progress, schedule, source, directory
        self._every, self._last = log_every_steps, last
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
        if not np.isfinite(list(values.values())).all():
            bad = ", ".join(f"{name}={value}" for name, value in values.items() if not np.isfinite(value))
            images = ", ".join(self._source.ids(int(i)) for i in index)
            raise TrainingDiverged(
                f"Step {step} is not finite ({bad}) with the images {images}; lower optimizer.base_lr or look at these "
                "images. The checkpoints before this step are kept."
            )
        self.interval.append(values)
        self._progress.advance(step)
        if self._goodput:
            self._goodput.keep()
        if step % self._every == 0 or step == self._last:
            means = {name: float(np.mean([v[name] for v in self.interval])) for name in values}
            rate = {"learning_rate": float(self._schedule(step - 1))}
            self._progress.log(step, means | rate | self.walltime.take() | self._once)
            self.interval, self._once = [], {}

    def compiled(self) -> None:
        """Tell what was compiled up to the first step: on the console now, in the logs with the next line."""
        self._progress.say(self._compiled.words())
        self._once = self._compiled.values()

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
