"""Arcee (AFM): Llama without a gate, whose MLP squares what is above zero."""

from __future__ import annotations

from dataclasses import replace

from spinal_jax.models.config import DecoderConfig
from spinal_jax.models.families import llama
from spinal_jax.models.hf_config import HFConfig
from spinal_jax.models.translate import Family, Rule, linear, without_prefix


def decoder_config(hf: HFConfig) -> DecoderConfig:
    """config.json of an `arcee` model."""
    hf.defaults(
        hidden_size=2560,
        intermediate_size=18432,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        hidden_act="relu2",
    )
    return replace(llama.decoder_config(hf), gated=False)


def rules(config: DecoderConfig) -> list[Rule]:
    """Names of an Arcee checkpoint."""
    layer = "model.layers.{i}"
    return [
        *llama.end_rules(config),
        *linear(f"{layer}.input_layernorm", "block.attention_norm", False),
        *linear(f"{layer}.post_attention_layernorm", "block.mlp_norm", False),
        *llama.attention_rules(config, f"{layer}.self_attn"),
        *linear(f"{layer}.mlp.up_proj", "block.mlp.up", config.mlp_bias),
        *linear(f"{layer}.mlp.down_proj", "block.mlp.down", config.mlp_bias),
    ]


ARCEE = Family(("arcee",), decoder_config, rules, llama.ROTARY_TABLES, without_prefix("model"))
