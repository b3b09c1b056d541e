"""What the time of a run went into, over all its starts: goodput.json."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from psp_jax.walltime import ACTIVITIES, WallTime
from psp_jax.workdir import read_json, write_json

_KEEP_SECONDS = 10.0  # between two records; what a killed process did after its last one counts as restart
_WORDS = {
    "step": "steps",
    "data_wait": "data wait",
    "compile": "compilation",
    "validation": "validation",
    "checkpoint": "checkpoints",
    "again": "steps taken again",
    "start": "start and restarts",
}


class Goodput:
    """Keeps goodput.json: seconds, and shares that add up to 1, of each of ACTIVITIES since the first start.

    A context manager, which writes the record and tells it at its end. `start` is the time until the first step of each
    start, and before it that since the last record of the process that was killed or preempted; `again` is that of the
    steps which it had begun, and which are taken once more.

    Args:
      directory: the run's workdir.
      walltime: of this process; is told which steps were begun before.
      clock: seconds since the epoch.
    """

    def __init__(self, directory: Path, walltime: WallTime, clock: Callable[[], float] = time.time) -> None:
        self._path, self._walltime, self._clock = directory / "goodput.json", walltime, clock
        former = _former(self._path)
        self._before = {activity: former["seconds"].get(activity, 0.0) for activity in ACTIVITIES}
        if not former["ended"]:
            self._before["start"] += max(0.0, clock() - former["time"] - sum(walltime.seconds().values()))
        self._starts, self._kept = former["starts"] + 1, clock()
        walltime.reached = former["step"]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._walltime.moves:  # a run that was finished before has taken no time
            self.write(ended=kind is None)
            print(self.words(), flush=True)

    def keep(self) -> None:
        """Write the record, if the last one is ten seconds old."""
        if self._clock() - self._kept >= _KEEP_SECONDS:
            self.write()

    def write(self, ended: bool = False) -> None:
        """Write the record; `ended` says that the time until another start is not the run's."""
        seconds = self._total()
        whole = max(sum(seconds.values()), 1e-9)
        self._kept = self._clock()
        record = {
            "seconds": {activity: round(value, 3) for activity, value in seconds.items()},
            "shares": {activity: value / whole for activity, value in seconds.items()},
            "starts": self._starts,
            "step": max(self._walltime.step, self._walltime.reached),
            "time": self._kept,
            "ended": ended,
        }
        try:
            write_json(self._path, record)
        except OSError as error:  # no run shall end for want of its statistics
            print(f"{self._path} was not written: {error}", file=sys.stderr, flush=True)

    def words(self) -> str:
        """Return the shares of the time as a line for the console."""
        seconds = self._total()
        whole = max(sum(seconds.values()), 1e-9)
        shares = ", ".join(f"{words} {100 * seconds[activity] / whole:.1f} %" for activity, words in _WORDS.items())
        return f"time of {whole:.0f} s, {self._starts} start{'s' if self._starts > 1 else ''}: {shares}"

    def _total(self) -> dict[str, float]:
        now = self._walltime.seconds()
        return {activity: self._before[activity] + now[activity] for activity in ACTIVITIES}


def _former(path: Path) -> dict[str, Any]:
    """Return the record of the starts before; one that is damaged counts as none, and is told of."""
    new: dict[str, Any] = {"seconds": {}, "starts": 0, "step": 0, "ended": True}
    if not path.exists():
        return new
    try:
        former = read_json(path)
        kinds = {"seconds": dict, "starts": int, "step": int, "ended": bool, "time": int | float}
        if all(isinstance(former[name], kind) for name, kind in kinds.items()):
            return dict(former)
    except (ValueError, KeyError, TypeError):
        pass
    print(f"{path} is damaged; the record of the time begins anew.", file=sys.stderr, flush=True)
    return new
