"""From the metadata of a GGUF file to a config.json, one function for each architecture."""

from __future__ import annotations

import math
from typing import Any

from spinal_jax.models.formats.gguf_keys import (
    Config,
    Keys,
    decoder,
    layer_types,
    partial_rope_parameters,
    partial_rotary,
    require_derived_head,
    rms_decoder,
    rope_parameters,
    rope_settings,
    tokens,
    vocabulary,
)


def llama(keys: Keys) -> Config:
    """Llama; Mistral where there is a window, Mixtral where there are experts."""
    config, head_dim = rms_decoder(keys, experts=True)
    config |= {"head_dim": head_dim, "hidden_act": "silu", **rope_settings(keys, head_dim)}
    window, count, per_token = (
        keys.get(key, 0) for key in ("attention.sliding_window", "expert_count", "expert_used_count")
    )
    if count or per_token:
        if not 1 <= per_token <= count:
            raise keys.refusal("expert_used_count", f"but expert_count is {count}")
        named = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "sliding_window": window or None}
        return named | {"num_local_experts": count, "num_experts_per_tok": per_token, **config}
    if window:
        return {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": window, **config}
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": "blk.0.attn_q.bias" in keys.shapes,
        "mlp_bias": "blk.0.ffn_up.bias" in keys.shapes,
        **config,
    }


def qwen2(keys: Keys) -> Config:
    config, head_dim = rms_decoder(keys)
    require_derived_head(keys, config, head_dim)
    named = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu"}
    return named | config | {"use_sliding_window": False, **rope_settings(keys, head_dim)}


def qwen3(keys: Keys) -> Config:
    config, head_dim = rms_decoder(keys)
    return {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_act": "silu",
        "head_dim": head_dim,
        "attention_bias": "blk.0.attn_q.bias" in keys.shapes,
        "use_sliding_window": False,
        **config,
        **rope_settings(keys, head_dim),
    }


