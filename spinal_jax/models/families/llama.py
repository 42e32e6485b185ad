"""Llama 1-3.x, Mistral, SmolLM2, TinyLlama, DeepSeek-LLM (dense): pre-norm blocks, gated MLP, grouped queries, rotary."""

from __future__ import annotations

from typing import Any

from spinal_jax.models.config import DecoderConfig
from spinal_jax.models.hf_config import ACTIVATIONS, HFConfig
from spinal_jax.models.translate import Family, Rule, linear, same


def common(hf: HFConfig, kv_heads: int | None = None) -> dict[str, Any]:
    """The fields that Llama-like families share, keyed as in DecoderConfig; `kv_heads` is the family's own default."""
    depth, heads, width = hf.integer("num_hidden_layers"), hf.integer("num_attention_heads"), hf.integer("hidden_size")
    return dict(
        family=hf.model_type,
        vocab_size=hf.integer("vocab_size"),
        width=width,
        depth=depth,
        heads=heads,
        kv_heads=hf.integer("num_key_value_heads", kv_heads or heads),
        head_dim=hf.integer("head_dim", width // heads),
        mlp_width=hf.integer("intermediate_size"),
        max_positions=hf.integer("max_position_embeddings", 2048),
        activation=hf.choice("hidden_act", ACTIVATIONS, "silu"),
        norm_eps=hf.number("rms_norm_eps", 1e-6),
        layer_rope=(0,) * depth,
        windows=(0,) * depth,
    )


def decoder_config(hf: HFConfig) -> DecoderConfig:
    """config.json of a `llama` model."""
    fields = common(hf)
    attention_bias = hf.flag("attention_bias", False)
    return DecoderConfig(
        **fields,
        ropes=(hf.rope(fields["head_dim"]),),
        tied=hf.flag("tie_word_embeddings", False),
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        mlp_bias=hf.flag("mlp_bias", False),
    )


def mistral_config(hf: HFConfig) -> DecoderConfig:
    """config.json of a `mistral` model: Llama with a sliding window and without biases."""
    fields = common(hf, kv_heads=8)
    hf.refuse("attention_bias", "mlp_bias")
    # Null means no window, but an absent key means the first release's.
    window = hf.integer("sliding_window", 0) if "sliding_window" in hf.values else 4096
    fields["windows"] = (window,) * fields["depth"]
    return DecoderConfig(
        **fields, ropes=(hf.rope(fields["head_dim"]),), tied=hf.flag("tie_word_embeddings", False)
    )


def rules(config: DecoderConfig) -> list[Rule]:
    """Names of a Llama-like checkpoint."""
    layer = "model.layers.{i}"
    return [
        same("model.embed_tokens.weight", "embedding"),
        same("model.norm.weight", "final_norm.weight"),
        *([] if config.tied else linear("lm_head", "unembedding", config.unembed_bias)),
        same(f"{layer}.input_layernorm.weight", "block.attention_norm.weight"),
        same(f"{layer}.post_attention_layernorm.weight", "block.mlp_norm.weight"),
        *attention_rules(config, f"{layer}.self_attn"),
        *mlp_rules(config, f"{layer}.mlp"),
    ]


def attention_rules(config: DecoderConfig, hf: str) -> list[Rule]:
    """q_proj, k_proj, v_proj and o_proj under `hf`."""
    return [
        *linear(f"{hf}.q_proj", "block.attention.query", config.qkv_bias),
        *linear(f"{hf}.k_proj", "block.attention.key", config.qkv_bias),
        *linear(f"{hf}.v_proj", "block.attention.value", config.qkv_bias),
        *linear(f"{hf}.o_proj", "block.attention.out", config.out_bias),
    ]


def mlp_rules(config: DecoderConfig, hf: str) -> list[Rule]:
    """gate_proj, up_proj and down_proj under `hf`."""
    return [
        *linear(f"{hf}.gate_proj", "block.mlp.gate", config.mlp_bias),
        *linear(f"{hf}.up_proj", "block.mlp.up", config.mlp_bias),
        *linear(f"{hf}.down_proj", "block.mlp.down", config.mlp_bias),
    ]


ROTARY_TABLES = (r".*rotary_emb\.inv_freq",)

LLAMA = Family(("llama",), decoder_config, rules, ROTARY_TABLES)
MISTRAL = Family(("mistral",), mistral_config, rules, ROTARY_TABLES)
