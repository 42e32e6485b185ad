"""The mesh of devices and the sharding rules of parameters.

A mesh has three axes: `data` (rows of a batch), `fsdp` (rows, and one dimension of parameters) and `tensor` (the other
dimension of parameters). Models have no sharding annotations. The rules below give the sharding by the path of a
parameter, and XLA's partitioner propagates it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar

import jax
import numpy as np
from jax import Array
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from spinal_jax.config import ParallelConfig
from spinal_jax.errors import UserError

T = TypeVar("T")

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # axes that split the rows of a batch
ROOTS = ("embedding", "positions", "stacks", "final_norm", "unembedding")
LARGE = 1 << 22  # number of elements from which a parameter must be sharded

# (paths, axes of the last dimensions). Parameters without a rule are small and replicated.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r".*norm\.(weight|bias)", ()),
    (r"embedding|unembedding\.weight", ("tensor", "fsdp")),  # [V, d]
    (r"positions", (None, "fsdp")),  # [T, d]
    (r".*\b(out|down)\.weight|.*\bdown", ("fsdp", "tensor")),  # [d, inner]
    (r".*\.weight", ("tensor", "fsdp")),  # [inner, d]
    (r".*\b(gate|up|router)", ("tensor", "fsdp")),  # [.., inner or experts, d]
    (r".*\b(gate|up)_bias", ("fsdp", "tensor")),  # [experts, inner]
    (r".*\bdown_bias", ("tensor", "fsdp")),  # [experts, d]
    (r".*\badapter\.a", (None, "fsdp")),
    (r".*\badapter\.b", ("fsdp", None)),
)


def make_mesh(config: ParallelConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The devices as a mesh data x fsdp x tensor; an axis of -1 takes the remaining devices.

    Args:
        config: the sizes.
        devices: devices of the mesh, such as a TPU slice to compile for; None is all.

    Raises:
        UserError: the axes do not multiply to the number of devices.
    """
    sizes = [config.data, config.fsdp, config.tensor]
    count = jax.device_count() if devices is None else len(devices)
    if devices is None and sizes == [1, 1, 1] and jax.process_count() == 1:
        return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1])
    known = math.prod(size for size in sizes if size > 0)
    if -1 in sizes and count % known == 0:
        sizes[sizes.index(-1)] = count // known
    if math.prod(sizes) != count:
        asked = " x ".join(f"{name} {size}" for name, size in zip(AXES, sizes, strict=True))
        raise UserError(f"parallel is {asked}, but there are {count} devices; -1 for one axis takes what is left")
    types = (AxisType.Auto,) * len(AXES)
    try:
        return jax.make_mesh(sizes, AXES, axis_types=types, devices=devices)
    except NotImplementedError:  # an axis does not match the sides of the slice, such as 8 in 16 x 16
        each = jax.devices() if devices is None else list(devices)
        return Mesh(create_device_mesh(sizes, each, allow_split_physical_axes=True), AXES, axis_types=types)


def parameter_sharding(mesh: Mesh, path: str, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of a parameter. If an axis does not divide its dimension, it splits the other dimension if possible.

    Raises:
        UserError: a large parameter would be replicated on a mesh that shards parameters.
    """
    axes: tuple[str | None, ...] = next((axes for rule, axes in RULES if re.fullmatch(rule, path)), ())
    axes = axes[-len(shape) :] if len(shape) else ()
    axes = (None,) * (len(shape) - len(axes)) + axes
    named = [number for number, axis in enumerate(axes) if axis]
    fitting: list[list[str]] = [[] for _ in shape]
    for number in named:
        for dimension in (number, *(n for n in named if n != number)):
            wanted = [*fitting[dimension], axes[number] or ""]
            if shape[dimension] % math.prod(mesh.shape[axis] for axis in wanted) == 0:
                fitting[dimension] = wanted
                break
    split = mesh.shape["fsdp"] * mesh.shape["tensor"]
    if split > 1 and math.prod(shape) >= LARGE and not any(mesh.shape[a] > 1 for some in fitting for a in some):
        raise UserError(
            f"{path} {list(shape)} would lie whole on each of {mesh.size} devices: fsdp {mesh.shape['fsdp']} and "
            f"tensor {mesh.shape['tensor']} do not divide it; choose sizes that do"
        )
    return NamedSharding(mesh, PartitionSpec(*(tuple(some) or None for some in fitting)))


def parameter_shardings(tree: T, mesh: Mesh) -> T:
    """The `NamedSharding` of each array, or abstract array, in a dictionary by path or in a tree of such dictionaries
    (optimiser state)."""

    def place(path: tuple[object, ...], leaf: Array | jax.ShapeDtypeStruct) -> NamedSharding:
        names = [str(getattr(key, "key", key)) for key in path]
        name = next((name for name in reversed(names) if name.partition(".")[0] in ROOTS), "")
        return parameter_sharding(mesh, name, leaf.shape)

    return jax.tree_util.tree_map_with_path(place, tree)


def shard_parameters(tree: T, mesh: Mesh) -> T:
    """Places the arrays of such a tree by RULES."""
    return jax.tree.map(placed, tree, parameter_shardings(tree, mesh))


def shard_rows(tree: T, mesh: Mesh) -> T:
    """Host arrays of a batch on the devices: matrices [R, ..] split by rows over data and fsdp, vectors whole. Of
    several processes each has the whole batch and makes the rows that its devices take."""
    return jax.tree.map(lambda x: placed(x, row_sharding(mesh) if np.ndim(x) > 1 else on_all(mesh)), tree)


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Split by rows over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


def on_all(mesh: Mesh) -> NamedSharding:
    """Replicated over the mesh."""
    return NamedSharding(mesh, PartitionSpec())


def placed(x: ArrayLike, sharding: NamedSharding) -> Array:
    """Places a host array, equal in every process, or a device array by `sharding`."""
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    if isinstance(x, Array) and not x.is_fully_addressable:
        return x if x.sharding == sharding else _moved(sharding)(x)
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


@cache
def _moved(sharding: NamedSharding) -> Callable[[Array], Array]:
    return jax.jit(lambda x: x, out_shardings=sharding)


def row_multiple(mesh: Mesh) -> int:
    """Number of devices that split the rows of a batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]
