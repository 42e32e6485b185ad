"""Transport: how far the logit-lens distribution moves from boundary to boundary.

`L = 2 arccos BC(p, q)`, BC = sum_v sqrt(p_v q_v): the Fisher-Rao distance, in radians, in [0, pi].

The vocabulary is walked in chunks. With t = exp(z / 2 - m / 2) for logits z and a running maximum m, each chunk adds to
A = sum t^2 and, for a pair of boundaries, to D = sum (t - t')^2; when the maxima grow and t, t' shrink by factors a, b,
D becomes `a b D + (a - b)(a A - b A')`, which subtracts nothing large. At the end
`1 - BC = (D - (sqrt A - sqrt A')^2) / (2 sqrt(A A'))`, so small distances keep their digits where arccos loses them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

# Logits that exist at a time, all boundaries x a tile of positions x a chunk of vocabulary: about what a CPU core's
# second-level cache holds on a CPU, enough to fill the machine elsewhere.
TILE_BYTES = {"cpu": 2**21}
TILE_BYTES_ELSEWHERE = 2**27
LEAST = -1e30  # a masked logit: finite, so that its product with a mass of 0 is 0
CHUNK = 1024  # least tokens in a chunk of vocabulary, where the tile allows


class Pair(NamedTuple):
    """Two equally long runs of boundaries, compared one by one: `first[i]` with `first[i] + offset`."""

    start: int
    stop: int
    offset: int

    def slices(self) -> tuple[slice, slice]:
        """The two runs."""
        return slice(self.start, self.stop), slice(self.start + self.offset, self.stop + self.offset)


class LensStats(NamedTuple):
    """What one pass over the vocabulary leaves, at M positions of D + 1 boundaries. float32."""

    distances: tuple[Array, ...]  # for each Pair, [stop - start, M] radians
    entropy: Array  # [D + 1, M] nats
    log_normaliser: Array  # [D + 1, M] log sum exp of the logits


class _Running(NamedTuple):
    top: Array  # [L, M] running maximum of the logits
    mass: Array  # [L, M] A
    moment: Array  # [L, M] sum t^2 z
    gaps: tuple[Array, ...]  # D for each pair
    best: Array  # [L, M, K] largest logits, K = 0 without top_k
    tokens: Array  # [L, M, K] which tokens have them


@dataclass(frozen=True)
class Lens:
    """How logits are read from a normed residual: `cap(x @ unembed.T + bias) / temperature`."""

    unembed: Array  # [V, d]
    bias: Array | None  # [V]
    cap: float | None
    temperature: float

    def logits(self, scores: Array, bias: Array | float) -> Array:
        """From the product with the unembedding, float32."""
        z = scores + bias
        return (z if self.cap is None else self.cap * jnp.tanh(z / self.cap)) / self.temperature

    def read(self, x: Array) -> Array:
        """float32 [..., V] from x [..., d], the whole vocabulary at once."""
        scores = jnp.einsum("...d,vd->...v", x, self.unembed, preferred_element_type=jnp.float32)
        return self.logits(scores, 0.0 if self.bias is None else self.bias.astype(jnp.float32))


def lens_stats(
    lens: Lens, x: Array, pairs: tuple[Pair, ...], top_k: int | None = None, count: Array | None = None
) -> LensStats:
    """Distances, entropies and normalisers of the distributions that the lens reads.

    Args:
        lens: the model's unembedding.
        x: [L, M, d] after the final norm, at L boundaries.
        pairs: which boundaries to compare.
        top_k: tell only the `top_k` likeliest tokens of either distribution apart and count the rest as one, which
            gives a lower bound of each distance; None is exact.
        count: how many of the M positions matter, the first ones; work on the rest is saved, and what is returned for
            them has no meaning. None: all.
    """
    boundaries, positions, _ = x.shape
    top_k = None if top_k is None else min(top_k, lens.unembed.shape[0])
    budget = TILE_BYTES.get(jax.default_backend(), TILE_BYTES_ELSEWHERE) // (4 * boundaries)  # positions x tokens
    tile = min(positions, max(8, budget // CHUNK))
    tiles = -(-positions // tile)
    tile = -(-positions // tiles)  # even tiles
    chunks = -(-lens.unembed.shape[0] // max(128, budget // tile))
    x = jnp.pad(x, ((0, 0), (0, tiles * tile - positions), (0, 0)))

    def one_tile(part: Array) -> LensStats:  # [L, tile, d]
        return _finish(_walk(lens, part, pairs, chunks, top_k or 0), lens, part, pairs, top_k)

    def step(number: Array, found: LensStats) -> LensStats:
        begin = number * tile
        stats = one_tile(jax.lax.dynamic_slice_in_dim(x, begin, tile, axis=1))
        return jax.tree.map(lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, begin, axis=1), found, stats)

    shapes = jax.eval_shape(one_tile, x[:, :tile])
    empty = jax.tree.map(lambda a: jnp.zeros((a.shape[0], tiles * tile), a.dtype), shapes)
    needed = tiles if count is None else jnp.minimum(-(-count // tile), tiles)
    found = jax.lax.fori_loop(0, needed, step, empty)
    return jax.tree.map(lambda a: a[:, :positions], found)


def _walk(lens: Lens, x: Array, pairs: tuple[Pair, ...], chunks: int, top_k: int) -> _Running:
    """The vocabulary in `chunks` parts, for one tile x [L, tile, d]."""
    vocab, shape = lens.unembed.shape[0], x.shape[:2]
    chunk = -(-vocab // chunks)

    def step(number: Array, run: _Running) -> _Running:
        begin = number * chunk
        start = jnp.minimum(begin, vocab - chunk)  # the last chunk reaches back and masks what was seen
        rows = jax.lax.dynamic_slice_in_dim(lens.unembed, start, chunk)
        bias = 0.0 if lens.bias is None else jax.lax.dynamic_slice_in_dim(lens.bias, start, chunk).astype(jnp.float32)
        z = lens.logits(jnp.einsum("lmd,vd->lmv", x, rows, preferred_element_type=jnp.float32), bias)
        if vocab % chunk:
            z = jnp.where(start + jnp.arange(chunk, dtype=jnp.int32) >= begin, z, LEAST)
        run = _add(run, z, pairs)
        if top_k:
            best, tokens = merge_top(run.best, run.tokens, z, start)
            run = run._replace(best=best, tokens=tokens)
        return run

    zeros = jnp.zeros(shape, jnp.float32)
    empty = _Running(
        zeros - jnp.inf,
        zeros,
        zeros,
        tuple(jnp.zeros((p.stop - p.start, shape[1]), jnp.float32) for p in pairs),
        jnp.full((*shape, top_k), -jnp.inf, jnp.float32),
        jnp.zeros((*shape, top_k), jnp.int32),
    )
    return jax.lax.fori_loop(0, chunks, step, empty)


def _add(run: _Running, z: Array, pairs: tuple[Pair, ...]) -> _Running:
    """One chunk of logits z [L, M, v] into the running sums."""
    top = jnp.maximum(run.top, jnp.max(z, axis=-1))
    # The barriers keep XLA from computing exp again for every sum that reads it, and from copying slices.
    t = jax.lax.optimization_barrier(jnp.exp((z - top[..., None]) / 2))
    shrink = jnp.exp((run.top - top) / 2)  # 0 before anything was seen
    square = t * t
    gaps = []
    for pair, gap in zip(pairs, run.gaps, strict=True):
        here, there = pair.slices()
        a, b, mass, other = shrink[here], shrink[there], run.mass[here], run.mass[there]
        rescaled = a * b * gap + (a - b) * (a * mass - b * other)
        parting = jax.lax.optimization_barrier(jnp.square(t[here] - t[there]))
        gaps.append(rescaled + jnp.sum(parting, axis=-1))
    return run._replace(
        top=top,
        mass=shrink**2 * run.mass + jnp.sum(square, axis=-1),
        moment=shrink**2 * run.moment + jnp.sum(square * z, axis=-1),
        gaps=tuple(gaps),
    )


def _finish(run: _Running, lens: Lens, x: Array, pairs: tuple[Pair, ...], top_k: int | None) -> LensStats:
    log_mass = jnp.log(run.mass)
    log_normaliser = run.top + log_mass
    distances = []
    for pair, gap in zip(pairs, run.gaps, strict=True):
        here, there = pair.slices()
        exact = fisher_rao(run.mass[here], run.mass[there], gap)
        if top_k is None:
            distances.append(exact)
            continue

        def log_p(at: slice, tokens: Array) -> Array:
            """Log-probabilities [l, M, K] of `tokens` at the boundaries `at`."""
            bias = 0.0 if lens.bias is None else lens.bias[tokens].astype(jnp.float32)
            scores = jnp.einsum("lmd,lmkd->lmk", x[at], lens.unembed[tokens], preferred_element_type=jnp.float32)
            return lens.logits(scores, bias) - log_normaliser[at][..., None]

        p, q = run.tokens[here], run.tokens[there]
        coarse = coarse_distance(log_p(here, p), log_p(there, q), log_p(here, q), log_p(there, p), p, q)
        distances.append(jnp.minimum(coarse, exact))  # where hardly anything is left over, its rounding shows
    return LensStats(tuple(distances), log_normaliser - run.moment / run.mass, log_normaliser)


def fisher_rao(mass: Array, other: Array, gap: Array) -> Array:
    """Radians between two distributions from A, A' and D (see the module), to better than 1e-4 over [0, pi]."""
    lost = (gap - jnp.square(jnp.sqrt(mass) - jnp.sqrt(other))) / (2 * jnp.sqrt(mass) * jnp.sqrt(other))
    lost = jnp.clip(lost, 0.0, 1.0)  # 1 - BC = 2 sin^2(L / 4)
    return 4 * jnp.arcsin(jnp.sqrt(lost / 2))


