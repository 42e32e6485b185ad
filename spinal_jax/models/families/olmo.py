"""OLMo 1 (layer norms without weights) and OLMoE (experts, norms on queries and keys), both with clipped heads."""

from __future__ import annotations

from typing import Any

from spinal_jax.models.config import DecoderConfig, Experts
from spinal_jax.models.families import llama
from spinal_jax.models.families.qwen_moe import expert_rules
from spinal_jax.models.hf_config import HFConfig
from spinal_jax.models.translate import Family, Rule, without_prefix


def common(hf: HFConfig) -> dict[str, Any]:
    """What both share, keyed as in DecoderConfig."""
    hf.defaults(vocab_size=50304, attention_bias=False, tie_word_embeddings=False)
    fields, bias = llama.common(hf), hf.flag("attention_bias")
    clip = None if hf.get("clip_qkv") is None else hf.positive("clip_qkv")
    ropes = (hf.rope(fields["head_dim"]),)
    tied = hf.flag("tie_word_embeddings")
    return fields | {"ropes": ropes, "tied": tied, "qkv_bias": bias, "out_bias": bias, "qkv_clip": clip}


def dense_config(hf: HFConfig) -> DecoderConfig:
    """config.json of an `olmo` model."""
    hf.defaults(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    hf.refuse("rms_norm_eps")  # its norms have 1e-5, always
    return DecoderConfig(**common(hf) | {"norm": "layer", "norm_weight": False, "norm_eps": 1e-5})


def sparse_config(hf: HFConfig) -> DecoderConfig:
    """config.json of an `olmoe` model."""
    hf.defaults(
        hidden_size=2048,
        intermediate_size=2048,
        num_hidden_layers=16,
        num_attention_heads=16,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        num_experts_per_tok=8,
        norm_topk_prob=False,
    )
    count = hf.integer("num_experts", hf.integer("num_local_experts", 64))
    hf.agree("num_local_experts", count, f"num_experts is {count}")
    fields = common(hf)
    experts = Experts(
        count=count,
        per_token=hf.integer("num_experts_per_tok"),
        width=fields["mlp_width"],
        normalise=hf.flag("norm_topk_prob"),
    )
    return DecoderConfig(**fields, qk_norm="full", experts=experts)


def dense_rules(config: DecoderConfig) -> list[Rule]:
    """Names of an OLMo checkpoint, which has no norms to load."""
    layer = "model.layers.{i}"
    ends = [rule for rule in llama.end_rules(config) if rule.hf != "model.norm.weight"]
    return [*ends, *llama.attention_rules(config, f"{layer}.self_attn"), *llama.mlp_rules(config, f"{layer}.mlp")]


def sparse_rules(config: DecoderConfig) -> list[Rule]:
    """Names of an OLMoE checkpoint."""
    layer = "model.layers.{i}"
    norms = llama.query_key_norm_rules(config, f"{layer}.self_attn")
    return [*llama.rules(config), *norms, *expert_rules(f"{layer}.mlp")]


OLMO = Family(("olmo",), dense_config, dense_rules, llama.ROTARY_TABLES, without_prefix("model"))
OLMOE = Family(("olmoe",), sparse_config, sparse_rules, llama.ROTARY_TABLES, without_prefix("model"))
