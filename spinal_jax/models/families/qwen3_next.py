"""Qwen3-Next: gated delta nets in three of four blocks, gated attention in the fourth; experts with a shared one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from spinal_jax.models.config import DecoderConfig, DeltaNet, Experts
from spinal_jax.models.families import llama
from spinal_jax.models.families.qwen_moe import expert_rules, shared_rules, sparse_layers
from spinal_jax.models.hf_config import HFConfig
from spinal_jax.models.translate import Family, Rule, by_head, linear, same, without_prefix


def common(hf: HFConfig, *mrope: str) -> dict[str, Any]:
    """The fields that Qwen3.5 shares, keyed as in DecoderConfig; `mrope` are keys of its rope that images ask for."""
    hf.defaults(
        max_position_embeddings=32768,
        head_dim=256,
        attention_bias=False,
        linear_conv_kernel_dim=4,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_num_key_heads=16,
        linear_num_value_heads=32,
        tie_word_embeddings=False,
    )
    hf.refuse("use_sliding_window", "mlp_bias")
    hf.ignore("sliding_window", "max_window_layers", "mamba_ssm_dtype")
    hf.ignore("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings")  # blocks that guess ahead, see IGNORED
    hf.agree("attn_output_gate", True, "attention always has an output gate")
    if hf.get("output_gate_type", "silu") not in ("silu", "swish"):
        raise hf.refusal("output_gate_type", "but the gate of a delta net is a silu")
    fields, bias = llama.common(hf), hf.flag("attention_bias")
    return fields | {
        "ropes": (hf.rope(fields["head_dim"], default_partial=0.25, extra=mrope),),
        "tied": hf.flag("tie_word_embeddings"),
        "norm_unit_offset": True,
        "norm_float32": True,
        "qk_norm": "head",
        "qkv_bias": bias,
        "out_bias": bias,
        "attention_gate": True,
        **delta_fields(hf, fields["depth"]),
    }


def delta_fields(hf: HFConfig, depth: int) -> dict[str, Any]:
    """The delta nets, and which blocks have one; none where every block has attention."""
    interval = hf.size("full_attention_interval", 4)
    names = ["full_attention", "linear_attention"]
    layers = hf.get("layer_types", [names[bool((layer + 1) % interval)] for layer in range(depth)])
    if not isinstance(layers, list) or len(layers) != depth or not all(layer in names for layer in layers):
        raise hf.refusal("layer_types", f"which is not {depth} times {' or '.join(names)}")
    delta = DeltaNet(
        key_heads=hf.size("linear_num_key_heads"),
        value_heads=hf.size("linear_num_value_heads"),
        key_dim=hf.size("linear_key_head_dim"),
        value_dim=hf.size("linear_value_head_dim"),
        kernel=hf.size("linear_conv_kernel_dim"),
    )
    if "linear_attention" not in layers:
        return {}
    return {"delta": delta, "delta_layers": tuple(layer == "linear_attention" for layer in layers)}


def decoder_config(hf: HFConfig) -> DecoderConfig:
    """config.json of a `qwen3_next` model."""
    hf.defaults(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=48,
        num_attention_heads=16,
        num_key_value_heads=2,
        decoder_sparse_step=1,
        moe_intermediate_size=512,
        shared_expert_intermediate_size=512,
        num_experts_per_tok=10,
        num_experts=512,
        norm_topk_prob=True,
    )
    fields = common(hf)
    return DecoderConfig(**fields, **mixture(hf, sparse_layers(hf, fields["depth"]), hf.flag("norm_topk_prob")))


def mixture(hf: HFConfig, sparse: tuple[bool, ...], normalise: bool) -> dict[str, Any]:
    """The experts of the blocks that are `sparse`, keyed as in DecoderConfig; none where every block is dense."""
    count, per_token = hf.integer("num_experts"), hf.integer("num_experts_per_tok")
    width, shared = hf.size("moe_intermediate_size"), hf.integer("shared_expert_intermediate_size")
    if not count or not any(sparse):
        return {}
    experts = Experts(count, per_token, width, shared_width=shared, shared_gate=True, normalise=normalise)
    return {"experts": experts, "expert_layers": sparse}


def rules(config: DecoderConfig) -> list[Rule]:
    """Names of a Qwen3-Next checkpoint, whose delta nets keep the rows of a key head together."""
    net, delta = "model.layers.{i}.linear_attn", config.delta
    if delta is None:
        return shared_with_qwen3_5(config)
    groups = delta.value_heads // delta.key_heads
    values = groups * delta.value_dim
    wide = {"query": delta.key_dim, "key": delta.key_dim, "value": values, "gate": values}
    narrow = {"rate": groups, "decay": groups}

    def rule(hf: str, sizes: dict[str, int]) -> Rule:
        ours = [f"block.delta.{name}.weight" for name in sizes]
        return by_head(f"{net}.{hf}.weight", ours, delta.key_heads, tuple(sizes.values()))

    return [*shared_with_qwen3_5(config), rule("in_proj_qkvz", wide), rule("in_proj_ba", narrow)]


def shared_with_qwen3_5(config: DecoderConfig) -> list[Rule]:
    """All but the input layers of the delta nets."""
    layer = "model.layers.{i}"
    attention, net, mlp = f"{layer}.self_attn", f"{layer}.linear_attn", f"{layer}.mlp"
    return [
        *llama.end_rules(config),
        *linear(f"{layer}.input_layernorm", "block.attention_norm", False),
        *linear(f"{layer}.post_attention_layernorm", "block.mlp_norm", False),
        gated_query(attention, "weight", config),
        *([gated_query(attention, "bias", config)] if config.qkv_bias else []),
        *(rule for rule in llama.attention_rules(config, attention) if ".q_proj." not in rule.hf),
        *llama.query_key_norm_rules(config, attention),
        same(f"{net}.A_log", "block.delta.decay_log"),
        same(f"{net}.dt_bias", "block.delta.decay_bias"),
        *linear(f"{net}.norm", "block.delta.norm", False),
        *linear(f"{net}.out_proj", "block.delta.out", False),
        Rule(f"{net}.conv1d.weight", FILTERS, _split_filters, lambda p, c: np.concatenate(p)[:, None]),
        *llama.mlp_rules(config, mlp),
        *expert_rules(mlp),
        *shared_rules(config, f"{mlp}.shared_expert"),
        same(f"{mlp}.shared_expert_gate.weight", "block.mlp.shared_gate.weight"),
    ]


FILTERS = tuple(f"block.delta.{name}_filter" for name in ("query", "key", "value"))


def _split_filters(tensor: np.ndarray, config: DecoderConfig) -> Sequence[np.ndarray]:
    if tensor.ndim != 3 or tensor.shape[1] != 1:
        raise ValueError("it is not [features, 1, tokens]")
    return np.split(tensor[:, 0], np.cumsum(input_rows(config))[:-1])


def input_rows(config: DecoderConfig) -> tuple[int, int, int]:
    """How many rows queries, keys and values of the delta nets have."""
    delta = config.delta
    assert delta is not None
    keys = delta.key_heads * delta.key_dim
    return keys, keys, delta.value_heads * delta.value_dim


def gated_query(hf: str, part: str, config: DecoderConfig) -> Rule:
    """q_proj, which has the rows of a head's query and of its gate behind each other."""
    ours = tuple(f"block.attention.{name}.{part}" for name in ("query", "gate"))
    return by_head(f"{hf}.q_proj.{part}", ours, config.heads, (config.head_dim, config.head_dim))


# Blocks behind the last that guess tokens ahead; Hugging Face leaves them out too.
IGNORED = (*llama.ROTARY_TABLES, r"mtp\..*")

QWEN3_NEXT = Family(("qwen3_next",), decoder_config, rules, IGNORED, without_prefix("model"), experts_apart=True)
