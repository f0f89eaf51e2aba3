"""Where arrays live: one mesh with a ``data`` and an ``fsdp`` axis, for one device or many.

Batches are split over both axes, parameters and optimizer state over ``fsdp``. The program is the same for any number
of devices; one device is a mesh of one.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dreamer4.errors import UserError


def make_mesh(fsdp: int = 1) -> Mesh:
    """All devices as (data, fsdp)."""
    devices = jax.device_count()
    if fsdp < 1 or devices % fsdp:
        raise UserError(f"train.fsdp: {fsdp} must divide the number of devices, {devices}")
    return jax.make_mesh((devices // fsdp, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis of every array of a batch over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def state_shardings(mesh: Mesh, shapes: Any) -> Any:
    """For each array of a state its largest axis that ``fsdp`` divides, the last of equals; others whole everywhere.

    Optimizer moments have the shapes of their parameters and so are cut like them.
    """
    parts = mesh.shape["fsdp"]

    def place(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        fitting = [i for i, size in enumerate(leaf.shape) if parts > 1 and size % parts == 0 and leaf.ndim > 1]
        axis = max(fitting, key=lambda i: (leaf.shape[i], i), default=None)
        return NamedSharding(mesh, PartitionSpec(*("fsdp" if i == axis else None for i in range(leaf.ndim))))

    return jax.tree.map(place, shapes)


def place_batch(batch: Any, mesh: Mesh) -> Any:
    """A host batch on the mesh. Every process holds the whole batch and keeps its own devices' part."""
    sharding = batch_sharding(mesh)

    def place(x: np.ndarray) -> jax.Array:
        if len(x) % mesh.size:
            raise UserError(f"train.batch_size: {len(x)} clips cannot be split evenly over {mesh.size} devices")
        if jax.process_count() == 1:
            return jax.device_put(x, sharding)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, batch)
