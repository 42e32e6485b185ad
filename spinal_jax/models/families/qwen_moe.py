"""Qwen3-MoE, and Qwen2-MoE (Qwen1.5-MoE too) with its gated shared expert; dense blocks may stand among the sparse."""

from __future__ import annotations

from typing import Any

from spinal_jax.models.config import DecoderConfig, Experts
from spinal_jax.models.families import llama
from spinal_jax.models.hf_config import HFConfig
from spinal_jax.models.translate import Family, Rule, linear, same, without_prefix


def sparse_layers(hf: HFConfig, depth: int) -> tuple[bool, ...]:
    """[D] every `decoder_sparse_step`-th block has experts, but for those in `mlp_only_layers`."""
    step, dense = hf.integer("decoder_sparse_step", 1), hf.get("mlp_only_layers", [])
    if step < 1:
        raise hf.refusal("decoder_sparse_step", "which is not a whole number above 0")
    if not isinstance(dense, list) or not all(type(i) is int for i in dense):
        raise hf.refusal("mlp_only_layers", "which is not a list of layer numbers")
    return tuple(i not in dense and (i + 1) % step == 0 for i in range(depth))


def common(hf: HFConfig, count: int, **experts: Any) -> dict[str, Any]:
    """The fields that both have, keyed as in DecoderConfig.

    Args:
        hf: config.json.
        count: experts in a sparse block; 0: every block is dense.
        experts: the settings of `Experts` that only one generation has.
    """
    hf.defaults(
        vocab_size=151936,
        hidden_size=2048,
        num_hidden_layers=24,
        max_position_embeddings=32768,
        use_sliding_window=False,
        sliding_window=4096,
        norm_topk_prob=False,
        tie_word_embeddings=False,
    )
    hf.refuse("mlp_bias", "use_mrope")
    fields = llama.common(hf)
    fields |= {"ropes": (hf.rope(fields["head_dim"]),), "tied": hf.flag("tie_word_embeddings")}
    settings = {
        "per_token": hf.integer("num_experts_per_tok"),
        "width": hf.size("moe_intermediate_size"),
        "normalise": hf.flag("norm_topk_prob"),
    }
    sparse = sparse_layers(hf, fields["depth"])
    if not count or not any(sparse):
        return fields
    return fields | {"experts": Experts(count, **settings, **experts), "expert_layers": sparse}


def qwen3_moe_config(hf: HFConfig) -> DecoderConfig:
    """config.json of a `qwen3_moe` model."""
    hf.defaults(
        intermediate_size=6144,
        num_attention_heads=32,
        num_key_value_heads=4,
        attention_bias=False,
        moe_intermediate_size=768,
        num_experts_per_tok=8,
    )
    # Checkpoints of the hub say num_experts, transformers 5 writes num_local_experts.
    count = hf.integer("num_experts", hf.integer("num_local_experts", 128))
    hf.agree("num_local_experts", count, f"num_experts is {count}")
    fields, bias = common(hf, count), hf.flag("attention_bias")
    window = hf.window("sliding_window") if hf.flag("use_sliding_window") else 0
    # A window holds for every block here; max_window_layers is left over from Qwen2.
    hf.ignore("sliding_window", "max_window_layers")
    fields["windows"] = (window,) * fields["depth"]
    return DecoderConfig(**fields, qk_norm="head", qkv_bias=bias, out_bias=bias)


def qwen2_moe_config(hf: HFConfig) -> DecoderConfig:
    """config.json of a `qwen2_moe` model."""
    hf.defaults(
        intermediate_size=5632,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_window_layers=28,
        qkv_bias=True,
        moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632,
        num_experts_per_tok=4,
        num_experts=60,
    )
    hf.refuse("attention_bias")
    shared = hf.integer("shared_expert_intermediate_size")
    fields = common(hf, hf.integer("num_experts"), shared_width=shared, shared_gate=True)
    window = hf.window("sliding_window") if hf.flag("use_sliding_window") else 0
    below = hf.integer("max_window_layers")
    hf.ignore("sliding_window")
    fields["windows"] = llama.layer_windows(
        hf, fields["depth"], window, lambda layer: bool(window) and layer % 2 == 0 and layer < below
    )
    return DecoderConfig(**fields, qkv_bias=hf.flag("qkv_bias"))


def rules(config: DecoderConfig) -> list[Rule]:
    """Names of a Qwen-MoE checkpoint, of its dense and of its sparse blocks."""
    layer = "model.layers.{i}"
    return [
        *llama.rules(config),
        *llama.query_key_norm_rules(config, f"{layer}.self_attn"),
        *expert_rules(f"{layer}.mlp"),
        *shared_rules(config, f"{layer}.mlp.shared_expert"),
        same(f"{layer}.mlp.shared_expert_gate.weight", "block.mlp.shared_gate.weight"),
    ]


def expert_rules(hf: str) -> list[Rule]:
    """The router and the experts under `hf`, one tensor for each expert, as the hub's checkpoints hold them."""
    return [
        same(f"{hf}.gate.weight", "block.mlp.router"),
        same(f"{hf}.experts.{{e}}.gate_proj.weight", "block.mlp.gate"),
        same(f"{hf}.experts.{{e}}.up_proj.weight", "block.mlp.up"),
        same(f"{hf}.experts.{{e}}.down_proj.weight", "block.mlp.down"),
    ]


def shared_rules(config: DecoderConfig, hf: str) -> list[Rule]:
    """The shared expert under `hf`."""
    return [
        *linear(f"{hf}.gate_proj", "block.mlp.shared.gate", config.mlp_bias),
        *linear(f"{hf}.up_proj", "block.mlp.shared.up", config.mlp_bias),
        *linear(f"{hf}.down_proj", "block.mlp.shared.down", config.mlp_bias),
    ]


QWEN3_MOE = Family(
    ("qwen3_moe",), qwen3_moe_config, rules, llama.ROTARY_TABLES, without_prefix("model"), experts_apart=True
)
QWEN2_MOE = Family(
    ("qwen2_moe",), qwen2_moe_config, rules, llama.ROTARY_TABLES, without_prefix("model"), experts_apart=True
)
