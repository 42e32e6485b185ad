"""Transport: distance between the logit-lens distributions of adjacent boundaries.

`L = 2 arccos BC(p, q)`, BC = sum_v sqrt(p_v q_v): the Fisher-Rao distance, in radians, in [0, pi].

The vocabulary is processed in chunks. With t = exp(z / 2 - m / 2) for logits z and a running maximum m, each chunk adds
to A = sum t^2 and, for a pair of boundaries, to D = sum (t - t')^2. When the maxima grow, t and t' shrink by factors a
and b, and D becomes `a b D + (a - b)(a A - b A')`, without cancellation of large numbers. Finally
`1 - BC = (D - (sqrt A - sqrt A')^2) / (2 sqrt(A A'))`. Small distances stay accurate where arccos is ill-conditioned.

Several models with one vocabulary are processed together: each chunk holds the logits of all of them, so distances
between models need no extra matmul. Boundaries are numbered consecutively: 0..D is the first model, D + 1..2D + 1
the second.

If devices split the vocabulary, each processes its own rows, and the running sums are merged by the same recurrence.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from spinal_jax.metrics.lens import MASKED_LOGIT, Lens
from spinal_jax.parallel.device_defaults import logit_tile_bytes

MIN_CHUNK_TOKENS = 1024  # tokens in a chunk of the vocabulary, if the tile allows


class Pair(NamedTuple):
    """Two ranges of boundaries of equal length, each within one model; boundary `i` is compared with `i + offset`."""

    start: int
    stop: int
    offset: int

    def slices(self) -> tuple[slice, slice]:
        """The two ranges."""
        return slice(self.start, self.stop), slice(self.start + self.offset, self.stop + self.offset)


class LensStats(NamedTuple):
    """Results of one pass over the vocabulary, at M positions of the D + 1 boundaries of each model, float32."""

    distances: tuple[Array, ...]  # for each `Pair`: [stop - start, M] radians
    divergences: Array  # [n, M] nats, KL(p || q) of the requested pairs of boundaries
    entropy: Array  # [models (D + 1), M] nats
    log_normaliser: Array  # [models (D + 1), M] log-sum-exp of the logits


class _Running(NamedTuple):
    """Running sums over the vocabulary; tuples have an entry for each model unless noted otherwise."""

    top: tuple[Array, ...]  # [L, M] running maximum of the logits
    mass: tuple[Array, ...]  # [L, M] A
    moment: tuple[Array, ...]  # [L, M] sum t^2 z
    squared_chords: tuple[Array, ...]  # D for each pair
    log_ratio_sums: tuple[Array, ...]  # [M] sum t^2 (z - z') for each divergence
    best: tuple[Array, ...]  # [L, M, K] largest logits, K = 0 without top_k
    tokens: tuple[Array, ...]  # [L, M, K] tokens of these logits


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
    """Distances, entropies and normalisers of logit-lens distributions.

    Args:
        lenses: the unembedding of each model; all have the same vocabulary.
        x: for each model [L, M, d] after the final norm, at L boundaries of the same M positions.
        pairs: boundaries to compare.
        divergences: pairs of boundaries whose Kullback-Leibler divergence KL(p || q) is computed.
        top_k: merge all tokens but the `top_k` most likely of either distribution into one, which gives a lower bound
            of each distance; None is exact. Divergences are always exact.
        count: number of positions to process, from the first; results at later positions are undefined. None is all.
        over: mesh axes of a `jax.shard_map` that split the rows of the lenses; results cover all rows.
        backend: kind of device, which sets the tile sizes; None is JAX's default.
    """
    boundaries, positions, _ = x[0].shape
    vocab = lenses[0].unembed.shape[0]  # rows on this device
    top_k = None if top_k is None else min(top_k, lenses[0].vocab_size)
    backend = backend or jax.default_backend()
    budget = logit_tile_bytes(backend)
    budget //= 4 * boundaries * len(lenses)  # positions x tokens
    tile = min(positions, max(8, budget // MIN_CHUNK_TOKENS))
    tiles = -(-positions // tile)
    tile = -(-positions // tiles)  # tiles of equal size
    chunks = _even_chunks(vocab, -(-vocab // max(128, budget // tile)))
    x = tuple(jnp.pad(part, ((0, 0), (0, tiles * tile - positions), (0, 0))) for part in x)

    def one_tile(part: tuple[Array, ...]) -> LensStats:  # [L, tile, d] each
        run = _walk(lenses, part, pairs, divergences, chunks, top_k or 0, over, backend)
        if over:
            run = _join(run, pairs, divergences, over)
        return _finish(run, lenses, part, pairs, divergences, top_k, over)

    def step(number: Array, so_far: LensStats) -> LensStats:
        begin = number * tile
        stats = one_tile(tuple(jax.lax.dynamic_slice_in_dim(part, begin, tile, axis=1) for part in x))
        return jax.tree.map(lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, begin, axis=1), so_far, stats)

    shapes = jax.eval_shape(one_tile, tuple(part[:, :tile] for part in x))
    empty = jax.tree.map(lambda a: jnp.zeros((a.shape[0], tiles * tile), a.dtype), shapes)
    needed = tiles if count is None else jnp.minimum(-(-count // tile), tiles)
    padded = jax.lax.fori_loop(0, needed, step, empty)
    return jax.tree.map(lambda a: a[:, :positions], padded)


def _even_chunks(vocab: int, least: int) -> int:
    """Number of chunks: `least`, or up to a quarter more if these divide the vocabulary and need no mask."""
    return next((count for count in range(least, least + least // 4 + 1) if vocab % count == 0), least)


def _of(models: tuple[Array, ...], at: slice) -> Array:
    """The consecutively numbered boundaries `at` of arrays that are given for each model."""
    boundaries = models[0].shape[0]
    model = min(at.start // boundaries, len(models) - 1)  # an empty range may start after the last boundary
    return models[model][at.start - model * boundaries : at.stop - model * boundaries]


def _walk(
    lenses: tuple[Lens, ...],
    x: tuple[Array, ...],
    pairs: tuple[Pair, ...],
    divergences: tuple[tuple[int, int], ...],
    chunks: int,
    top_k: int,
    over: tuple[str, ...],
    backend: str,
) -> _Running:
    """Running sums over the rows of this device, in `chunks` parts, for one tile x [L, tile, d] of each model."""
    vocab, shape = lenses[0].unembed.shape[0], x[0].shape[:2]
    first = _first_token(lenses[0], over)
    chunk = -(-vocab // chunks)

    def step(number: Array, run: _Running) -> _Running:
        begin = number * chunk
        start = jnp.minimum(begin, vocab - chunk)  # the last chunk starts early and masks tokens of the chunk before

        def logits(lens: Lens, x: Array) -> Array:
            rows = jax.lax.dynamic_slice_in_dim(lens.unembed, start, chunk)
            bias = (
                0.0 if lens.bias is None else jax.lax.dynamic_slice_in_dim(lens.bias, start, chunk).astype(jnp.float32)
            )
            z = lens.logits(jnp.einsum("lmd,vd->lmv", x, rows, preferred_element_type=jnp.float32), bias)
            if vocab % chunk:
                z = jnp.where(start + jnp.arange(chunk, dtype=jnp.int32) >= begin, z, MASKED_LOGIT)
            if lens.known is not None:
                z = jnp.where(jax.lax.dynamic_slice_in_dim(lens.known, start, chunk), z, MASKED_LOGIT)
            if lens.size is not None and (over or lens.size < vocab):
                z = jnp.where(first + start + jnp.arange(chunk, dtype=jnp.int32) < lens.size, z, MASKED_LOGIT)
            return z

        z = tuple(map(logits, lenses, x))
        run = _add(run, z, pairs, divergences, backend)
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
    run: _Running,
    z: tuple[Array, ...],
    pairs: tuple[Pair, ...],
    divergences: tuple[tuple[int, int], ...],
    backend: str,
) -> _Running:
    """Adds one chunk of logits z [L, M, v] of each model to the running sums."""

    def once(x: Array) -> Array:
        """Stops XLA from recomputing exp in every sum that uses it, and from copying slices. On a GPU memory is the
        bottleneck, and recomputing is faster."""
        return x if backend == "gpu" else jax.lax.optimization_barrier(x)

    top = tuple(jnp.maximum(before, jnp.max(part, axis=-1)) for before, part in zip(run.top, z, strict=True))
    t = tuple(once(jnp.exp((part - new[..., None]) / 2)) for part, new in zip(z, top, strict=True))
    shrink = tuple(jnp.exp((old - new) / 2) for old, new in zip(run.top, top, strict=True))  # 0 in the first chunk
    square = tuple(part * part for part in t)
    squared_chords = []
    for pair, chord in zip(pairs, run.squared_chords, strict=True):
        here, there = pair.slices()
        a, b, mass, other = _of(shrink, here), _of(shrink, there), _of(run.mass, here), _of(run.mass, there)
        rescaled = a * b * chord + (a - b) * (a * mass - b * other)
        squares = once(jnp.square(_of(t, here) - _of(t, there)))
        squared_chords.append(rescaled + jnp.sum(squares, axis=-1))
    log_ratio_sums = []
    for (here, there), sum_so_far in zip(divergences, run.log_ratio_sums, strict=True):
        p, q = slice(here, here + 1), slice(there, there + 1)
        more = jnp.sum(_of(square, p) * (_of(z, p) - _of(z, q)), axis=-1)
        log_ratio_sums.append((_of(shrink, p) ** 2 * sum_so_far + more)[0])
    return run._replace(
        top=top,
        mass=tuple(a**2 * mass + jnp.sum(s, axis=-1) for a, mass, s in zip(shrink, run.mass, square, strict=True)),
        moment=tuple(
            a**2 * moment + jnp.sum(s * part, axis=-1)
            for a, moment, s, part in zip(shrink, run.moment, square, z, strict=True)
        ),
        squared_chords=tuple(squared_chords),
        log_ratio_sums=tuple(log_ratio_sums),
    )


def _first_token(lens: Lens, over: tuple[str, ...]) -> Array | int:
    """Token id of the first row on this device."""
    return jax.lax.axis_index(over) * lens.unembed.shape[0] if over else 0


def _join(
    run: _Running, pairs: tuple[Pair, ...], divergences: tuple[tuple[int, int], ...], over: tuple[str, ...]
) -> _Running:
    """Merges the running sums of the devices along `over` into sums over the whole vocabulary."""
    top = tuple(jax.lax.pmax(part, over) for part in run.top)
    shrink = tuple(jnp.exp((old - new) / 2) for old, new in zip(run.top, top, strict=True))
    squared_chords = []
    for pair, chord in zip(pairs, run.squared_chords, strict=True):
        here, there = pair.slices()
        a, b, mass, other = _of(shrink, here), _of(shrink, there), _of(run.mass, here), _of(run.mass, there)
        squared_chords.append(a * b * chord + (a - b) * (a * mass - b * other))
    log_ratio_sums = [
        _of(shrink, slice(here, here + 1))[0] ** 2 * part
        for (here, _), part in zip(divergences, run.log_ratio_sums, strict=True)
    ]
    best, tokens = run.best, run.tokens
    if best[0].shape[-1]:
        gathered = tuple(jax.lax.all_gather(part, over, axis=-1, tiled=True) for part in best)
        names = tuple(jax.lax.all_gather(part, over, axis=-1, tiled=True) for part in tokens)
        largest = [jax.lax.top_k(part, best[0].shape[-1]) for part in gathered]
        best = tuple(values for values, _ in largest)
        tokens = tuple(jnp.take_along_axis(n, index, axis=-1) for n, (_, index) in zip(names, largest, strict=True))
    total = partial(jax.lax.psum, axis_name=over)
    return _Running(
        top,
        tuple(total(a**2 * mass) for a, mass in zip(shrink, run.mass, strict=True)),
        tuple(total(a**2 * moment) for a, moment in zip(shrink, run.moment, strict=True)),
        tuple(map(total, squared_chords)),
        tuple(map(total, log_ratio_sums)),
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
    for pair, chord in zip(pairs, run.squared_chords, strict=True):
        here, there = pair.slices()
        exact = fisher_rao(mass[here], mass[there], chord)
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
        distances.append(jnp.minimum(coarse, exact))  # rounding may lift the bound above the exact value
    divergent = [
        log_ratio_sum / mass[p] - (top[p] - top[q] + jnp.log(mass[p] / mass[q]))  # exactly 0 for equal distributions
        for (p, q), log_ratio_sum in zip(divergences, run.log_ratio_sums, strict=True)
    ]
    return LensStats(
        tuple(distances),
        jnp.maximum(jnp.stack(divergent), 0.0) if divergent else jnp.zeros((0, *mass.shape[1:]), jnp.float32),
        log_normaliser - jnp.concatenate(run.moment) / mass,
        log_normaliser,
    )


def fisher_rao(mass: Array, other: Array, squared_chord: Array) -> Array:
    """Distance of two distributions in radians from A, A' and D (see above); error below 1e-4 over [0, pi]."""
    lost = (squared_chord - jnp.square(jnp.sqrt(mass) - jnp.sqrt(other))) / (2 * jnp.sqrt(mass) * jnp.sqrt(other))
    lost = jnp.clip(lost, 0.0, 1.0)  # 1 - BC = 2 sin^2(L / 4)
    return 4 * jnp.arcsin(jnp.sqrt(lost / 2))


