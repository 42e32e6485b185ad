"""Causal attention in tiles of queries for training on a CPU, without stored scores.

As in FlashAttention (Dao et al. 2022, arXiv 2205.14135), the forward pass stores the output and the log-normaliser of
each row, and the backward pass recomputes the scores. A tile uses keys up to its last row only, which skips most of the
masked scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

TILE = 128  # minimum number of queries
MOST_TILES = 8  # per row; longer rows have larger tiles
FORBIDDEN = -1e30  # added to masked scores; finite, so that differences are too
KEPT = "attention"  # names for `jax.checkpoint` policies: output and normalisers


class _Tile(NamedTuple):
    """Queries `start` to `stop` of a row, and the keys before `stop`."""

    start: int
    stop: int


def _tiles(length: int) -> Iterator[_Tile]:
    size = max(TILE, -(-length // MOST_TILES))
    for start in range(0, length, size):
        yield _Tile(start, min(length, start + size))


class _Saved(NamedTuple):
    """Residuals of the backward pass."""

    q: Array
    k: Array
    v: Array
    bias: Array
    out: Array  # [B, T, H, vd]
    normaliser: Array  # [B, K, G, T] log of the sum of exp(score)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend_tiled(softcap: float | None, q: Array, k: Array, v: Array, bias: Array) -> Array:
    """Softmax attention.

    Args:
        softcap: of the scores, if any.
        q: [B, T, H, hd], scaled; k: [B, T, K, hd]; v: [B, T, K, vd]; head h reads key head h // G, G = H / K.
        bias: float32 [B, T, T], 0 for allowed pairs, FORBIDDEN for masked ones, including all above the diagonal.

    Returns:
        [B, T, H, vd]
    """
    return _forward(softcap, q, k, v, bias)[0]


def _grouped(x: Array, kv_heads: int) -> Array:
    """[B, T, H, hd] to [B, K, G, T, hd]: query heads grouped by key head."""
    batch, length, _, dim = x.shape
    return x.reshape(batch, length, kv_heads, -1, dim).transpose(0, 2, 3, 1, 4)


def _rows(x: Array, tile: _Tile) -> Array:
    """The queries of a tile, [B, K, G * Q, hd], with the heads of a group as rows of one product."""
    part = x[:, :, :, tile.start : tile.stop]
    return part.reshape(*part.shape[:2], -1, part.shape[-1])


def _product(equation: str, one: Array, other: Array) -> Array:
    # Set here, because a custom backward pass is traced outside of `jax.default_matmul_precision`.
    precision = jax.lax.Precision.HIGHEST if one.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jnp.einsum(equation, one, other, precision=precision, preferred_element_type=jnp.float32)


def _scores(softcap: float | None, q: Array, k: Array, bias: Array, tile: _Tile) -> tuple[Array, Array]:
    """(scores [B, K, G, Q, stop] with the bias, and without it)."""
    raw = _product("bkqh,bkth->bkqt", _rows(q, tile), k[:, :, : tile.stop])
    raw = raw.reshape(*q.shape[:3], -1, tile.stop)
    if softcap is not None:
        raw = softcap * jnp.tanh(raw / softcap)
    return raw + bias[:, None, None, tile.start : tile.stop, : tile.stop], raw


def _forward(softcap: float | None, q: Array, k: Array, v: Array, bias: Array) -> tuple[Array, _Saved]:
    batch, length, heads, _ = q.shape
    kv_heads = k.shape[2]
    grouped, keys, values = _grouped(q, kv_heads), k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    outs, normalisers = [], []
    for tile in _tiles(length):
        scores, _ = _scores(softcap, grouped, keys, bias, tile)
        top = jnp.max(scores, axis=-1)
        odds = jnp.exp(scores - top[..., None])
        mass = jnp.sum(odds, axis=-1)
        weights = odds.reshape(batch, kv_heads, -1, tile.stop).astype(v.dtype)
        out = _product("bkqt,bkth->bkqh", weights, values[:, :, : tile.stop])
        outs.append(out.reshape(*mass.shape, -1) / mass[..., None])
        normalisers.append(top + jnp.log(mass))
    out = jnp.concatenate(outs, axis=3).transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, -1).astype(v.dtype)
    out, normaliser = checkpoint_name(out, KEPT), checkpoint_name(jnp.concatenate(normalisers, axis=3), KEPT)
    return out, _Saved(q, k, v, bias, out, normaliser)


def _backward(softcap: float | None, saved: _Saved, gradient: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, bias, out, normaliser = saved
    batch, length, heads, _ = q.shape
    kv_heads = k.shape[2]
    grouped, keys, values = _grouped(q, kv_heads), k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    to_out = _grouped(gradient, kv_heads)
    shared = jnp.sum((gradient * out).astype(jnp.float32), axis=-1, keepdims=True)
    shared = _grouped(shared, kv_heads)[..., 0]  # [B, K, G, T] sum of weight times its gradient
    to_q = []
    to_k, to_v = jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32)
    for tile in _tiles(length):
        span, before = slice(tile.start, tile.stop), slice(0, tile.stop)
        scores, raw = _scores(softcap, grouped, keys, bias, tile)
        weights = jnp.exp(scores - normaliser[..., span, None])
        own = _rows(to_out, tile)
        to_weights = _product("bkqh,bkth->bkqt", own, values[:, :, before]).reshape(weights.shape)
        to_scores = weights * (to_weights - shared[..., span, None])
        if softcap is not None:
            to_scores *= 1 - jnp.square(raw / softcap)
        flat = (batch, kv_heads, -1, tile.stop)
        weights, to_scores = weights.reshape(flat).astype(v.dtype), to_scores.reshape(flat).astype(q.dtype)
        to_q.append(_product("bkqt,bkth->bkqh", to_scores, keys[:, :, before]).reshape(*raw.shape[:-1], -1))
        to_k = to_k.at[:, :, before].add(_product("bkqt,bkqh->bkth", to_scores, _rows(grouped, tile)))
        to_v = to_v.at[:, :, before].add(_product("bkqt,bkqh->bkth", weights, own))
    joined = jnp.concatenate(to_q, axis=3).transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, -1)
    back = (to_k.transpose(0, 2, 1, 3).astype(k.dtype), to_v.transpose(0, 2, 1, 3).astype(v.dtype))
    return joined.astype(q.dtype), *back, None


attend_tiled.defvjp(_forward, _backward)