def turning_angle(before: Array, after: Array, across: Array, least: float = 1e-3) -> tuple[Array, Array]:
    """The angle in [0, pi] by which a geodesic path p -> q -> r turns at q, and where it counts.

    Args:
        before, after, across: Fisher-Rao distances pq, qr, pr, radians. On the unit sphere of square roots they are
            twice the sides of a triangle.
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


def merge_top(values: Array, tokens: Array, z: Array, first: Array) -> tuple[Array, Array]:
    """The K largest of `values` [..., K] and a chunk of logits z [..., v], with their tokens.

    `tokens` [..., K] are those of `values`; the chunk's are `first`, `first + 1`, ...
    """
    count = values.shape[-1]
    here = jnp.broadcast_to(first + jnp.arange(z.shape[-1], dtype=jnp.int32), z.shape)
    every, names = jnp.concatenate([values, z], -1), jnp.concatenate([tokens, here], -1)
    best, place = jax.lax.top_k(every, count)
    return best, jnp.take_along_axis(names, place, axis=-1)


def coarse_distance(
    log_p: Array, log_q: Array, log_p_at_q: Array, log_q_at_p: Array, p_tokens: Array, q_tokens: Array
) -> Array:
    """Radians between p and q when only the union of their K likeliest tokens is told apart; all arguments [..., K].

    Args:
        log_p, log_q: log-probabilities of each one's own likeliest tokens; log_p_at_q, log_q_at_p: of the other's.
        p_tokens, q_tokens: which tokens those are.
    """
    new = ~jnp.any(q_tokens[..., :, None] == p_tokens[..., None, :], axis=-1)  # of q's, not among p's
    p = jnp.exp(jnp.concatenate([log_p, jnp.where(new, log_p_at_q, -jnp.inf)], -1))
    q = jnp.exp(jnp.concatenate([log_q_at_p, jnp.where(new, log_q, -jnp.inf)], -1))
    rest_p, rest_q = (jnp.maximum(1 - jnp.sum(x, axis=-1), 0.0) for x in (p, q))
    squared = jnp.sum(jnp.square(jnp.sqrt(p) - jnp.sqrt(q)), axis=-1)
    squared = squared + jnp.square(jnp.sqrt(rest_p) - jnp.sqrt(rest_q))
    return 4 * jnp.arcsin(jnp.minimum(jnp.sqrt(squared) / 2, 1.0))  # the chord of an angle L / 2 is 2 sin(L / 4)
