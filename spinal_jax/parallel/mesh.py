"""All sharding: which processes and devices there are, how they are arranged, and where every array lies.

A mesh has three axes: `data` (rows of a batch), `fsdp` (rows too, and parameters along one dimension) and `tensor`
(parameters along the other). Models hold no sharding of their own; the rules below say it once, by the path of a
parameter, and XLA's partitioner does the rest. Where it would gather what is split, the audit says what each device
does (`Shards.by_rows`, `by_features`, `by_vocabulary`).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import jax
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from spinal_jax.config import AuditParallelConfig, ParallelConfig
from spinal_jax.errors import UserError

T = TypeVar("T")

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # what splits the rows of a batch
ROOTS = ("embedding", "positions", "stacks", "final_norm", "unembedding")
LARGE = 1 << 22  # elements from which a parameter must not lie whole on every device of a mesh that shards
ROOM = 0.5  # of a device's memory that a model and its sums may take; the rest is for what a batch needs
HEARTBEAT = 50  # seconds without one after which JAX ends a process that hangs
TABLE_BYTES = 1 << 30  # of the unembedding, up to which only `tensor` splits its rows

# (paths, axes of the last dimensions); what no rule names is small and lies whole on every device.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r".*norm\.(weight|bias)", ()),
    (r"embedding|unembedding\.weight", ("tensor", "fsdp")),  # [V, d]
    (r"positions", (None, "fsdp")),  # [T, d]
    (r".*\b(out|down)\.weight|.*\bdown", ("fsdp", "tensor")),  # [d, inner]
    (r".*\.weight", ("tensor", "fsdp")),  # [inner, d]
    (r".*\b(gate|up|router)", ("tensor", "fsdp")),  # [.., inner or experts, d]
    (r".*\badapter\.a", (None, "fsdp")),
    (r".*\badapter\.b", ("fsdp", None)),
)


@dataclass(frozen=True)
class Place:
    """Where this process stands among those that share a run."""

    coordinator: str  # HOST:PORT of process 0
    processes: int
    process: int
    devices: tuple[int, ...] | None = None  # those of this host that it takes; None: all that it sees

    @property
    def local(self) -> bool:
        """Whether all processes are on this machine, so that nobody else has to reach them."""
        host = self.coordinator.rpartition(":")[0]
        return host == "localhost" or host.startswith("127.")


def place_of(config: AuditParallelConfig) -> Place:
    """What the settings say, or with `parallel.coordinator=auto` the environment: SLURM, Open MPI or TPU metadata.

    Raises:
        UserError: nothing in the environment says it.
    """
    if config.coordinator != "auto":
        assert config.coordinator is not None
        assert config.processes is not None
        assert config.process is not None
        return Place(config.coordinator, config.processes, config.process)
    from jax._src.clusters import ClusterEnv  # what jax.distributed.initialize asks; no public name tells beforehand

    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, config.start_timeout)
    except Exception as error:  # whatever a variable or an answer that is not as expected leads to
        raise UserError(f"parallel.coordinator is 'auto', but {type(error).__name__}: {error}") from error
    coordinator, processes, process, devices = found
    if coordinator is None or processes is None or process is None:
        raise UserError(
            "parallel.coordinator is 'auto', but neither SLURM, Open MPI nor a TPU pod says which processes there are; "
            "give HOST:PORT of process 0, parallel.processes and parallel.process"
        )
    return Place(coordinator, processes, process, None if devices is None else tuple(devices))


def start(place: Place, service: str, timeout: int) -> None:
    """Makes the devices of all processes visible to this one. Nothing may have asked JAX for devices before.

    Args:
        place: of this process.
        service: HOST:PORT at which JAX of process 0 is to serve the others.
        timeout: seconds that all of them have.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        service,
        place.processes,
        place.process,
        None if place.devices is None else list(place.devices),
        cluster_detection_method="deactivate",
        initialization_timeout=timeout,
        heartbeat_timeout_seconds=HEARTBEAT,
        coordinator_bind_address=service if place.local else None,
    )