def _gemma_decoder(keys: Keys) -> tuple[Config, int]:
    config, head_dim = rms_decoder(keys)
    config |= {"head_dim": head_dim, "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False}
    return config | rope_settings(keys, head_dim), head_dim


def gemma(keys: Keys) -> Config:
    config, _ = _gemma_decoder(keys)
    activation = config["hidden_activation"]  # under its older name too, which transformers 5 reads
    return {"model_type": "gemma", "architectures": ["GemmaForCausalLM"], "hidden_act": activation, **config}


def gemma2(keys: Keys) -> Config:
    config, head_dim = _gemma_decoder(keys)
    return {
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        **config,
        "attn_logit_softcapping": keys.get("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": keys.get("final_logit_softcapping", 30.0),
        "sliding_window": keys.get("attention.sliding_window", 4096),
        "query_pre_attn_scalar": _gemma_query_scale(config, head_dim, blocks_of_27b=46),
    }


def gemma3(keys: Keys) -> Config:
    config, head_dim = _gemma_decoder(keys)
    window, depth = keys.get("attention.sliding_window", 0), config["num_hidden_layers"]
    return {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        **config,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": keys.get("final_logit_softcapping"),
        "sliding_window": window or config["max_position_embeddings"],
        "layer_types": layer_types(keys, depth, 6) if window else ["full_attention"] * depth,
        "rope_local_base_freq": keys.get("rope.freq_base_swa", 10000.0),
        "query_pre_attn_scalar": _gemma_query_scale(config, head_dim, blocks_of_27b=62),
    }


def _gemma_query_scale(config: Config, head_dim: int, blocks_of_27b: int) -> int:
    """Not stored: llama.cpp knows the 27B model by its depth, where the scale is not the head size."""
    is_27b = config["num_hidden_layers"] == blocks_of_27b
    return config["hidden_size"] // config["num_attention_heads"] if is_27b else head_dim


def phi2(keys: Keys) -> Config:
    config, head_dim = decoder(keys)
    require_derived_head(keys, config, head_dim)
    return {
        "model_type": "phi",
        "architectures": ["PhiForCausalLM"],
        **config,
        "hidden_act": "gelu_new",
        "layer_norm_eps": keys.need("attention.layer_norm_epsilon"),
        "partial_rotary_factor": partial_rotary(keys, head_dim),
        "qk_layernorm": False,
        "rope_theta": keys.get("rope.freq_base", 10000.0),
        "rope_scaling": None,
    }


def phi3(keys: Keys) -> Config:
    config, head_dim = rms_decoder(keys)
    require_derived_head(keys, config, head_dim)
    limit = config["max_position_embeddings"]
    original = keys.get("rope.scaling.original_context_length", limit)
    long, short = keys.factors("rope_factors_long.weight"), keys.factors("rope_factors_short.weight")
    attention = keys.get("rope.scaling.attn_factor", 1.0)
    scaling = None
    if long is not None and short is not None:
        if original < 2:
            raise keys.refusal("rope.scaling.original_context_length", "but longrope takes its logarithm")
        scaling = {"type": "longrope", "long_factor": long.tolist(), "short_factor": short.tolist()}
        by_rule = math.sqrt(1 + math.log(max(limit / original, 1.0)) / math.log(original))
        if not math.isclose(attention, by_rule, rel_tol=1e-6):
            scaling["attention_factor"] = attention
    elif attention != 1.0:
        raise keys.refusal("rope.scaling.attn_factor", "but the file lacks the tables rope_factors_long and _short")
    if keys.get("rope.scaling.type", "longrope") not in ("longrope", "none"):
        raise keys.refusal("rope.scaling.type", "but phi3 knows only longrope")
    return {
        "model_type": "phi3",
        "architectures": ["Phi3ForCausalLM"],
        **config,
        "hidden_act": "silu",
        "sliding_window": keys.get("attention.sliding_window", 0) or None,
        "original_max_position_embeddings": original,
        "partial_rotary_factor": partial_rotary(keys, head_dim),
        "rope_theta": keys.get("rope.freq_base", 10000.0),
        "rope_scaling": scaling,
    }


def gpt2(keys: Keys) -> Config:
    width, heads = keys.need("embedding_length"), keys.need("attention.head_count")
    if keys.get("attention.head_count_kv", heads) != heads:
        raise keys.refusal("attention.head_count_kv", f"but gpt2 has as many as query heads, {heads}")
    keys.ignore("vocab_size")
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": "gelu_new",
        "vocab_size": vocabulary(keys),
        "n_embd": width,
        "n_head": heads,
        "n_inner": keys.get("feed_forward_length", 4 * width),
        "n_layer": keys.need("block_count"),
        "n_positions": keys.need("context_length"),
        "layer_norm_epsilon": keys.need("attention.layer_norm_epsilon"),
        **tokens(keys),
    }


def _dense(keys: Keys, model_type: str, architecture: str, **more: Any) -> Config:
    """The config of a family that reads like Llama's, and what it has `more`."""
    config, head_dim = rms_decoder(keys)
    named = {"model_type": model_type, "architectures": [architecture], "head_dim": head_dim}
    return named | config | {"rope_parameters": rope_parameters(keys, head_dim), **more}


def _has(keys: Keys, tensor: str) -> bool:
    return f"blk.0.{tensor}" in keys.shapes


def _biases(keys: Keys) -> Config:
    return {"attention_bias": _has(keys, "attn_q.bias"), "mlp_bias": _has(keys, "ffn_up.bias")}


def smollm3(keys: Keys) -> Config:
    # Which blocks have no rope is not stored: llama.cpp knows the one pattern that was published.
    free = {"no_rope_layer_interval": 4, "use_sliding_window": False, "hidden_act": "silu"}
    return _dense(keys, "smollm3", "SmolLM3ForCausalLM", **free, **_biases(keys))


def granite(keys: Keys) -> Config:
    return _dense(
        keys,
        "granite",
        "GraniteForCausalLM",
        hidden_act="silu",
        attention_multiplier=keys.need("attention.scale"),
        embedding_multiplier=keys.get("embedding_scale", 1.0),
        residual_multiplier=keys.get("residual_scale", 1.0),
        logits_scaling=keys.get("logit_scale", 1.0),
        **_biases(keys),
    )


def seed_oss(keys: Keys) -> Config:
    out = {"attention_out_bias": _has(keys, "attn_output.bias"), "hidden_act": "silu"}
    return _dense(keys, "seed_oss", "SeedOssForCausalLM", **out, **_biases(keys))


def arcee(keys: Keys) -> Config:
    return _dense(keys, "arcee", "ArceeForCausalLM", hidden_act="relu2", **_biases(keys))


def ernie4_5(keys: Keys) -> Config:
    return _dense(keys, "ernie4_5", "Ernie4_5ForCausalLM", hidden_act="silu", use_bias=_has(keys, "attn_q.bias"))


def hunyuan(keys: Keys) -> Config:
    bias = _has(keys, "attn_q.bias")  # a dynamic rope is stored as the theta that it amounts to
    return _dense(keys, "hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM", hidden_act="silu", attention_bias=bias)


def apertus(keys: Keys) -> Config:
    bias = _has(keys, "attn_q.bias")
    return _dense(keys, "apertus", "ApertusForCausalLM", hidden_act="xielu", attention_bias=bias)


def exaone4(keys: Keys) -> Config:
    config = _dense(keys, "exaone4", "Exaone4ForCausalLM", hidden_act="silu")
    window, depth = keys.get("attention.sliding_window", 0), config["num_hidden_layers"]
    layers = layer_types(keys, depth, 4) if window else ["full_attention"] * depth
    return config | {"sliding_window": window or None, "layer_types": layers}


def glm4(keys: Keys) -> Config:
    config, head_dim = rms_decoder(keys)
    return {
        "model_type": "glm4",
        "architectures": ["Glm4ForCausalLM"],
        "head_dim": head_dim,
        "hidden_act": "silu",
        **config,
        "attention_bias": _has(keys, "attn_q.bias"),
        "rope_parameters": partial_rope_parameters(keys, head_dim),
    }


def gpt_neox(keys: Keys) -> Config:
    config, head_dim = decoder(keys)
    require_derived_head(keys, config, head_dim)
    is_20b = (config["num_hidden_layers"], config["hidden_size"]) == (44, 6144)
    return {
        "model_type": "gpt_neox",
        "architectures": ["GPTNeoXForCausalLM"],
        **config,
        # Not stored: GPT-NeoX-20B was trained with an approximation, Pythia without.
        "hidden_act": "gelu_fast" if is_20b else "gelu",
        "layer_norm_eps": keys.need("attention.layer_norm_epsilon"),
        "attention_bias": _has(keys, "attn_qkv.bias"),
        "use_parallel_residual": keys.get("use_parallel_residual", True),
        "rope_parameters": partial_rope_parameters(keys, head_dim),
    }


def stablelm(keys: Keys) -> Config:
    config, head_dim = decoder(keys)
    require_derived_head(keys, config, head_dim)
    return {
        "model_type": "stablelm",
        "architectures": ["StableLmForCausalLM"],
        "hidden_act": "silu",
        **config,
        "layer_norm_eps": keys.need("attention.layer_norm_epsilon"),
        "qk_layernorm": _has(keys, "attn_q_norm.weight"),
        "use_qkv_bias": _has(keys, "attn_q.bias"),
        "use_parallel_residual": keys.get("use_parallel_residual", False),
        "rope_parameters": partial_rope_parameters(keys, head_dim),
    }


def mistral3(keys: Keys) -> Config:
    """Mistral Small 3 as it is, Ministral 3 where queries grow with their position."""
    window = keys.get("attention.sliding_window", 0) or None
    config = _dense(keys, "mistral", "MistralForCausalLM", hidden_act="silu", sliding_window=window)
    if not (growth := keys.get("attention.temperature_scale", 0)):
        return config
    turned = config["rope_parameters"]
    if (original := turned.get("original_max_position_embeddings")) is None:
        raise keys.refusal("rope.scaling.type", "but queries that grow with their position come with yarn")
    if keys.get("attention.temperature_length", original) != original:
        raise keys.refusal("attention.temperature_length", f"but the rope's original context is {original}")
    if (multiplier := keys.get("rope.scaling.yarn_log_multiplier", 1.0)) != 1:
        raise keys.refusal("rope.scaling.yarn_log_multiplier", f"but only 1 is supported, not {multiplier}")
    turned |= {"llama_4_scaling_beta": growth, "mscale": 1.0, "mscale_all_dim": 1.0}
    return config | {"model_type": "ministral3", "architectures": ["Ministral3ForCausalLM"]}


def olmo(keys: Keys) -> Config:
    config, head_dim = decoder(keys)
    require_derived_head(keys, config, head_dim)
    if (eps := keys.get("attention.layer_norm_epsilon", 1e-5)) != 1e-5:
        raise keys.refusal("attention.layer_norm_epsilon", f"but norms of this architecture have 1e-5, not {eps}")
    return {
        "model_type": "olmo",
        "architectures": ["OlmoForCausalLM"],
        "hidden_act": "silu",
        **config,
        "clip_qkv": keys.get("attention.clamp_kqv"),
        "rope_parameters": rope_parameters(keys, head_dim),
    }


def olmo2(keys: Keys) -> Config:
    """OLMo 2; with a window OLMo 3, whose sliding blocks have a rope without scaling."""
    bias = _has(keys, "attn_q.bias")
    if not (window := keys.get("attention.sliding_window", 0)):
        return _dense(keys, "olmo2", "Olmo2ForCausalLM", hidden_act="silu", attention_bias=bias)
    config = _dense(keys, "olmo3", "Olmo3ForCausalLM", hidden_act="silu", attention_bias=bias)
    full = config["rope_parameters"]
    theta = keys.get("rope.freq_base_swa", full["rope_theta"])
    ropes = {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": theta}}
    layers = layer_types(keys, config["num_hidden_layers"], 4)
    return config | {"sliding_window": window, "layer_types": layers, "rope_parameters": ropes}


def olmoe(keys: Keys) -> Config:
    config, head_dim = rms_decoder(keys, experts=True)
    require_derived_head(keys, config, head_dim)
    return {
        "model_type": "olmoe",
        "architectures": ["OlmoeForCausalLM"],
        "hidden_act": "silu",
        **config,
        "attention_bias": _has(keys, "attn_q.bias"),
        "clip_qkv": None,
        "num_experts": keys.need("expert_count"),
        "num_experts_per_tok": keys.need("expert_used_count"),
        "norm_topk_prob": False,
        "rope_parameters": rope_parameters(keys, head_dim),
    }


def gpt_oss(keys: Keys) -> Config:
    config, head_dim = rms_decoder(keys, experts=True)
    depth, inner = config["num_hidden_layers"], config["intermediate_size"]
    if (width := keys.get("expert_feed_forward_length", inner)) != inner:
        raise keys.refusal("expert_feed_forward_length", f"but feed_forward_length is {inner}, not {width}")
    turned = rope_parameters(keys, head_dim)
    return {
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        "head_dim": head_dim,
        **config,
        "attention_bias": _has(keys, "attn_q.bias"),
        "num_local_experts": keys.need("expert_count"),
        "num_experts_per_tok": keys.need("expert_used_count"),
        "sliding_window": keys.need("attention.sliding_window"),
        "layer_types": layer_types(keys, depth, 2),
        # Not stored: the model rounds yarn's bounds nowhere.
        "rope_parameters": turned | ({"truncate": False} if turned["rope_type"] == "yarn" else {}),
    }
