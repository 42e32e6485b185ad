"""Random tiny configs of every dense family: what `test_families` compares with Hugging Face."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 97
SEEDS = range(4)


class Draw:
    """Picks among options so that, over consecutive seeds, every option of every switch comes up in turn."""

    def __init__(self, seed: int):
        self.seed = seed
        self.offsets = np.random.default_rng(0)  # the same for all seeds: another turn for each switch

    def __call__(self, *options: Any) -> Any:
        return options[(self.seed + int(self.offsets.integers(len(options)))) % len(options)]


def rope(draw: Draw, rotated: int, *, longest: int = 20, **partial: float) -> dict[str, Any]:
    """`rope_parameters` of some kind for `rotated` features, over a model of `longest` positions in pretraining."""
    base = {"rope_theta": draw(100.0, 10000.0, 5e5), **partial}
    frequencies = rotated // 2
    return base | draw(
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": longest,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": longest},
        {
            "rope_type": "longrope",
            "original_max_position_embeddings": longest,
            "short_factor": [1.0 + 0.1 * i for i in range(frequencies)],
            "long_factor": [1.0 + 0.7 * i for i in range(frequencies)],
        },
    )


def sizes(draw: Draw) -> dict[str, Any]:
    """What every family but GPT-2 calls by these names."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": draw(48, 64),
        "intermediate_size": draw(80, 40, 72),
        "num_hidden_layers": draw(3, 2, 4),
        "num_attention_heads": 4,
        "max_position_embeddings": draw(64, 32),  # on both sides of the longest prompt
        "tie_word_embeddings": draw(False, True),
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def grouped(draw: Draw, *, free_head: bool = True) -> dict[str, Any]:
    """`sizes` with key heads and, where the family lets it differ, a head size."""
    fields = sizes(draw) | {"num_key_value_heads": draw(2, 1, 4)}
    return fields | ({"head_dim": draw(16, 8, 20)} if free_head else {})


