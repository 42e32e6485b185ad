"""Shardings of the arrays of an audit on a mesh or on replicas, and the choice between the two.

`Shards.by_rows`, `by_features` and `by_vocabulary` use `jax.shard_map` where XLA's partitioner would gather sharded
arrays.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import jax
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from spinal_jax.config import AuditParallelConfig, ParallelConfig
from spinal_jax.errors import UserError
from spinal_jax.parallel.device_defaults import MODEL_SHARE, TABLE_BYTES
from spinal_jax.parallel.mesh import ROWS, make_mesh, parameter_sharding, row_multiple

T = TypeVar("T")

MAX_TENSOR = 8  # devices that `tensor` spans by default


@dataclass(frozen=True)
class Shards:
    """Shardings of the arrays of an audit on a mesh. Hashable, for use as a static argument.

    Attributes:
        mesh: the devices.
        vocabulary: axes that split the rows of the unembedding in the lens. The other row axes split the measured
            positions.
    """

    mesh: Mesh
    vocabulary: tuple[str, ...] = ("tensor",)

    @staticmethod
    def of(mesh: Mesh, table_bytes: int) -> Shards:
        """The shardings for an unembedding of `table_bytes`.

        If it is small, only `tensor` splits the vocabulary: measured positions stay on their device, and only sums over
        the vocabulary are exchanged. If it is large, `fsdp` splits it too, and the hidden states at the measured
        positions are gathered along `fsdp`.
        """
        return Shards(mesh, ("tensor",) if table_bytes <= TABLE_BYTES * mesh.shape["tensor"] else ("tensor", "fsdp"))

    @property
    def rows(self) -> int:
        """Number of devices that split the rows of a batch."""
        return row_multiple(self.mesh)

    @property
    def parameter_split(self) -> int:
        """Number of devices that split large parameters."""
        return self.mesh.shape["fsdp"] * self.mesh.shape["tensor"]

    @property
    def own(self) -> tuple[int, ...]:
        """Numbers of the row shards of this process, in order."""
        parts = self.batch.addressable_devices_indices_map((self.rows,)).values()
        return tuple(sorted({index[0].indices(self.rows)[0] for index in parts if index is not None}))

    def of_parts(self, x: np.ndarray, sharding: NamedSharding, axis: int = 0) -> Array:
        """A global array sharded by rows along `axis`, from the shards of this process (`own`)."""
        if sharding.is_fully_addressable:
            return jax.device_put(x, sharding)
        own = {part: place for place, part in enumerate(self.own)}
        size = x.shape[axis] // len(own)
        shape = (*x.shape[:axis], size * self.rows, *x.shape[axis + 1 :])

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            place = own[index[axis].indices(shape[axis])[0] // size]
            return x[(*index[:axis], slice(place * size, (place + 1) * size))]

        return jax.make_array_from_callback(shape, sharding, part)

    def parts(self, x: Array, axis: int = 0) -> np.ndarray:
        """The inverse of `of_parts`."""
        if x.is_fully_addressable:
            return np.asarray(x)
        found = {(shard.index[axis].start or 0): shard.data for shard in x.addressable_shards}
        return np.concatenate([np.asarray(found[begin]) for begin in sorted(found)], axis=axis)

    @property
    def table_multiple(self) -> int:
        """The rows of the unembedding are padded to a multiple of this."""
        return math.prod(self.mesh.shape[axis] for axis in self.vocabulary)

    def _on(self, *axes: str | tuple[str, ...] | None) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(*axes))

    @property
    def each(self) -> NamedSharding:
        """One entry of the first axis on each device."""
        return self._on(self.mesh.axis_names)

    @property
    def whole(self) -> NamedSharding:
        """Replicated."""
        return self._on()

    def parameter(self, path: str, shape: tuple[int, ...]) -> NamedSharding:
        """Sharding of a parameter by path.

        XLA for GPUs gathers arrays along their first axis. To gather along another, it lays out the weights of all
        blocks anew, in a copy. There `fsdp` splits the outputs of linear layers as `tensor` does, where it can.
        """
        sharding = parameter_sharding(self.mesh, path, shape)
        axes = tuple(sharding.spec)
        linear = path.startswith("stacks") and path.endswith(".weight") and axes[-2:] == ("tensor", "fsdp")
        if linear and self.mesh.devices.flat[0].platform == "gpu" and shape[-2] % self.parameter_split == 0:
            return self._on(*axes[:-2], ("tensor", "fsdp"), None)
        return sharding

    @property
    def batch(self) -> NamedSharding:
        """Sharding of the arrays of a batch."""
        return self._on(ROWS)

    @property
    def kept(self) -> NamedSharding:
        """Sharding of the hidden states at the measured positions, [D + 1, M, d]."""
        return self._on(None, ROWS)

    @property
    def table(self) -> NamedSharding:
        """Sharding of the unembedding [V, d] and its bias [V] in the lens."""
        return self._on(self.vocabulary)

    def features(self, height: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(axes that split the computation of the `height` rows of a stripe, axes of ROWS over which these are
        reduce-scattered).

        A device computes 1 / tensor of the rows from its own hidden states, and keeps its part of a reduce-scatter
        along `fsdp` and `data`. Splitting boundaries instead would move whole matrices across the mesh, and D + 1
        rarely has suitable divisors.
        """
        made = ("tensor",) if height % self.mesh.shape["tensor"] == 0 else ()
        left = height // math.prod(self.mesh.shape[axis] for axis in made)
        kept: tuple[str, ...] = ()
        for axis in reversed(ROWS):
            if left % self.mesh.shape[axis] == 0:
                kept, left = (*kept, axis), left // self.mesh.shape[axis]
        return made, kept

    def gram_share(self, height: int) -> int:
        """Number of devices that split the Gram sums."""
        made, kept = self.features(height)
        return math.prod(self.mesh.shape[axis] for axis in (*made, *kept))

    def grams(self, height: int) -> tuple[Any, Any]:
        """Shardings of a stripe [slots, D + 1, height, ...] and of the sums of rows [slots, D + 1, d]."""
        made, kept = self.features(height)
        return self._on(None, None, (*made, *kept)), self.whole

    def by_rows(self, function: Callable[..., T]) -> Callable[..., T]:
        """Maps `function` over devices, with inputs and outputs split by rows."""
        by = PartitionSpec(ROWS)
        return jax.shard_map(function, mesh=self.mesh, in_specs=by, out_specs=by, check_vma=False)

    def by_features(self, function: Callable[..., Any], sums: Any) -> Callable[..., Any]:
        """`function` of Gram sums, three arrays split by rows, and two that every device has whole, to Gram sums.
        `sums` is where these lie: `NamedSharding`s in the place of arrays."""
        specs = jax.tree.map(lambda sharding: sharding.spec, sums)
        rows, whole = PartitionSpec(ROWS), PartitionSpec()
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=(specs, rows, rows, rows, whole, whole),
            out_specs=specs,
            check_vma=False,
        )

    def by_vocabulary(self, function: Callable[..., T]) -> Callable[..., T]:
        """Maps `function(lenses, x, weight)` over parts of the vocabulary and of the positions, x [L, M, d], weight
        [M], to arrays [..., M] that are equal on all devices of the vocabulary axes."""
        positions = PartitionSpec(tuple(axis for axis in ROWS if axis not in self.vocabulary))
        by = PartitionSpec(None, *positions)
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=(self.table.spec, by, positions),
            out_specs=by,
            check_vma=False,
        )


