"""Tables of GGUF architectures: tensor names, and which transformations of the exporter are undone.

A new architecture is a function in `gguf_configs.py` or `gguf_mixer_configs.py`, a table of names and a line in
ARCHITECTURES.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

from spinal_jax.models.formats import gguf_configs as configs
from spinal_jax.models.formats import gguf_layouts as layouts
from spinal_jax.models.formats import gguf_mixer_configs as mixers
from spinal_jax.models.formats.gguf_keys import Config, Keys
from spinal_jax.models.formats.gguf_layouts import Joined, Undo

_LAYER = "model.layers.{}."
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_SPLIT_ATTENTION = {
    "attn_q": _LAYER + "self_attn.q_proj",
    "attn_k": _LAYER + "self_attn.k_proj",
    "attn_v": _LAYER + "self_attn.v_proj",
}
_LLAMA_NAMES = {
    **_OUTSIDE,
    **_SPLIT_ATTENTION,
    "attn_norm": _LAYER + "input_layernorm",
    "attn_output": _LAYER + "self_attn.o_proj",
    "ffn_norm": _LAYER + "post_attention_layernorm",
    "ffn_gate": _LAYER + "mlp.gate_proj",
    "ffn_up": _LAYER + "mlp.up_proj",
    "ffn_down": _LAYER + "mlp.down_proj",
}
_NORMED_HEADS = {"attn_q_norm": _LAYER + "self_attn.q_norm", "attn_k_norm": _LAYER + "self_attn.k_norm"}
_GEMMA2_NAMES = {
    **_LLAMA_NAMES,
    "post_attention_norm": _LAYER + "post_attention_layernorm",
    "ffn_norm": _LAYER + "pre_feedforward_layernorm",
    "post_ffw_norm": _LAYER + "post_feedforward_layernorm",
}
_PHI2_NAMES = {
    **_SPLIT_ATTENTION,
    "token_embd": "model.embed_tokens",
    "output_norm": "model.final_layernorm",
    "output": "lm_head",
    "attn_norm": _LAYER + "input_layernorm",
    "attn_qkv": tuple(_SPLIT_ATTENTION.values()),  # exports of the model's first release
    "attn_output": _LAYER + "self_attn.dense",
    "ffn_up": _LAYER + "mlp.fc1",
    "ffn_down": _LAYER + "mlp.fc2",
}
_PHI3_NAMES = {
    **_OUTSIDE,
    "attn_norm": _LAYER + "input_layernorm",
    "attn_qkv": _LAYER + "self_attn.qkv_proj",
    "attn_output": _LAYER + "self_attn.o_proj",
    "ffn_norm": _LAYER + "post_attention_layernorm",
    "ffn_up": _LAYER + "mlp.gate_up_proj",
    "ffn_down": _LAYER + "mlp.down_proj",
}
_GPT2_NAMES = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    "attn_norm": "transformer.h.{}.ln_1",
    "attn_qkv": "transformer.h.{}.attn.c_attn",
    "attn_output": "transformer.h.{}.attn.c_proj",
    "ffn_norm": "transformer.h.{}.ln_2",
    "ffn_up": "transformer.h.{}.mlp.c_fc",
    "ffn_down": "transformer.h.{}.mlp.c_proj",
}
_POST_NORMS = {
    "post_attention_norm": _LAYER + "post_attention_layernorm",
    "post_ffw_norm": _LAYER + "post_feedforward_layernorm",
}
_NO_NORMS = {name: hf for name, hf in _LLAMA_NAMES.items() if "norm" not in name}
_WITHOUT_GATE = {name: hf for name, hf in _LLAMA_NAMES.items() if name != "ffn_gate"}
_OLMO2_NAMES = {**_NO_NORMS, "output_norm": "model.norm", **_POST_NORMS, **_NORMED_HEADS}
_MLP = ("ffn_gate", "ffn_up", "ffn_down")
_EXPERT = _LAYER + "mlp.experts.{e}."
_EXPERT_NAMES = {
    "ffn_gate_inp": _LAYER + "mlp.gate",
    "ffn_gate_exps": _EXPERT + "gate_proj",
    "ffn_up_exps": _EXPERT + "up_proj",
    "ffn_gate_up_exps": (_EXPERT + "gate_proj", _EXPERT + "up_proj"),
    "ffn_down_exps": _EXPERT + "down_proj",
}
_SPARSE_NAMES = {**{name: hf for name, hf in _LLAMA_NAMES.items() if name not in _MLP}, **_EXPERT_NAMES}
_GLM4_NAMES = {
    **_WITHOUT_GATE,
    "post_attention_norm": _LAYER + "post_self_attn_layernorm",
    "ffn_up": _LAYER + "mlp.gate_up_proj",
    "post_ffw_norm": _LAYER + "post_mlp_layernorm",
}
_SEED_OSS_NAMES = {
    **{name: hf for name, hf in _LLAMA_NAMES.items() if name != "ffn_norm"},
    "post_attention_norm": _LAYER + "post_attention_layernorm",
}
_APERTUS_NAMES = {
    **_WITHOUT_GATE,
    **_NORMED_HEADS,
    "attn_norm": _LAYER + "attention_layernorm",
    "ffn_norm": _LAYER + "feedforward_layernorm",
}
_APERTUS_CONSTANTS: dict[str, tuple[str, tuple[int, ...]]] = {
    _LAYER + "mlp.act_fn.alpha_p": ("xielu.alpha_p", (1,)),
    _LAYER + "mlp.act_fn.alpha_n": ("xielu.alpha_n", (1,)),
    _LAYER + "mlp.act_fn.beta": ("xielu.beta", ()),
    _LAYER + "mlp.act_fn.eps": ("xielu.eps", ()),
}
_HUNYUAN_NAMES = {
    **_LLAMA_NAMES,
    "attn_q_norm": _LAYER + "self_attn.query_layernorm",
    "attn_k_norm": _LAYER + "self_attn.key_layernorm",
}
_GPT_OSS_NAMES = {
    **_OUTSIDE,
    **_SPLIT_ATTENTION,
    "attn_norm": _LAYER + "input_layernorm",
    "attn_output": _LAYER + "self_attn.o_proj",
    "attn_sinks": _LAYER + "self_attn.sinks",
    "post_attention_norm": _LAYER + "post_attention_layernorm",
    "ffn_gate_inp": _LAYER + "mlp.router",
}
_GPT_OSS_EXPERTS = {
    _LAYER + f"mlp.experts.{name}": Joined(stored, layouts.alternating, layouts.alternating_shape)
    for name, stored in {
        "gate_up_proj": ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
        "gate_up_proj_bias": ("ffn_gate_exps.bias", "ffn_up_exps.bias"),
        "down_proj": ("ffn_down_exps.weight",),
        "down_proj_bias": ("ffn_down_exps.bias",),
    }.items()
}
_MIXTRAL_NAMES = {
    "ffn_gate_inp": _LAYER + "block_sparse_moe.gate",
    "ffn_gate_exps": _LAYER + "block_sparse_moe.experts.{e}.w1",
    "ffn_up_exps": _LAYER + "block_sparse_moe.experts.{e}.w3",
    "ffn_down_exps": _LAYER + "block_sparse_moe.experts.{e}.w2",
}
_SHARED_NAMES = {
    "ffn_gate_inp_shexp": _LAYER + "mlp.shared_expert_gate",
    "ffn_gate_shexp": _LAYER + "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": _LAYER + "mlp.shared_expert.up_proj",
    "ffn_down_shexp": _LAYER + "mlp.shared_expert.down_proj",
}
_DELTA = _LAYER + "linear_attn."
_DELTA_NAMES = {
    **{name: hf for name, hf in _LLAMA_NAMES.items() if name != "ffn_norm"},
    **_NORMED_HEADS,
    "post_attention_norm": _LAYER + "post_attention_layernorm",
    "ssm_a": _DELTA + "A_log",
    "ssm_dt": _DELTA + "dt_bias",
    "ssm_conv1d": _DELTA + "conv1d",
    "ssm_norm": _DELTA + "norm",
    "ssm_out": _DELTA + "out_proj",
}
_DELTA_WHOLE = ("ssm_a", "ssm_dt")
_QWEN3_NEXT_NAMES = {
    **_DELTA_NAMES,
    **_EXPERT_NAMES,
    **_SHARED_NAMES,
    "ssm_in": _DELTA + "in_proj_qkvz",  # of the first converters; later ones store attn_qkv and attn_gate
    "ssm_ba": _DELTA + "in_proj_ba",
}
_QWEN3_NEXT_INPUTS = {
    _DELTA + "in_proj_qkvz.weight": Joined(
        ("attn_qkv.weight", "attn_gate.weight"), layouts.delta_inputs, layouts.delta_inputs_shape
    )
}
_QWEN35_NAMES = {
    **_DELTA_NAMES,
    "attn_qkv": _DELTA + "in_proj_qkv",
    "attn_gate": _DELTA + "in_proj_z",
    "ssm_alpha": _DELTA + "in_proj_a",
    "ssm_beta": _DELTA + "in_proj_b",
}
_GPT_NEOX_LAYER = "gpt_neox.layers.{}."
_GPT_NEOX_NAMES = {
    "token_embd": "gpt_neox.embed_in",
    "output_norm": "gpt_neox.final_layer_norm",
    "output": "lm_head",
    "attn_norm": _GPT_NEOX_LAYER + "input_layernorm",
    "attn_qkv": _GPT_NEOX_LAYER + "attention.query_key_value",
    "attn_output": _GPT_NEOX_LAYER + "attention.dense",
    "ffn_norm": _GPT_NEOX_LAYER + "post_attention_layernorm",
    "ffn_up": _GPT_NEOX_LAYER + "mlp.dense_h_to_4h",
    "ffn_down": _GPT_NEOX_LAYER + "mlp.dense_4h_to_h",
}
_STABLELM_NAMES = {
    **_LLAMA_NAMES,
    "attn_q_norm": _LAYER + "self_attn.q_layernorm.norms.{e}",
    "attn_k_norm": _LAYER + "self_attn.k_layernorm.norms.{e}",
}
_DEEPSEEK_NAMES = {
    **_LLAMA_NAMES,
    **_EXPERT_NAMES,
    "attn_q_a": _LAYER + "self_attn.q_a_proj",
    "attn_q_a_norm": _LAYER + "self_attn.q_a_layernorm",
    "attn_q_b": _LAYER + "self_attn.q_b_proj",
    "attn_kv_a_mqa": _LAYER + "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": _LAYER + "self_attn.kv_a_layernorm",
    "attn_kv_b": _LAYER + "self_attn.kv_b_proj",  # of older converters; later ones store attn_k_b and attn_v_b
    "exp_probs_b": _LAYER + "mlp.gate.e_score_correction_bias",
    "ffn_gate_shexp": _LAYER + "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": _LAYER + "mlp.shared_experts.up_proj",
    "ffn_down_shexp": _LAYER + "mlp.shared_experts.down_proj",
}
_DEEPSEEK_LATENT = {
    _LAYER + "self_attn.kv_b_proj.weight": Joined(
        ("attn_k_b.weight", "attn_v_b.weight"), layouts.latent_up, layouts.latent_up_shape
    )
}


def _undo_llama(stem: str, config: Config) -> Undo | None:
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    return partial(layouts.halves, heads=heads[stem]) if stem in heads else None


def _undo_gemma(stem: str, config: Config) -> Undo | None:
    return layouts.minus_one if stem.endswith("norm") else None


def _undo_gpt2(stem: str, config: Config) -> Undo | None:
    return layouts.out_in if stem in {"attn_qkv", "attn_output", "ffn_up", "ffn_down"} else None


def _undo_gpt_neox(stem: str, config: Config) -> Undo | None:
    return partial(layouts.fused_by_head, heads=config["num_attention_heads"]) if stem == "attn_qkv" else None


def _undo_shared_gate(stem: str, config: Config) -> Undo | None:
    return layouts.one_row if stem == "ffn_gate_inp_shexp" else None


def _undo_qwen3_next(stem: str, config: Config) -> Undo | None:
    if stem.endswith("norm") and stem != "ssm_norm":
        return layouts.minus_one
    found: dict[str, Undo] = {"ssm_a": layouts.log_of_negative, "ssm_conv1d": layouts.filters}
    return found.get(stem) or _undo_shared_gate(stem, config)


def _undo_qwen35(stem: str, config: Config) -> Undo | None:
    heads = {"key_heads": config["linear_num_key_heads"], "value_heads": config["linear_num_value_heads"]}
    first = 2 * config["linear_num_key_heads"] * config["linear_key_head_dim"]
    found: dict[str, Undo] = {
        "ssm_a": partial(layouts.decays_by_key_head, **heads),
        "ssm_conv1d": partial(layouts.filters_by_key_head, **heads, first=first),
        "ssm_out": partial(layouts.columns_by_key_head, **heads),
        "attn_qkv": partial(layouts.by_key_head, **heads, first=first),
        **dict.fromkeys(("attn_gate", "ssm_alpha", "ssm_beta", "ssm_dt"), partial(layouts.by_key_head, **heads)),
    }
    return found.get(stem) or _undo_qwen3_next(stem, config)


class Architecture(NamedTuple):
    """Tables for one `general.architecture`.

    A name in `names` is that of a tensor without block and suffix, and stands for one HF tensor, a tuple of equal parts
    of one, or with `{e}` one for each expert or head. `whole` are those of HF's that have no suffix.
    `joined`: HF tensors of a block that are made of several stored ones.
    `constants`: HF tensors of a block, the metadata key that holds a number for each block, and their shape.
    """

    config: Callable[[Keys], Config]
    names: Mapping[str, str | tuple[str, ...]]
    undo: Callable[[str, Config], Undo | None] = layouts.undo_nothing
    whole: tuple[str, ...] = ()
    joined: Mapping[str, Joined] = {}
    constants: Mapping[str, tuple[str, tuple[int, ...]]] = {}


ARCHITECTURES = {
    "llama": Architecture(configs.llama, {**_LLAMA_NAMES, **_MIXTRAL_NAMES}, _undo_llama),
    "qwen2": Architecture(configs.qwen2, _LLAMA_NAMES),
    "qwen3": Architecture(configs.qwen3, {**_LLAMA_NAMES, **_NORMED_HEADS}),
    "gemma": Architecture(configs.gemma, _LLAMA_NAMES, _undo_gemma),
    "gemma2": Architecture(configs.gemma2, _GEMMA2_NAMES, _undo_gemma),
    "gemma3": Architecture(configs.gemma3, {**_GEMMA2_NAMES, **_NORMED_HEADS}, _undo_gemma),
    "phi2": Architecture(configs.phi2, _PHI2_NAMES),
    "phi3": Architecture(configs.phi3, _PHI3_NAMES),
    "gpt2": Architecture(configs.gpt2, _GPT2_NAMES, _undo_gpt2),
    "olmo": Architecture(configs.olmo, _NO_NORMS, _undo_llama),
    "olmo2": Architecture(configs.olmo2, _OLMO2_NAMES),
    "olmoe": Architecture(configs.olmoe, {**_SPARSE_NAMES, **_NORMED_HEADS}),
    "smollm3": Architecture(configs.smollm3, _LLAMA_NAMES, _undo_llama),
    "granite": Architecture(configs.granite, _LLAMA_NAMES, _undo_llama),
    "glm4": Architecture(configs.glm4, _GLM4_NAMES),
    "seed_oss": Architecture(configs.seed_oss, _SEED_OSS_NAMES),
    "ernie4_5": Architecture(configs.ernie4_5, _LLAMA_NAMES),
    "apertus": Architecture(configs.apertus, _APERTUS_NAMES, constants=_APERTUS_CONSTANTS),
    "exaone4": Architecture(configs.exaone4, _OLMO2_NAMES),
    "mistral3": Architecture(configs.mistral3, _LLAMA_NAMES, _undo_llama),
    "arcee": Architecture(configs.arcee, _WITHOUT_GATE, _undo_llama),
    "hunyuan-dense": Architecture(configs.hunyuan, _HUNYUAN_NAMES),
    "gpt-oss": Architecture(configs.gpt_oss, _GPT_OSS_NAMES, whole=("attn_sinks",), joined=_GPT_OSS_EXPERTS),
    "gptneox": Architecture(configs.gpt_neox, _GPT_NEOX_NAMES, _undo_gpt_neox),
    "stablelm": Architecture(configs.stablelm, _STABLELM_NAMES),
    "qwen2moe": Architecture(mixers.qwen2_moe, {**_SPARSE_NAMES, **_SHARED_NAMES}, _undo_shared_gate),
    "qwen3moe": Architecture(mixers.qwen3_moe, {**_SPARSE_NAMES, **_NORMED_HEADS}),
    "qwen3next": Architecture(mixers.qwen3_next, _QWEN3_NEXT_NAMES, _undo_qwen3_next, _DELTA_WHOLE, _QWEN3_NEXT_INPUTS),
    "qwen35": Architecture(mixers.qwen35, _QWEN35_NAMES, _undo_qwen35, _DELTA_WHOLE),
    "qwen35moe": Architecture(
        mixers.qwen35_moe, {**_QWEN35_NAMES, **_EXPERT_NAMES, **_SHARED_NAMES}, _undo_qwen35, _DELTA_WHOLE
    ),
    "deepseek2": Architecture(mixers.deepseek2, _DEEPSEEK_NAMES, whole=("exp_probs_b",), joined=_DEEPSEEK_LATENT),
}