def head(fields: dict[str, Any]) -> int:
    """The size of a head."""
    return fields.get("head_dim", fields["hidden_size"] // fields["num_attention_heads"])


def layers(draw: Draw, depth: int) -> list[str] | None:
    """`layer_types`: the family's own pattern, or one that is nobody's."""
    odd = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"][:depth]
    return draw(None, odd, None)


def llama(draw: Draw) -> dict[str, Any]:
    fields = grouped(draw) | {
        "attention_bias": draw(False, True),
        "mlp_bias": draw(True, False),
        "rms_norm_eps": draw(1e-6, 1e-3),
        "hidden_act": draw("silu", "gelu"),
    }
    return fields | {"rope_parameters": rope(draw, head(fields))}


def mistral(draw: Draw) -> dict[str, Any]:
    fields = grouped(draw) | {"sliding_window": draw(7, None, 25)}
    return fields | {"rope_parameters": rope(draw, head(fields))}


def qwen2(draw: Draw) -> dict[str, Any]:
    fields = grouped(draw, free_head=False)
    return fields | {
        "use_sliding_window": draw(True, False, True),
        "sliding_window": 7,
        "max_window_layers": draw(1, 0, 2),
        "rope_parameters": rope(draw, head(fields)),
    }


def qwen3(draw: Draw) -> dict[str, Any]:
    fields = grouped(draw) | {"attention_bias": draw(False, True)}
    slides = draw(True, False)
    return fields | {
        "use_sliding_window": slides,
        "sliding_window": 7,
        "max_window_layers": 1,
        "layer_types": layers(draw, fields["num_hidden_layers"]) if slides else None,
        "rope_parameters": rope(draw, head(fields)),
    }


def gemma(draw: Draw) -> dict[str, Any]:
    fields = grouped(draw) | {
        "attention_bias": draw(False, True),
        "hidden_act": draw("gelu_pytorch_tanh", "gelu", "silu"),
    }
    return fields | {"rope_parameters": rope(draw, head(fields))}


def gemma2(draw: Draw) -> dict[str, Any]:
    fields = grouped(draw) | {
        "attention_bias": draw(False, True),
        "query_pre_attn_scalar": draw(24, 16, 7),
        "sliding_window": draw(7, 11),
        "final_logit_softcapping": draw(3.0, None),
        "attn_logit_softcapping": draw(None, 2.0, 0.5),
        "hidden_activation": draw("gelu_pytorch_tanh", "silu"),
    }
    return fields | {
        "layer_types": layers(draw, fields["num_hidden_layers"]),
        "rope_parameters": rope(draw, head(fields)),
    }


def gemma3_text(draw: Draw) -> dict[str, Any]:
    fields = grouped(draw) | {
        "attention_bias": draw(False, True),
        "query_pre_attn_scalar": draw(24, 16, 7),
        "sliding_window": draw(7, 11),
        "final_logit_softcapping": draw(3.0, None),
        "attn_logit_softcapping": draw(None, 2.0),
    }
    return fields | {
        "layer_types": layers(draw, fields["num_hidden_layers"]),
        "sliding_window_pattern": 2,
        "rope_parameters": {
            "full_attention": rope(draw, head(fields)),
            "sliding_attention": {"rope_type": "default", "rope_theta": draw(500.0, 10000.0)},
        },
    }


def gemma3(draw: Draw) -> dict[str, Any]:
    text = gemma3_text(draw) | {"final_logit_softcapping": None}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    return {
        "text_config": text,
        "vision_config": vision | {"image_size": 8, "patch_size": 4},
        "mm_tokens_per_image": 4,
        "tie_word_embeddings": text["tie_word_embeddings"],
    }


def phi(draw: Draw) -> dict[str, Any]:
    normed = draw(False, True)
    fields = grouped(draw, free_head=not normed) | {"hidden_act": draw("gelu_new", "gelu"), "qk_layernorm": normed}
    part = draw(0.5, 1.0)
    return fields | {"rope_parameters": rope(draw, int(part * head(fields)), partial_rotary_factor=part)}


def phi3(draw: Draw) -> dict[str, Any]:
    fields = grouped(draw, free_head=False) | {
        "sliding_window": draw(None, 9),
        "original_max_position_embeddings": 20,
        "rms_norm_eps": draw(1e-5, 1e-3),
    }
    part = draw(1.0, 0.5)
    frequencies = int(part * head(fields)) // 2
    scaled = {
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.1 * i for i in range(frequencies)],
        "long_factor": [1.0 + 0.7 * i for i in range(frequencies)],
    }
    kind = draw(scaled, {"rope_type": "default"})
    return fields | {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": part, **kind}}


def gpt2(draw: Draw) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "n_embd": draw(48, 64),
        "n_layer": draw(3, 2, 4),
        "n_head": draw(4, 2),
        "n_inner": draw(None, 40),
        "n_positions": 64,
        "activation_function": draw("gelu_new", "relu", "gelu"),
        "scale_attn_weights": draw(True, True, False),
        "scale_attn_by_inverse_layer_idx": draw(True, False),
        "tie_word_embeddings": draw(True, False),
    }


def gpt_neox(draw: Draw) -> dict[str, Any]:
    fields = sizes(draw) | {
        "hidden_act": draw("gelu", "gelu_fast"),
        "attention_bias": draw(False, True),
        "use_parallel_residual": draw(True, False),
    }
    # A quarter of 12 features is 3, which is rounded up to two pairs.
    part = draw(0.25, 0.5, 1.0)
    rotated = int(part * head(fields))
    kind = rope(draw, rotated, partial_rotary_factor=part)
    if rotated % 2 and kind["rope_type"] in ("yarn", "longrope"):
        kind = {"rope_theta": 500.0, "rope_type": "default", "partial_rotary_factor": part}
    return fields | {"rope_parameters": kind}


def olmo2(draw: Draw) -> dict[str, Any]:
    fields = grouped(draw) | {"attention_bias": draw(False, True), "rms_norm_eps": draw(1e-5, 1e-3)}
    return fields | {"rope_parameters": rope(draw, head(fields))}


