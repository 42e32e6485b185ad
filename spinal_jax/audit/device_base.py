"""Abstract base of the devices of an audit, and functions that the implementations share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypedDict

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
from spinal_jax.metrics.depth import Terminal
from spinal_jax.metrics.lens import Lens
from spinal_jax.models.decoder import Decoder
from spinal_jax.models.translate import Placing
from spinal_jax.parallel.placement import Shards

AllGrams = tuple[contraction.Grams, ...]  # for `contraction.skip` and for each of `variants.skip`

# Jitted at module level, so that repeated calls of `measure` compile once; sums are donated.
jit_forward_step = jax.jit(
    forward_step, static_argnames=("skips", "groups", "shards", "backend"), donate_argnames="grams"
)
jit_lens_step = jax.jit(
    lens_step, static_argnames=("top_k", "groups", "lasts", "terminal", "shards", "backend"), donate_argnames="sums"
)


jit_position_steps = jax.jit(position_steps, static_argnames=("top_k", "shards", "backend"))


class Devices(ABC):
    """The devices of an audit.

    Attributes:
        rows: number of devices that split the rows of a batch.
        own: numbers of the row shards that this process fills; None is all.
        leads: whether this process collects the results.
        placing: sharding of each parameter, for `load_decoder`; None is the default device.
        shards: shardings on a mesh; None without a mesh.
    """

    rows: int
    own: tuple[int, ...] | None
    leads: bool
    placing: Placing | None
    shards: Shards | None

    def gram_share(self, width: int) -> int:
        """Number of devices that split the Gram sums."""
        return 1 if self.shards is None else self.shards.gram_share(width // contraction.stripe_count(width))

    @abstractmethod
    def model(self, model: Decoder) -> Decoder:
        """The model with its parameters placed on the devices."""

    @abstractmethod
    def lens(self, lens: Lens) -> Lens:
        """The lens with its rows placed for the pass over the vocabulary."""

    @abstractmethod
    def batch(self, batch: TokenBatch) -> TokenBatch:
        """A host batch placed on the devices."""

    @abstractmethod
    def grams(self, number: int, slots: int, boundaries: int, width: int, dtype: np.dtype) -> AllGrams:
        """`number` Gram sums of zero rows."""

    @abstractmethod
    def lens_error(self) -> Array:
        """A lens error of 0."""

    @abstractmethod
    def lens_sums(self, sums: LensSums) -> LensSums:
        """Sums placed on the devices."""

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
        """Sets one slot to zero; `grams` is donated."""

    @abstractmethod
    def of_slot(self, grams: contraction.Grams, slot: int, boundary: int) -> BoundarySums:
        """The sums of a slot at a boundary, on the host. A collective operation of all processes."""

    @abstractmethod
    def of_boundaries(self, grams: contraction.Grams, boundaries: Sequence[int]) -> dict[int, BoundarySums]:
        """The sums of all slots at one boundary for each of `workers`, by the number of the device, for the devices of
        this process. A collective operation of all processes."""

    @property
    @abstractmethod
    def workers(self) -> Sequence[Worker]:
        """All devices, which share the eigenvalue computations."""

    @abstractmethod
    def to_host(self, x: Array) -> np.ndarray:
        """x [D + 1, M, d] from `forward_step`, on the host."""

    @abstractmethod
    def from_host(self, x: np.ndarray) -> Array:
        """The inverse of `to_host`."""

    @abstractmethod
    def largest(self, lens_error: Array) -> float:
        """The lens error as a number, over all devices."""

    @abstractmethod
    def totals(self, sums: LensSums) -> tuple[tuple[TransportSums, ...], PairSums | None]:
        """The sums in float64 on the host."""


@partial(jax.jit, donate_argnames="grams")
def clear_slot(grams: contraction.Grams, slot: int) -> contraction.Grams:
    """Sets one slot to zero."""
    return jax.tree.map(lambda x: x.at[slot].set(0), grams)


class LensSettings(TypedDict):
    """Static arguments of `lens_step`."""

    top_k: int | None
    groups: int
    lasts: tuple[int, ...]
    terminal: Terminal


def static(settings: MetricsConfig) -> LensSettings:
    """The settings for which `lens_step` is compiled."""
    return {
        "top_k": settings.transport.top_k,
        "groups": settings.groups,
        "lasts": settings.lasts,
        "terminal": settings.terminal,
    }


def no_error() -> Array:
    """A lens error of 0."""
    return jnp.zeros((), jnp.float32)


def as_float64(sums: LensSums) -> tuple[tuple[TransportSums, ...], PairSums | None]:
    """The sums in float64 on the host."""
    host = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
    return host.own, host.across


def slot_sums(grams: contraction.Grams, slot: int, boundary: int) -> BoundarySums:
    """The sums of a slot at a boundary."""
    return BoundarySums(second=tuple(x[slot, boundary] for x in grams.second), first=grams.first[slot, boundary])


def on_host(sums: BoundarySums) -> BoundarySums:
    """The sums, copied to the host."""
    return jax.tree.map(np.asarray, sums)


def dealt_out(grams: contraction.Grams, boundaries: Array, part: Callable[[Array, Array], Array]) -> BoundarySums:
    """`part(x, boundaries)` of the arrays of Gram sums, one after another, so that devices hold what they exchange of
    one stripe at a time."""
    parts: list[Array] = []
    for x in (*grams.second, grams.first):
        if parts:
            boundaries, parts[-1] = jax.lax.optimization_barrier((boundaries, parts[-1]))
        parts.append(part(x, boundaries))
    return BoundarySums(second=tuple(parts[:-1]), first=parts[-1])


def by_device(dealt: BoundarySums, workers: Sequence[Worker]) -> dict[int, BoundarySums]:
    """Sums with one boundary on each device -> those of this process, by the number of the device."""
    number = {device: index for index, device in enumerate(workers)}
    parts = [{number[shard.device]: shard.data[0] for shard in x.addressable_shards} for x in jax.tree.leaves(dealt)]
    return {
        index: BoundarySums(second=tuple(part[index] for part in parts[:-1]), first=parts[-1][index])
        for index in parts[-1]
    }
