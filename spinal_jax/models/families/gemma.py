"""Gemma 1: Llama whose embedding is scaled by sqrt(width) and whose norms scale by 1 + weight."""

from __future__ import annotations

from typing import Any

from spinal_jax.errors import UserError
from spinal_jax.models.config import DecoderConfig
from spinal_jax.models.families import llama
from spinal_jax.models.hf_config import ACTIVATIONS, HFConfig
from spinal_jax.models.translate import Family, Rule, linear, without_prefix


def common(hf: HFConfig, activation: str) -> dict[str, Any]:
    """The fields that all Gemmas share, keyed as in DecoderConfig; `activation` is the key that counts."""
    hf.defaults(
        head_dim=256,
        attention_bias=False,
        tie_word_embeddings=True,
        **{activation: "gelu_pytorch_tanh"},
    )
    hf.refuse("use_bidirectional_attention")
    fields = llama.common(hf, activation=activation)
    bias = hf.flag("attention_bias")
    return fields | {
        "tied": hf.flag("tie_word_embeddings"),
        "qkv_bias": bias,
        "out_bias": bias,
        "embed_scale": fields["width"] ** 0.5,
        "norm_unit_offset": True,
        "norm_float32": True,
    }


def decoder_config(hf: HFConfig) -> DecoderConfig:
    """config.json of a `gemma` model."""
    hf.defaults(
        vocab_size=256000,
        hidden_size=3072,
        intermediate_size=24576,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=8192,
    )
    fields = common(hf, "hidden_act")
    # The first releases say "gelu", but were trained with its tanh approximation.
    meant = {name: "gelu_tanh" if name == "gelu" else kind for name, kind in ACTIVATIONS.items()}
    fields["activation"] = hf.choice("hidden_act", meant)
    if hf.choice("hidden_activation", meant, hf.values["hidden_act"]) != fields["activation"]:
        raise UserError(
            f"config.json contradicts itself: hidden_act is {hf.values['hidden_act']!r}, hidden_activation is "
            f"{hf.values['hidden_activation']!r}"
        )
    return DecoderConfig(**fields, ropes=(hf.rope(fields["head_dim"]),))


GEMMA = Family(("gemma",), decoder_config, llama.rules, llama.ROTARY_TABLES, without_prefix("model"))


def four_norm_rules(config: DecoderConfig) -> list[Rule]:
    """Names of a Gemma 2 or 3 checkpoint, with norms before and after attention and MLP."""
    layer = "model.layers.{i}"
    return [
        *llama.end_rules(config),
        *linear(f"{layer}.input_layernorm", "block.attention_norm", False),
        *linear(f"{layer}.post_attention_layernorm", "block.attention_post_norm", False),
        *linear(f"{layer}.pre_feedforward_layernorm", "block.mlp_norm", False),
        *linear(f"{layer}.post_feedforward_layernorm", "block.mlp_post_norm", False),
        *llama.attention_rules(config, f"{layer}.self_attn"),
        *llama.query_key_norm_rules(config, f"{layer}.self_attn"),
        *llama.mlp_rules(config, f"{layer}.mlp"),
    ]
