"""An audit on a mesh of devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import final

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding

from spinal_jax.audit.device_base import (
    AllGrams,
    Devices,
    as_float64,
    by_device,
    clear_slot,
    dealt_out,
    jit_forward_step,
    jit_lens_step,
    jit_position_steps,
    no_error,
    on_host,
    slot_sums,
    static,
)
from spinal_jax.audit.forward_step import gram_shardings
from spinal_jax.audit.lens_step import LensSums, PairSums, TransportSums
from spinal_jax.audit.spectra import BoundarySums, Worker
from spinal_jax.config import MetricsConfig
from spinal_jax.data.packing import TokenBatch
from spinal_jax.metrics import contraction
from spinal_jax.metrics.lens import Lens
from spinal_jax.models.decoder import Decoder
from spinal_jax.models.parts import take_apart
from spinal_jax.parallel.mesh import placed
from spinal_jax.parallel.placement import Shards


@final
class OnMesh(Devices):
    """A mesh of devices; arrays are sharded by the rules of `spinal_jax.parallel`."""

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
        padded = jax.tree.map(partial(_padded, multiple=multiple), lens)  # so that the mesh divides the rows
        return replace(jax.tree.map(lambda x: placed(x, table), padded), size=lens.vocab_size)

    def batch(self, batch: TokenBatch) -> TokenBatch:
        return jax.tree.map(lambda x: self.places.of_parts(x, self.places.batch), batch)

    def grams(self, number: int, slots: int, boundaries: int, width: int, dtype: np.dtype) -> AllGrams:
        shardings = gram_shardings(width, self.places)
        init = jax.jit(contraction.init, static_argnums=(0, 1, 2, 3), out_shardings=shardings)
        return tuple(init(slots, boundaries, width, dtype) for _ in range(number))

    def lens_error(self) -> Array:
        return placed(no_error(), self.places.whole)

    def lens_sums(self, sums: LensSums) -> LensSums:
        return jax.tree.map(lambda x: placed(x, self.places.whole), sums)

    def forward_step(
        self,
        model: Decoder,
        grams: AllGrams,
        lens_error: Array,
        batch: TokenBatch,
        skips: tuple[int, ...],
        groups: int,
    ) -> tuple[AllGrams, Array, Array]:
        return jit_forward_step(model, grams, lens_error, batch, skips=skips, groups=groups, shards=self.shards)

    def lens_step(
        self,
        lenses: tuple[Lens, ...],
        sums: LensSums,
        x: tuple[Array, ...],
        batch: TokenBatch,
        settings: MetricsConfig,
    ) -> LensSums:
        return jit_lens_step(lenses, sums, x, batch, **static(settings), shards=self.shards)

    def position_steps(
        self, lenses: tuple[Lens, ...], x: tuple[Array, ...], batch: TokenBatch, top_k: int | None
    ) -> tuple[np.ndarray, ...]:
        return tuple(map(np.asarray, jit_position_steps(lenses, x, batch, top_k=top_k, shards=self.shards)))

    def clear(self, grams: contraction.Grams, slot: int) -> contraction.Grams:
        return clear_slot(grams, slot)

    def of_slot(self, grams: contraction.Grams, slot: int, boundary: int) -> BoundarySums:
        return on_host(_gathered(self.places.whole)(grams, slot, boundary))

    def of_boundaries(self, grams: contraction.Grams, boundaries: Sequence[int]) -> dict[int, BoundarySums]:
        return by_device(_dealt_out(self.places.each)(grams, np.array(boundaries, np.int32)), self.workers)

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
        return as_float64(sums)


@partial(jax.jit, static_argnames="multiple")
def _padded(x: Array, multiple: int) -> Array:
    """x [V, ...] padded with rows of zeros to a multiple of `multiple`."""
    return jnp.pad(x, ((0, -x.shape[0] % multiple), *((0, 0) for _ in x.shape[1:])))


@cache
def _gathered(whole: NamedSharding) -> Callable[[contraction.Grams, int, int], BoundarySums]:
    return jax.jit(slot_sums, out_shardings=whole)


@cache
def _dealt_out(each: NamedSharding) -> Callable[[contraction.Grams, np.ndarray], BoundarySums]:
    """Jitted function to [n, G, ...], the sums of all slots at one boundary for each device, one on each."""

    def part(x: Array, boundaries: Array) -> Array:
        return jax.lax.with_sharding_constraint(jnp.moveaxis(x[:, boundaries], 1, 0), each)

    return jax.jit(partial(dealt_out, part=part), out_shardings=each)
