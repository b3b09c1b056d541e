"""Ends a process whose run stands still, and tells which process it waits for.

Each process publishes its place through the coordination service that joined them, and process 0 looks whether all do.
JAX's own heartbeats, 100 seconds unless told otherwise, end the others too (by SIGABRT, code 134) where a process is
gone or stopped, but not where it hangs and its threads live, and they know no host and no place.
"""

import contextlib
import faulthandler
import json
import math
import os
import socket
import statistics
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from jax._src import distributed  # the key-value store of the coordination service has no public name

from psp_jax.walltime import ACTIVITIES, WallTime

CODE = 69  # EX_UNAVAILABLE of sysexits.h
_PLACES, _ALARMS = "psp_jax/place/", "psp_jax/alarm/"
_BEAT_SECONDS = 3.0  # between two signs of life
_SILENCE_SECONDS = 60.0  # without a sign of life; less than JAX's own limit, which names no host
_PATIENCE = 10  # a first step, a batch of a validation, a checkpoint may take this many times as long as a step

Place = dict[str, Any]  # process, host, pid, step, activity, beat


class Watchdog:
    """Watches the steps of this process from threads of its own; a context manager.

    A process ends with CODE, after it has written the stacks of all its threads to stderr and to the file
    watchdog/process_RANK.txt of the workdir, when it takes no step for `times` times the median step, at least for
    `least_seconds`; when another process, or process 0 with the coordination service, gives no sign of life for
    `least_seconds` or a minute, whichever is less; or when another process has ended so. Time in which the whole
    process was stopped does not count.

    Args:
      walltime: of the loop.
      directory: the run's workdir.
      rank: of this process.
      times: 0 switches it off.
      least_seconds: at least 1.
    """

    def __init__(self, walltime: WallTime, directory: Path, rank: int, times: float, least_seconds: float) -> None:
        self._walltime, self._rank, self._times, self._least = walltime, rank, times, least_seconds
        self._file = directory / "watchdog" / f"process_{rank}.txt"
        self._beat, self._silence = min(_BEAT_SECONDS, least_seconds / 4), min(_SILENCE_SECONDS, least_seconds)
        self._client: Any = distributed.global_state.client
        self._closed = threading.Event()
        self._answers = 0  # of the coordination service
        self._places: dict[int, Place] = {}
        self._alarms: list[str] = []
        self._own_alarm = ""
        self._late = False
        work = [self._watch, *([self._publish] if self._client else [])] if times else []
        self._threads = [threading.Thread(target=target, name="watchdog", daemon=True) for target in work]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        for thread in self._threads:
            thread.join(1)  # it takes a call to say goodbye, which blocks where process 0 is stopped

    def _publish(self) -> None:
        """Exchange signs of life; a thread of its own, since a call blocks while process 0 is stopped."""
        beat, key = 0, f"{_PLACES}{self._rank}/"
        while not self._closed.wait(self._beat):
            beat += 1
            place = self._own_place() | {"beat": beat}
            # What the service cannot do counts as no answer; when it is gone JAX ends this process.
            with contextlib.suppress(RuntimeError):
                self._client.key_value_set(f"{key}place", json.dumps(place), allow_overwrite=True)
                if self._own_alarm:
                    self._client.key_value_set(f"{_ALARMS}{self._rank}", self._own_alarm, allow_overwrite=True)
                # Everybody asking for everybody would be too much for many processes.
                asked = _PLACES if self._rank == 0 or self._late else f"{_PLACES}0/"
                found = [json.loads(value) for _, value in self._client.key_value_dir_get(asked)]
                self._places = {place["process"]: place for place in found}
                self._alarms = [value for _, value in self._client.key_value_dir_get(_ALARMS)]
                self._answers += 1
        with contextlib.suppress(RuntimeError):
            self._client.key_value_delete(f"{key}place")  # who has ended well is not silent

    def _watch(self) -> None:
        """Look every few seconds; a thread of its own, since the main one may be inside a collective for ever."""
        awake, last = 0.0, time.monotonic()  # seconds, without those in which this process was stopped
        seen: dict[int, tuple[Any, float]] = {}  # process: its last sign of life, and when it came
        moved = (self._walltime.moves, awake)
        while not self._closed.wait(self._beat):
            now = time.monotonic()
            awake, last = awake + min(now - last, 2 * self._beat), now
            if self._walltime.moves != moved[0]:
                moved = (self._walltime.moves, awake)
            signs = {rank: place["beat"] for rank, place in self._places.items()}
            if self._client and self._rank:
                signs = {0: self._answers}
            seen = {
                rank: seen[rank] if rank in seen and seen[rank][0] == s else (s, awake) for rank, s in signs.items()
            }
            silent = {r: awake - since for r, (_, since) in seen.items() if awake - since > self._silence}
            still, limit = awake - moved[1], self._limit()
            self._late = still > limit / 2
            if self._alarms:
                self._end(self._alarms[0], told=True)
            elif silent or still > limit:
                places = self._places | {self._rank: self._own_place()}
                self._end(
                    accusation(places, silent) if silent else f"no progress for {still:.0f} s; {accusation(places, {})}"
                )

    def _limit(self) -> float:
        """Seconds after which the loop counts as standing still, in its present activity."""
        steps = list(self._walltime.step_seconds)
        usual = max(self._times * statistics.median(steps), self._least) if steps else self._least
        if self._walltime.activity == "start":
            return math.inf  # a run may begin with the reading of all labels
        stepping = steps and self._walltime.activity in ("step", "again", "data_wait")
        return usual if stepping else _PATIENCE * usual

    def _own_place(self) -> Place:
        who = {"process": self._rank, "host": socket.gethostname(), "pid": os.getpid()}
        return who | {"step": self._walltime.step, "activity": self._walltime.activity}

    def _end(self, words: str, told: bool = False) -> None:
        """Tell, write all stacks, let the others know, and end; nothing here may wait for the main thread or a disk."""
        text = words if told else f"watchdog: {words}"
        if not told:
            self._own_alarm = text
        # Standard error may be a file on the very storage that hangs.
        for write in (lambda: _write_stacks(2, f"{text}; ending with code {CODE}\n"), lambda: self._write_file(text)):
            writer = threading.Thread(target=write, daemon=True)
            writer.start()
            writer.join(5)
        if not told:
            answers, until = self._answers, time.monotonic() + 3 * self._beat
            while self._client and self._answers < answers + 2 and time.monotonic() < until:
                time.sleep(0.1)
            # The coordination service ends with process 0, and with it, by JAX, all that have not heard yet.
            time.sleep(3 * self._beat if self._client and not self._rank else 0)
        os._exit(CODE)

    def _write_file(self, text: str) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("w", encoding="utf-8") as file:
            _write_stacks(file.fileno(), text + "\n")


