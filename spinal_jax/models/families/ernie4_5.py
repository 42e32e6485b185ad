"""ERNIE 4.5, dense: Llama whose heads rotate neighbouring features."""

from __future__ import annotations

from dataclasses import replace

from spinal_jax.models.config import DecoderConfig
from spinal_jax.models.families import llama
from spinal_jax.models.hf_config import HFConfig
from spinal_jax.models.translate import Family, without_prefix


def decoder_config(hf: HFConfig) -> DecoderConfig:
    """config.json of an `ernie4_5` model."""
    hf.defaults(
        vocab_size=103424,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=18,
        num_attention_heads=16,
        num_key_value_heads=2,
        head_dim=128,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        use_bias=False,
        tie_word_embeddings=True,
    )
    fields, bias = llama.common(hf), hf.flag("use_bias")
    return DecoderConfig(
        **fields,
        ropes=(replace(hf.rope(fields["head_dim"], default_theta=5e5), interleaved=True),),
        tied=hf.flag("tie_word_embeddings"),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
    )


ERNIE4_5 = Family(("ernie4_5",), decoder_config, llama.rules, llama.ROTARY_TABLES, without_prefix("model"))
