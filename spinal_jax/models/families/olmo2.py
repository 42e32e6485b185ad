"""OLMo 2: Llama whose only norms stand behind attention and MLP, and on all queries and keys of a token at once."""

from __future__ import annotations

from dataclasses import replace

from spinal_jax.models.config import DecoderConfig
from spinal_jax.models.families import llama
from spinal_jax.models.hf_config import HFConfig
from spinal_jax.models.translate import Family, Rule, linear, without_prefix


def without_rope(hf: HFConfig) -> DecoderConfig:
    """What OLMo 2 and 3 share."""
    hf.defaults(
        vocab_size=50304,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        rms_norm_eps=1e-5,
        attention_bias=False,
        tie_word_embeddings=False,
    )
    fields = llama.common(hf)
    return DecoderConfig(
        **fields,
        ropes=(),
        tied=hf.flag("tie_word_embeddings"),
        norm_float32=True,
        pre_norm=False,
        post_norm=True,
        qk_norm="full",
        qkv_bias=hf.flag("attention_bias"),
        out_bias=hf.flag("attention_bias"),
    )


def decoder_config(hf: HFConfig) -> DecoderConfig:
    """config.json of an `olmo2` model."""
    config = without_rope(hf)
    return replace(config, ropes=(hf.rope(config.head_dim),))


def rules(config: DecoderConfig) -> list[Rule]:
    """Names of an OLMo 2 checkpoint."""
    layer = "model.layers.{i}"
    return [
        *llama.end_rules(config),
        *linear(f"{layer}.post_attention_layernorm", "block.attention_post_norm", False),
        *linear(f"{layer}.post_feedforward_layernorm", "block.mlp_post_norm", False),
        *llama.attention_rules(config, f"{layer}.self_attn"),
        *llama.query_key_norm_rules(config, f"{layer}.self_attn"),
        *llama.mlp_rules(config, f"{layer}.mlp"),
    ]


OLMO2 = Family(("olmo2",), decoder_config, rules, llama.ROTARY_TABLES, without_prefix("model"))
