"""`gguf_configs.py` of architectures with experts, delta nets and latent attention.

Which blocks have a delta net is read from the tensors.
"""

from __future__ import annotations

from spinal_jax.models.formats.gguf_keys import (
    Config,
    Keys,
    partial_rope_parameters,
    require_derived_head,
    rms_decoder,
    rope_parameters,
    rope_scaling,
    sizes,
)

# Groups of experts, and groups kept, of published models with so many experts; older converters left them out.
_GROUPS = {64: (1, 1), 160: (8, 3), 256: (8, 4)}
_SOFTMAX, _SIGMOID = 1, 2  # of expert_gating_func


def _rows(keys: Keys, depth: int, tensor: str) -> int:
    """The rows of a tensor in the first block that has it, or 0."""
    shapes = (keys.shapes.get(f"blk.{block}.{tensor}", ()) for block in range(depth))
    return next((shape[-2] for shape in shapes if len(shape) >= 2), 0)


def _mixture(keys: Keys, config: Config) -> Config:
    """The experts, which every block has: the format has no dense blocks among them."""
    inner = _rows(keys, config["num_hidden_layers"], "ffn_gate_exps.weight") or config["intermediate_size"]
    count, per_token = keys.need("expert_count"), keys.need("expert_used_count")
    if per_token > count:
        raise keys.refusal("expert_used_count", f"but expert_count is {count}")
    return {
        "num_experts": count,
        "num_experts_per_tok": per_token,
        "moe_intermediate_size": keys.get("expert_feed_forward_length", inner),
    }


def _shared(keys: Keys, config: Config) -> Config:
    inner = _rows(keys, config["num_hidden_layers"], "ffn_gate_shexp.weight")
    return {"shared_expert_intermediate_size": keys.get("expert_shared_feed_forward_length", inner)}


def qwen2_moe(keys: Keys) -> Config:
    config, head_dim = rms_decoder(keys, experts=True)
    require_derived_head(keys, config, head_dim)
    return {
        "model_type": "qwen2_moe",
        "architectures": ["Qwen2MoeForCausalLM"],
        "hidden_act": "silu",
        **config,
        **_mixture(keys, config),
        **_shared(keys, config),
        "decoder_sparse_step": 1,
        "norm_topk_prob": keys.get("expert_weights_norm", False),
        "qkv_bias": "blk.0.attn_q.bias" in keys.shapes,
        "use_sliding_window": False,
        "rope_parameters": rope_parameters(keys, head_dim),
    }


def qwen3_moe(keys: Keys) -> Config:
    config, head_dim = rms_decoder(keys, experts=True)
    return {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_act": "silu",
        "head_dim": head_dim,
        **config,
        **_mixture(keys, config),
        "decoder_sparse_step": 1,
        "norm_topk_prob": keys.get("expert_weights_norm", True),
        "attention_bias": "blk.0.attn_q.bias" in keys.shapes,
        "use_sliding_window": False,
        "rope_parameters": rope_parameters(keys, head_dim),
    }


def _with_delta_nets(keys: Keys, experts: bool) -> Config:
    """What Qwen3-Next and Qwen3.5 share."""
    config, head_dim = rms_decoder(keys, experts)
    keys.predicting = keys.get("nextn_predict_layers", 0)
    if (depth := config["num_hidden_layers"] - keys.predicting) < 1:
        raise keys.refusal("nextn_predict_layers", f"but block_count is {config['num_hidden_layers']}")
    keys.ignore("full_attention_interval", "rope.dimension_sections")  # the latter is for images
    nets = [f"blk.{block}.ssm_out.weight" in keys.shapes for block in range(depth)]
    first = nets.index(False) if False in nets else 0
    inner, heads = keys.need("ssm.inner_size"), keys.need("ssm.time_step_rank")
    if inner % heads:
        raise keys.refusal("ssm.inner_size", f"which {heads} value heads cannot share equally")
    return config | {
        "num_hidden_layers": depth,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "attention_bias": f"blk.{first}.attn_q.bias" in keys.shapes,
        "layer_types": ["linear_attention" if net else "full_attention" for net in nets],
        "linear_num_key_heads": keys.need("ssm.group_count"),
        "linear_num_value_heads": heads,
        "linear_key_head_dim": keys.need("ssm.state_size"),
        "linear_value_head_dim": inner // heads,
        "linear_conv_kernel_dim": keys.need("ssm.conv_kernel"),
        "rope_parameters": partial_rope_parameters(keys, head_dim),
    }


