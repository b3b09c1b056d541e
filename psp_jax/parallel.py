"""Devices: the (data, spatial) mesh, shardings, global arrays.

Data parallelism is the partitioner's work: arrays are global, the batch axis is sharded over `data`, image rows over
`spatial`, and every mean in the step, batch norm's included, is a mean over all devices.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Array = jax.Array


def make_mesh(data: int = -1, spatial: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arrange `devices`, or all of this run, as (data, spatial); `data` = -1 takes what `spatial` leaves.

    Raises:
      ValueError: the two do not multiply to the number of devices.
    """
    count = jax.device_count() if devices is None else len(devices)
    if data == -1 and spatial >= 1 and count % spatial == 0:
        data = count // spatial
    if data * spatial != count:
        raise ValueError(
            f"mesh.data={data} x mesh.spatial={spatial} does not use the {count} devices of this run exactly; "
            f"choose factors of {count}, or mesh.data=-1."
        )
    # In the order of the processes, so that each holds neighbouring images, and neighbouring rows of an image are on
    # chips of one host where they can be. `jax.make_mesh` would arrange chips by their place in the pod, or refuse.
    found = jax.devices() if devices is None else devices
    ordered = sorted(found, key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(ordered).reshape(data, spatial), ("data", "spatial"), axis_types=(AxisType.Auto,) * 2)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of state and scalars: a copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of arrays [B, H, ...]: batch over `data`, rows over `spatial`."""
    return NamedSharding(mesh, PartitionSpec("data", "spatial" if mesh.shape["spatial"] > 1 else None))


def batch_axis_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of arrays [B, ...] that have no image rows: batch over `data`."""
    return NamedSharding(mesh, PartitionSpec("data"))


def image_sharding(mesh: Mesh, images: int) -> NamedSharding:
    """Return the sharding of `images` images that are evaluated: over all devices where they divide, or over `data`."""
    return (batch_axis_sharding if images % mesh.size else all_devices_sharding)(mesh)


def spread_shardings(tree: Any, mesh: Mesh) -> Any:
    """Return the shardings of a tree of parameters or their momentum of which each device holds a share.

    Of kernels an axis that divides is cut, the longest, or the last but one where several are: the last lies along the
    lanes of a TPU. Vectors, and kernels without such an axis, are small and stay whole on every device.
    """

    def sharding(x: Any) -> NamedSharding:
        axes = [axis for axis, size in enumerate(x.shape) if size % mesh.size == 0] if x.ndim > 1 else []
        if not axes:
            return replicated(mesh)
        cut = max(axes, key=lambda axis: (x.shape[axis], axis != x.ndim - 1))
        return NamedSharding(mesh, PartitionSpec(*(mesh.axis_names if axis == cut else None for axis in range(x.ndim))))

    return jax.tree.map(sharding, tree)


def spread(tree: Any, mesh: Mesh) -> Any:
    """Place a tree of parameters or gradients, inside a jitted function, by `spread_shardings`."""
    # First whole: the gradient's own products shall not be cut along its channels.
    whole = jax.lax.with_sharding_constraint(tree, replicated(mesh))
    return jax.lax.with_sharding_constraint(whole, spread_shardings(tree, mesh))


def placed(tree: Any, shardings: Any) -> Any:
    """Return a tree of global arrays where `shardings`, one or a tree of them, says, across processes too."""
    return jax.jit(_same, out_shardings=shardings)(tree)


def _same(tree: Any) -> Any:
    return tree


def all_devices_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of arrays [B, ...] whose batch is spread over all devices."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


@dataclass(frozen=True)
class RowSplit:
    """How one image is spread over the devices of the axis `spatial`: each has an equal share of its rows.

    The partitioner follows the sharding of the image through the network and exchanges the rows that a convolution
    reads beyond a device's own; maps are pinned on the way, since a resize, for one, would lose the split.

    Attributes:
      mesh: of `make_mesh`.
      images: global batch.
      rows: of an image, a multiple of `stride` times the devices of `spatial`, so that every map divides.
      stride: input rows per row of features.
    """

    mesh: Mesh
    images: int
    rows: int
    stride: int

    def extend(self, x: Array, value: int) -> Array:
        """Pad [B, H, ...] with `value` below to `rows`, and spread it."""
        x = jnp.pad(x, ((0, 0), (0, self.rows - x.shape[1]), *((0, 0),) * (x.ndim - 2)), constant_values=value)
        return jax.lax.with_sharding_constraint(x, batch_sharding(self.mesh))

    def constrain(self, x: Array) -> Array:
        """Pin maps [B, h, w, C] by rows; of those pooled to a few rows, only the batch is split.

        Maps in phases, several for an image (see `psp_jax.models.phases`), are spread by phase where those divide.
        """
        spatial = self.mesh.shape["spatial"]
        sharding = batch_axis_sharding(self.mesh)
        if x.shape[0] > self.images and x.shape[0] // self.images % spatial == 0:
            sharding = all_devices_sharding(self.mesh)
        elif x.shape[0] * x.shape[1] >= self.images * self.rows // self.stride and x.shape[1] % spatial == 0:
            sharding = batch_sharding(self.mesh)
        return jax.lax.with_sharding_constraint(x, sharding)


def split_rows(mesh: Mesh, images: int, rows: int, stride: int) -> RowSplit | None:
    """Return how images of `rows` rows spread over `mesh`, None where they do not."""
    spatial = mesh.shape["spatial"]
    if spatial == 1:
        return None
    unit = stride * spatial
    return RowSplit(mesh, images, -(-rows // unit) * unit, stride)


def share(sharding: NamedSharding) -> tuple[int, int]:
    """Return which equal share of arrays [B, ...] this process feeds, and how many there are: (index, count).

    Where an image is spread over several processes, all of them feed the same share.
    """
    mesh = sharding.mesh
    parts = mesh.devices.reshape(mesh.shape["data"] if sharding.spec[0] == "data" else mesh.size, -1)
    mine = [i for i, part in enumerate(parts) if any(d.process_index == jax.process_index() for d in part)]
    return mine[0] // len(mine), len(parts) // len(mine)


def to_global(batch: dict[str, np.ndarray], sharding: NamedSharding) -> dict[str, Array]:
    """Join the shares of all processes, which `share` tells, into global arrays."""
    _, count = share(sharding)
    return {
        name: jax.make_array_from_process_local_data(sharding, rows, (count * len(rows), *rows.shape[1:]))
        for name, rows in batch.items()
    }


def to_replicated(tree: Any, mesh: Mesh) -> Any:
    """Put a copy of every array of a tree, the same in each process, on all devices."""

    def put(value: np.ndarray | Array) -> Array:
        if isinstance(value, Array):
            return value  # where it belongs already
        return jax.make_array_from_callback(value.shape, replicated(mesh), lambda index: value[index])

    return jax.tree.map(put, tree)


def local_rows(x: Array) -> list[np.ndarray]:
    """Return this process's rows of an array [B, ...] split along its first axis; no row is another process's too."""
    shards = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards if shard.replica_id == 0}
    return [row for start in sorted(shards) for row in np.asarray(shards[start])]
