"""Causal self-attention over packed rows, with grouped queries, windows, soft-caps and rotary positions.

XLA computes the scores, unless a kernel for the accelerator supports the model (`fused_attention`). Training on a CPU
uses tiles of queries (`tiled_attention`).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from spinal_jax.models.config import DecoderConfig
from spinal_jax.models.fused_attention import AnyMesh, Kernel, attend_cudnn, attend_splash, kernel_of
from spinal_jax.models.layers import Linear, Norm, normal
from spinal_jax.models.rope import rotate, rotation
from spinal_jax.models.tiled_attention import FORBIDDEN, attend_tiled

QUERY_BLOCK = 512  # row length above which scores are computed in blocks of queries


class Layout(NamedTuple):
    """Masks and rotations that all blocks of a forward pass share."""

    segments: Array  # [B, T] sequence of each token within its row
    positions: Array  # [B, T] position within the sequence
    branches: Array | None  # [B, T] continuation of a shared prompt; 0 for the prompt
    cos: Array  # [ropes, B, T, dim / 2]; no ropes for learned positions; the last may be the identity
    sin: Array
    kernel: Kernel  # implementation of attention
    mesh: AnyMesh | None  # devices that split the rows and heads of a kernel
    growth: Array | None  # [B, T] scale of the queries by position
    bias: Array | None  # [B, T, T] float32 mask of `attend_tiled`, or None


class PerLayer(NamedTuple):
    """Settings that differ between blocks, as arrays that the scan over depth slices."""

    window: Array  # [D] tokens, 0: unlimited
    scale: Array  # [D] multiplies q.k, float32
    rope: Array  # [D] index into Layout.cos


def layout(
    config: DecoderConfig,
    positions: Array,
    segments: Array,
    lengths: Array,
    branches: Array | None,
    dtype: jnp.dtype,
    backend: str,
    mesh: AnyMesh | None = None,
    *,
    tiled: bool = False,
) -> Layout:
    """The layout of a forward pass in a dtype; `positions`, `segments`, `lengths` and `branches` are [B, T]. `tiled`
    selects `attend_tiled`."""
    turns = [rotation(rope, positions, lengths) for rope in config.ropes]
    if turns and -1 in config.layer_rope:
        turns.append((jnp.ones_like(turns[0][0]), jnp.zeros_like(turns[0][1])))
    growth = None
    if config.query_growth is not None:
        slope, period = config.query_growth
        growth = 1 + slope * jnp.log1p(jnp.floor(positions.astype(jnp.float32) / period))
    nothing = jnp.zeros((0, *positions.shape, 0), jnp.float32)
    cos = jnp.stack([c for c, _ in turns]) if turns else nothing
    sin = jnp.stack([s for _, s in turns]) if turns else nothing
    kernel = kernel_of(config, dtype, backend, mesh).kernel
    bias = None
    if tiled and not config.sinks:  # not supported by `attend_tiled`
        seen = allowed(segments, jnp.arange(segments.shape[1], dtype=jnp.int32), None, branches, positions)
        bias = jnp.where(seen, 0.0, FORBIDDEN)
    return Layout(
        segments=segments,
        positions=positions,
        branches=branches,
        cos=cos,
        sin=sin,
        kernel="xla" if kernel == "splash" and branches is not None else kernel,  # has no internal mask
        mesh=mesh,
        growth=growth,
        bias=bias,
    )


def query_scale(config: DecoderConfig) -> float:
    """The scale of q.k, without factors that depend on depth."""
    return config.query_scale or config.head_dim**-0.5


def per_layer(config: DecoderConfig) -> PerLayer:
    """The scanned settings, each [D]."""
    rope = [len(config.ropes) if index < 0 else index for index in config.layer_rope] or [0] * config.depth
    scale = query_scale(config)
    scales = [scale / (layer + 1) if config.scale_by_depth else scale for layer in range(config.depth)]
    return PerLayer(
        jnp.asarray(config.windows, jnp.int32), jnp.asarray(scales, jnp.float32), jnp.asarray(rope, jnp.int32)
    )


def allowed(
    segments: Array,
    queries: Array,
    window: Array | None,
    branches: Array | None = None,
    positions: Array | None = None,
) -> Array:
    """bool [B, Q, T] the causal mask: queries at row positions `queries` [Q] attend within their sequence to the last
    `window` tokens.

    With `branches` [B, T] a segment is a prompt (0) with several continuations (1, 2, ...), each of which attends to
    the prompt and to itself; distances are then measured in `positions` [B, T] instead of the row.
    """
    back = queries[:, None] - jnp.arange(segments.shape[1], dtype=jnp.int32)[None, :]
    seen = (back >= 0) & (segments[:, queries, None] == segments[:, None, :])
    if branches is not None:
        assert positions is not None
        seen &= (branches[:, None, :] == 0) | (branches[:, queries, None] == branches[:, None, :])
        back = positions[:, queries, None] - positions[:, None, :]
    return seen if window is None else seen & ((window == 0) | (back < window))


def attend(
    q: Array,
    k: Array,
    v: Array,
    segments: Array,
    *,
    window: Array | None,
    scale: Array | float,
    softcap: float | None,
    sinks: Array | None = None,
    branches: Array | None = None,
    positions: Array | None = None,
) -> Array:
    """Softmax attention.

    Args:
        q: [B, T, H, hd]; k: [B, T, K, hd]; v: [B, T, K, vd], where K divides H and head h reads key head h // (H / K).
        segments: [B, T]; window: scalar or None; scale: of the scores; softcap: of the scores, if any.
        sinks: [H] an additional logit of the softmax of each head, without a value; or None.
        branches, positions: [B, T] as in `allowed`, or None.

    Returns:
        [B, T, H, vd]
    """
    batch, length, heads, _ = q.shape
    kv_heads = k.shape[2]
    # Query heads with one key head are rows of one matmul, which is 6-8 % faster than broadcasting the keys.
    q = q.reshape(batch, length, kv_heads, heads // kv_heads, -1).transpose(0, 2, 3, 1, 4)  # [B, K, H/K, T, hd]
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)  # [B, K, T, hd]

    def block(part: Array, start: Array | int) -> Array:
        """Queries `part` [B, K, H/K, Q, hd], the first at row position `start`, to [B, Q, H, vd]."""
        rows = part.reshape(batch, kv_heads, -1, part.shape[-1])
        scores = jnp.einsum("bkqh,bkth->bkqt", rows, k, preferred_element_type=jnp.float32) * scale
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        count = part.shape[3]
        queries = start + jnp.arange(count, dtype=jnp.int32)
        mask = allowed(segments, queries, window, branches, positions)[:, None, None]
        scores = scores.reshape(batch, kv_heads, -1, count, length)
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
        weights = (jax.nn.softmax(scores, axis=-1) if sinks is None else softmax_with(sinks, scores)).astype(v.dtype)
        out = jnp.einsum("bkqt,bkth->bkqh", weights.reshape(batch, kv_heads, -1, length), v)
        return out.reshape(batch, heads, count, -1).transpose(0, 2, 1, 3)

    if length <= QUERY_BLOCK or length % QUERY_BLOCK:
        return block(q, 0)
    parts = jnp.moveaxis(q.reshape(*q.shape[:3], -1, QUERY_BLOCK, q.shape[-1]), 3, 0)
    starts = jnp.arange(0, length, QUERY_BLOCK, dtype=jnp.int32)
    blocks = jax.lax.map(lambda xs: block(*xs), (parts, starts))  # [T / Q, B, Q, H, vd]
    return jnp.moveaxis(blocks, 0, 1).reshape(batch, length, heads, -1)


def softmax_with(sinks: Array, scores: Array) -> Array:
    """Softmax of `scores` [B, K, H/K, Q, T] with an additional logit for each head, `sinks` [H], which is dropped."""
    sink = sinks.astype(scores.dtype).reshape(1, *scores.shape[1:3], 1, 1)
    most = jax.lax.stop_gradient(jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), sink))
    weights = jnp.exp(scores - most)
    return weights / (jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(sink - most))


class Attention(nnx.Module):
    """Grouped-query attention, including multi-head and multi-query attention."""

    def __init__(self, config: DecoderConfig, *, lead: tuple[int, ...], rngs: nnx.Rngs):
        heads, kv_heads, dim = config.heads, config.kv_heads, config.head_dim

        def linear(out: int, into: int, bias: bool) -> Linear:
            return Linear(out, into, bias=bias, lead=lead, rngs=rngs)

        self.config = config
        self.query = linear(heads * dim, config.width, config.qkv_bias)
        self.key = linear(kv_heads * dim, config.width, config.qkv_bias)
        self.value = linear(kv_heads * dim, config.width, config.qkv_bias)
        self.gate = linear(heads * dim, config.width, config.qkv_bias) if config.attention_gate else None
        self.out = linear(config.width, heads * dim, config.out_bias)

        def norm(count: int) -> Norm | None:
            shape = {"none": (), "head": (dim,), "heads": (count, dim), "full": (count * dim,)}[config.qk_norm]
            return Norm(config, *shape, lead=lead, bias=config.qk_norm_bias, rngs=rngs) if shape else None

        self.query_norm, self.key_norm = norm(heads), norm(kv_heads)
        self.sinks = nnx.Param(normal(rngs, (*lead, heads))) if config.sinks else None

    def __call__(self, x: Array, shared: Layout, layer: PerLayer) -> Array:
        config = self.config

        def split(y: Array, norm: Norm | None) -> Array:
            """[B, T, heads * hd] to [B, T, heads, hd], with the norms of the family."""
            if norm is not None and config.qk_norm == "full":
                return clip(norm(y)).reshape(*y.shape[:2], -1, config.head_dim)
            y = clip(y).reshape(*y.shape[:2], -1, config.head_dim)
            return y if norm is None or config.qk_norm_last else norm(y)

        def clip(y: Array) -> Array:
            return y if config.qkv_clip is None else jnp.clip(y, -config.qkv_clip, config.qkv_clip)

        q, k = split(self.query(x), self.query_norm), split(self.key(x), self.key_norm)
        if config.ropes:
            interleaved = config.ropes[0].interleaved
            cos, sin = shared.cos[layer.rope], shared.sin[layer.rope]
            q, k = rotate(q, cos, sin, interleaved), rotate(k, cos, sin, interleaved)
        if config.qk_norm_last and self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if shared.growth is not None:
            q = q * shared.growth[..., None, None].astype(q.dtype)
        v, window = split(self.value(x), None), layer.window if any(config.windows) else None
        branches, positions = shared.branches, shared.positions
        scale, softcap = query_scale(config), config.attention_softcap
        if shared.bias is not None:
            bias = shared.bias
            if window is not None:
                back = positions[:, :, None] - positions[:, None, :]
                bias = jnp.where((window == 0) | (back < window), bias, FORBIDDEN)
            scaled = (q.astype(jnp.float32) * layer.scale).astype(q.dtype)
            out: Array = attend_tiled(softcap, scaled, k, v, bias)
        elif shared.kernel == "cudnn":
            mask = None
            if window is not None or branches is not None:
                row = jnp.arange(x.shape[1], dtype=jnp.int32)
                mask = allowed(shared.segments, row, window, branches, positions)
            out = attend_cudnn(q, k, v, shared.segments, scale=scale, mask=mask, mesh=shared.mesh)
        elif shared.kernel == "splash":
            out = attend_splash(
                q,
                k,
                v,
                shared.segments,
                windows=config.windows,
                window=window,
                scale=scale,
                softcap=softcap,
                mesh=shared.mesh,
            )
        else:
            out = attend(
                q,
                k,
                v,
                shared.segments,
                window=window,
                scale=layer.scale,
                softcap=config.attention_softcap,
                sinks=None if self.sinks is None else self.sinks[...],
                branches=branches,
                positions=positions,
            )
        out = out.reshape(*x.shape[:2], -1)
        return self.out(out if self.gate is None else out * jax.nn.sigmoid(self.gate(x)))
