"""The processes of a run: how they start together, wait for each other, tell each other, agree, and end."""

import atexit
import contextlib
import json
import os
import re
import socket
import sys
import threading
import time
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # barriers and keys of the coordination service have no public names
from jax.experimental import multihost_utils

from psp_jax.rendezvous import Place, arrivals, connect, detect

_FAILED = "psp_jax/failed/"
_LOOK_SECONDS = 1.0  # between two looks for a process that failed
_GRACE_SECONDS = 3.0  # that a process has to end by itself, of the same cause or to finish a checkpoint
_LEAVE_SECONDS = 10  # that a process which fails gives the others to hear of it
_ended = threading.Event()


class AllRefuse(ValueError):
    """Every process of the run comes to this by itself, and none needs to be told."""


def initialize(
    coordinator: str | None, num_processes: int | None, process_id: int | None, start_timeout: int = 300
) -> None:
    """Join the other processes of a run; a single process without these arguments has nothing to do.

    From then on a process that fails ends the others too, within seconds: see `leave`. With an address and a rank a
    process drives all GPUs that it sees, unless JAX_LOCAL_DEVICE_IDS tells which; with "auto" see
    `rendezvous.local_devices`.

    Args:
      coordinator: "host:port" of process 0, or "auto" where JAX finds all three out by itself (Cloud TPU, GKE's TPUs,
        SLURM, Open MPI).
      num_processes: how many processes the run has.
      process_id: rank of this one, from 0.
      start_timeout: seconds that all have to arrive; the process ends with code 1 and a sentence where they do not.

    Raises:
      ValueError: a number of processes or a rank without a coordinator, or the other way round; no cluster is found;
        process 0 does not answer.
    """
    explicit = coordinator not in (None, "auto")
    if explicit != (num_processes is not None) or explicit != (process_id is not None):
        raise ValueError("--coordinator=HOST:PORT, --num_processes and --process_id belong together; give all or none.")
    if coordinator is None:
        return
    if num_processes is None or process_id is None:
        place = detect(start_timeout)
    elif not 0 <= process_id < num_processes or not _is_address(coordinator):
        raise ValueError(
            f"--coordinator={coordinator} --num_processes={num_processes} --process_id={process_id} is no place in a "
            "run; give HOST:PORT, and ranks from 0 to below the number of processes."
        )
    else:
        place = Place(coordinator, num_processes, process_id)
    if os.environ.get("JAX_PLATFORMS", "") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    connect(place, start_timeout)
    watch = threading.Thread(target=_watch, name="watch for failed processes", daemon=True)
    watch.start()
    # Runs before JAX takes its client down, since it is registered after JAX's own.
    atexit.register(_stop, watch)


def is_primary() -> bool:
    """Say whether this process writes what only one may write."""
    return jax.process_index() == 0


def rank() -> int:
    """Return the rank that the coordination service knows this process by; unlike JAX's own it asks no device."""
    return distributed.global_state.process_id


def count() -> int:
    """Return the number of processes without asking a device."""
    return distributed.global_state.num_processes


def wait_for_all(name: str, hours: float = 24.0) -> None:
    """Block until every process has reached the point called `name`, each once in a run.

    Asks the coordination service: a collective of the devices would give up long before a data set is prepared.

    Raises:
      ValueError: one has died, or time is up.
    """
    client = _client()
    if client is None:
        return
    try:
        client.wait_at_barrier(name, timeout_in_ms=int(hours * 3_600_000))
    except jax.errors.JaxRuntimeError as error:
        if counted := arrivals(str(error)):
            why = f"{counted[0]} came within {hours * 3600:.0f} s{counted[1]}"
        elif dead := re.search(r"Task (\d+) heartbeat timeout", str(error)):
            why = f"process {dead[1]} gives no sign of life"
        else:
            why = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(f"The processes of this run wait for each other at {name!r} in vain: {why}.") from error


def _is_address(coordinator: str) -> bool:
    host, _, port = coordinator.rpartition(":")
    return bool(host) and port.isdigit() and 0 < int(port) < 65536


def tell(key: str, value: Any) -> None:
    """Tell all processes `value`, as JSON, under `key`; once in a run."""
    _client().key_value_set(f"psp_jax/{key}", json.dumps(value))


def hear(key: str, seconds: float) -> Any:
    """Return what a process tells under `key`, waiting for it; ValueError says that it did not come."""
    try:
        return json.loads(_client().blocking_key_value_get(f"psp_jax/{key}", int(seconds * 1000)))
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"No process has told {key!r} within {seconds:.0f} s; look at the others' output.") from error


def told(folder: str) -> dict[str, Any]:
    """Return what was told under keys "folder/...", by what follows the slash."""
    found = _client().key_value_dir_get(f"psp_jax/{folder}/")
    return {key.rpartition("/")[2]: json.loads(value) for key, value in found}


def agree(value: int) -> bool:
    """Say whether `value` is the same on every process; all must ask."""
    return (
        bool((multihost_utils.process_allgather(np.int32(value)) == value).all()) if jax.process_count() > 1 else True
    )


def leave(code: int) -> None:
    """End this process after the error that is being handled; the others print a sentence about it and end too."""
    client = _client()
    if client is None:
        sys.exit(code)
    error = sys.exception()
    if not isinstance(error, AllRefuse):
        words = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the service may be gone
            client.key_value_set(f"{_FAILED}{rank()}", json.dumps([socket.gethostname(), words]))
    _end(code)


def _client() -> Any:
    """Return what speaks to the coordination service; None where there is only this process."""
    return distributed.global_state.client


def _stop(watch: threading.Thread) -> None:
    _ended.set()
    watch.join()


def _watch() -> None:
    """End this process when another one has told that it fails."""
    client = _client()
    while not _ended.wait(_LOOK_SECONDS):
        try:
            failed = client.key_value_dir_get(_FAILED)
        except jax.errors.JaxRuntimeError:
            continue  # where the coordinator has gone JAX ends this process
        if failed and not _ended.wait(_GRACE_SECONDS):
            key, value = failed[0]
            host, words = json.loads(value)
            process = key.removeprefix(_FAILED)
            print(f"error: Process {process} ({host}) has failed: {words}", file=sys.stderr, flush=True)
            _end(1)


def _end(code: int) -> None:
    """End this process without an orderly exit, which would wait minutes for the others, who wait for this one."""
    _ended.set()
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _client().wait_at_barrier("psp_jax/leaving", timeout_in_ms=_LEAVE_SECONDS * 1000)
        if rank() == 0:
            time.sleep(0.5)  # without the service in this process JAX would abort the others on their way out
    os._exit(code)
