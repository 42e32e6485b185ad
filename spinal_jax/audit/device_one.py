"""An audit on one device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from spinal_jax.audit.device_base import (
    AllGrams,
    Devices,
    as_float64,
    clear_slot,
    jit_forward_step,
    jit_lens_step,
    jit_position_steps,
    no_error,
    on_host,
    slot_sums,
    static,
)
from spinal_jax.audit.lens_step import LensSums, PairSums, TransportSums
from spinal_jax.audit.spectra import BoundarySums, Worker
from spinal_jax.config import MetricsConfig
from spinal_jax.data.packing import TokenBatch
from spinal_jax.metrics import contraction
from spinal_jax.metrics.lens import Lens
from spinal_jax.models.decoder import Decoder


@final
class OneDevice(Devices):
    """JAX's default device."""

    def __init__(self) -> None:
        self.rows, self.own, self.leads = 1, None, True
        self.placing, self.shards = None, None

    def model(self, model: Decoder) -> Decoder:
        return model

    def lens(self, lens: Lens) -> Lens:
        return lens

    def batch(self, batch: TokenBatch) -> TokenBatch:
        return jax.tree.map(jnp.asarray, batch)

    def grams(self, number: int, slots: int, boundaries: int, width: int, dtype: np.dtype) -> AllGrams:
        return tuple(contraction.init(slots, boundaries, width, dtype) for _ in range(number))

    def lens_error(self) -> Array:
        return no_error()

    def lens_sums(self, sums: LensSums) -> LensSums:
        return sums

    def forward_step(
        self,
        model: Decoder,
        grams: AllGrams,
        lens_error: Array,
        batch: TokenBatch,
        skips: tuple[int, ...],
        groups: int,
    ) -> tuple[AllGrams, Array, Array]:
        return jit_forward_step(model, grams, lens_error, batch, skips=skips, groups=groups)

    def lens_step(
        self,
        lenses: tuple[Lens, ...],
        sums: LensSums,
        x: tuple[Array, ...],
        batch: TokenBatch,
        settings: MetricsConfig,
    ) -> LensSums:
        return jit_lens_step(lenses, sums, x, batch, **static(settings))

    def position_steps(
        self, lenses: tuple[Lens, ...], x: tuple[Array, ...], batch: TokenBatch, top_k: int | None
    ) -> tuple[np.ndarray, ...]:
        return tuple(map(np.asarray, jit_position_steps(lenses, x, batch, top_k=top_k)))

    def clear(self, grams: contraction.Grams, slot: int) -> contraction.Grams:
        return clear_slot(grams, slot)

    def of_slot(self, grams: contraction.Grams, slot: int, boundary: int) -> BoundarySums:
        return on_host(_of_slot(grams, slot, boundary))

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
        return as_float64(sums)


_of_slot = jax.jit(slot_sums)


@jax.jit
def _of_boundary(grams: contraction.Grams, boundary: int) -> BoundarySums:
    return BoundarySums(second=tuple(x[:, boundary] for x in grams.second), first=grams.first[:, boundary])
