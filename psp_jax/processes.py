"""The processes of a run: how they find each other, wait for each other, agree, and end."""

import os
import sys

import jax
import numpy as np
from jax._src import distributed  # the barrier of the coordination service has no public name
from jax.experimental import multihost_utils


def initialize(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Join the other processes of a run; a single process without these arguments has nothing to do.

    Args:
      coordinator: "host:port" of process 0, or "auto" where JAX finds all three out by itself (Cloud TPU, SLURM,
        Open MPI).
      num_processes: how many processes the run has.
      process_id: rank of this one, from 0.

    Raises:
      ValueError: a number of processes or a rank without a coordinator, or the other way round.
    """
    explicit = coordinator not in (None, "auto")
    if explicit != (num_processes is not None) or explicit != (process_id is not None):
        raise ValueError("--coordinator=HOST:PORT, --num_processes and --process_id belong together; give all or none.")
    if coordinator is None:
        return
    if os.environ.get("JAX_PLATFORMS", "") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if coordinator == "auto":
        jax.distributed.initialize()
    else:
        jax.distributed.initialize(coordinator, num_processes, process_id)


def is_primary() -> bool:
    """Say whether this process writes what only one may write."""
    return jax.process_index() == 0


def wait_for_all(name: str, hours: float = 24.0) -> None:
    """Block until every process has reached the point called `name`, each once in a run.

    Asks the coordination service: a collective of the devices would give up long before a data set is prepared.
    """
    client = distributed.global_state.client
    if client is not None:
        client.wait_at_barrier(name, timeout_in_ms=int(hours * 3_600_000))


def agree(value: int) -> bool:
    """Say whether `value` is the same on every process; all must ask."""
    return (
        bool((multihost_utils.process_allgather(np.int32(value)) == value).all()) if jax.process_count() > 1 else True
    )


def leave(code: int) -> None:
    """End this process after an error; the others of the run end too, as soon as they notice."""
    if distributed.global_state.client is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # an orderly exit would wait minutes for the others, who wait for this one
    sys.exit(code)
