"""An audit on replicas: every device has the whole model and processes a part of each batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import TypeVar, Unpack, final

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding

from spinal_jax.audit.device_base import (
    AllGrams,
    Devices,
    LensSettings,
    as_float64,
    by_device,
    dealt_out,
    no_error,
    on_host,
    static,
)
from spinal_jax.audit.forward_step import forward_step
from spinal_jax.audit.lens_step import LensSums, PairSums, TransportSums, lens_step, position_steps
from spinal_jax.audit.spectra import BoundarySums, Worker
from spinal_jax.config import MetricsConfig
from spinal_jax.data.packing import TokenBatch
from spinal_jax.metrics import contraction
from spinal_jax.metrics.lens import Lens
from spinal_jax.models.decoder import Decoder
from spinal_jax.parallel.placement import Replicas

T = TypeVar("T")


@final
class OnReplicas(Devices):
    """Data parallelism by `jax.pmap`: each device has the whole model, some rows of each batch, and its own sums.

    Sums are added when they leave the devices, so that a step needs no communication.
    """

    def __init__(self, replicas: Replicas):
        self.replicas = replicas
        self.rows, self.own, self.leads = replicas.count, None, True
        self.placing = lambda path, shape: replicas.whole
        self.shards = None

    def _each(self, tree: T) -> T:
        """One copy on each device, along a new leading axis."""
        return jax.tree.map(lambda x: jax.device_put(np.stack([np.asarray(x)] * self.rows), self.replicas.each), tree)

    def model(self, model: Decoder) -> Decoder:
        return jax.device_put(model, self.replicas.whole)

    def lens(self, lens: Lens) -> Lens:
        return jax.device_put(lens, self.replicas.whole)

    def batch(self, batch: TokenBatch) -> TokenBatch:
        parts = jax.tree.map(lambda x: np.asarray(x).reshape(self.rows, -1, *x.shape[1:]), batch)
        return jax.device_put(parts, self.replicas.each)

    def grams(self, number: int, slots: int, boundaries: int, width: int, dtype: np.dtype) -> AllGrams:
        def init() -> contraction.Grams:
            sums = contraction.init(slots, boundaries, width, dtype)
            return jax.tree.map(lambda x: jnp.broadcast_to(x, (self.rows, *x.shape)), sums)

        return tuple(jax.jit(init, out_shardings=self.replicas.each)() for _ in range(number))

    def lens_error(self) -> Array:
        return self._each(no_error())

    def lens_sums(self, sums: LensSums) -> LensSums:
        return self._each(sums)

    def forward_step(
        self,
        model: Decoder,
        grams: AllGrams,
        lens_error: Array,
        batch: TokenBatch,
        skips: tuple[int, ...],
        groups: int,
    ) -> tuple[AllGrams, Array, Array]:
        return _forward_each(skips, groups)(model, grams, lens_error, batch)

    def lens_step(
        self,
        lenses: tuple[Lens, ...],
        sums: LensSums,
        x: tuple[Array, ...],
        batch: TokenBatch,
        settings: MetricsConfig,
    ) -> LensSums:
        return _lens_each(**static(settings))(lenses, sums, x, batch)

    def position_steps(
        self, lenses: tuple[Lens, ...], x: tuple[Array, ...], batch: TokenBatch, top_k: int | None
    ) -> tuple[np.ndarray, ...]:
        return tuple(map(self.to_host, _steps_each(top_k)(lenses, x, batch)))

    def clear(self, grams: contraction.Grams, slot: int) -> contraction.Grams:
        return _clear_each(grams, slot)

    def of_slot(self, grams: contraction.Grams, slot: int, boundary: int) -> BoundarySums:
        return on_host(_over_replicas(grams, slot, boundary))

    def of_boundaries(self, grams: contraction.Grams, boundaries: Sequence[int]) -> dict[int, BoundarySums]:
        dealt = _dealt_out_by_replicas(self.replicas.each)(grams, np.array(boundaries, np.int32))
        return by_device(dealt, self.workers)

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
        return jax.tree.map(lambda x: x.sum(axis=0), as_float64(sums))


@cache
def _dealt_out_by_replicas(each: NamedSharding) -> Callable[[contraction.Grams, np.ndarray], BoundarySums]:
    """Jitted function from the sums of each device [n, G, D + 1, ...] to the totals at one boundary for each device."""

    def part(x: Array, boundaries: Array) -> Array:
        return jnp.moveaxis(jnp.sum(x[:, :, boundaries], axis=0), 1, 0)

    return jax.jit(partial(dealt_out, part=part), out_shardings=each)


@cache
def _forward_each(skips: tuple[int, ...], groups: int) -> Callable[..., tuple[AllGrams, Array, Array]]:
    return jax.pmap(partial(forward_step, skips=skips, groups=groups), in_axes=(None, 0, 0, 0), donate_argnums=1)


@cache
def _lens_each(**static: Unpack[LensSettings]) -> Callable[..., LensSums]:
    return jax.pmap(partial(lens_step, **static), in_axes=(None, 0, 0, 0), donate_argnums=1)


@cache
def _steps_each(top_k: int | None) -> Callable[..., tuple[Array, ...]]:
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