def stablelm(draw: Draw) -> dict[str, Any]:
    fields = grouped(draw, free_head=False) | {
        "hidden_size": 64,
        "use_qkv_bias": draw(False, True),
        "qk_layernorm": draw(True, False),
        "use_parallel_residual": draw(False, True, True),
    }
    part = draw(0.25, 0.5, 1.0)
    return fields | {"rope_parameters": rope(draw, int(part * head(fields)), partial_rotary_factor=part)}


def olmo3(draw: Draw) -> dict[str, Any]:
    fields = grouped(draw) | {
        "attention_bias": draw(False, True),
        "rms_norm_eps": draw(1e-5, 1e-3),
        "sliding_window": draw(7, 11, 25),
        "num_hidden_layers": draw(4, 5, 4),
    }
    return fields | {
        "layer_types": layers(draw, 4) if fields["num_hidden_layers"] == 4 else None,
        "rope_parameters": {
            "full_attention": rope(draw, head(fields)),
            "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
        },
    }


def smollm3(draw: Draw) -> dict[str, Any]:
    fields = grouped(draw) | {
        "attention_bias": draw(False, True),
        "mlp_bias": draw(True, False),
        "use_sliding_window": draw(False, True),
        "sliding_window": 7,
        "no_rope_layer_interval": draw(2, 3),
        "no_rope_layers": draw(None, [1, 0, 0, 1], None),
    }
    return fields | {"rope_parameters": rope(draw, head(fields))}


def olmo(draw: Draw) -> dict[str, Any]:
    fields = grouped(draw, free_head=False) | {"attention_bias": draw(False, True), "clip_qkv": draw(None, 0.8, 1.5)}
    return fields | {"rope_parameters": rope(draw, head(fields))}


def olmoe(draw: Draw) -> dict[str, Any]:
    fields = grouped(draw, free_head=False) | {
        "attention_bias": draw(False, True),
        "clip_qkv": draw(0.8, None),
        "num_experts": draw(6, 4),
        "num_experts_per_tok": draw(2, 3),
        "norm_topk_prob": draw(False, True),
    }
    return fields | {"rope_parameters": rope(draw, head(fields))}


def granite(draw: Draw) -> dict[str, Any]:
    return llama(draw) | {
        "embedding_multiplier": draw(12.0, 1.0, 0.5),
        "logits_scaling": draw(8.0, 1.0, 0.5),
        "residual_multiplier": draw(0.22, 1.0),
        "attention_multiplier": draw(0.015625, 0.3, 1.0),
    }


def glm4(draw: Draw) -> dict[str, Any]:
    part = draw(0.5, 1.0, 0.25)
    fields = grouped(draw) | {"head_dim": draw(16, 8, 24), "attention_bias": draw(True, False)}
    return fields | {"rope_parameters": rope(draw, int(part * head(fields)), partial_rotary_factor=part)}


def seed_oss(draw: Draw) -> dict[str, Any]:
    return llama(draw) | {"attention_out_bias": draw(False, True)}


def ernie4_5(draw: Draw) -> dict[str, Any]:
    fields = grouped(draw) | {"use_bias": draw(False, True), "rms_norm_eps": draw(1e-5, 1e-3)}
    return fields | {"rope_parameters": rope(draw, head(fields))}


def apertus(draw: Draw) -> dict[str, Any]:
    fields = grouped(draw) | {
        "hidden_act": draw("xielu", "xielu", "silu"),
        "attention_bias": draw(False, True),
        "dtype": "float32",
    }
    kind = rope(draw, head(fields))
    if kind["rope_type"] == "default":  # which its class replaces where older files say so
        kind |= {"rope_type": "linear", "factor": 3.0}
    return fields | {"rope_parameters": kind}