def accusation(places: Mapping[int, Place], silent: Mapping[int, float]) -> str:
    """Say which processes a run waits for: those that are silent, since so many seconds, or else those behind."""

    def name(rank: int) -> str:
        place = places.get(rank)
        return f"process {rank}" + (f" ({place['host']}, pid {place['pid']})" if place else "")

    def where(rank: int) -> str:
        return f"step {places[rank]['step']}, {places[rank]['activity']}" if rank in places else "a place not known"

    if silent:
        return "; ".join(
            f"{name(rank)} has given no sign of life for {seconds:.0f} s, last seen in {where(rank)}"
            for rank, seconds in sorted(silent.items())
        )
    order = {rank: (place["step"], ACTIVITIES.index(place["activity"])) for rank, place in places.items()}
    behind = [rank for rank in sorted(order) if order[rank] == min(order.values())]
    if len(behind) == len(places) > 1:
        return f"all {len(places)} processes are in {where(0)}"
    others = " behind the others," if len(places) > 1 else ""
    return "; ".join(f"{name(rank)} is{others} in {where(rank)}" for rank in behind)


def _write_stacks(descriptor: int, text: str) -> None:
    os.write(descriptor, text.encode())  # not through sys.stderr, whose lock the main thread may hold
    faulthandler.dump_traceback(descriptor, all_threads=True)