@dataclass(frozen=True)
class Replicas:
    """Devices with a whole model each; `each` splits the first axis of an array over them."""

    mesh: Mesh  # of one axis

    @staticmethod
    def all() -> Replicas:
        """All devices of this process in the order of `jax.pmap`."""
        return Replicas(Mesh(np.array(jax.local_devices()), ("data",), axis_types=(AxisType.Auto,)))

    @property
    def count(self) -> int:
        """Number of devices."""
        return self.mesh.size

    @property
    def each(self) -> NamedSharding:
        """One entry of the first axis on each device."""
        return NamedSharding(self.mesh, PartitionSpec("data"))

    @property
    def whole(self) -> NamedSharding:
        """Replicated."""
        return NamedSharding(self.mesh, PartitionSpec())


@dataclass(frozen=True)
class Choice:
    """The devices of an audit: a mesh, replicas, or one device if both are None."""

    shards: Shards | None
    replicas: Replicas | None
    why: str = ""  # empty if the settings determine it

    def __str__(self) -> str:
        if self.replicas is not None:
            what = f"pmap x {self.replicas.count}"
        else:
            sizes = (1, 1, 1) if self.shards is None else self.shards.mesh.devices.shape
            what = f"mesh {' x '.join(map(str, sizes))}"
        return f"{what} ({self.why})" if self.why else what


