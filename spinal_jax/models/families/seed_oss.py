"""Seed-OSS: Llama with biases on queries, keys and values."""

from __future__ import annotations

from spinal_jax.models.config import DecoderConfig
from spinal_jax.models.families import llama
from spinal_jax.models.hf_config import HFConfig
from spinal_jax.models.translate import Family, without_prefix


def decoder_config(hf: HFConfig) -> DecoderConfig:
    """config.json of a `seed_oss` model."""
    hf.defaults(
        vocab_size=155136,
        hidden_size=4096,
        intermediate_size=27648,
        num_hidden_layers=64,
        num_attention_heads=80,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=524288,
        attention_bias=True,
        attention_out_bias=False,
        mlp_bias=False,
        tie_word_embeddings=False,
    )
    fields = llama.common(hf)
    return DecoderConfig(
        **fields,
        ropes=(hf.rope(fields["head_dim"]),),
        tied=hf.flag("tie_word_embeddings"),
        qkv_bias=hf.flag("attention_bias"),
        out_bias=hf.flag("attention_out_bias"),
        mlp_bias=hf.flag("mlp_bias"),
    )


SEED_OSS = Family(("seed_oss",), decoder_config, llama.rules, llama.ROTARY_TABLES, without_prefix("model"))
