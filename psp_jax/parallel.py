"""Devices and processes: distributed start, the (data, spatial) mesh, shardings, global arrays.

Data parallelism is the partitioner's work: arrays are global, the batch axis is sharded over `data`, image rows over
`spatial`, and every mean in the step, batch norm's included, is a mean over all devices.
"""

import os
from collections.abc import Callable

import jax
import numpy as np
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
    """
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


def constrain_maps(mesh: Mesh) -> Callable[[Array], Array]:
    """Return a function that pins maps [B, h, w, C] to the batch sharding (rows only where they divide)."""

    def constrain(x: Array) -> Array:
        divides = x.shape[1] % mesh.shape["spatial"] == 0
        return jax.lax.with_sharding_constraint(x, batch_sharding(mesh) if divides else batch_axis_sharding(mesh))

    return constrain


def to_global(batch: dict[str, np.ndarray], sharding: NamedSharding) -> dict[str, Array]:
    """Join each process's rows of a batch into global arrays, process 0's rows first."""
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def is_primary() -> bool:
    """Say whether this process writes what only one may write."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Block until every process has reached the point called `name`."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
