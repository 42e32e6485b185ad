"""What an audit runs on, and what all kinds of it share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from spinal_jax.audit.forward_step import forward_step
from spinal_jax.audit.lens_step import LensSums, PairSums, TransportSums, lens_step, position_steps
from spinal_jax.audit.spectra import BoundarySums, Worker
from spinal_jax.config import MetricsConfig
from spinal_jax.data.packing import TokenBatch
from spinal_jax.metrics import contraction
from spinal_jax.metrics.transport import Lens
from spinal_jax.models.decoder import Decoder
from spinal_jax.models.translate import Placing
from spinal_jax.parallel.placement import Shards

AllGrams = tuple[contraction.Grams, ...]  # of the rows that count, and of each of `metrics.variants.skip`

# Compiled once for the shapes of a model and a batch, however often `measure` is called; what is summed is donated.
jit_forward_step = jax.jit(
    forward_step, static_argnames=("skips", "groups", "shards", "backend"), donate_argnames="grams"
)
jit_lens_step = jax.jit(
    lens_step, static_argnames=("top_k", "groups", "lasts", "terminal", "shards", "backend"), donate_argnames="sums"
)


jit_position_steps = jax.jit(position_steps, static_argnames=("top_k", "shards", "backend"))


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
        return 1 if self.shards is None else self.shards.gram_share(width // contraction.stripe_count(width))

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
    def grams(self, number: int, slots: int, boundaries: int, width: int, dtype: np.dtype) -> AllGrams:
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
        grams: AllGrams,
        lens_error: Array,
        batch: TokenBatch,
        skips: tuple[int, ...],
        groups: int,
    ) -> tuple[AllGrams, Array, Array]:
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


@partial(jax.jit, donate_argnames="grams")
def clear_slot(grams: contraction.Grams, slot: int) -> contraction.Grams:
    """The sums with nothing in one slot."""
    return jax.tree.map(lambda x: x.at[slot].set(0), grams)


def static(settings: MetricsConfig) -> dict[str, Any]:
    """The settings that `lens_step` is compiled for."""
    return {
        "top_k": settings.transport.top_k,
        "groups": settings.groups,
        "lasts": settings.lasts,
        "terminal": settings.terminal,
    }


def no_error() -> Array:
    """No difference seen yet."""
    return jnp.zeros((), jnp.float32)


def as_float64(sums: LensSums) -> tuple[tuple[TransportSums, ...], PairSums | None]:
    """The sums of the model, and between two, on the host."""
    host = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
    return host.own, host.across


def slot_sums(grams: contraction.Grams, slot: int, boundary: int) -> BoundarySums:
    """The sums of a slot at a boundary."""
    return BoundarySums(second=tuple(x[slot, boundary] for x in grams.second), first=grams.first[slot, boundary])


def on_host(sums: BoundarySums) -> BoundarySums:
    """The sums, copied to the host."""
    return jax.tree.map(np.asarray, sums)


def by_device(dealt: BoundarySums, workers: Sequence[Worker]) -> dict[int, BoundarySums]:
    """Of sums that were dealt out, one to each device, those of this process by the number of the device."""
    number = {device: place for place, device in enumerate(workers)}
    parts = [{number[shard.device]: shard.data[0] for shard in x.addressable_shards} for x in jax.tree.leaves(dealt)]
    return {
        place: BoundarySums(second=tuple(part[place] for part in parts[:-1]), first=parts[-1][place])
        for place in parts[-1]
    }
