"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values from a low-rank latent."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
from flax import nnx
from jax import Array

from spinal_jax.models.attention import Layout, PerLayer, attend
from spinal_jax.models.config import DecoderConfig
from spinal_jax.models.layers import Linear, Norm
from spinal_jax.models.rope import rotate


class MultiHeadLatentAttention(nnx.Module):
    """Attention with an unrotated and a rotated part of each head; all heads share the rotated key."""

    def __init__(self, config: DecoderConfig, *, lead: tuple[int, ...], rngs: nnx.Rngs):
        latent, heads, width = config.latent, config.heads, config.width
        assert latent is not None

        def linear(out: int, into: int, bias: bool = False) -> Linear:
            return Linear(out, into, bias=bias, lead=lead, rngs=rngs)

        def norm(rank: int) -> Norm:
            # The norms of the latents use Hugging Face's default epsilon instead of rms_norm_eps.
            return Norm(replace(config, norm_eps=1e-6), rank, lead=lead, rngs=rngs)

        self.config = config
        query = heads * config.head_dim
        if latent.query_rank:
            self.query_down = linear(latent.query_rank, width, config.qkv_bias)
            self.query_norm = norm(latent.query_rank)
            self.query_up = linear(query, latent.query_rank)
        else:
            self.query = linear(query, width)
        self.latent_down = linear(latent.key_value_rank + latent.rope_dim, width, config.qkv_bias)
        self.latent_norm = norm(latent.key_value_rank)
        self.latent_up = linear(heads * (latent.nope_dim + latent.value_dim), latent.key_value_rank)
        self.out = linear(width, heads * latent.value_dim, config.out_bias)

    def __call__(self, x: Array, shared: Layout, layer: PerLayer) -> Array:
        config, latent = self.config, self.config.latent
        assert latent is not None
        heads = (*x.shape[:2], config.heads, -1)
        interleaved = config.ropes[0].interleaved
        cos, sin = shared.cos[layer.rope], shared.sin[layer.rope]

        q = self.query_up(self.query_norm(self.query_down(x))) if latent.query_rank else self.query(x)
        q_nope, q_rope = jnp.split(q.reshape(heads), [latent.nope_dim], axis=-1)  # [B, T, H, nope | rope]
        compressed, k_rope = jnp.split(self.latent_down(x), [latent.key_value_rank], axis=-1)
        expanded = self.latent_up(self.latent_norm(compressed)).reshape(heads)
        k_nope, v = jnp.split(expanded, [latent.nope_dim], axis=-1)  # [B, T, H, nope | value]
        q_rope = rotate(q_rope, cos, sin, interleaved)
        k_rope = rotate(k_rope[:, :, None], cos, sin, interleaved)  # [B, T, 1, rope]
        out = attend(
            jnp.concatenate([q_nope, q_rope], axis=-1),
            jnp.concatenate([k_nope, jnp.broadcast_to(k_rope, q_rope.shape)], axis=-1),
            v,
            shared.segments,
            window=None,
            scale=layer.scale,
            softcap=None,
            branches=shared.branches,
            positions=shared.positions,
        )
        return self.out(out.reshape(*x.shape[:2], -1))
