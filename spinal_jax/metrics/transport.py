"""Transport: how far the logit-lens distribution moves from boundary to boundary.

`L = 2 arccos BC(p, q)`, BC = sum_v sqrt(p_v q_v): the Fisher-Rao distance, in radians, in [0, pi].

The vocabulary is walked in chunks. With t = exp(z / 2 - m / 2) for logits z and a running maximum m, each chunk adds to
A = sum t^2 and, for a pair of boundaries, to D = sum (t - t')^2; when the maxima grow and t, t' shrink by factors a, b,
D becomes `a b D + (a - b)(a A - b A')`, which subtracts nothing large. At the end
`1 - BC = (D - (sqrt A - sqrt A')^2) / (2 sqrt(A A'))`, so small distances keep their digits where arccos loses them.

Several models that share a vocabulary are read in one walk: each chunk has the logits of all of them side by side, so
distances between models cost no matmul of their own. Their boundaries are numbered through: 0..D are the first
model's, D + 1..2D + 1 the second's.

Devices that share the vocabulary each walk through their own rows of it; the sums of all are then one more such step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from spinal_jax.parallel.device_defaults import logit_tile_bytes

LEAST = -1e30  # a masked logit: finite, so that its product with a mass of 0 is 0
MIN_CHUNK_TOKENS = 1024  # least tokens in a chunk of vocabulary, where the tile allows


class Pair(NamedTuple):
    """Two equally long runs of boundaries, each within one model, compared one by one: `i` with `i + offset`."""

    start: int
    stop: int
    offset: int

    def slices(self) -> tuple[slice, slice]:
        """The two runs."""
        return slice(self.start, self.stop), slice(self.start + self.offset, self.stop + self.offset)


class LensStats(NamedTuple):
    """What one pass over the vocabulary leaves, at M positions of the D + 1 boundaries of each model. float32."""

    distances: tuple[Array, ...]  # for each Pair, [stop - start, M] radians
    divergences: Array  # [n, M] nats, KL(p || q) of the pairs of boundaries asked for
    entropy: Array  # [models (D + 1), M] nats
    log_normaliser: Array  # [models (D + 1), M] log sum exp of the logits


class _Running(NamedTuple):
    """Sums over what was seen of the vocabulary; tuples have an entry for each model unless said otherwise."""

    top: tuple[Array, ...]  # [L, M] running maximum of the logits
    mass: tuple[Array, ...]  # [L, M] A
    moment: tuple[Array, ...]  # [L, M] sum t^2 z
    gaps: tuple[Array, ...]  # D for each pair
    leaning: tuple[Array, ...]  # [M] sum t^2 (z - z') for each divergence
    best: tuple[Array, ...]  # [L, M, K] largest logits, K = 0 without top_k
    tokens: tuple[Array, ...]  # [L, M, K] which tokens have them


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["unembed", "bias", "known"],
    meta_fields=["cap", "temperature", "size"],
)
@dataclass(frozen=True)
class Lens:
    """How logits are read from a normed residual: `cap(x @ unembed.T + bias) / temperature`."""

    unembed: Array  # [V, d]
    bias: Array | None  # [V]
    cap: float | None
    temperature: float
    size: int | None = None  # how many of the rows are tokens, the rest being padding; None: all
    known: Array | None = None  # bool [V] which rows are tokens, where those that are not lie between others; None: all

    @property
    def vocab_size(self) -> int:
        """V, of all devices together."""
        return self.unembed.shape[0] if self.size is None else self.size

    def logits(self, scores: Array, bias: Array | float) -> Array:
        """From the product with the unembedding, float32."""
        z = scores + bias
        return (z if self.cap is None else self.cap * jnp.tanh(z / self.cap)) / self.temperature

    def read(self, x: Array) -> Array:
        """float32 [..., V] from x [..., d], the whole vocabulary at once."""
        scores = jnp.einsum("...d,vd->...v", x, self.unembed, preferred_element_type=jnp.float32)
        z = self.logits(scores, 0.0 if self.bias is None else self.bias.astype(jnp.float32))
        z = z if self.known is None else jnp.where(self.known, z, LEAST)
        return z[..., : self.vocab_size]

    def over(self, ids: np.ndarray, rows: int) -> Lens:
        """The lens over some tokens alone: the distribution over them, renormalised.

        Args:
            ids: int [n], ascending and below `rows`.
            rows: how many rows to keep, so that models with more and with fewer are read in one walk; V copies nothing.
        """
        cut = self
        if rows < self.unembed.shape[0]:
            cut = replace(self, unembed=self.unembed[:rows], bias=None if self.bias is None else self.bias[:rows])
        size = int(ids[-1]) + 1
        if len(ids) == size:
            return replace(cut, size=size)
        known = np.zeros(rows, bool)
        known[ids] = True
        return replace(cut, size=size, known=jnp.asarray(known))


def lens_stats(
    lenses: tuple[Lens, ...],
    x: tuple[Array, ...],
    pairs: tuple[Pair, ...],
    divergences: tuple[tuple[int, int], ...] = (),
    top_k: int | None = None,
    count: Array | None = None,
    over: tuple[str, ...] = (),
    backend: str | None = None,
) -> LensStats:
    """Distances, entropies and normalisers of the distributions that the lenses read.

    Args:
        lenses: the unembedding of each model, all of one vocabulary.
        x: for each, [L, M, d] after the final norm, at L boundaries of the same M positions.
        pairs: which boundaries to compare.
        divergences: between which boundaries to take the Kullback-Leibler divergence KL(p || q).
        top_k: tell only the `top_k` likeliest tokens of either distribution apart and count the rest as one, which
            gives a lower bound of each distance; None is exact. Divergences are exact either way.
        count: how many of the M positions matter, the first ones; work on the rest is saved, and what is returned for
            them has no meaning. None: all.
        over: axes of a `jax.shard_map` along which the lenses' rows are split; what is returned is then of all rows.
        backend: the kind of device that this is for, which sizes the tiles; None: JAX's default.
    """
    boundaries, positions, _ = x[0].shape
    vocab = lenses[0].unembed.shape[0]  # of this device
    top_k = None if top_k is None else min(top_k, lenses[0].vocab_size)
    budget = logit_tile_bytes(backend or jax.default_backend())
    budget //= 4 * boundaries * len(lenses)  # positions x tokens
    tile = min(positions, max(8, budget // MIN_CHUNK_TOKENS))
    tiles = -(-positions // tile)
    tile = -(-positions // tiles)  # even tiles
    chunks = _even_chunks(vocab, -(-vocab // max(128, budget // tile)))
    x = tuple(jnp.pad(part, ((0, 0), (0, tiles * tile - positions), (0, 0))) for part in x)

    def one_tile(part: tuple[Array, ...]) -> LensStats:  # [L, tile, d] each
        run = _walk(lenses, part, pairs, divergences, chunks, top_k or 0, over)
        if over:
            run = _join(run, pairs, divergences, over)
        return _finish(run, lenses, part, pairs, divergences, top_k, over)

    def step(number: Array, found: LensStats) -> LensStats:
        begin = number * tile
        stats = one_tile(tuple(jax.lax.dynamic_slice_in_dim(part, begin, tile, axis=1) for part in x))
        return jax.tree.map(lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, begin, axis=1), found, stats)

    shapes = jax.eval_shape(one_tile, tuple(part[:, :tile] for part in x))
    empty = jax.tree.map(lambda a: jnp.zeros((a.shape[0], tiles * tile), a.dtype), shapes)
    needed = tiles if count is None else jnp.minimum(-(-count // tile), tiles)
    found = jax.lax.fori_loop(0, needed, step, empty)
    return jax.tree.map(lambda a: a[:, :positions], found)


def _even_chunks(vocab: int, least: int) -> int:
    """How many chunks, `least` or up to a quarter more where they then divide the vocabulary and none needs a mask."""
    return next((count for count in range(least, least + least // 4 + 1) if vocab % count == 0), least)


def _of(models: tuple[Array, ...], at: slice) -> Array:
    """The boundaries `at`, numbered through, of what each model has by boundary."""
    boundaries = models[0].shape[0]
    model = min(at.start // boundaries, len(models) - 1)  # an empty run may begin behind the last
    return models[model][at.start - model * boundaries : at.stop - model * boundaries]


def _walk(
    lenses: tuple[Lens, ...],
    x: tuple[Array, ...],
    pairs: tuple[Pair, ...],
    divergences: tuple[tuple[int, int], ...],
    chunks: int,
    top_k: int,
    over: tuple[str, ...],
) -> _Running:
    """This device's rows of the vocabulary in `chunks` parts, for one tile x [L, tile, d] of each model."""
    vocab, shape = lenses[0].unembed.shape[0], x[0].shape[:2]
    first = _first_token(lenses[0], over)
    chunk = -(-vocab // chunks)

    def step(number: Array, run: _Running) -> _Running:
        begin = number * chunk
        start = jnp.minimum(begin, vocab - chunk)  # the last chunk reaches back and masks what was seen

        def logits(lens: Lens, x: Array) -> Array:
            rows = jax.lax.dynamic_slice_in_dim(lens.unembed, start, chunk)
            bias = (
                0.0 if lens.bias is None else jax.lax.dynamic_slice_in_dim(lens.bias, start, chunk).astype(jnp.float32)
            )
            z = lens.logits(jnp.einsum("lmd,vd->lmv", x, rows, preferred_element_type=jnp.float32), bias)
            if vocab % chunk:
                z = jnp.where(start + jnp.arange(chunk, dtype=jnp.int32) >= begin, z, LEAST)
            if lens.known is not None:
                z = jnp.where(jax.lax.dynamic_slice_in_dim(lens.known, start, chunk), z, LEAST)
            if lens.size is not None and (over or lens.size < vocab):
                z = jnp.where(first + start + jnp.arange(chunk, dtype=jnp.int32) < lens.size, z, LEAST)
            return z

        z = tuple(map(logits, lenses, x))
        run = _add(run, z, pairs, divergences)
        if top_k:
            best = [merge_top(b, n, part, first + start) for b, n, part in zip(run.best, run.tokens, z, strict=True)]
            run = run._replace(best=tuple(b for b, _ in best), tokens=tuple(t for _, t in best))
        return run

    zeros = jnp.zeros(shape, jnp.float32)
    models = len(lenses)
    empty = _Running(
        (zeros - jnp.inf,) * models,
        (zeros,) * models,
        (zeros,) * models,
        tuple(jnp.zeros((p.stop - p.start, shape[1]), jnp.float32) for p in pairs),
        (zeros[0],) * len(divergences),
        (jnp.full((*shape, top_k), -jnp.inf, jnp.float32),) * models,
        (jnp.zeros((*shape, top_k), jnp.int32),) * models,
    )
    return jax.lax.fori_loop(0, chunks, step, empty)


def _add(
    run: _Running, z: tuple[Array, ...], pairs: tuple[Pair, ...], divergences: tuple[tuple[int, int], ...]
) -> _Running:
    """One chunk of logits z [L, M, v] of each model into the running sums."""
    top = tuple(jnp.maximum(before, jnp.max(part, axis=-1)) for before, part in zip(run.top, z, strict=True))
    # The barriers keep XLA from computing exp again for every sum that reads it, and from copying slices.
    t = tuple(
        jax.lax.optimization_barrier(jnp.exp((part - new[..., None]) / 2)) for part, new in zip(z, top, strict=True)
    )
    shrink = tuple(
        jnp.exp((old - new) / 2) for old, new in zip(run.top, top, strict=True)
    )  # 0 before anything was seen
    square = tuple(part * part for part in t)
    gaps = []
    for pair, gap in zip(pairs, run.gaps, strict=True):
        here, there = pair.slices()
        a, b, mass, other = _of(shrink, here), _of(shrink, there), _of(run.mass, here), _of(run.mass, there)
        rescaled = a * b * gap + (a - b) * (a * mass - b * other)
        parting = jax.lax.optimization_barrier(jnp.square(_of(t, here) - _of(t, there)))
        gaps.append(rescaled + jnp.sum(parting, axis=-1))
    leaning = []
    for (here, there), sum_so_far in zip(divergences, run.leaning, strict=True):
        p, q = slice(here, here + 1), slice(there, there + 1)
        more = jnp.sum(_of(square, p) * (_of(z, p) - _of(z, q)), axis=-1)
        leaning.append((_of(shrink, p) ** 2 * sum_so_far + more)[0])
    return run._replace(
        top=top,
        mass=tuple(a**2 * mass + jnp.sum(s, axis=-1) for a, mass, s in zip(shrink, run.mass, square, strict=True)),
        moment=tuple(
            a**2 * moment + jnp.sum(s * part, axis=-1)
            for a, moment, s, part in zip(shrink, run.moment, square, z, strict=True)
        ),
        gaps=tuple(gaps),
        leaning=tuple(leaning),
    )


def _first_token(lens: Lens, over: tuple[str, ...]) -> Array | int:
    """Which token this device's first row is."""
    return jax.lax.axis_index(over) * lens.unembed.shape[0] if over else 0


def _join(
    run: _Running, pairs: tuple[Pair, ...], divergences: tuple[tuple[int, int], ...], over: tuple[str, ...]
) -> _Running:
    """The running sums of the whole vocabulary from those of each device along `over`."""
    top = tuple(jax.lax.pmax(part, over) for part in run.top)
    shrink = tuple(jnp.exp((old - new) / 2) for old, new in zip(run.top, top, strict=True))
    gaps = []
    for pair, gap in zip(pairs, run.gaps, strict=True):
        here, there = pair.slices()
        a, b, mass, other = _of(shrink, here), _of(shrink, there), _of(run.mass, here), _of(run.mass, there)
        gaps.append(a * b * gap + (a - b) * (a * mass - b * other))
    leaning = [
        _of(shrink, slice(here, here + 1))[0] ** 2 * part
        for (here, _), part in zip(divergences, run.leaning, strict=True)
    ]
    best, tokens = run.best, run.tokens
    if best[0].shape[-1]:
        every = tuple(jax.lax.all_gather(part, over, axis=-1, tiled=True) for part in best)
        names = tuple(jax.lax.all_gather(part, over, axis=-1, tiled=True) for part in tokens)
        found = [jax.lax.top_k(part, best[0].shape[-1]) for part in every]
        best = tuple(values for values, _ in found)
        tokens = tuple(jnp.take_along_axis(n, place, axis=-1) for n, (_, place) in zip(names, found, strict=True))
    total = partial(jax.lax.psum, axis_name=over)
    return _Running(
        top,
        tuple(total(a**2 * mass) for a, mass in zip(shrink, run.mass, strict=True)),
        tuple(total(a**2 * moment) for a, moment in zip(shrink, run.moment, strict=True)),
        tuple(map(total, gaps)),
        tuple(map(total, leaning)),
        best,
        tokens,
    )


def _finish(
    run: _Running,
    lenses: tuple[Lens, ...],
    x: tuple[Array, ...],
    pairs: tuple[Pair, ...],
    divergences: tuple[tuple[int, int], ...],
    top_k: int | None,
    over: tuple[str, ...],
) -> LensStats:
    boundaries = x[0].shape[0]
    mass, top = jnp.concatenate(run.mass), jnp.concatenate(run.top)
    log_normaliser = top + jnp.log(mass)
    distances = []
    for pair, gap in zip(pairs, run.gaps, strict=True):
        here, there = pair.slices()
        exact = fisher_rao(mass[here], mass[there], gap)
        if top_k is None:
            distances.append(exact)
            continue

        def log_p(at: slice, tokens: Array) -> Array:
            """Log-probabilities [l, M, K] of `tokens` at the boundaries `at`."""
            lens = lenses[at.start // boundaries]
            row = tokens - _first_token(lens, over)
            bias = 0.0 if lens.bias is None else lens.bias[row].astype(jnp.float32)
            scores = jnp.einsum("lmd,lmkd->lmk", _of(x, at), lens.unembed[row], preferred_element_type=jnp.float32)
            z = lens.logits(scores, bias)
            if over:  # one device has the row
                z = jax.lax.psum(jnp.where((row >= 0) & (row < lens.unembed.shape[0]), z, 0.0), over)
            return z - log_normaliser[at][..., None]

        p, q = _of(run.tokens, here), _of(run.tokens, there)
        coarse = coarse_distance(log_p(here, p), log_p(there, q), log_p(here, q), log_p(there, p), p, q)
        distances.append(jnp.minimum(coarse, exact))  # where hardly anything is left over, its rounding shows
    divergent = [
        leaning / mass[p] - (top[p] - top[q] + jnp.log(mass[p] / mass[q]))  # equal distributions leave exactly 0
        for (p, q), leaning in zip(divergences, run.leaning, strict=True)
    ]
    return LensStats(
        tuple(distances),
        jnp.maximum(jnp.stack(divergent), 0.0) if divergent else jnp.zeros((0, *mass.shape[1:]), jnp.float32),
        log_normaliser - jnp.concatenate(run.moment) / mass,
        log_normaliser,
    )


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
