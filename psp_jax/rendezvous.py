"""How the processes of a run find each other: what the cluster says, and JAX's coordination service with a time limit.

JAX ends a process with SIGABRT and a C++ stack trace when the others do not come, or process 0 goes: an error in C++
cannot be raised in Python there. On its way out a sentence is made of what JAX says: how many came, and who did not.
"""

import atexit
import contextlib
import ctypes
import functools
import os
import re
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import jax
from jax._src.clusters import ClusterEnv  # what JAX detects, and how long its service waits, have no public names
from jaxlib import _jax

_GRACE = 30  # seconds that the service has to tell everybody that time is up, before a process gives up by itself
_ABORTED = 134  # what shells make of SIGABRT


@dataclass(frozen=True)
class Place:
    """Where this process stands in its run.

    Attributes:
      coordinator: host:port of process 0.
      processes: how many there are.
      rank: of this one, from 0.
      devices: which of the GPUs that it sees are its own; None is all of them.
    """

    coordinator: str
    processes: int
    rank: int
    devices: list[int] | None = None


def detect(seconds: int) -> Place:
    """Return what JAX finds out on Cloud TPU, GKE's TPUs, SLURM and Open MPI, waiting `seconds` for a host's name.

    JAX_COORDINATOR_ADDRESS and JAX_LOCAL_DEVICE_IDS win over what is found, as in jax.distributed.initialize.

    Raises:
      ValueError: this is none of them, or one that tells too little.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    try:
        address, processes, rank, devices = ClusterEnv.auto_detect_unset_distributed_params(
            address, None, None, None, None, seconds
        )
    except RuntimeError as error:
        raise ValueError(f"--coordinator=auto: {error}; give --coordinator=HOST:PORT.") from error
    if address is None or processes is None or rank is None:
        raise ValueError(
            "--coordinator=auto finds no cluster here (Cloud TPU, GKE's TPUs, SLURM, Open MPI); give "
            "--coordinator=HOST:PORT, --num_processes and --process_id."
        )
    return Place(address, processes, rank, local_devices(os.environ, list(devices) if devices else None))


def local_devices(environment: Mapping[str, str], detected: list[int] | None) -> list[int] | None:
    """Return which GPUs a process drives of those that it sees; None is all of them.

    JAX gives each process of SLURM and Open MPI a single GPU, `detected`; one that is alone on its node drives all.
    """
    if given := environment.get("JAX_LOCAL_DEVICE_IDS"):
        return [int(number) for number in given.split(",")]
    nodes = environment.get("SLURM_STEP_NUM_NODES")
    alone = nodes is not None and nodes == environment.get("SLURM_NTASKS")
    return None if alone or environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1" else detected


def connect(place: Place, seconds: int) -> None:
    """Join the other processes; when they have not all come within `seconds`, tell how many have and end with code 1.

    Raises:
      ValueError: process 0 does not answer; or this is process 0, and its port is taken.
    """
    if place.rank:
        _await_coordinator(place.coordinator, seconds)
    elif "JAX_COORDINATOR_BIND_ADDRESS" not in os.environ:
        _check_port(place.coordinator)
    # JAX leaves the service an hour, after which nobody listens.
    service = _jax.get_distributed_runtime_service
    _jax.get_distributed_runtime_service = functools.partial(service, cluster_register_timeout=seconds)
    try:
        with _last_words(place, seconds):
            jax.distributed.initialize(
                place.coordinator,
                place.processes,
                place.rank,
                place.devices,
                cluster_detection_method="deactivate",
                initialization_timeout=seconds + _GRACE,
            )
    finally:
        _jax.get_distributed_runtime_service = service
    if place.rank:
        _name_process_0(place)


def arrivals(text: str) -> tuple[str, str] | None:
    """Return ("2 of 4 processes", " (missing: 1, 3)") of what JAX writes of a barrier, which names a few; else None."""
    counted = re.search(r"# of tasks that reached the barrier: (\d+)/(\d+)", text)
    if counted is None:
        return None
    named = re.search(r"timed out task names:\n((?:\d+\n)*)", text)
    missing = sorted(map(int, named[1].split())) if named else []
    others = int(counted[2]) - int(counted[1]) - len(missing)
    words = ", ".join(map(str, missing)) + (f" and {others} more" if others else "")
    return f"{counted[1]} of {counted[2]} processes", f" (missing: {words})" if missing else ""


def too_few(text: str, place: Place, seconds: int) -> str:
    """Return the sentence for what JAX wrote before it gave up."""
    if counted := arrivals(text):
        return (
            f"{counted[0]} arrived at {place.coordinator} within {seconds} s{counted[1]}; look at the output of the "
            "others, or wait longer with --start_timeout."
        )
    why = re.search(r"absl::Status: (.*)", text)
    return (
        f"Process {place.rank} of {place.processes} could not join the run at {place.coordinator} "
        f"({why[1].strip().rstrip('.') if why else 'no reason given'}); look at the output of process 0."
    )


def _check_port(address: str) -> None:
    """Raise ValueError where the port of `address` is taken on this machine; JAX would end in a segmentation fault."""
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("", int(address.rpartition(":")[2])))
        except OSError as error:
            raise ValueError(
                f"Process 0 cannot listen at {address} ({error.strerror}); end what uses the port, or choose another "
                "one in --coordinator (JAX_COORDINATOR_PORT with auto)."
            ) from None


def _await_coordinator(address: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while error := _answers(address):
        if time.monotonic() >= deadline:
            raise ValueError(
                f"The coordinator {address} (process 0) has not answered for {seconds} s ({error}); see whether "
                "process 0 runs there and its port is open, or wait longer with --start_timeout."
            )
        time.sleep(0.5)


def _answers(address: str) -> OSError | None:
    """Return why nobody answers at `address`, None where somebody does."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        return error
    return None


@contextlib.contextmanager
def _last_words(place: Place, seconds: int) -> Iterator[None]:
    """Hold stderr back; where JAX aborts the process, print a sentence made of it and exit with code 1 instead."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as held:

        def aborted() -> None:
            held.seek(0)
            sentence = too_few(held.read().decode(errors="replace"), place, seconds)
            os.write(stderr, f"error: {sentence}\n".encode())
            if place.rank == 0:
                time.sleep(1)  # the others hear of it from the service in this process
            os._exit(1)

        undo = _at_abort(aborted)
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            undo()
            os.close(stderr)
            held.seek(0)
            sys.stderr.write(held.read().decode(errors="replace"))


def _name_process_0(place: Place) -> None:
    """Print a sentence, below all that JAX writes, where it aborts this process because process 0 has ended."""

    def aborted() -> None:
        undo()
        if _answers(place.coordinator) is not None:
            words = f"Process 0 has ended and answers no more at {place.coordinator}; look at its output"
            os.write(2, f"error: {words}. Process {place.rank} ends too, with code {_ABORTED}.\n".encode())
            os._exit(_ABORTED)
        signal.raise_signal(signal.SIGABRT)  # of another cause: for the handler before this one

    undo = _at_abort(aborted)
    atexit.register(undo)  # no Python runs in a handler when the interpreter has gone


def _at_abort(act: Callable[[], None]) -> Callable[[], None]:
    """Let C++ call `act` before it aborts this process; return what undoes that."""
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    # abort() runs this in a thread of JAX's, which holds no lock of Python meanwhile.
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: act())
    former = libc.signal(signal.SIGABRT, handler)

    def undo(handler: object = handler) -> None:  # which must live until then
        libc.signal(signal.SIGABRT, former)

    return undo
