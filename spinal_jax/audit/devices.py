"""The devices an audit runs on: one, a mesh that shares every array, or replicas that each do a part of every batch.

All three run the same two steps, `gather` and `read`. Whatever goes to devices or comes back passes through here.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache, partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding

from spinal_jax.audit.forward_step import gather
from spinal_jax.audit.lens_step import Across, Reading, Sums, read
from spinal_jax.config import MetricsConfig
from spinal_jax.data.packing import SLOTS, TokenBatch
from spinal_jax.metrics import contraction
from spinal_jax.metrics.transport import Lens
from spinal_jax.models.config import DecoderConfig
from spinal_jax.models.decoder import Decoder
from spinal_jax.models.parts import take_apart
from spinal_jax.models.translate import Placing
from spinal_jax.parallel.mesh import Choice, Replicas, Shards, device_memory, placed

T = TypeVar("T")
GRAM_ROOM = 0.25  # of a device's memory, for Gram sums

# Compiled once for the shapes of a model and a batch, however often `measure` is called; what is summed is donated.
gather_step = jax.jit(gather, static_argnames=("skips", "shards"), donate_argnames="grams")
read_step = jax.jit(read, static_argnames=("top_k", "groups", "lasts", "shards"), donate_argnames="reading")


@partial(jax.jit, donate_argnames="grams")
def _clear(grams: contraction.Grams, slot: int) -> contraction.Grams:
    return jax.tree.map(lambda x: x.at[slot].set(0), grams)


@partial(jax.jit, static_argnames="multiple")
def _padded(x: Array, multiple: int) -> Array:
    """Rows of zeros behind x [V, ..], up to a multiple of so many."""
    return jnp.pad(x, ((0, -x.shape[0] % multiple), *((0, 0) for _ in x.shape[1:])))


class OneDevice:
    """The device that JAX takes where nothing is said."""

    shards: Shards | None = None
    rows = 1  # how many share the rows of a batch
    own: tuple[int, ...] | None = None  # which of these rows this process fills; None: all
    leads = True  # whether this process keeps the sums that leave the devices: the first of those that share them
    placing: Placing | None = None  # where a parameter lies, for `load_decoder`

    def slots(self, config: DecoderConfig, settings: MetricsConfig) -> int:
        """How many groups have their Gram sums here at once, all others being in a scratch file: two, or one where two
        would take more than GRAM_ROOM of a device in float64."""
        memory, share = device_memory(), 1
        if self.shards is not None:
            made, kept = self.shards.features(config.width)
            share = math.prod(self.shards.mesh.shape[axis] for axis in (*made, *kept))
        size = (1 + len(settings.variants.skip)) * (config.depth + 1) * config.width**2 * 8 / share
        return 1 if memory and SLOTS * size > GRAM_ROOM * memory else SLOTS

    def model(self, model: Decoder) -> Decoder:
        """The model, its parameters where they belong."""
        return model

    def lens(self, lens: Lens) -> Lens:
        """What reads token distributions, its rows where the walk through the vocabulary wants them."""
        return lens

    def batch(self, batch: TokenBatch) -> TokenBatch:
        """A batch of the host."""
        return jax.tree.map(jnp.asarray, batch)

    def grams(self, number: int, slots: int, boundaries: int, width: int, dtype: np.dtype) -> Any:
        """`number` sums of nothing yet."""
        return tuple(contraction.init(slots, boundaries, width, dtype) for _ in range(number))

    def gap(self) -> Array:
        """No difference seen yet."""
        return jnp.zeros((), jnp.float32)

    def reading(self, reading: Reading) -> Reading:
        """Sums of nothing yet."""
        return reading

    def gather(self, model: Decoder, grams: Any, gap: Array, batch: TokenBatch, skips: tuple[int, ...]) -> Any:
        """`gather`, compiled; `grams` is donated."""
        return gather_step(model, grams, gap, batch, skips=skips, shards=self.shards)

    def read(
        self,
        lenses: tuple[Lens, ...],
        reading: Reading,
        x: tuple[Array, ...],
        batch: TokenBatch,
        settings: MetricsConfig,
    ) -> Reading:
        """`read`, compiled; `reading` is donated."""
        return read_step(lenses, reading, x, batch, **_static(settings), shards=self.shards)

    def clear(self, grams: contraction.Grams, slot: int) -> contraction.Grams:
        """The sums with nothing in one slot; `grams` is donated."""
        return _clear(grams, slot)

    def second(self, grams: contraction.Grams, slot: int, boundary: int) -> np.ndarray:
        """[d, d] Gram sum of a slot and boundary, on the host. Processes that share the sums must all ask for it."""
        return np.asarray(grams.second[slot, boundary])

    def first(self, grams: contraction.Grams, slot: int) -> np.ndarray:
        """[D + 1, d] the sums beside it."""
        return np.asarray(grams.first[slot])

    def kept(self, x: Array) -> np.ndarray:
        """x [D + 1, M, d] on the host."""
        return np.asarray(x)

    def keep(self, x: np.ndarray) -> Array:
        """x [D + 1, M, d] of the host, as `gather` leaves it."""
        return jnp.asarray(x)

    def largest(self, gap: Array) -> float:
        """The largest difference seen."""
        return float(gap)

    def totals(self, reading: Reading) -> tuple[tuple[Sums, ...], Across | None]:
        """The sums as float64 on the host."""
        host = jax.tree.map(lambda x: np.asarray(x, np.float64), reading)
        return host.own, host.across


class OnMesh(OneDevice):
    """A mesh of devices, every array split by the rules of `spinal_jax.parallel.mesh`."""

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

    def grams(self, number: int, slots: int, boundaries: int, width: int, dtype: np.dtype) -> Any:
        placed = self.places.grams(width)
        init = jax.jit(contraction.init, static_argnums=(0, 1, 2, 3), out_shardings=contraction.Grams(*placed))
        return tuple(init(slots, boundaries, width, dtype) for _ in range(number))

    def gap(self) -> Array:
        return placed(super().gap(), self.places.whole)

    def reading(self, reading: Reading) -> Reading:
        return jax.tree.map(lambda x: placed(x, self.places.whole), reading)

    def second(self, grams: contraction.Grams, slot: int, boundary: int) -> np.ndarray:
        return np.asarray(_gathered(self.places.whole)(grams.second, slot, boundary))

    def first(self, grams: contraction.Grams, slot: int) -> np.ndarray:
        return np.asarray(grams.first)[slot]

    def kept(self, x: Array) -> np.ndarray:
        return self.places.parts(x, axis=1)

    def keep(self, x: np.ndarray) -> Array:
        return self.places.of_parts(x, self.places.kept, axis=1)


class OnReplicas(OneDevice):
    """Devices that each have the whole model, a part of every batch's rows and sums of their own: `jax.pmap`.

    Sums are added up as they leave the devices, so that nothing is exchanged during a step.
    """

    def __init__(self, replicas: Replicas):
        self.replicas = replicas
        self.rows = replicas.count
        self.placing = lambda path, shape: replicas.whole

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

    def grams(self, number: int, slots: int, boundaries: int, width: int, dtype: np.dtype) -> Any:
        def init() -> contraction.Grams:
            sums = contraction.init(slots, boundaries, width, dtype)
            return jax.tree.map(lambda x: jnp.broadcast_to(x, (self.rows, *x.shape)), sums)

        return tuple(jax.jit(init, out_shardings=self.replicas.each)() for _ in range(number))

    def gap(self) -> Array:
        return self._each(super().gap())

    def reading(self, reading: Reading) -> Reading:
        return self._each(reading)

    def gather(self, model: Decoder, grams: Any, gap: Array, batch: TokenBatch, skips: tuple[int, ...]) -> Any:
        return _gather_each(skips)(model, grams, gap, batch)

    def read(
        self,
        lenses: tuple[Lens, ...],
        reading: Reading,
        x: tuple[Array, ...],
        batch: TokenBatch,
        settings: MetricsConfig,
    ) -> Reading:
        return _read_each(**_static(settings))(lenses, reading, x, batch)

    def clear(self, grams: contraction.Grams, slot: int) -> contraction.Grams:
        return _clear_each(grams, slot)

    def second(self, grams: contraction.Grams, slot: int, boundary: int) -> np.ndarray:
        return np.asarray(_over_replicas(grams.second, slot, boundary))

    def first(self, grams: contraction.Grams, slot: int) -> np.ndarray:
        return np.asarray(grams.first)[:, slot].astype(np.float64).sum(axis=0)

    def kept(self, x: Array) -> np.ndarray:
        return np.concatenate(list(np.asarray(x)), axis=1)

    def keep(self, x: np.ndarray) -> Array:
        return jax.device_put(np.stack(np.split(x, self.rows, axis=1)), self.replicas.each)

    def largest(self, gap: Array) -> float:
        return float(np.asarray(gap).max())

    def totals(self, reading: Reading) -> tuple[tuple[Sums, ...], Across | None]:
        own, across = super().totals(reading)
        return jax.tree.map(lambda x: x.sum(axis=0), (own, across))


def devices_of(choice: Choice) -> OneDevice:
    """What runs the audit on the devices that were chosen."""
    if choice.replicas is not None:
        return OnReplicas(choice.replicas)
    return OneDevice() if choice.shards is None else OnMesh(choice.shards)


def _static(settings: MetricsConfig) -> dict[str, Any]:
    return {"top_k": settings.transport.top_k, "groups": settings.groups, "lasts": settings.lasts}


@cache
def _gathered(whole: NamedSharding) -> Any:
    return jax.jit(lambda second, slot, boundary: second[slot, boundary], out_shardings=whole)


@cache
def _gather_each(skips: tuple[int, ...]) -> Any:
    return jax.pmap(partial(gather, skips=skips), in_axes=(None, 0, 0, 0), donate_argnums=1)


@cache
def _read_each(**static: Any) -> Any:
    return jax.pmap(partial(read, **static), in_axes=(None, 0, 0, 0), donate_argnums=1)


@partial(jax.jit, donate_argnames="grams")
def _clear_each(grams: contraction.Grams, slot: int) -> contraction.Grams:
    return jax.tree.map(lambda x: x.at[:, slot].set(0), grams)


@jax.jit
def _over_replicas(second: Array, slot: int, boundary: int) -> Array:
    return jnp.sum(second[:, slot, boundary], axis=0)
