"""Computes numbered batches in worker processes and returns them in order.

Worker w of W computes the steps start + w, start + w + W, ...; so the values do not depend on W. The processes are
plain interpreters over socket pairs rather than grain's `mp_prefetch`, because the latter imports jax in every worker
(three times the memory and start-up time), runs the command's module again in each, puts every batch into /dev/shm
(64 MB in a default container, then a bus error) and leaves its workers behind when the main process is killed.
Here a worker whose main process is gone ends at its next batch, and /dev/shm is not used.
"""

import logging
import os
import pickle
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

Batch = dict[str, np.ndarray]

# Ctrl-C and a scheduler's SIGTERM reach the whole process group, but only the main process decides what they mean.
# jax is blocked, not merely left out: grain imports it where it can, and has code of its own where it cannot.
_START = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sys.path[:] = {path!r}
sys.modules["jax"] = None
from psp_jax.data import workers
workers.serve({descriptor})
"""
# Memory of a batch or an image that is freed goes to the next one: by default glibc hands blocks of megabytes back to
# Linux, which clears every page anew, up to a quarter of a worker's time where faults are slow (virtual machines).
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(256 << 20)}
_READY = 2  # finished batches that wait in the main process, besides the one that every worker holds
_LENGTH = struct.Struct("<Q")


class Batches(Protocol):
    """Batches by step: picklable, and a pure function of the step."""

    def __getitem__(self, step: int) -> Batch: ...


class WorkerPool:
    """Iterates over batches[start:stop], computed by `num_workers` processes, in order.

    An exception in a worker comes out of `next` as ValueError with its message (the worker's traceback is a note), the
    death of a worker as ChildProcessError; both close the pool. `close` ends the workers at once; a context manager.
    """

    def __init__(self, batches: Batches, start: int, stop: int, num_workers: int) -> None:
        jobs = [pickle.dumps((batches, start + index, stop, num_workers)) for index in range(num_workers)]
        workers = [_Worker() for _ in range(num_workers)]
        closed = threading.Event()
        self._ready: queue.Queue[Batch | Exception] = queue.Queue(maxsize=_READY)
        # Not a bound method, so that a forgotten pool can be collected, and closes its workers then.
        reader = threading.Thread(
            target=_read, args=(workers, jobs, stop - start, self._ready, closed), name="batch-reader", daemon=True
        )
        self._close = weakref.finalize(self, _close, workers, closed)
        reader.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if not self._close.alive:
            raise StopIteration
        item = self._ready.get()
        if isinstance(item, Exception):
            self.close()
            raise item
        return item

    def close(self) -> None:
        """Kills the workers, which hold nothing that could be lost, and waits for their end."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()


class _Worker:
    """The main process's end of one worker."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair()
        with theirs:
            code = _START.format(path=sys.path, descriptor=theirs.fileno())
            self.process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=_KEEP_MEMORY | os.environ,
            )

    def send(self, job: bytes) -> None:
        try:
            _send_bytes(self.socket, job)
        except OSError:
            raise self._death() from None

    def receive(self) -> Batch:
        try:
            header = pickle.loads(_receive_bytes(self.socket))
            batch = {}
            if not isinstance(header, _Failure):
                for name, dtype, shape in header:
                    batch[name] = np.empty(shape, dtype)
                    _receive_into(self.socket, batch[name].data.cast("B"))
                return batch
        except (EOFError, OSError):
            raise self._death() from None
        error = ValueError(header.message)
        error.add_note(f"In the data worker:\n{header.traceback}")
        raise error

    def _death(self) -> ChildProcessError:
        code = self.process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return ChildProcessError(
            f"Data worker process {self.process.pid} {how}; see the messages above, or if there are none and the"
            " machine is short of memory, lower data.num_workers."
        )


def _close(workers: list[_Worker], closed: threading.Event) -> None:
    closed.set()
    for worker in workers:
        worker.process.kill()
    for worker in workers:
        worker.process.wait()


def _read(
    workers: list[_Worker],
    jobs: list[bytes],
    num_batches: int,
    ready: "queue.Queue[Batch | Exception]",
    closed: threading.Event,
) -> None:
    """Hands out the jobs, then takes the batches out of the sockets in order, until the end, an error or `closed`.

    A thread of its own, so that batches arrive while the main thread waits for the device. It owns the sockets.
    """

    def put(item: Batch | Exception) -> None:
        while not closed.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    try:
        for worker, job in zip(workers, jobs, strict=True):
            worker.send(job)
        for count in range(num_batches):
            put(workers[count % len(workers)].receive())
            if closed.is_set():
                break
        put(StopIteration())
    except Exception as error:  # the main thread raises it
        put(error)
    finally:
        for worker in workers:
            worker.socket.close()


class _Failure:
    """What a worker sends in place of a batch."""

    def __init__(self, error: Exception) -> None:
        self.message = str(error) or type(error).__name__
        self.traceback = "".join(traceback.format_exception(error))


def serve(descriptor: int) -> None:
    """Runs in the worker process: takes its job from the socket, computes the batches and sends them."""
    with socket.socket(fileno=descriptor) as connection:
        try:
            for result in _compute(_receive_bytes(connection)):
                _send_result(connection, result)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return  # the main process is gone, or takes no more


def _compute(job: bytearray) -> Iterator[Batch | _Failure]:
    try:
        import cv2  # here, since the main process has no business with it in this module

        cv2.setNumThreads(1)
        logging.disable(logging.WARNING)  # grain's, about the absence of jax
        batches, start, stop, stride = pickle.loads(job)
        logging.disable(logging.NOTSET)
        for step in range(start, stop, stride):
            yield batches[step]
    except Exception as error:
        yield _Failure(error)


def _send_result(connection: socket.socket, result: Batch | _Failure) -> None:
    if isinstance(result, _Failure):
        return _send_bytes(connection, pickle.dumps(result))
    arrays = {name: np.ascontiguousarray(array) for name, array in result.items()}
    header: list[Any] = [(name, array.dtype, array.shape) for name, array in arrays.items()]
    _send_bytes(connection, pickle.dumps(header))
    for array in arrays.values():
        connection.sendall(array.data.cast("B"))


def _send_bytes(connection: socket.socket, payload: bytes) -> None:
    connection.sendall(_LENGTH.pack(len(payload)))
    connection.sendall(payload)


def _receive_bytes(connection: socket.socket) -> bytearray:
    length = bytearray(_LENGTH.size)
    _receive_into(connection, memoryview(length))
    payload = bytearray(_LENGTH.unpack(length)[0])
    _receive_into(connection, memoryview(payload))
    return payload


def _receive_into(connection: socket.socket, view: memoryview) -> None:
    while view:
        count = connection.recv_into(view)
        if not count:
            raise EOFError("the other end of the socket is closed")
        view = view[count:]
