"""The end that a scheduler asks for by SIGTERM: every process of a run stops at the same place."""

import faulthandler
import os
import signal
import threading
import time
from types import TracebackType
from typing import Any, Self

from jax._src import distributed  # what asks the other processes has no public name

CODE = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, start it again
_IMPATIENT_SECONDS = 5.0  # SLURM sends SIGTERM itself and by the batch script, at about the same time


class Preempted(SystemExit):
    """The run was asked to end; raised when it has stopped where it can go on from. Its exit code is CODE."""

    def __init__(self) -> None:
        super().__init__(CODE)


class Preemption:
    """Takes SIGTERM and tells when to stop; a context manager, of the main thread.

    A SIGTERM that comes five seconds or more after the first one ends the process at once, with code 143. With several
    processes JAX's own notifier spreads the word and finds the first place that none of them has passed.
    """

    def __init__(self) -> None:
        # Orbax asks it as well, in a thread of its own and with the step of a save; JAX would take that for our place.
        self._manager: Any = distributed.global_state.preemption_sync_manager
        distributed.global_state.preemption_sync_manager = None
        self._places, self._told = 0, threading.Event()
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        threading.Thread(target=self._listen, args=(reader,), name="sigterm", daemon=True).start()
        if self._manager is None:
            # Where a thread that is not Python's gets the signal, as some do, faulthandler writes nothing.
            self._former = signal.signal(signal.SIGTERM, lambda *_: self._told.set())
        # Unlike a handler of Python's it runs at once, even while the main thread is inside a compilation or waits for
        # a device, and it hands the signal on: to the handler above, or to the one that JAX has set.
        faulthandler.register(signal.SIGTERM, self._writer, all_threads=False, chain=True)

    def _listen(self, reader: int) -> None:
        first = None
        with open(reader, encoding="utf-8", errors="replace") as stacks:
            for line in stacks:
                if "most recent call first" in line:  # one for each signal
                    first = first or time.monotonic()
                    if time.monotonic() - first >= _IMPATIENT_SECONDS:
                        os._exit(128 + signal.SIGTERM)
                    self._told.set()

    def reached(self) -> bool:
        """Say whether to stop here; all processes must ask equally often, and all get the same answer."""
        self._places += 1
        return bool(self._manager.reached_sync_point(self._places)) if self._manager else self._told.is_set()

    def check(self) -> None:
        """Raise Preempted where `reached`."""
        if self.reached():
            raise Preempted

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        faulthandler.unregister(signal.SIGTERM)
        if self._manager is None:
            signal.signal(signal.SIGTERM, self._former)
        os.close(self._writer)
        distributed.global_state.preemption_sync_manager = self._manager  # JAX must end it before it leaves
