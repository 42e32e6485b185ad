"""Log-probabilities of tokens from the last residual, in tiles of the vocabulary: neither the forward nor the backward
pass holds logits of the whole vocabulary.

With `z = lens(x)`, `log p(t) = z_t - log sum_v exp(z_v)` and `d log p(t) / d z = onehot(t) - p`. The forward pass runs
through the tiles with a running maximum and keeps one number a position, the log of the sum. The backward pass computes
a tile's logits again, and from them the gradients of `x` and of that tile of the unembedding. Where the unembedding is
frozen the forward pass sums `d log p(t) / d x` beside the rest, as attention sums values, and the backward pass only
multiplies it by the gradient of `log p(t)`.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from spinal_jax.metrics.lens import Lens

# Logits of a tile: about what a CPU's caches hold, enough to fill the machine elsewhere.
TILE_BYTES = {"cpu": 2**25}
TILE_BYTES_ELSEWHERE = 2**29
CHUNK_TOKENS = 128  # positions of a row at a time; chunks without any position that counts are skipped
LOWEST = -1e30  # below any logit; its difference to another is finite


class TokenScores(NamedTuple):
    """Of the distribution that predicts each token, float32 [R, T]; 0 in chunks that are skipped."""

    logp: Array  # log-probability of the token, nats; the only one that carries a gradient
    entropy: Array  # nats
    logit: Array  # mean logit over the vocabulary
    correct: Array  # 1 where the token is the likeliest


class _Tiles(NamedTuple):
    """The unembedding in K tiles of W rows; row i of tile k is token `i K + k`, so that a split of V stays one of W."""

    weight: Array  # [W, K, d]
    bias: Array | None  # [W, K] float32
    number: int  # K
    width: int  # W


class _ToTiles(NamedTuple):
    """Gradients of `_Tiles`, float32; that of an absent bias has size 0."""

    weight: Array
    bias: Array


class _Pulls(NamedTuple):
    """What the gradient of log p(t) for x is made of, [R, C, d]: `target - all / mass`."""

    target: Array  # gradient of the token's logit
    all: Array  # sum of exp(z - top) times the gradient of z


class _Running(NamedTuple):
    """Sums over the tiles so far, [R, C]."""

    top: Array  # largest logit
    mass: Array  # sum of exp(z - top)
    moment: Array  # sum of exp(z - top) (z - top)
    total: Array  # sum of z
    target: Array  # the logit of the token
    pulls: _Pulls | None  # where the gradient of x alone is wanted


def _tiles(lens: Lens, positions: int) -> _Tiles:
    budget = TILE_BYTES.get(jax.default_backend(), TILE_BYTES_ELSEWHERE)
    vocab = lens.unembed.shape[0]
    count = max(1, -(-4 * positions * vocab // budget))
    width = -(-vocab // count)
    pad = width * count - vocab
    weight = jnp.pad(lens.unembed, ((0, pad), (0, 0))) if pad else lens.unembed
    bias = None if lens.bias is None else jnp.pad(lens.bias.astype(jnp.float32), (0, pad)).reshape(width, count)
    return _Tiles(weight.reshape(width, count, -1), bias, count, width)


def _tile(lens: Lens, tiles: _Tiles, index: Array, x: Array) -> tuple[Array, Any, Array]:
    """(logits float32 [R, C, W] of tile `index`, their pullback to scores and bias, its weight [W, d]). Columns beyond
    the vocabulary hold LOWEST."""
    weight = jax.lax.dynamic_index_in_dim(tiles.weight, index, 1, keepdims=False)
    bias = 0.0 if tiles.bias is None else jax.lax.dynamic_index_in_dim(tiles.bias, index, 1, keepdims=False)
    scores = jnp.einsum("rcd,wd->rcw", x, weight, precision=_precision(x), preferred_element_type=jnp.float32)
    z, pullback = jax.vjp(lens.logits, scores, bias)
    if tiles.number * tiles.width > lens.vocab_size:
        token = jnp.arange(tiles.width, dtype=jnp.int32) * tiles.number + index
        z = jnp.where(token < lens.vocab_size, z, LOWEST)
    return z, pullback, weight


def _precision(x: Array) -> jax.lax.Precision:
    # Said here, not left to `jax.default_matmul_precision`, because a custom backward pass is traced outside of it.
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def _chunks(x: Array) -> Array:
    """[R, T, ...] to [chunks, R, C, ...], zeros behind the last position."""
    rows, length = x.shape[:2]
    count = -(-length // CHUNK_TOKENS)
    chunk = -(-length // count)
    padded = jnp.pad(x, ((0, 0), (0, count * chunk - length), *((0, 0),) * (x.ndim - 2)))
    return jnp.moveaxis(padded.reshape(rows, count, chunk, *x.shape[2:]), 1, 0)


def _joined(x: Array, length: int) -> Array:
    """The inverse of `_chunks`."""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :length]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def token_scores(trains_lens: bool, lens: Lens, x: Array, targets: Array, weight: Array) -> TokenScores:
    """Scores of tokens.

    Args:
        trains_lens: whether the gradient of the unembedding is wanted; it is 0 where it is not.
        lens: reads logits.
        x: [R, T, d] residuals after the final norm, at the positions that predict.
        targets: int32 [R, T] the tokens they predict.
        weight: [R, T] 0 where a position does not count, which come last in a row.
    """
    return _scores(lens, x, targets, weight, pulls=False)[0]


def _scores(
    lens: Lens, x: Array, targets: Array, weight: Array, *, pulls: bool
) -> tuple[TokenScores, Array, Array | None]:
    """(scores, log of the normaliser [R, T], the gradient of log p for `x` [R, T, d] if `pulls`)."""
    rows, length = targets.shape
    chunked = (_chunks(x), _chunks(targets), _chunks(weight))
    tiles = _tiles(lens, rows * chunked[1].shape[2])

    def pulled(
        before: _Pulls, shrink: Array, z: Array, odds: Array, pullback: Any, own: Array, place: Array, here: Array
    ) -> _Pulls:
        """The sums with a tile more: `place` [R, C] is the token's row in it, if it is `here`."""
        (slope,) = pullback(jnp.ones_like(z))[:1]
        at = jnp.take_along_axis(slope, place[..., None], axis=-1)
        scaled = pullback(odds)[0].astype(x.dtype)
        read = jnp.einsum("rcw,wd->rcd", scaled, own, precision=_precision(x), preferred_element_type=jnp.float32)
        target = at * jnp.take(own, place, axis=0).astype(jnp.float32)
        return _Pulls(
            target=jnp.where(here[..., None], target, before.target), all=before.all * shrink[..., None] + read
        )

    def some(x: Array, targets: Array) -> tuple[TokenScores, Array, Array | None]:
        def step(running: _Running, index: Array) -> tuple[_Running, None]:
            z, pullback, own = _tile(lens, tiles, index, x)
            top = jnp.maximum(running.top, jnp.max(z, axis=-1))
            above = z - top[..., None]
            odds, shrink, sink = jnp.exp(above), jnp.exp(running.top - top), running.top - top
            place, here = targets // tiles.number, targets % tiles.number == index
            at = jnp.take_along_axis(z, place[..., None], axis=-1)[..., 0]
            real = jnp.where(z > LOWEST, z, 0.0) if tiles.number * tiles.width > lens.vocab_size else z
            return _Running(
                top=top,
                mass=running.mass * shrink + jnp.sum(odds, axis=-1),
                moment=(running.moment + running.mass * sink) * shrink + jnp.sum(odds * above, axis=-1),
                total=running.total + jnp.sum(real, axis=-1),
                target=jnp.where(here, at, running.target),
                pulls=None
                if running.pulls is None
                else pulled(running.pulls, shrink, z, odds, pullback, own, place, here),
            ), None

        nothing, empty = jnp.zeros(targets.shape, jnp.float32), jnp.zeros(x.shape, jnp.float32)
        start = _Running(
            top=jnp.full(targets.shape, LOWEST, jnp.float32),
            mass=nothing,
            moment=nothing,
            total=nothing,
            target=nothing,
            pulls=_Pulls(target=empty, all=empty) if pulls else None,
        )
        end, _ = jax.lax.scan(step, start, jnp.arange(tiles.number, dtype=jnp.int32))
        log_mass = jnp.log(end.mass)
        scores = TokenScores(
            logp=end.target - end.top - log_mass,
            entropy=log_mass - end.moment / end.mass,
            logit=end.total / lens.vocab_size,
            correct=(end.target >= end.top).astype(jnp.float32),
        )
        pull = None if end.pulls is None else end.pulls.target - end.pulls.all / end.mass[..., None]
        return scores, end.top + log_mass, pull

    def none(x: Array, targets: Array) -> tuple[TokenScores, Array, Array | None]:
        zeros = jnp.zeros(targets.shape, jnp.float32)
        empty = TokenScores(logp=zeros, entropy=zeros, logit=zeros, correct=zeros)
        return empty, zeros, jnp.zeros(x.shape, jnp.float32) if pulls else None

    def step(nothing: None, part: tuple[Array, Array, Array]) -> tuple[None, tuple[TokenScores, Array, Array | None]]:
        x, targets, weight = part
        return None, jax.lax.cond(jnp.any(weight > 0), some, none, x, targets)

    _, found = jax.lax.scan(step, None, chunked)
    joined: tuple[TokenScores, Array, Array | None] = jax.tree.map(lambda y: _joined(y, length), found)
    return joined


