"""Second step of an audit: token distributions at the measured positions, summed by prompt group."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from spinal_jax.audit.forward_step import pick
from spinal_jax.config import MetricsConfig
from spinal_jax.data.packing import TokenBatch
from spinal_jax.metrics.depth import Terminal, terminal_block
from spinal_jax.metrics.lens import Lens
from spinal_jax.metrics.transport import LensStats, Pair, lens_stats, turning_angle
from spinal_jax.parallel.placement import Shards


class TransportSums(NamedTuple):
    """Sums over measured positions by prompt group, float32."""

    positions: Array  # [G] number of positions
    step: Array  # [G, D + 1] radians, step that ends at a boundary; 0 at boundary 0
    entropy: Array  # [G, D + 1] nats
    turning: Array  # [G, D + 1] radians
    turned: Array  # [G, D + 1] number of positions in `turning`
    direct: Array  # [G] radians
    last_positions: Array  # [K, G] number of positions among the last tokens, for each of `lasts`
    last_step: Array  # [K, G, D + 1] radians, `step` at these positions


class PairSums(NamedTuple):
    """Sums of distances between two models by prompt group, float32."""

    distance: Array  # [G, D + 1] radians
    divergence: Array  # [G] nats, KL(model || reference) of the output distributions


class LensSums(NamedTuple):
    """The state of `lens_step`."""

    own: tuple[TransportSums, ...]  # of the model, and of the reference if its measurement is pending
    across: PairSums | None
    lens_error: Array  # largest difference between two computations of the output probabilities


def pairs_of(boundaries: int, model: int = 0, terminal: Terminal = "third") -> tuple[Pair, Pair, Pair]:
    """Steps, chords over two blocks (for the turning angle) and the terminal chord (for directness) of one model."""
    depth, begin = boundaries - 1, model * boundaries
    before = begin + terminal_block(depth, terminal)[0] - 1
    return (
        Pair(begin, begin + depth, 1),
        Pair(begin, begin + max(depth - 1, 0), 2),
        Pair(before, before + 1, begin + depth - before),
    )


def zero_lens_sums(boundaries: int, settings: MetricsConfig, models: int, across: bool) -> LensSums:
    """The initial state.

    Args:
        boundaries: D + 1.
        settings: what is measured.
        models: number of models with transport sums.
        across: whether distances between two models are summed.
    """
    zeros = partial(jnp.zeros, dtype=jnp.float32)
    groups, lasts = settings.groups, len(settings.lasts)
    by = (groups, boundaries)

    def sums() -> TransportSums:  # separate arrays, because they are donated
        return TransportSums(
            positions=zeros(groups),
            step=zeros(by),
            entropy=zeros(by),
            turning=zeros(by),
            turned=zeros(by),
            direct=zeros(groups),
            last_positions=zeros((lasts, groups)),
            last_step=zeros((lasts, *by)),
        )

    return LensSums(
        own=tuple(sums() for _ in range(models)),
        across=PairSums(distance=zeros(by), divergence=zeros(groups)) if across else None,
        lens_error=zeros(()),
    )


def lens_step(
    lenses: tuple[Lens, ...],
    sums: LensSums,
    x: tuple[Array, ...],
    batch: TokenBatch,
    *,
    top_k: int | None,
    groups: int,
    lasts: tuple[int, ...],
    terminal: Terminal = "third",
    shards: Shards | None = None,
    backend: str | None = None,
) -> LensSums:
    """Adds the token distributions at the measured positions of a batch to the sums. A pure function.

    Args:
        lenses: of the model and, with a reference, of the reference.
        sums: the state.
        x: for each lens [D + 1, M, d] from `forward_step`.
        batch: the batch of `x`.
        top_k: as in `lens_stats`.
        groups: number of groups of prompts.
        lasts: for each K, steps are also summed over the last K tokens of each sequence only.
        terminal: as in `terminal_block`.
        shards: shardings on a mesh, if there are several devices.
        backend: as in `lens_stats`.
    """
    boundaries = x[0].shape[0]
    within = tuple(pairs_of(boundaries, model, terminal) for model in range(len(sums.own)))
    pairs, divergences = sum(within, ()), ()
    if sums.across is not None:
        pairs, divergences = (*pairs, Pair(0, boundaries, boundaries)), ((boundaries - 1, 2 * boundaries - 1),)
    full = any(part.dtype == jnp.float32 for part in x)
    with jax.default_matmul_precision("highest" if full else "default"):
        if shards is None:
            count = jnp.sum(batch.measured_weight > 0, dtype=jnp.int32)
            stats = lens_stats(lenses, x, pairs, divergences, top_k, count, backend=backend)
        else:

            def part(lenses: tuple[Lens, ...], x: tuple[Array, ...], weight: Array) -> LensStats:
                count = jnp.max(jnp.where(weight > 0, jnp.arange(1, len(weight) + 1, dtype=jnp.int32), 0))
                return lens_stats(lenses, x, pairs, divergences, top_k, count, shards.vocabulary, backend)

            stats = shards.by_vocabulary(part)(lenses, x, batch.measured_weight)
        by_group = batch.measured_weight[:, None] * jax.nn.one_hot(batch.measured_group, groups, dtype=jnp.float32)
        ends = pick(batch.lengths - batch.positions, batch.measured, shards)  # 1 at the last token of a sequence
        by_last = jnp.stack([by_group * (ends <= k)[:, None].astype(jnp.float32) for k in lasts] or [by_group])
        by_last = by_last[: len(lasts)]
        own, lens_error = [], sums.lens_error
        for model, so_far in enumerate(sums.own):
            at = slice(model * boundaries, (model + 1) * boundaries)
            distances = stats.distances[3 * model : 3 * model + 3]
            added = group_sums(distances, stats.entropy[at], by_group, by_last)
            own.append(jax.tree.map(jnp.add, so_far, added))
            # The normaliser of the chunked pass against the whole vocabulary at once, at one position of the batch.
            logits = lenses[model].read(x[model][-1, 0])
            off = jnp.abs(jax.nn.softmax(logits) - jnp.exp(logits - stats.log_normaliser[at][-1, 0]))
            lens_error = jnp.maximum(lens_error, jnp.where(batch.measured_weight[0] > 0, jnp.max(off), 0.0))
    across = sums.across
    if across is not None:
        exact = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
        across = PairSums(
            distance=across.distance + exact("lm,mg->gl", stats.distances[-1], by_group),
            divergence=across.divergence + exact("m,mg->g", stats.divergences[0], by_group),
        )
    sums = LensSums(own=tuple(own), across=across, lens_error=lens_error)
    if shards is not None:
        sums = jax.lax.with_sharding_constraint(sums, jax.tree.map(lambda _: shards.whole, sums))
    return sums


def position_steps(
    lenses: tuple[Lens, ...],
    x: tuple[Array, ...],
    batch: TokenBatch,
    *,
    top_k: int | None,
    shards: Shards | None = None,
    backend: str | None = None,
) -> tuple[Array, ...]:
    """Transport at each measured position: for each model float32 [D, M] radians. A pure function.

    Args:
        lenses, x, batch, top_k, shards, backend: as in `lens_step`.
    """
    boundaries = x[0].shape[0]
    pairs = tuple(pairs_of(boundaries, model)[0] for model in range(len(lenses)))

    def part(lenses: tuple[Lens, ...], x: tuple[Array, ...], weight: Array) -> tuple[Array, ...]:
        over = () if shards is None else shards.vocabulary
        return lens_stats(lenses, x, pairs, (), top_k, None, over, backend).distances

    full = any(each.dtype == jnp.float32 for each in x)
    with jax.default_matmul_precision("highest" if full else "default"):
        if shards is None:
            return part(lenses, x, batch.measured_weight)
        return shards.by_vocabulary(part)(lenses, x, batch.measured_weight)


def group_sums(distances: tuple[Array, ...], entropy: Array, by_group: Array, by_last: Array) -> TransportSums:
    """Sums over the measured positions of each group.

    Args:
        distances: of the pairs of `pairs_of`.
        entropy: [D + 1, M].
        by_group: [M, G] 1 for the group of each position.
        by_last: [K, M, G] `by_group` restricted to the last tokens of sequences.
    """
    step, chord, terminal = distances  # [D, M], [D - 1, M], [1, M]
    angle, counts = turning_angle(step[:-1], step[1:], chord)  # [D - 1, M]
    exact = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

    def total(values: Array, before: int = 0, behind: int = 0) -> Array:  # [l, M] -> [G, before + l + behind]
        return exact("lm,mg->gl", jnp.pad(values, ((before, behind), (0, 0))), by_group)

    return TransportSums(
        positions=jnp.sum(by_group, axis=0),
        step=total(step, before=1),
        entropy=total(entropy),
        turning=total(angle, before=1, behind=1),
        turned=total(counts.astype(jnp.float32), before=1, behind=1),
        direct=total(terminal)[:, 0],
        last_positions=jnp.sum(by_last, axis=1),
        last_step=exact("lm,kmg->kgl", jnp.pad(step, ((1, 0), (0, 0))), by_last),
    )


def over_groups(sums: TransportSums, drop: int | None = None) -> TransportSums:
    """The sums over all groups, or over all but `drop`."""
    some = np.ones(len(sums.positions), bool) if drop is None else np.arange(len(sums.positions)) != drop

    def total(x: Any, axis: int = 0) -> Any:
        return np.compress(some, np.asarray(x), axis).sum(axis=axis)

    return TransportSums(
        positions=total(sums.positions),
        step=total(sums.step),
        entropy=total(sums.entropy),
        turning=total(sums.turning),
        turned=total(sums.turned),
        direct=total(sums.direct),
        last_positions=total(sums.last_positions, axis=1),
        last_step=total(sums.last_step, axis=1),
    )
