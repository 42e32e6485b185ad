"""Granite 3: Llama with multipliers of the embedding, the residual branches, the scores and the logits."""

from __future__ import annotations

from dataclasses import replace

from spinal_jax.models.config import DecoderConfig
from spinal_jax.models.families import llama
from spinal_jax.models.hf_config import HFConfig
from spinal_jax.models.translate import Family, without_prefix


def decoder_config(hf: HFConfig) -> DecoderConfig:
    """config.json of a `granite` model."""
    hf.defaults(embedding_multiplier=1.0, logits_scaling=1.0, residual_multiplier=1.0, attention_multiplier=1.0)
    return replace(
        llama.decoder_config(hf),
        embed_scale=hf.number("embedding_multiplier"),
        residual_scale=hf.number("residual_multiplier"),
        query_scale=hf.positive("attention_multiplier"),
        logit_divisor=hf.positive("logits_scaling"),
    )


GRANITE = Family(("granite",), decoder_config, llama.rules, llama.ROTARY_TABLES, without_prefix("model"))
