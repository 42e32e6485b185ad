"""DeepSeek-V2 and DeepSeek-V3/R1 (and Moonlight): multi-head latent attention, shared and routed experts.

The line before them, DeepSeek-LLM, is a plain `llama`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from spinal_jax.models.config import DecoderConfig, Experts, LatentAttention
from spinal_jax.models.families import llama
from spinal_jax.models.families.qwen_moe import expert_rules, shared_rules
from spinal_jax.models.hf_config import HFConfig
from spinal_jax.models.translate import Family, Rule, linear, same, without_prefix


def common(hf: HFConfig) -> dict[str, Any]:
    """What both versions share: the latent attention, its rotary embedding, keyed as in DecoderConfig."""
    hf.defaults(
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        attention_bias=False,
        moe_layer_freq=1,
        tie_word_embeddings=False,
    )
    hf.values |= {"head_dim": hf.size("qk_rope_head_dim")}  # whatever config.json says, as in Hugging Face
    hf.ignore("qk_head_dim", "ep_size")  # follows from others; how training spread the experts over machines
    fields = llama.common(hf)
    if fields["kv_heads"] != fields["heads"]:
        raise hf.refusal("num_key_value_heads", f"but latent attention has one key for each of {fields['heads']} heads")
    latent = LatentAttention(
        query_rank=hf.integer("q_lora_rank", 0),  # null: queries of full rank
        key_value_rank=hf.size("kv_lora_rank"),
        nope_dim=hf.integer("qk_nope_head_dim"),
        rope_dim=hf.size("qk_rope_head_dim"),
        value_dim=hf.size("v_head_dim"),
    )
    rope = replace(hf.rope(latent.rope_dim), interleaved=True)
    bias = hf.flag("attention_bias")
    head_dim = latent.nope_dim + latent.rope_dim
    return fields | {
        "head_dim": head_dim,
        "ropes": (rope,),
        "query_scale": head_dim**-0.5 * _yarn_scale(hf, rope.factor),
        "tied": hf.flag("tie_word_embeddings"),
        "qkv_bias": bias,
        "out_bias": bias,
        "latent": latent,
    }


def _yarn_scale(hf: HFConfig, factor: float) -> float:
    """How much yarn's `mscale_all_dim` sharpens the softmax: its square multiplies the scores, as it would q and k."""
    scaling = HFConfig(hf.get("rope_parameters", hf.get("rope_scaling")) or {}, path=hf.path)
    sharpen = scaling.number("mscale_all_dim", 0)
    return (0.1 * sharpen * math.log(factor) + 1.0) ** 2 if factor > 1 else 1.0


def with_experts(hf: HFConfig, fields: dict[str, Any], **experts: Any) -> DecoderConfig:
    """The decoder of `fields`, with experts in every `moe_layer_freq`-th block from `first_k_dense_replace` on.

    `experts` are the settings of `Experts` that the versions differ in.
    """
    first, step = hf.integer("first_k_dense_replace"), hf.integer("moe_layer_freq")
    if step < 1:
        raise hf.refusal("moe_layer_freq", "which is not a whole number above 0")
    count, per_token = hf.integer("n_routed_experts"), hf.integer("num_experts_per_tok")
    width, shared = hf.size("moe_intermediate_size"), hf.integer("n_shared_experts")
    scale = hf.number("routed_scaling_factor")
    sparse = tuple(layer >= first and layer % step == 0 for layer in range(fields["depth"]))
    if not any(sparse):
        return DecoderConfig(**fields)
    mixture = Experts(count, per_token, width, shared_width=width * shared, scale=scale, **experts)
    return DecoderConfig(**fields, experts=mixture, expert_layers=sparse)