def exaone4(draw: Draw) -> dict[str, Any]:
    fields = grouped(draw) | {"sliding_window": draw(7, 11, None), "sliding_window_pattern": draw(2, 3)}
    fields["layer_types"] = layers(draw, fields["num_hidden_layers"])
    if fields["sliding_window"] is None:
        fields["layer_types"] = ["full_attention"] * fields["num_hidden_layers"]
    return fields | {"rope_parameters": rope(draw, head(fields))}


def ministral3(draw: Draw) -> dict[str, Any]:
    fields = grouped(draw) | {"sliding_window": draw(None, 7)}
    kind = rope(draw, head(fields), longest=draw(9, 20))
    if kind["rope_type"] == "default":  # as for apertus
        kind |= {"rope_type": "linear", "factor": 3.0}
    kind |= {"original_max_position_embeddings": draw(9, 4), "llama_4_scaling_beta": draw(0.1, 0.7, 0.0)}
    return fields | {"rope_parameters": kind}


def mistral3(draw: Draw) -> dict[str, Any]:
    kind = draw("mistral", "ministral3")
    text = {"mistral": mistral, "ministral3": ministral3}[kind](draw)
    vision = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    return {
        "text_config": text | {"model_type": kind},
        "vision_config": vision | {"num_attention_heads": 1, "image_size": 8, "patch_size": 4},
        "tie_word_embeddings": text["tie_word_embeddings"],
    }


def arcee(draw: Draw) -> dict[str, Any]:
    return llama(draw) | {"hidden_act": draw("relu2", "relu2", "silu"), "hidden_size": 64}


def hunyuan(draw: Draw) -> dict[str, Any]:
    fields = grouped(draw) | {"attention_bias": draw(False, True), "rms_norm_eps": draw(1e-5, 1e-3)}
    kind = rope(draw, head(fields))
    return fields | {"rope_parameters": kind | ({"alpha": 50.0} if kind["rope_type"] == "dynamic" else {})}


def delta_net(draw: Draw, depth: int) -> dict[str, Any]:
    """The gated delta nets of Qwen3-Next and Qwen3.5, and which blocks have one."""
    odd = ["full_attention", "linear_attention", "linear_attention", "full_attention"][:depth]
    heads = draw((2, 4), (2, 2), (1, 3))
    return {
        "layer_types": draw(odd, ["linear_attention"] * depth, None, odd[::-1]),
        "linear_num_key_heads": heads[0],
        "linear_num_value_heads": heads[1],
        "linear_key_head_dim": draw(8, 12),
        "linear_value_head_dim": draw(6, 8, 16),
        "linear_conv_kernel_dim": draw(4, 2, 3),
    }


def qwen3_5_text(draw: Draw) -> dict[str, Any]:
    part = draw(0.25, 0.5, 1.0)
    fields = grouped(draw) | {
        "head_dim": draw(16, 32, 24),
        "attention_bias": draw(False, True),
        "rms_norm_eps": draw(1e-6, 1e-3),
        "hidden_act": draw("silu", "silu", "gelu"),
    }
    fields |= delta_net(draw, fields["num_hidden_layers"])
    return fields | {"rope_parameters": rope(draw, int(part * head(fields)), partial_rotary_factor=part)}


CASES: dict[str, Callable[[Draw], dict[str, Any]]] = {
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma3_text": gemma3_text,
    "gemma3": gemma3,
    "phi": phi,
    "phi3": phi3,
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
    "olmo2": olmo2,
    "stablelm": stablelm,
    "olmo3": olmo3,
    "smollm3": smollm3,
    "olmo": olmo,
    "olmoe": olmoe,
    "granite": granite,
    "glm4": glm4,
    "seed_oss": seed_oss,
    "ernie4_5": ernie4_5,
    "apertus": apertus,
    "exaone4": exaone4,
    "ministral3": ministral3,
    "mistral3": mistral3,
    "arcee": arcee,
    "hunyuan_v1_dense": hunyuan,
    "qwen3_5_text": qwen3_5_text,
}


def draw_config(model_type: str, seed: int) -> PretrainedConfig:
    """A tiny config of a family."""
    return CONFIG_MAPPING[model_type](**CASES[model_type](Draw(seed)))
