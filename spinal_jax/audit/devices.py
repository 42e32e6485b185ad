"""The devices an audit runs on: one, a mesh that shares every array, or replicas that each do a part of every batch.

All three run the same two steps, `forward_step` and `lens_step`. Whatever goes to devices or comes back passes through
here.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any, TypeVar, final

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding

from spinal_jax.audit.forward_step import forward_step, gram_shardings
from spinal_jax.audit.lens_step import LensSums, PairSums, TransportSums, lens_step, position_steps
from spinal_jax.audit.spectra import BoundarySums, Worker
from spinal_jax.config import MetricsConfig
from spinal_jax.data.packing import TokenBatch
from spinal_jax.metrics import contraction
from spinal_jax.metrics.transport import Lens
from spinal_jax.models.decoder import Decoder
from spinal_jax.models.parts import take_apart
from spinal_jax.models.translate import Placing
from spinal_jax.parallel.mesh import placed
from spinal_jax.parallel.placement import Choice, Replicas, Shards

T = TypeVar("T")
Grams = tuple[contraction.Grams, ...]  # of the rows that count, and of each of `metrics.variants.skip`

# Compiled once for the shapes of a model and a batch, however often `measure` is called; what is summed is donated.
jit_forward_step = jax.jit(
    forward_step, static_argnames=("skips", "groups", "shards", "backend"), donate_argnames="grams"
)
jit_lens_step = jax.jit(
    lens_step, static_argnames=("top_k", "groups", "lasts", "terminal", "shards", "backend"), donate_argnames="sums"
)


jit_position_steps = jax.jit(position_steps, static_argnames=("top_k", "shards", "backend"))


@partial(jax.jit, donate_argnames="grams")
def _clear(grams: contraction.Grams, slot: int) -> contraction.Grams:
    return jax.tree.map(lambda x: x.at[slot].set(0), grams)


@partial(jax.jit, static_argnames="multiple")
def _padded(x: Array, multiple: int) -> Array:
    """Rows of zeros behind x [V, ..], up to a multiple of so many."""
    return jnp.pad(x, ((0, -x.shape[0] % multiple), *((0, 0) for _ in x.shape[1:])))


class Devices(ABC):
    """What an audit runs on.

    Attributes:
        rows: how many devices share the rows of a batch.
        own: which of these parts of the rows this process fills; None: all.
        leads: whether this process keeps the sums that leave the devices: the first of those that share them.
        placing: where a parameter lies, for `load_decoder`; None: wherever JAX puts it.
        shards: where arrays lie on a mesh; None: there is none.
    """

    rows: int
    own: tuple[int, ...] | None
    leads: bool
    placing: Placing | None
    shards: Shards | None

    def gram_share(self, width: int) -> int:
        """Among how many devices the Gram sums are split."""
        if self.shards is None:
            return 1
        made, kept = self.shards.features(width // contraction.stripe_count(width))
        return math.prod(self.shards.mesh.shape[axis] for axis in (*made, *kept))

    @abstractmethod
    def model(self, model: Decoder) -> Decoder:
        """The model, its parameters where they belong."""

    @abstractmethod
    def lens(self, lens: Lens) -> Lens:
        """What reads token distributions, its rows where the walk through the vocabulary wants them."""

    @abstractmethod
    def batch(self, batch: TokenBatch) -> TokenBatch:
        """A batch of the host."""

    @abstractmethod
    def grams(self, number: int, slots: int, boundaries: int, width: int, dtype: np.dtype) -> Grams:
        """`number` sums of nothing yet."""

    @abstractmethod
    def lens_error(self) -> Array:
        """No difference seen yet."""

    @abstractmethod
    def lens_sums(self, sums: LensSums) -> LensSums:
        """Sums of nothing yet."""

    @abstractmethod
    def forward_step(
        self,
        model: Decoder,
        grams: Grams,
        lens_error: Array,
        batch: TokenBatch,
        skips: tuple[int, ...],
        groups: int,
    ) -> tuple[Grams, Array, Array]:
        """`forward_step`, compiled; `grams` is donated."""

    @abstractmethod
    def lens_step(
        self,
        lenses: tuple[Lens, ...],
        sums: LensSums,
        x: tuple[Array, ...],
        batch: TokenBatch,
        settings: MetricsConfig,
    ) -> LensSums:
        """`lens_step`, compiled; `sums` is donated."""

    @abstractmethod
    def position_steps(
        self, lenses: tuple[Lens, ...], x: tuple[Array, ...], batch: TokenBatch, top_k: int | None
    ) -> tuple[np.ndarray, ...]:
        """`position_steps`, compiled; [D, M] of each model on the host."""

    @abstractmethod
    def clear(self, grams: contraction.Grams, slot: int) -> contraction.Grams:
        """The sums with nothing in one slot; `grams` is donated."""

    @abstractmethod
    def of_slot(self, grams: contraction.Grams, slot: int, boundary: int) -> BoundarySums:
        """The sums of a slot at a boundary, on the host. Processes that share the sums must all ask for them."""

    @abstractmethod
    def of_boundaries(self, grams: contraction.Grams, boundaries: Sequence[int]) -> dict[int, BoundarySums]:
        """The sums of all slots at one boundary for each device (`workers` of them): by the number of the device, of
        those that belong to this process, which have them. Processes that share the sums must all ask for them."""

    @property
    @abstractmethod
    def workers(self) -> Sequence[Worker]:
        """All devices, which share the work of the spectra."""

    @abstractmethod
    def to_host(self, x: Array) -> np.ndarray:
        """x [D + 1, M, d] as `forward_step` leaves it, on the host."""

    @abstractmethod
    def from_host(self, x: np.ndarray) -> Array:
        """The inverse of `to_host`."""

    @abstractmethod
    def largest(self, lens_error: Array) -> float:
        """The largest difference seen."""

    @abstractmethod
    def totals(self, sums: LensSums) -> tuple[tuple[TransportSums, ...], PairSums | None]:
        """The sums as float64 on the host."""


@final
class OneDevice(Devices):
    """The device that JAX takes where nothing is said."""

    def __init__(self) -> None:
        self.rows, self.own, self.leads = 1, None, True
        self.placing, self.shards = None, None

    def model(self, model: Decoder) -> Decoder:
        return model

    def lens(self, lens: Lens) -> Lens:
        return lens

    def batch(self, batch: TokenBatch) -> TokenBatch:
        return jax.tree.map(jnp.asarray, batch)

    def grams(self, number: int, slots: int, boundaries: int, width: int, dtype: np.dtype) -> Grams:
        return tuple(contraction.init(slots, boundaries, width, dtype) for _ in range(number))

    def lens_error(self) -> Array:
        return _no_error()

    def lens_sums(self, sums: LensSums) -> LensSums:
        return sums

    def forward_step(
        self,
        model: Decoder,
        grams: Grams,
        lens_error: Array,
        batch: TokenBatch,
        skips: tuple[int, ...],
        groups: int,
    ) -> tuple[Grams, Array, Array]:
        return jit_forward_step(model, grams, lens_error, batch, skips=skips, groups=groups)

    def lens_step(
        self,
        lenses: tuple[Lens, ...],
        sums: LensSums,
        x: tuple[Array, ...],
        batch: TokenBatch,
        settings: MetricsConfig,
    ) -> LensSums:
        return jit_lens_step(lenses, sums, x, batch, **_static(settings))

    def position_steps(
        self, lenses: tuple[Lens, ...], x: tuple[Array, ...], batch: TokenBatch, top_k: int | None
    ) -> tuple[np.ndarray, ...]:
        return tuple(map(np.asarray, jit_position_steps(lenses, x, batch, top_k=top_k)))

    def clear(self, grams: contraction.Grams, slot: int) -> contraction.Grams:
        return _clear(grams, slot)

    def of_slot(self, grams: contraction.Grams, slot: int, boundary: int) -> BoundarySums:
        return _on_host(_of_slot(grams, slot, boundary))

    def of_boundaries(self, grams: contraction.Grams, boundaries: Sequence[int]) -> dict[int, BoundarySums]:
        return {0: _of_boundary(grams, boundaries[0])}

    @property
    def workers(self) -> Sequence[Worker]:
        return jax.devices()[:1]

    def to_host(self, x: Array) -> np.ndarray:
        return np.asarray(x)

    def from_host(self, x: np.ndarray) -> Array:
        return jnp.asarray(x)

    def largest(self, lens_error: Array) -> float:
        return float(lens_error)

    def totals(self, sums: LensSums) -> tuple[tuple[TransportSums, ...], PairSums | None]:
        return _as_float64(sums)


@final
class OnMesh(Devices):
    """A mesh of devices, every array split by the rules of `spinal_jax.parallel`."""

    def __init__(self, shards: Shards):
        self.shards = self.places = shards
        self.rows = shards.rows
        self.own = shards.own
        self.leads = shards.whole.is_fully_addressable or jax.process_index() == 0
        self.placing = shards.parameter

    def model(self, model: Decoder) -> Decoder:
        parts, arrays = take_apart(model)
        return parts.assemble({path: placed(x, self.places.parameter(path, x.shape)) for path, x in arrays.items()})

    def lens(self, lens: Lens) -> Lens:
        multiple, table = self.places.table_multiple, self.places.table
        padded = jax.tree.map(partial(_padded, multiple=multiple), lens)  # first, so that rows can be dealt out evenly
        return replace(jax.tree.map(lambda x: placed(x, table), padded), size=lens.vocab_size)

    def batch(self, batch: TokenBatch) -> TokenBatch:
        return jax.tree.map(lambda x: self.places.of_parts(x, self.places.batch), batch)

    def grams(self, number: int, slots: int, boundaries: int, width: int, dtype: np.dtype) -> Grams:
        shardings = gram_shardings(width, self.places)
        init = jax.jit(contraction.init, static_argnums=(0, 1, 2, 3), out_shardings=shardings)
        return tuple(init(slots, boundaries, width, dtype) for _ in range(number))

    def lens_error(self) -> Array:
        return placed(_no_error(), self.places.whole)

    def lens_sums(self, sums: LensSums) -> LensSums:
        return jax.tree.map(lambda x: placed(x, self.places.whole), sums)

    def forward_step(
        self,
        model: Decoder,
        grams: Grams,
        lens_error: Array,
        batch: TokenBatch,
        skips: tuple[int, ...],
        groups: int,
    ) -> tuple[Grams, Array, Array]:
        return jit_forward_step(model, grams, lens_error, batch, skips=skips, groups=groups, shards=self.shards)

    def lens_step(
        self,
        lenses: tuple[Lens, ...],
        sums: LensSums,
        x: tuple[Array, ...],
        batch: TokenBatch,
        settings: MetricsConfig,
    ) -> LensSums:
        return jit_lens_step(lenses, sums, x, batch, **_static(settings), shards=self.shards)

    def position_steps(
        self, lenses: tuple[Lens, ...], x: tuple[Array, ...], batch: TokenBatch, top_k: int | None
    ) -> tuple[np.ndarray, ...]:
        return tuple(map(np.asarray, jit_position_steps(lenses, x, batch, top_k=top_k, shards=self.shards)))

    def clear(self, grams: contraction.Grams, slot: int) -> contraction.Grams:
        return _clear(grams, slot)

    def of_slot(self, grams: contraction.Grams, slot: int, boundary: int) -> BoundarySums:
        return _on_host(_gathered(self.places.whole)(grams, slot, boundary))

    def of_boundaries(self, grams: contraction.Grams, boundaries: Sequence[int]) -> dict[int, BoundarySums]:
        return _by_device(_dealt_out(self.places.each)(grams, np.array(boundaries, np.int32)), self.workers)

    @property
    def workers(self) -> Sequence[Worker]:
        return list(self.places.mesh.devices.flat)

    def to_host(self, x: Array) -> np.ndarray:
        return self.places.parts(x, axis=1)

    def from_host(self, x: np.ndarray) -> Array:
        return self.places.of_parts(x, self.places.kept, axis=1)

    def largest(self, lens_error: Array) -> float:
        return float(lens_error)

    def totals(self, sums: LensSums) -> tuple[tuple[TransportSums, ...], PairSums | None]:
        return _as_float64(sums)


@final
class OnReplicas(Devices):
    """Devices that each have the whole model, a part of every batch's rows and sums of their own: `jax.pmap`.

    Sums are added up as they leave the devices, so that nothing is exchanged during a step.
    """

    def __init__(self, replicas: Replicas):
        self.replicas = replicas
        self.rows, self.own, self.leads = replicas.count, None, True
        self.placing = lambda path, shape: replicas.whole
        self.shards = None

    def _each(self, tree: T) -> T:
        """One copy on each device, along a new first axis."""
        return jax.tree.map(lambda x: jax.device_put(np.stack([np.asarray(x)] * self.rows), self.replicas.each), tree)

    def model(self, model: Decoder) -> Decoder:
        return jax.device_put(model, self.replicas.whole)

    def lens(self, lens: Lens) -> Lens:
        return jax.device_put(lens, self.replicas.whole)

    def batch(self, batch: TokenBatch) -> TokenBatch:
        parts = jax.tree.map(lambda x: np.asarray(x).reshape(self.rows, -1, *x.shape[1:]), batch)
        return jax.device_put(parts, self.replicas.each)

    def grams(self, number: int, slots: int, boundaries: int, width: int, dtype: np.dtype) -> Grams:
        def init() -> contraction.Grams:
            sums = contraction.init(slots, boundaries, width, dtype)
            return jax.tree.map(lambda x: jnp.broadcast_to(x, (self.rows, *x.shape)), sums)

        return tuple(jax.jit(init, out_shardings=self.replicas.each)() for _ in range(number))

    def lens_error(self) -> Array:
        return self._each(_no_error())

    def lens_sums(self, sums: LensSums) -> LensSums:
        return self._each(sums)

    def forward_step(
        self,
        model: Decoder,
        grams: Grams,
        lens_error: Array,
        batch: TokenBatch,
        skips: tuple[int, ...],
        groups: int,
    ) -> tuple[Grams, Array, Array]:
        return _forward_each(skips, groups)(model, grams, lens_error, batch)

    def lens_step(
        self,
        lenses: tuple[Lens, ...],
        sums: LensSums,
        x: tuple[Array, ...],
        batch: TokenBatch,
        settings: MetricsConfig,
    ) -> LensSums:
        return _lens_each(**_static(settings))(lenses, sums, x, batch)

    def position_steps(
        self, lenses: tuple[Lens, ...], x: tuple[Array, ...], batch: TokenBatch, top_k: int | None
    ) -> tuple[np.ndarray, ...]:
        return tuple(map(self.to_host, _steps_each(top_k)(lenses, x, batch)))

    def clear(self, grams: contraction.Grams, slot: int) -> contraction.Grams:
        return _clear_each(grams, slot)

    def of_slot(self, grams: contraction.Grams, slot: int, boundary: int) -> BoundarySums:
        return _on_host(_over_replicas(grams, slot, boundary))

    def of_boundaries(self, grams: contraction.Grams, boundaries: Sequence[int]) -> dict[int, BoundarySums]:
        dealt = _dealt_out_by_replicas(self.replicas.each)(grams, np.array(boundaries, np.int32))
        return _by_device(dealt, self.workers)

    @property
    def workers(self) -> Sequence[Worker]:
        return list(self.replicas.mesh.devices.flat)

    def to_host(self, x: Array) -> np.ndarray:
        return np.concatenate(list(np.asarray(x)), axis=1)

    def from_host(self, x: np.ndarray) -> Array:
        return jax.device_put(np.stack(np.split(x, self.rows, axis=1)), self.replicas.each)

    def largest(self, lens_error: Array) -> float:
        return float(np.asarray(lens_error).max())

    def totals(self, sums: LensSums) -> tuple[tuple[TransportSums, ...], PairSums | None]:
        return jax.tree.map(lambda x: x.sum(axis=0), _as_float64(sums))


def devices_of(choice: Choice) -> Devices:
    """What runs the audit on the devices that were chosen."""
    if choice.replicas is not None:
        return OnReplicas(choice.replicas)
    return OneDevice() if choice.shards is None else OnMesh(choice.shards)


def _static(settings: MetricsConfig) -> dict[str, Any]:
    return {
        "top_k": settings.transport.top_k,
        "groups": settings.groups,
        "lasts": settings.lasts,
        "terminal": settings.terminal,
    }


def _no_error() -> Array:
    return jnp.zeros((), jnp.float32)


def _as_float64(sums: LensSums) -> tuple[tuple[TransportSums, ...], PairSums | None]:
    host = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
    return host.own, host.across


def _slot(grams: contraction.Grams, slot: int, boundary: int) -> BoundarySums:
    return BoundarySums(second=tuple(x[slot, boundary] for x in grams.second), first=grams.first[slot, boundary])


_of_slot = jax.jit(_slot)


@jax.jit
def _of_boundary(grams: contraction.Grams, boundary: int) -> BoundarySums:
    return BoundarySums(second=tuple(x[:, boundary] for x in grams.second), first=grams.first[:, boundary])


def _on_host(sums: BoundarySums) -> BoundarySums:
    return jax.tree.map(np.asarray, sums)


@cache
def _gathered(whole: NamedSharding) -> Any:
    return jax.jit(_slot, out_shardings=whole)


@cache
def _dealt_out(each: NamedSharding) -> Any:
    """Sums of all slots at one boundary for each device, [n, G, ..], one on each."""

    def deal(grams: contraction.Grams, boundaries: Array) -> BoundarySums:
        second, first = jax.tree.map(lambda x: jnp.moveaxis(x[:, boundaries], 1, 0), tuple(grams))
        return BoundarySums(second=second, first=first)

    return jax.jit(deal, out_shardings=each)


@cache
def _dealt_out_by_replicas(each: NamedSharding) -> Any:
    """The same, of sums [n, G, D + 1, ..] that each device has its part of."""

    def deal(grams: contraction.Grams, boundaries: Array) -> BoundarySums:
        second, first = jax.tree.map(lambda x: jnp.moveaxis(jnp.sum(x[:, :, boundaries], axis=0), 1, 0), tuple(grams))
        return BoundarySums(second=second, first=first)

    return jax.jit(deal, out_shardings=each)


def _by_device(dealt: BoundarySums, workers: Sequence[Worker]) -> dict[int, BoundarySums]:
    number = {device: place for place, device in enumerate(workers)}
    parts = [{number[shard.device]: shard.data[0] for shard in x.addressable_shards} for x in jax.tree.leaves(dealt)]
    return {
        place: BoundarySums(second=tuple(part[place] for part in parts[:-1]), first=parts[-1][place])
        for place in parts[-1]
    }


@cache
def _forward_each(skips: tuple[int, ...], groups: int) -> Any:
    return jax.pmap(partial(forward_step, skips=skips, groups=groups), in_axes=(None, 0, 0, 0), donate_argnums=1)


@cache
def _lens_each(**static: Any) -> Any:
    return jax.pmap(partial(lens_step, **static), in_axes=(None, 0, 0, 0), donate_argnums=1)


@cache
def _steps_each(top_k: int | None) -> Any:
    return jax.pmap(partial(position_steps, top_k=top_k), in_axes=(None, 0, 0))


@partial(jax.jit, donate_argnames="grams")
def _clear_each(grams: contraction.Grams, slot: int) -> contraction.Grams:
    return jax.tree.map(lambda x: x.at[:, slot].set(0), grams)


@jax.jit
def _over_replicas(grams: contraction.Grams, slot: int, boundary: int) -> BoundarySums:
    return BoundarySums(
        second=tuple(jnp.sum(x[:, slot, boundary], axis=0) for x in grams.second),
        first=jnp.sum(grams.first[:, slot, boundary], axis=0),
    )