def check_same(facts: Mapping[str, str]) -> None:
    """UserError, in every process, where something that all must have alike is not. For one process nothing."""
    if jax.process_count() == 1:
        return
    from jax.experimental.multihost_utils import process_allgather

    own = [np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint32) for value in facts.values()]
    everybody = np.asarray(process_allgather(np.stack(own)))  # [processes, facts, words]
    for number, name in enumerate(facts):
        other = np.flatnonzero((everybody[:, number] != everybody[0, number]).any(axis=-1))
        if len(other):
            raise UserError(f"process {other[0]} has other {name} than process 0; all must have the same")


def placed(x: Any, sharding: NamedSharding) -> Array:
    """An array of the host that every process has alike, or one that is on devices, where `sharding` says."""
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    if isinstance(x, Array) and not x.is_fully_addressable:
        return x if x.sharding == sharding else _moved(sharding)(x)
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


@cache
def _moved(sharding: NamedSharding) -> Callable[[Array], Array]:
    return jax.jit(lambda x: x, out_shardings=sharding)


def make_mesh(config: ParallelConfig) -> Mesh:
    """The devices as data x fsdp x tensor; one axis may be -1, which takes what is left.

    Raises:
        UserError: the axes do not multiply to the number of devices.
    """
    sizes = [config.data, config.fsdp, config.tensor]
    count = jax.device_count()
    if sizes == [1, 1, 1] and jax.process_count() == 1:
        return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1])
    known = math.prod(size for size in sizes if size > 0)
    if -1 in sizes and count % known == 0:
        sizes[sizes.index(-1)] = count // known
    if math.prod(sizes) != count:
        asked = " x ".join(f"{name} {size}" for name, size in zip(AXES, sizes, strict=True))
        raise UserError(f"parallel is {asked}, but there are {count} devices; -1 for one axis takes what is left")
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def parameter_sharding(mesh: Mesh, path: str, shape: tuple[int, ...]) -> NamedSharding:
    """Where a parameter lies. An axis that does not divide its dimension splits the other one where it divides that.

    Raises:
        UserError: a large parameter would lie whole on every device of a mesh that is there to split it.
    """
    axes: tuple[str | None, ...] = next((axes for rule, axes in RULES if re.fullmatch(rule, path)), ())
    axes = axes[-len(shape) :] if len(shape) else ()
    axes = (None,) * (len(shape) - len(axes)) + axes
    named = [number for number, axis in enumerate(axes) if axis]
    fitting: list[list[str]] = [[] for _ in shape]
    for number in named:
        for place in (number, *(n for n in named if n != number)):
            wanted = [*fitting[place], axes[number] or ""]
            if shape[place] % math.prod(mesh.shape[axis] for axis in wanted) == 0:
                fitting[place] = wanted
                break
    split = mesh.shape["fsdp"] * mesh.shape["tensor"]
    if split > 1 and math.prod(shape) >= LARGE and not any(mesh.shape[a] > 1 for some in fitting for a in some):
        raise UserError(
            f"{path} {list(shape)} would lie whole on each of {mesh.size} devices: fsdp {mesh.shape['fsdp']} and "
            f"tensor {mesh.shape['tensor']} do not divide it; choose sizes that do"
        )
    return NamedSharding(mesh, PartitionSpec(*(tuple(some) or None for some in fitting)))


def shard_parameters(tree: T, mesh: Mesh) -> T:
    """Parameters by path, or a tree that holds such dictionaries (an optimiser's moments), placed by RULES."""

    def place(path: Any, leaf: Array) -> Array:
        names = [str(getattr(key, "key", key)) for key in path]
        name = next((name for name in reversed(names) if name.partition(".")[0] in ROOTS), "")
        return jax.device_put(leaf, parameter_sharding(mesh, name, leaf.shape))

    return jax.tree_util.tree_map_with_path(place, tree)


