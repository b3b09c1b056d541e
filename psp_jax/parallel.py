"""Devices: the (data, spatial) mesh, shardings, global arrays.

Data parallelism is the partitioner's work: arrays are global, the batch axis is sharded over `data`, image rows over
`spatial`, and every mean in the step, batch norm's included, is a mean over all devices.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Array = jax.Array


def make_mesh(data: int = -1, spatial: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arrange `devices`, by default all, as (data, spatial); `data` = -1 takes what `spatial` leaves.

    Raises:
      ValueError: the two do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    if data == -1 and spatial >= 1 and count % spatial == 0:
        data = count // spatial
    if data * spatial != count:
        raise ValueError(
            f"mesh.data={data} x mesh.spatial={spatial} does not use the {count} devices of this run exactly; "
            f"choose factors of {count}, or mesh.data=-1."
        )
    both = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((data, spatial), ("data", "spatial"), axis_types=both, devices=devices)


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
