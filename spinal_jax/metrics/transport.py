"""Transport: how far the logit-lens distribution moves from boundary to boundary (METHOD section 2).

`L = 2 arccos BC(p, q)`, BC = sum_v sqrt(p_v q_v): the Fisher-Rao distance, in radians, in [0, pi].

The vocabulary is walked in chunks. With t = exp(z / 2 - m / 2) for logits z and a running maximum m, each chunk adds to
A = sum t^2 and, for a pair of boundaries, to D = sum (t - t')^2; when the maxima grow and t, t' shrink by factors a, b,
D becomes `a b D + (a - b)(a A - b A')`, which subtracts nothing large. At the end
`1 - BC = (D - (sqrt A - sqrt A')^2) / (2 sqrt(A A'))`, so small distances keep their digits where arccos loses them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

TILE_BYTES = 16 * 2**20  # logits that exist at a time: all boundaries x a tile of positions x a chunk of vocabulary


class Pair(NamedTuple):
    """Two equally long runs of boundaries, compared one by one: `first[i]` with `first[i] + offset`."""

    start: int
    stop: int
    offset: int


class LensStats(NamedTuple):
    """What one pass over the vocabulary leaves, at M positions of D + 1 boundaries. float32."""

    distances: tuple[Array, ...]  # for each Pair, [stop - start, M] radians
    entropy: Array  # [D + 1, M] nats
    log_normaliser: Array  # [D + 1, M] log sum exp of the logits


class _Running(NamedTuple):
    top: Array  # [L, M] running maximum of the logits
    mass: Array  # [L, M] A
    moment: Array  # [L, M] sum t^2 (z - top)
    gaps: tuple[Array, ...]  # D for each pair


def lens_stats(
    logits: Callable[[Array, Array], Array], x: Array, unembed: Array, bias: Array | None, pairs: tuple[Pair, ...]
) -> LensStats:
    """Distances, entropies and normalisers of the distributions that `unembed` reads from `x`.

    Args:
        logits: turns raw scores into logits: soft-cap and temperature, given (scores, bias chunk or 0).
        x: [L, M, d] after the final norm, at L boundaries.
        unembed: [V, d]; bias: [V] or None.
        pairs: which boundaries to compare.
    """
    boundaries, count, _ = x.shape
    vocab = unembed.shape[0]
    tile = max(8, min(count, TILE_BYTES // (4 * boundaries * 1024)))
    tile = -(-count // -(-count // tile))  # even tiles
    tiles = -(-count // tile)
    x = jnp.pad(x, ((0, 0), (0, tiles * tile - count), (0, 0)))
    chunk = min(vocab, max(128, TILE_BYTES // (4 * boundaries * tile)))
    chunks = -(-vocab // chunk)
    chunk = -(-vocab // chunks)

    def one_tile(x: Array) -> LensStats:  # [L, tile, d]
        def step(number: Array, run: _Running) -> _Running:
            begin = number * chunk
            start = jnp.minimum(begin, vocab - chunk)  # the last chunk reaches back and masks what was seen
            rows = jax.lax.dynamic_slice_in_dim(unembed, start, chunk)
            offset = 0.0 if bias is None else jax.lax.dynamic_slice_in_dim(bias, start, chunk)
            scores = jnp.einsum("lmd,vd->lmv", x, rows, preferred_element_type=jnp.float32)
            z = logits(scores, jnp.asarray(offset, jnp.float32))
            if vocab % chunk:
                z = jnp.where(start + jnp.arange(chunk) >= begin, z, -jnp.inf)
            return _add(run, z, pairs)

        shape = (boundaries, tile)
        empty = _Running(
            jnp.full(shape, -jnp.inf),
            jnp.zeros(shape),
            jnp.zeros(shape),
            tuple(jnp.zeros((p.stop - p.start, tile)) for p in pairs),
        )
        return _finish(jax.lax.fori_loop(0, chunks, step, empty), pairs)

    if tiles == 1:
        return one_tile(x)
    parts = jax.lax.map(one_tile, x.reshape(boundaries, tiles, tile, -1).swapaxes(0, 1))
    return jax.tree.map(lambda a: a.swapaxes(0, 1).reshape(a.shape[1], -1)[:, :count], parts)


def _add(run: _Running, z: Array, pairs: tuple[Pair, ...]) -> _Running:
    """One chunk of logits z [L, M, v] into the running sums."""
    top = jnp.maximum(run.top, jnp.max(z, axis=-1))
    shifted = z - top[..., None]
    t = jnp.exp(shifted / 2)
    shrink = jnp.exp((run.top - top) / 2)  # 0 before anything was seen
    square = t * t
    # 0 * -inf where a logit is masked: such a token has no mass and no moment.
    moment = jnp.sum(jnp.where(square > 0, square * shifted, 0.0), axis=-1)
    moved = jnp.where(run.mass > 0, run.mass * (run.top - top), 0.0)
    gaps = []
    for pair, gap in zip(pairs, run.gaps, strict=True):
        here, there = slice(pair.start, pair.stop), slice(pair.start + pair.offset, pair.stop + pair.offset)
        a, b, mass, other = shrink[here], shrink[there], run.mass[here], run.mass[there]
        rescaled = a * b * gap + (a - b) * (a * mass - b * other)
        gaps.append(rescaled + jnp.sum(jnp.square(t[here] - t[there]), axis=-1))
    return _Running(
        top,
        shrink**2 * run.mass + jnp.sum(square, axis=-1),
        shrink**2 * (run.moment + moved) + moment,
        tuple(gaps),
    )


def _finish(run: _Running, pairs: tuple[Pair, ...]) -> LensStats:
    distances = []
    for pair, gap in zip(pairs, run.gaps, strict=True):
        mass, other = run.mass[pair.start : pair.stop], run.mass[pair.start + pair.offset : pair.stop + pair.offset]
        distances.append(fisher_rao(mass, other, gap))
    log_mass = jnp.log(run.mass)
    return LensStats(tuple(distances), log_mass - run.moment / run.mass, run.top + log_mass)


def fisher_rao(mass: Array, other: Array, gap: Array) -> Array:
    """Radians between two distributions from A, A' and D (see the module), to better than 1e-4 over [0, pi]."""
    lost = (gap - jnp.square(jnp.sqrt(mass) - jnp.sqrt(other))) / (2 * jnp.sqrt(mass) * jnp.sqrt(other))
    lost = jnp.clip(lost, 0.0, 1.0)  # 1 - BC = 2 sin^2(L / 4)
    return 4 * jnp.arcsin(jnp.sqrt(lost / 2))


def turning_angle(before: Array, after: Array, across: Array, least: float = 1e-3) -> tuple[Array, Array]:
    """The angle in [0, pi] by which a geodesic path p -> q -> r turns at q, and where it counts.

    Args:
        before, after, across: Fisher-Rao distances pq, qr, pr, radians; on the unit sphere of square roots the sides of a
            triangle are half of them.
        least: steps shorter than this have no direction; there the second result is False and the first 0.

    Half-angle formulas, because the law of cosines subtracts nearly equal numbers when steps are short.
    """
    a, b, c = before / 2, after / 2, across / 2
    s = (a + b + c) / 2
    opposite = jnp.sin(jnp.maximum(s - a, 0)) * jnp.sin(jnp.maximum(s - b, 0))
    adjacent = jnp.sin(jnp.minimum(s, math.pi)) * jnp.sin(jnp.maximum(s - c, 0))
    inner = 2 * jnp.arctan2(jnp.sqrt(opposite), jnp.sqrt(adjacent))
    counts = (before >= least) & (after >= least)
    return jnp.where(counts, math.pi - inner, 0.0), counts