def turning_angle(before: Array, after: Array, across: Array, least: float = 1e-3) -> tuple[Array, Array]:
    """The angle in [0, pi] by which a geodesic path p -> q -> r turns at q, and whether it is defined.

    Args:
        before, after, across: Fisher-Rao distances pq, qr, pr, radians. On the unit sphere of square roots they are
            twice the sides of a triangle.
        least: if a step is shorter, the angle is undefined: the second result is False and the first 0.

    Half-angle formulas avoid the cancellation of the law of cosines for short steps.
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

    `tokens` [..., K] belong to `values`; those of the chunk are `first`, `first + 1`, ...
    """
    count = values.shape[-1]
    here = jnp.broadcast_to(first + jnp.arange(z.shape[-1], dtype=jnp.int32), z.shape)
    candidates, names = jnp.concatenate([values, z], -1), jnp.concatenate([tokens, here], -1)
    best, index = jax.lax.top_k(candidates, count)
    return best, jnp.take_along_axis(names, index, axis=-1)


def coarse_distance(
    log_p: Array, log_q: Array, log_p_at_q: Array, log_q_at_p: Array, p_tokens: Array, q_tokens: Array
) -> Array:
    """Distance of p and q in radians after merging all tokens outside the union of their K most likely ones.

    Args:
        log_p, log_q: [..., K] log-probabilities of the most likely tokens of p and of q.
        log_p_at_q, log_q_at_p: [..., K] log-probabilities of the same tokens under the other distribution.
        p_tokens, q_tokens: [..., K] ids of these tokens.
    """
    new = ~jnp.any(q_tokens[..., :, None] == p_tokens[..., None, :], axis=-1)  # tokens of q that p does not have
    p = jnp.exp(jnp.concatenate([log_p, jnp.where(new, log_p_at_q, -jnp.inf)], -1))
    q = jnp.exp(jnp.concatenate([log_q_at_p, jnp.where(new, log_q, -jnp.inf)], -1))
    rest_p, rest_q = (jnp.maximum(1 - jnp.sum(x, axis=-1), 0.0) for x in (p, q))
    squared = jnp.sum(jnp.square(jnp.sqrt(p) - jnp.sqrt(q)), axis=-1)
    squared = squared + jnp.square(jnp.sqrt(rest_p) - jnp.sqrt(rest_q))
    return 4 * jnp.arcsin(jnp.minimum(jnp.sqrt(squared) / 2, 1.0))  # the chord of an angle L / 2 is 2 sin(L / 4)