def qwen3_next(keys: Keys) -> Config:
    config = _with_delta_nets(keys, experts=True)
    named = {"model_type": "qwen3_next", "architectures": ["Qwen3NextForCausalLM"], "decoder_sparse_step": 1}
    normed = {"norm_topk_prob": keys.get("expert_weights_norm", True)}
    return named | config | _mixture(keys, config) | _shared(keys, config) | normed


def qwen35(keys: Keys) -> Config:
    named = {"model_type": "qwen3_5_text", "architectures": ["Qwen3_5ForCausalLM"]}
    return named | _with_delta_nets(keys, experts=False)


def qwen35_moe(keys: Keys) -> Config:
    config = _with_delta_nets(keys, experts=True)
    config |= _mixture(keys, config) | _shared(keys, config)
    if not keys.get("expert_weights_norm", True):
        raise keys.refusal("expert_weights_norm", "but the weights of the chosen experts are always normalised")
    return {"model_type": "qwen3_5_moe_text", "architectures": ["Qwen3_5MoeForCausalLM"]} | config


def deepseek2(keys: Keys) -> Config:
    """DeepSeek-V3 where the router has sigmoids, else V2."""
    config = sizes(keys, experts=True)
    rank, rotated = keys.need("attention.kv_lora_rank"), keys.need("rope.dimension_count")
    # Of the compressed attention in later files, which have a key for the heads as they are.
    key_length, value_length = (keys.get(f"attention.{name}_length") for name in ("key", "value"))
    key_length = keys.get("attention.key_length_mla", key_length)
    value_length = keys.get("attention.value_length_mla", value_length)
    if key_length is None or value_length is None or key_length < rotated:
        raise keys.refusal("attention.key_length", f"which is not that of heads with {rotated} rotated features")
    count, per_token = keys.need("expert_count"), keys.need("expert_used_count")
    if count not in _GROUPS and keys.get("expert_group_count") is None:
        raise keys.refusal("expert_group_count", f"and {count} experts are not those of a model that is known without")
    groups, kept = _GROUPS.get(count, (1, 1))
    groups, kept = keys.get("expert_group_count", groups), keys.get("expert_group_used_count", kept)
    normalised, gating = keys.get("expert_weights_norm", False), keys.get("expert_gating_func", _SOFTMAX)
    inner = _rows(keys, config["num_hidden_layers"], "ffn_gate_exps.weight")
    config |= {
        "num_key_value_heads": config["num_attention_heads"],
        "rms_norm_eps": keys.need("attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_kv_a_mqa.bias" in keys.shapes,
        "q_lora_rank": keys.get("attention.q_lora_rank", 0) or None,
        "kv_lora_rank": rank,
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": key_length - rotated,
        "v_head_dim": value_length,
        "first_k_dense_replace": keys.get("leading_dense_block_count", 0),
        "moe_layer_freq": 1,
        "n_routed_experts": count,
        "num_experts_per_tok": per_token,
        "n_shared_experts": keys.get("expert_shared_count", 0),
        "moe_intermediate_size": keys.get("expert_feed_forward_length", inner),
        "routed_scaling_factor": keys.get("expert_weights_scale", 1.0),
        "norm_topk_prob": normalised,
        "n_group": groups,
        "topk_group": kept,
        "rope_parameters": _latent_rope(keys),
    }
    if gating == _SIGMOID:
        return {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], **config}
    if gating != _SOFTMAX or normalised:
        key = "expert_weights_norm" if normalised else "expert_gating_func"
        raise keys.refusal(key, "but routers of this architecture have sigmoids, or a softmax that is not normalised")
    method = "group_limited_greedy" if groups > 1 else "greedy"
    return {"model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"], **config, "topk_method": method}


def _latent_rope(keys: Keys) -> Config:
    scaling = rope_scaling(keys) or {"rope_type": "default"}
    if scaling["rope_type"] == "yarn":
        # Stored as a tenth of mscale_all_dim, which mscale equals in all published models.
        sharpened = round(keys.need("rope.scaling.yarn_log_multiplier") * 10, 6)
        scaling |= {"mscale": sharpened, "mscale_all_dim": sharpened}
    return {"rope_theta": keys.get("rope.freq_base", 10000.0), **scaling}