class _Saved(NamedTuple):
    """What the backward pass needs."""

    lens: Lens
    x: Array
    targets: Array
    weight: Array
    normaliser: Array  # [R, T]
    pull: Array | None  # [R, T, d] the gradient of log p for x, where the lens is frozen


def _forward(trains_lens: bool, lens: Lens, x: Array, targets: Array, weight: Array) -> tuple[TokenScores, _Saved]:
    scores, normaliser, pull = _scores(lens, x, targets, weight, pulls=not trains_lens)
    return scores, _Saved(lens, x, targets, weight, normaliser, pull)


def _backward(trains_lens: bool, saved: _Saved, gradient: TokenScores) -> tuple[Lens, Array, None, None]:
    lens, x, targets, weight, normaliser, pull = saved
    if pull is not None:
        to_x = (gradient.logp[..., None] * pull).astype(x.dtype)
        return jax.tree.map(jnp.zeros_like, lens), to_x, None, None
    rows, length = targets.shape
    chunked = tuple(map(_chunks, (x, targets, weight, normaliser, gradient.logp)))
    tiles = _tiles(lens, rows * chunked[1].shape[2])
    precision = _precision(x)

    def some(sums: _ToTiles, x: Array, targets: Array, normaliser: Array, pull: Array) -> tuple[_ToTiles, Array]:
        def step(carry: tuple[_ToTiles, Array], index: Array) -> tuple[tuple[_ToTiles, Array], None]:
            (to_weight, to_bias), to_x = carry
            z, pullback, own = _tile(lens, tiles, index, x)
            hit = jnp.arange(tiles.width, dtype=jnp.int32) == (targets // tiles.number)[..., None]
            hit &= (targets % tiles.number == index)[..., None]
            to_z = pull[..., None] * (hit.astype(jnp.float32) - jnp.exp(z - normaliser[..., None]))
            to_scores, to_own_bias = pullback(to_z)
            to_scores = to_scores.astype(x.dtype)
            to_x += jnp.einsum("rcw,wd->rcd", to_scores, own, precision=precision, preferred_element_type=jnp.float32)
            found = jnp.einsum("rcw,rcd->wd", to_scores, x, precision=precision, preferred_element_type=jnp.float32)
            to_weight = to_weight.at[:, index].add(found)
            to_bias = to_bias.at[:, index].add(to_own_bias) if tiles.bias is not None else to_bias
            return (_ToTiles(to_weight, to_bias), to_x), None

        start = (sums, jnp.zeros(x.shape, jnp.float32))
        (sums, to_x), _ = jax.lax.scan(step, start, jnp.arange(tiles.number, dtype=jnp.int32))
        return sums, to_x.astype(x.dtype)

    def step(sums: _ToTiles, part: tuple[Array, ...]) -> tuple[_ToTiles, Array]:
        x, targets, weight, normaliser, pull = part
        return jax.lax.cond(
            jnp.any(weight > 0),
            some,
            lambda sums, x, *_: (sums, jnp.zeros_like(x)),
            *(sums, x, targets, normaliser, pull),
        )

    start = _ToTiles(
        jnp.zeros(tiles.weight.shape, jnp.float32),
        jnp.zeros((tiles.width, tiles.number if tiles.bias is not None else 0), jnp.float32),
    )
    (to_weight, to_bias), to_x = jax.lax.scan(step, start, chunked)
    vocab = lens.unembed.shape[0]
    leaves = [to_weight.reshape(-1, x.shape[-1])[:vocab].astype(lens.unembed.dtype)]
    if lens.bias is not None:
        leaves.append(to_bias.reshape(-1)[:vocab].astype(lens.bias.dtype))
    to_lens = jax.tree.unflatten(jax.tree.structure(lens), leaves)
    return to_lens, _joined(to_x, length), None, None


token_scores.defvjp(_forward, _backward)
