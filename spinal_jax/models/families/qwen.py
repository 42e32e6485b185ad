"""Qwen2 and 2.5 (Llama with biases on queries, keys and values), Qwen3 (norms on queries and keys instead)."""

from __future__ import annotations

from typing import Any

from spinal_jax.models.config import DecoderConfig
from spinal_jax.models.families import llama
from spinal_jax.models.hf_config import HFConfig
from spinal_jax.models.translate import Family, Rule, without_prefix


def common(hf: HFConfig) -> dict[str, Any]:
    """The fields that both have, keyed as in DecoderConfig."""
    hf.defaults(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=22016,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=32768,
        use_sliding_window=False,
        sliding_window=4096,
        max_window_layers=28,
        tie_word_embeddings=False,
    )
    hf.refuse("use_mrope")
    fields = llama.common(hf)
    window = hf.window("sliding_window") if hf.flag("use_sliding_window") else 0
    first = hf.integer("max_window_layers")
    hf.ignore("sliding_window")
    return fields | {
        "ropes": (hf.rope(fields["head_dim"]),),
        "windows": llama.layer_windows(hf, fields["depth"], window, lambda layer: bool(window) and layer >= first),
        "tied": hf.flag("tie_word_embeddings"),
    }


def qwen2_config(hf: HFConfig) -> DecoderConfig:
    """config.json of a `qwen2` model."""
    return DecoderConfig(**common(hf), qkv_bias=True)


def qwen3_config(hf: HFConfig) -> DecoderConfig:
    """config.json of a `qwen3` model."""
    hf.defaults(head_dim=128, attention_bias=False)
    bias = hf.flag("attention_bias")
    return DecoderConfig(**common(hf), qk_norm="head", qkv_bias=bias, out_bias=bias)


def rules(config: DecoderConfig) -> list[Rule]:
    """Names of a Qwen checkpoint."""
    return [*llama.rules(config), *llama.query_key_norm_rules(config, "model.layers.{i}.self_attn")]


QWEN2 = Family(("qwen2",), qwen2_config, rules, llama.ROTARY_TABLES, without_prefix("model"))
QWEN3 = Family(("qwen3",), qwen3_config, rules, llama.ROTARY_TABLES, without_prefix("model"))