def device_memory() -> int | None:
    """Memory of a device for this process in bytes; None if unknown, as on a CPU."""
    stats = jax.local_devices()[0].memory_stats()
    return None if stats is None else stats.get("bytes_limit")


def host_memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def choose(config: AuditParallelConfig, whole_bytes: int, kv_heads: int, table_bytes: int) -> Choice:
    """The devices of the settings, or those that fit the model.

    Args:
        config: the `parallel` settings. With backend auto and no sizes, `suited` chooses.
        whole_bytes: size of parameters and Gram sums.
        kv_heads: number of key heads.
        table_bytes: size of the unembedding.

    Raises:
        UserError: the sizes do not multiply to the number of devices.
    """
    count, memory = jax.device_count(), device_memory()
    if config.backend == "pmap":
        replicas = Replicas.all()
        if config.data not in (-1, replicas.count):
            raise UserError(
                f"parallel.data is {config.data} and parallel.backend pmap, but there are {replicas.count} devices; "
                "-1 takes them all"
            )
        return Choice(None, replicas)
    if config.backend == "mesh" or not config.default:
        mesh = make_mesh(config)
        return Choice(Shards.of(mesh, table_bytes) if mesh.size > 1 else None, None)
    if count == 1:
        return Choice(None, None)
    found = suited(count, memory, jax.default_backend(), jax.process_count(), whole_bytes, kv_heads)
    if found.kind == "mesh":
        mesh = make_mesh(ParallelConfig(*found.sizes))
        return Choice(Shards.of(mesh, table_bytes), None, found.why)
    return Choice(None, Replicas.all() if found.kind == "replicas" else None, found.why)


@dataclass(frozen=True)
class Suited:
    """The default devices for a model."""

    kind: Literal["one", "replicas", "mesh"]
    sizes: tuple[int, int, int]  # data, fsdp, tensor
    why: str


def suited(count: int, memory: float | None, backend: str, processes: int, whole_bytes: int, kv_heads: int) -> Suited:
    """One device, replicas, or a mesh with the largest `tensor` up to 8 and the smallest `fsdp` that fits the model.

    `tensor` splits Gram sums, the largest part of what devices exchange, without an exchange; eight accelerators have
    fast links.

    Args:
        count: number of devices.
        memory: bytes of each; None if unknown.
        backend: kind of device.
        processes: number of processes.
        whole_bytes: size of parameters and Gram sums.
        kv_heads: number of key heads, which `tensor` must divide.
    """
    if backend == "cpu" and processes == 1:
        return Suited("one", (1, 1, 1), f"{count} CPU devices share one processor")
    size = f"the model and its sums are {whole_bytes / 2**30:.1f} GiB"
    if processes == 1 and (memory is None or whole_bytes <= MODEL_SHARE * memory):
        return Suited("replicas", (count, 1, 1), f"{size}, which each device has room for")
    tensor = 1 if backend == "cpu" else math.gcd(count, kv_heads, MAX_TENSOR)
    rest = count // tensor
    needed = math.inf if memory is None else whole_bytes / (MODEL_SHARE * memory * tensor)
    fsdp = next((n for n in range(1, rest + 1) if rest % n == 0 and n >= needed), rest)
    return Suited("mesh", (rest // fsdp, fsdp, tensor), f"{size}, shared by {fsdp * tensor}")