def shard_rows(tree: T, mesh: Mesh) -> T:
    """Host arrays of a batch on the devices: matrices [R, ..] split by rows over data and fsdp, vectors whole."""
    by_rows = NamedSharding(mesh, PartitionSpec(ROWS))
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: jax.device_put(x, by_rows if np.ndim(x) > 1 else whole), tree)


def row_multiple(mesh: Mesh) -> int:
    """How many devices share the rows of a batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def replicated(tree: T, mesh: Mesh) -> T:
    """Whole on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


@dataclass(frozen=True)
class Shards:
    """Where the arrays of an audit lie on a mesh, and how its devices share the work. Hashable: a static argument.

    Attributes:
        mesh: the devices.
        vocabulary: the axes that split the rows of the unembedding in the walk through the vocabulary. Measured
            positions are split by the row axes that are left.
    """

    mesh: Mesh
    vocabulary: tuple[str, ...] = ("tensor",)

    @staticmethod
    def of(mesh: Mesh, table_bytes: int) -> Shards:
        """For an unembedding of so many bytes.

        Rows of a batch and their measured positions then stay on their device, and only sums over the vocabulary are
        exchanged along `tensor`. That takes a copy of the unembedding that `fsdp` does not split; where it would be
        large, `fsdp` splits the vocabulary too, and residuals at the measured positions are gathered along it.
        """
        return Shards(mesh, ("tensor",) if table_bytes <= TABLE_BYTES * mesh.shape["tensor"] else ("tensor", "fsdp"))

    @property
    def rows(self) -> int:
        """How many devices share the rows of a batch: a multiple of it is what `batch.plan` makes."""
        return row_multiple(self.mesh)

    @property
    def own(self) -> tuple[int, ...]:
        """Which of the `rows` parts of a batch the devices of this process need, in order."""
        parts = self.batch.addressable_devices_indices_map((self.rows,)).values()
        return tuple(sorted({index[0].indices(self.rows)[0] for index in parts if index is not None}))

    def of_parts(self, x: np.ndarray, sharding: NamedSharding, axis: int = 0) -> Array:
        """An array that the row axes split along `axis`, from the parts of it that this process needs (`own`)."""
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
        """What the number of rows of the unembedding is padded to a multiple of."""
        return math.prod(self.mesh.shape[axis] for axis in self.vocabulary)

    def _on(self, *axes: Any) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(*axes))

    @property
    def whole(self) -> NamedSharding:
        """On every device: a scalar, and the sums that `read` carries."""
        return self._on()

    def parameter(self, path: str, shape: tuple[int, ...]) -> NamedSharding:
        """Of a parameter, by its path."""
        return parameter_sharding(self.mesh, path, shape)

    @property
    def batch(self) -> NamedSharding:
        """Of every array of a batch: rows [B, ..], and the measured positions [M] of each device's rows."""
        return self._on(ROWS)

    @property
    def kept(self) -> NamedSharding:
        """Of the residuals at the measured positions, [D + 1, M, d]."""
        return self._on(None, ROWS)

    @property
    def table(self) -> NamedSharding:
        """Of the unembedding [V, d] and its bias [V] in the walk through the vocabulary."""
        return self._on(self.vocabulary)

    def features(self, width: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(axes along which each device makes some rows of a Gram matrix, and of ROWS those that split them further).

        The rows of the matrices are split and not the boundaries, because that is how the parts are made: a device
        makes d / tensor rows from its own hidden states, of which it then keeps what a reduce-scatter along `fsdp` and
        `data` leaves it. With boundaries split, a boundary's sums would cross the mesh whole to the one that keeps
        them, and D + 1 is rarely divided by anything.
        """
        made = ("tensor",) if width % self.mesh.shape["tensor"] == 0 else ()
        left = width // math.prod(self.mesh.shape[axis] for axis in made)
        kept: tuple[str, ...] = ()
        for axis in reversed(ROWS):
            if left % self.mesh.shape[axis] == 0:
                kept, left = (*kept, axis), left // self.mesh.shape[axis]
        return made, kept

    def grams(self, width: int) -> tuple[Any, Any]:
        """`NamedSharding`s of the Gram sums [slots, D + 1, d, d] and of the sums [slots, D + 1, d] beside them."""
        made, kept = self.features(width)
        return self._on(None, None, (*made, *kept)), self.whole

    def by_rows(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` of arrays split by rows, run by each device on its own, to arrays split by rows."""
        by = PartitionSpec(ROWS)
        return jax.shard_map(function, mesh=self.mesh, in_specs=by, out_specs=by, check_vma=False)

    def by_features(self, function: Callable[..., Any], width: int) -> Callable[..., Any]:
        """`function` of arrays split by rows to (Gram sums, sums), split as `grams` says."""
        second, first = self.grams(width)
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=PartitionSpec(ROWS),
            out_specs=(second.spec, first.spec),
            check_vma=False,
        )

    def by_vocabulary(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function(lenses, x, weight)` of a part of the vocabulary and of the positions x [L, M, d], weight [M], to
        arrays [.., M] that are the same on every device that shares the vocabulary."""
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
    """Devices that each have a whole model: `each` splits the first axis of an array among them."""

    mesh: Mesh  # of one axis

    @staticmethod
    def all() -> Replicas:
        """All devices of this process, in the order of `jax.pmap`."""
        return Replicas(Mesh(np.array(jax.local_devices()), ("data",), axis_types=(AxisType.Auto,)))

    @property
    def count(self) -> int:
        """How many there are."""
        return self.mesh.size

    @property
    def each(self) -> NamedSharding:
        """One entry of the first axis on each device."""
        return NamedSharding(self.mesh, PartitionSpec("data"))

    @property
    def whole(self) -> NamedSharding:
        """Whole on every device."""
        return NamedSharding(self.mesh, PartitionSpec())


@dataclass(frozen=True)
class Choice:
    """Which devices an audit runs on: a mesh, replicas, or one device where both are None."""

    shards: Shards | None
    replicas: Replicas | None
    why: str = ""  # empty where nothing was left to choose

    def __str__(self) -> str:
        if self.replicas is not None:
            what = f"pmap x {self.replicas.count}"
        else:
            sizes = (1, 1, 1) if self.shards is None else self.shards.mesh.devices.shape
            what = f"mesh {' x '.join(map(str, sizes))}"
        return f"{what} ({self.why})" if self.why else what


def device_memory() -> int | None:
    """Bytes that a device has for this process; None where that is not said, as on a CPU."""
    stats = jax.local_devices()[0].memory_stats()
    return None if stats is None else stats.get("bytes_limit")


def choose(config: AuditParallelConfig, whole_bytes: int, table_bytes: int) -> Choice:
    """The devices that `config` asks for, or that suit a model.

    Args:
        config: the `parallel` settings. With backend auto and no sizes: replicas where the whole fits on a device, else
            a mesh whose `fsdp` is the least that makes it fit.
        whole_bytes: of parameters and Gram sums together.
        table_bytes: of the unembedding.

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
    if jax.default_backend() == "cpu" and jax.process_count() == 1:
        return Choice(None, None, f"{count} CPU devices share one processor")
    size = f"the model and its sums are {whole_bytes / 2**30:.1f} GiB"
    if jax.process_count() == 1 and (memory is None or whole_bytes <= ROOM * memory):
        return Choice(None, Replicas.all(), f"{size}, which each device has room for")
    fitting = [n for n in range(1, count + 1) if count % n == 0 and memory and whole_bytes / n <= ROOM * memory]
    fsdp = fitting[0] if fitting else count
    mesh = make_mesh(ParallelConfig(count // fsdp, fsdp, 1))
    return Choice(Shards.of(mesh, table_bytes), None, f"{size}, shared by {fsdp}")
