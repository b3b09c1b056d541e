"""Devices and processes: distributed start, the (data, spatial) mesh, shardings, global arrays.

Data parallelism is the partitioner's work: arrays are global, the batch axis is sharded over `data`, image rows over
`spatial`, and every mean in the step, batch norm's included, is a mean over all devices.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # the barrier of the coordination service has no public name
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Array = jax.Array


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


def make_mesh(data: int = -1, spatial: int = 1) -> Mesh:
    """Arrange all devices as (data, spatial); `data` = -1 takes what `spatial` leaves.

    Raises:
      ValueError: the two do not multiply to the number of devices.
    """
    devices = jax.device_count()
    if data == -1 and spatial >= 1 and devices % spatial == 0:
        data = devices // spatial
    if data * spatial != devices:
        raise ValueError(
            f"mesh.data={data} x mesh.spatial={spatial} does not use the {devices} devices of this run exactly; "
            f"choose factors of {devices}, or mesh.data=-1."
        )
    return jax.make_mesh((data, spatial), ("data", "spatial"), axis_types=(AxisType.Auto, AxisType.Auto))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of state and scalars: a copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of arrays [B, H, ...]: batch over `data`, rows over `spatial`."""
    return NamedSharding(mesh, PartitionSpec("data", "spatial" if mesh.shape["spatial"] > 1 else None))


def batch_axis_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of arrays [B, ...] that have no image rows: batch over `data`."""
    return NamedSharding(mesh, PartitionSpec("data"))


def all_devices_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of arrays [B, ...] whose batch is spread over all devices."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def constrain_maps(mesh: Mesh) -> Callable[[Array], Array]:
    """Return a function that pins maps [B, h, w, C] to the batch sharding (rows only where they divide)."""

    def constrain(x: Array) -> Array:
        divides = x.shape[1] % mesh.shape["spatial"] == 0
        return jax.lax.with_sharding_constraint(x, batch_sharding(mesh) if divides else batch_axis_sharding(mesh))

    return constrain


def to_global(batch: dict[str, np.ndarray], sharding: NamedSharding) -> dict[str, Array]:
    """Join each process's rows of a batch into global arrays, process 0's rows first."""
    processes = jax.process_count()
    return {
        name: jax.make_array_from_process_local_data(sharding, rows, (processes * len(rows), *rows.shape[1:]))
        for name, rows in batch.items()
    }


def to_replicated(tree: Any, mesh: Mesh) -> Any:
    """Put a copy of every array of a tree, the same in each process, on all devices."""

    def put(value: np.ndarray | Array) -> Array:
        if isinstance(value, Array):
            return value  # where it belongs already
        return jax.make_array_from_callback(value.shape, replicated(mesh), lambda index: value[index])

    return jax.tree.map(put, tree)


def local_rows(x: Array) -> np.ndarray:
    """Return this process's rows of an array [B, ...] that is sharded along its first axis."""
    shards = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


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
