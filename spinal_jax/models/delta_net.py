"""Gated delta net (Yang et al. 2024, arXiv 2412.06464): a recurrent mixer in place of attention.

Each value head keeps a state S [key_dim, value_dim] that starts at zero for each sequence of a row and is updated
for each token, `S <- a S + k (b (v - (a S)^T k))^T` with a decay a and a rate b, both in (0, 1); the output is `S^T q`.
The computation is chunked: within a chunk the updates are a triangular system, and S is passed between chunks.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from spinal_jax.models.attention import Layout, PerLayer
from spinal_jax.models.config import Activation, ClampedSwiGLU, DecoderConfig
from spinal_jax.models.layers import Linear, Norm, activate, normal

CHUNK_LENGTH = 64  # tokens
EPSILON = 1e-6  # added to the squared length of queries and keys

# Float32 for any dtype of the model, because the state sums over a whole sequence.
_einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


class GatedDeltaNet(nnx.Module):
    """Short causal convolutions of queries, keys and values, the gated delta rule, a gated norm for each head."""

    def __init__(self, config: DecoderConfig, *, lead: tuple[int, ...], rngs: nnx.Rngs):
        delta, width = config.delta, config.width
        assert delta is not None
        keys, values = delta.key_heads * delta.key_dim, delta.value_heads * delta.value_dim

        def linear(out: int, into: int) -> Linear:
            return Linear(out, into, bias=False, lead=lead, rngs=rngs)

        def filters(channels: int) -> nnx.Param:
            return nnx.Param(normal(rngs, (*lead, channels, delta.kernel), delta.kernel**-0.5))

        self.delta = delta
        assert not isinstance(config.activation, ClampedSwiGLU)  # which has two inputs
        self.activation: Activation = config.activation
        self.query, self.key, self.value = linear(keys, width), linear(keys, width), linear(values, width)
        self.query_filter, self.key_filter, self.value_filter = filters(keys), filters(keys), filters(values)
        self.gate = linear(values, width)
        self.rate = linear(delta.value_heads, width)
        self.decay = linear(delta.value_heads, width)
        self.decay_bias = nnx.Param(1.0 + normal(rngs, (*lead, delta.value_heads)))
        self.decay_log = nnx.Param(normal(rngs, (*lead, delta.value_heads), 0.5))
        plain = replace(config, norm="rms", norm_unit_offset=False, norm_float32=False, norm_weight=True)
        self.norm = Norm(plain, delta.value_dim, lead=lead, bias=False, rngs=rngs)
        self.out = linear(width, values)

    def __call__(self, x: Array, shared: Layout, layer: PerLayer) -> Array:
        if shared.branches is not None:
            raise AssertionError("continuations of one prompt do not share a row where a block has a recurrent state")
        delta, segments = self.delta, shared.segments
        groups = delta.value_heads // delta.key_heads

        def mixed(linear: Linear, filters: nnx.Param, heads: int) -> Array:
            y = activate(self.activation, convolve(linear(x), filters[...], segments))
            return y.reshape(*x.shape[:2], heads, -1).astype(jnp.float32)

        q = _unit(mixed(self.query, self.query_filter, delta.key_heads)) * delta.key_dim**-0.5
        k = _unit(mixed(self.key, self.key_filter, delta.key_heads))
        v = mixed(self.value, self.value_filter, delta.value_heads)
        rate = jax.nn.sigmoid(self.rate(x)).astype(jnp.float32)
        speed = jax.nn.softplus(self.decay(x).astype(jnp.float32) + self.decay_bias[...].astype(jnp.float32))
        log_decay = -jnp.exp(self.decay_log[...].astype(jnp.float32)) * speed
        by_key = (*x.shape[:2], delta.key_heads, groups)
        read = delta_rule(
            q, k, v.reshape(*by_key, -1), log_decay.reshape(by_key), rate.reshape(by_key), segments, CHUNK_LENGTH
        )
        read = self.norm(read.astype(x.dtype).reshape(*x.shape[:2], delta.value_heads, -1))
        gate = self.gate(x).reshape(read.shape).astype(jnp.float32)
        gated = (read.astype(jnp.float32) * jax.nn.silu(gate)).astype(x.dtype)
        return self.out(gated.reshape(*x.shape[:2], -1))


def _unit(x: Array) -> Array:
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + EPSILON)


def convolve(x: Array, filters: Array, segments: Array) -> Array:
    """Causal depthwise convolution within sequences.

    Args:
        x: [B, T, C].
        filters: [C, K], the last weight for the current token.
        segments: [B, T], equal for tokens of one sequence.

    Returns:
        [B, T, C]
    """
    kernel, length = filters.shape[-1], x.shape[1]
    out = x * filters[:, -1]
    for back in range(1, min(kernel, length)):
        earlier = jnp.pad(x, ((0, 0), (back, 0), (0, 0)))[:, :length]
        at = jnp.pad(segments, ((0, 0), (back, 0)), constant_values=-1)[:, :length]
        out += jnp.where((at == segments)[..., None], earlier, 0) * filters[:, -1 - back]
    return out


def delta_rule(q: Array, k: Array, v: Array, log_decay: Array, rate: Array, segments: Array, chunk: int) -> Array:
    """The gated delta rule.

    Args:
        q, k: [B, T, K, dk] of the key heads, float32.
        v: [B, T, K, G, dv], of the G value heads that each key head serves.
        log_decay: [B, T, K, G], at most 0; the state is multiplied by its exponential.
        rate: [B, T, K, G] the rate b.
        segments: [B, T], equal for the adjacent tokens of one sequence; not -1.
        chunk: tokens in a chunk; affects rounding only.

    Returns:
        [B, T, K, G, dv]
    """
    batch, length = segments.shape
    chunk = min(chunk, length)
    count = -(-length // chunk)

    def chunks(x: Array, fill: int = 0) -> Array:
        """[B, T, heads.., d..] to [N, B, heads.., C, d..]."""
        padding = [(0, 0), (0, count * chunk - length)] + [(0, 0)] * (x.ndim - 2)
        return jnp.moveaxis(jnp.pad(x, padding, constant_values=fill).reshape(batch, count, chunk, *x.shape[2:]), 1, 0)

    q, k = (jnp.moveaxis(chunks(x), 2, 3) for x in (q, k))  # [N, B, K, C, dk]
    v = jnp.moveaxis(chunks(v), 2, 4)  # [N, B, K, G, C, dv]
    log_decay, rate = (jnp.moveaxis(chunks(x), 2, 4) for x in (log_decay, rate))  # [N, B, K, G, C]
    at = chunks(segments, -1)  # [N, B, C]
    before = jnp.pad(at[:-1, :, -1], ((1, 0), (0, 0)), constant_values=-1)  # [N, B] sequence of the entering state
    goes_on = (at == before[..., None])[:, :, None, None]  # [N, B, 1, 1, C] tokens of this sequence
    stays = (at == at[..., -1:])[:, :, None, None]  # tokens of the sequence of the leaving state

    seen = jnp.tril(at[..., :, None] == at[..., None, :])[:, :, None, None]  # [N, B, 1, 1, C, C]
    # [.., i, j] the sum behind j up to i, added up for each j: differences of sums from the chunk's start would lose
    # weak decays behind strong ones, and depend on what stands before.
    steps = jnp.where(jnp.tri(chunk, k=-1, dtype=jnp.bool_), log_decay[..., None], 0)
    decay = jnp.cumsum(steps, axis=-2)  # [N, B, K, G, C, C]
    between = jnp.exp(jnp.where(seen, decay, -jnp.inf))
    since = jnp.where(goes_on, jnp.exp(jnp.cumsum(log_decay, axis=-1)), 0)[..., None]  # of the state that enters
    until = jnp.where(stays, jnp.exp(decay[..., -1, :]), 0)[..., None]  # from a token to the chunk's end
    keys = k[:, :, :, None]  # [N, B, K, 1, C, dk]
    # Each token writes its value minus the current value of its key, which earlier tokens of the chunk have changed.
    system = rate[..., None] * between * _einsum("nbkid,nbkjd->nbkij", k, k)[:, :, :, None]
    given = rate[..., None] * jnp.concatenate([v, keys * since], axis=-1)
    solved = jax.lax.linalg.triangular_solve(system, given, left_side=True, lower=True, unit_diagonal=True)
    written, forgotten = jnp.split(solved, [v.shape[-1]], axis=-1)  # [N, B, K, G, C, dv], [.., dk]
    scores = between * _einsum("nbkid,nbkjd->nbkij", q, k)[:, :, :, None]

    def turn(state: Array, xs: tuple[Array, ...]) -> tuple[Array, Array]:
        written, forgotten, scores, reads, writes, kept = xs
        new = written - _einsum("bkgcd,bkgde->bkgce", forgotten, state)
        out = _einsum("bkgcd,bkgde->bkgce", reads, state) + _einsum("bkgij,bkgje->bkgie", scores, new)
        return state * kept + _einsum("bkgcd,bkgce->bkgde", writes, new), out

    state = jnp.zeros((*v.shape[1:4], k.shape[-1], v.shape[-1]), jnp.float32)
    xs = (written, forgotten, scores, q[:, :, :, None] * since, keys * until, since[..., -1:, :])
    _, out = jax.lax.scan(turn, state, xs)  # [N, B, K, G, C, dv]
    return jnp.moveaxis(jnp.moveaxis(out, 4, 2), 0, 1).reshape(batch, count * chunk, *v.shape[2:4], -1)[:, :length]
