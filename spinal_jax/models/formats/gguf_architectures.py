"""Tables of GGUF architectures: tensor names and value transformations of the exporter.

The transformations invert those of llama.cpp's `convert_hf_to_gguf.py`. A new architecture is a function in
`gguf_configs.py`, a table of names and a line in ARCHITECTURES.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from spinal_jax.models.formats import gguf_configs as configs
from spinal_jax.models.formats.gguf_keys import Config, Keys

Undo = Callable[[np.ndarray], np.ndarray]

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
_OLMOE_NAMES = {
    **{name: hf for name, hf in _LLAMA_NAMES.items() if name not in ("ffn_gate", "ffn_up", "ffn_down")},
    **_NORMED_HEADS,
    "ffn_gate_inp": _LAYER + "mlp.gate",
    "ffn_gate_exps": _LAYER + "mlp.experts.{e}.gate_proj",
    "ffn_up_exps": _LAYER + "mlp.experts.{e}.up_proj",
    "ffn_down_exps": _LAYER + "mlp.experts.{e}.down_proj",
}
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
    _LAYER + "mlp.experts.gate_up_proj": ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
    _LAYER + "mlp.experts.gate_up_proj_bias": ("ffn_gate_exps.bias", "ffn_up_exps.bias"),
    _LAYER + "mlp.experts.down_proj": ("ffn_down_exps.weight",),
    _LAYER + "mlp.experts.down_proj_bias": ("ffn_down_exps.bias",),
}


def minus_one(weight: np.ndarray) -> np.ndarray:
    """Gemma's norms multiply by 1 + weight; the file holds that sum. Returns float32."""
    return weight.astype(np.float32) - np.float32(1)


def out_in(weight: np.ndarray) -> np.ndarray:
    """GPT-2 stores matrices as [in, out]; the file stores [out, in]."""
    return np.ascontiguousarray(weight.T)


def halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Query and key rows of Llama: the file interleaves rotated pairs, HF stores two halves of a head."""
    paired = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return paired.swapaxes(1, 2).reshape(weight.shape)


def alternating(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Joins expert weights [E, out, in] or biases [E, out] into [E, in, n out] or [E, n out] with alternating
    outputs."""
    joined = np.stack(parts, axis=2).reshape(len(parts[0]), -1, *parts[0].shape[2:])
    return joined.swapaxes(1, 2) if joined.ndim == 3 else joined


def _undo_nothing(stem: str, config: Config) -> Undo | None:
    return None


def _undo_llama(stem: str, config: Config) -> Undo | None:
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    return partial(halves, heads=heads[stem]) if stem in heads else None


def _undo_gemma(stem: str, config: Config) -> Undo | None:
    return minus_one if stem.endswith("norm") else None


def _undo_gpt2(stem: str, config: Config) -> Undo | None:
    return out_in if stem in {"attn_qkv", "attn_output", "ffn_up", "ffn_down"} else None


class Architecture(NamedTuple):
    """Tables for one `general.architecture`.

    A name in `names` is that of a tensor without block and suffix, and stands for one HF tensor, a tuple of equal parts
    of one, or with `{e}` one for each expert. `whole` are those of HF's that have no suffix.
    `experts`: HF tensors [experts, in, out] by the stored ones, [experts, out, in], whose outputs alternate in them.
    `constants`: HF tensors of a block, the metadata key that holds a number for each block, and their shape.
    """

    config: Callable[[Keys], Config]
    names: Mapping[str, str | tuple[str, ...]]
    undo: Callable[[str, Config], Undo | None] = _undo_nothing
    whole: tuple[str, ...] = ()
    experts: Mapping[str, tuple[str, ...]] = {}
    constants: Mapping[str, tuple[str, tuple[int, ...]]] = {}


ARCHITECTURES = {
    "llama": Architecture(configs.llama, _LLAMA_NAMES, _undo_llama),
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
    "olmoe": Architecture(configs.olmoe, _OLMOE_NAMES),
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
    "gpt-oss": Architecture(configs.gpt_oss, _GPT_OSS_NAMES, whole=("attn_sinks",), experts=_GPT_OSS_EXPERTS),
}