def v2_config(hf: HFConfig) -> DecoderConfig:
    """config.json of a `deepseek_v2` model (V2, V2-Lite, Coder-V2)."""
    hf.defaults(
        vocab_size=102400,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=2048,
        first_k_dense_replace=0,
        n_routed_experts=64,
        n_shared_experts=2,
        moe_intermediate_size=1407,
        routed_scaling_factor=1.0,
        mlp_bias=False,
        scoring_func="softmax",
        topk_method="greedy",
    )
    fields = common(hf) | {"mlp_bias": hf.flag("mlp_bias")}
    # DeepSeek's first code could renormalise; Hugging Face's never does, and no released checkpoint asks for it.
    hf.ignore("norm_topk_prob")
    hf.choice("scoring_func", {"softmax": None})
    limited = hf.choice("topk_method", {"greedy": False, "group_limited_greedy": True})
    groups, kept = (hf.integer("n_group"), hf.integer("topk_group")) if limited else (1, 1)
    hf.ignore("n_group", "topk_group")
    return with_experts(hf, fields, scoring="softmax", normalise=False, groups=groups, groups_kept=kept, group_top=1)


def v3_config(hf: HFConfig) -> DecoderConfig:
    """config.json of a `deepseek_v3` model (V3, V3.1, R1, Moonlight)."""
    hf.defaults(
        vocab_size=129280,
        hidden_size=7168,
        intermediate_size=18432,
        num_hidden_layers=61,
        num_attention_heads=128,
        num_key_value_heads=128,
        max_position_embeddings=4096,
        first_k_dense_replace=3,
        n_routed_experts=256,
        n_shared_experts=1,
        n_group=8,
        topk_group=4,
        num_experts_per_tok=8,
        moe_intermediate_size=2048,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
        rope_interleave=True,
        scoring_func="sigmoid",
        topk_method="noaux_tc",
    )
    fields = common(hf)
    if not hf.flag("rope_interleave"):
        fields["ropes"] = tuple(replace(rope, interleaved=False) for rope in fields["ropes"])
    hf.refuse("mlp_bias")
    hf.choice("scoring_func", {"sigmoid": None})
    hf.choice("topk_method", {"noaux_tc": None})
    hf.ignore("num_nextn_predict_layers", "num_mtp_layers")  # blocks behind the last, see IGNORED
    return with_experts(
        hf,
        fields,
        scoring="sigmoid",
        normalise=hf.flag("norm_topk_prob"),
        groups=hf.integer("n_group"),
        groups_kept=hf.integer("topk_group"),
        group_top=2,
        correction_bias=True,
    )


def rules(config: DecoderConfig) -> list[Rule]:
    """Names of a DeepSeek checkpoint, of its dense and of its sparse blocks."""
    layer, latent = "model.layers.{i}", config.latent
    assert latent is not None
    attention = f"{layer}.self_attn"
    low_rank = [
        *linear(f"{attention}.q_a_proj", "block.attention.query_down", config.qkv_bias),
        same(f"{attention}.q_a_layernorm.weight", "block.attention.query_norm.weight"),
        *linear(f"{attention}.q_b_proj", "block.attention.query_up", False),
    ]
    return [
        *llama.end_rules(config),
        same(f"{layer}.input_layernorm.weight", "block.attention_norm.weight"),
        same(f"{layer}.post_attention_layernorm.weight", "block.mlp_norm.weight"),
        *(low_rank if latent.query_rank else linear(f"{attention}.q_proj", "block.attention.query", False)),
        *linear(f"{attention}.kv_a_proj_with_mqa", "block.attention.latent_down", config.qkv_bias),
        same(f"{attention}.kv_a_layernorm.weight", "block.attention.latent_norm.weight"),
        *linear(f"{attention}.kv_b_proj", "block.attention.latent_up", False),
        *linear(f"{attention}.o_proj", "block.attention.out", config.out_bias),
        *llama.mlp_rules(config, f"{layer}.mlp"),
        *expert_rules(f"{layer}.mlp"),
        same(f"{layer}.mlp.gate.e_score_correction_bias", "block.mlp.correction"),
        *shared_rules(config, f"{layer}.mlp.shared_experts"),
    ]


# The published V3 and R1 hold a block behind their last that guesses two tokens ahead; Hugging Face leaves it out too.
IGNORED = (*llama.ROTARY_TABLES, r"model\.layers\.61\..*")

DEEPSEEK_V2 = Family(("deepseek_v2",), v2_config, rules, llama.ROTARY_TABLES, without_prefix("model"))
DEEPSEEK_V3 = Family(("deepseek_v3",), v3_config, rules, IGNORED, without_prefix("model"))
