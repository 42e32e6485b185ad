"""GGUF architectures as tables: metadata to an HF config, tensor names, and what the exporter did to some values.

What is undone here is what llama.cpp's `convert_hf_to_gguf.py` does. A new architecture is a config function, a table
of names and a line in ARCHITECTURES.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spinal_jax.errors import UserError
from spinal_jax.models.hf_config import LARGEST, LARGEST_REAL, MOST_BLOCKS, shown

Config = dict[str, Any]
Undo = Callable[[np.ndarray], np.ndarray]

# Tensors that hold no parameter but the divisors of rotary frequencies: they become part of the config.
ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


class Keys:
    """One file's metadata, read key by key without the architecture's prefix; `done` refuses what nobody read."""

    def __init__(
        self,
        path: Path,
        architecture: str,
        metadata: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
        read_tensor: Callable[[str], np.ndarray],
    ) -> None:
        self.path = path
        self.metadata = metadata
        self.shapes = shapes
        self._prefix = f"{architecture}."
        self._read_tensor = read_tensor
        self._read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """The value, or the default. A list with one value for each block must hold the same for all of them."""
        self._read.add(key)
        value = self.metadata.get(self._prefix + key, default)
        if isinstance(value, np.ndarray | list):
            distinct = set(np.asarray(value).tolist())
            if len(distinct) != 1:
                raise UserError(f"{self.path}: {self._prefix}{key} differs between blocks, which is not supported")
            value = distinct.pop()
        if value is not None and (wrong := _not_a_setting(key, value)):
            raise UserError(f"{self.path}: {self._prefix}{key} is {shown(value)}, which is not {wrong}")
        return value

    def need(self, key: str) -> Any:
        """The value of a key that must be there; a size is at least 1."""
        if (value := self.get(key)) is None:
            raise UserError(f"{self.path} lacks {self._prefix}{key}")
        if type(value) is int and value < 1:
            raise self.refusal(key, "but must be at least 1")
        return value

    def ignore(self, *keys: str) -> None:
        """Takes keys as read that change nothing in the forward pass."""
        self._read.update(keys)

    def factors(self, tensor: str) -> np.ndarray | None:
        """One of ROPE_FACTORS, or None where the file has it not."""
        if tensor not in self.shapes:
            return None
        self._read.add(tensor)
        return self._read_tensor(tensor).reshape(-1)

    def refusal(self, key: str, why: str) -> UserError:
        """The error that names a key and its value."""
        return UserError(f"{self.path}: {self._prefix}{key} is {shown(self.metadata.get(self._prefix + key))}, {why}")

    def done(self) -> None:
        """Refuses every key of the architecture and every table of rotary factors that was not read."""
        for name in sorted(self.metadata):
            if name.startswith(self._prefix) and (key := name.removeprefix(self._prefix)) not in self._read:
                raise self.refusal(key, "a setting that is not known for this architecture")
        for tensor in ROPE_FACTORS:
            if tensor in self.shapes and tensor not in self._read:
                raise UserError(f"{self.path} has {tensor}, which is not known for {self._prefix[:-1]}")


# Which settings are no whole numbers: real numbers by a part of their name, and the few that are no numbers at all.
_REAL = re.compile(r"epsilon|freq_base|factor|softcapping|scale|beta|multiplier|clamp")
_TEXT, _FLAGS = ("rope.scaling.type",), ("rope.scaling.finetuned", "attention.causal")


def _not_a_setting(key: str, value: Any) -> str:
    """What the value of a key would have to be, or nothing where it is that."""
    if key in _TEXT:
        return "" if isinstance(value, str) else "a name"
    if key in _FLAGS:
        return "" if isinstance(value, bool) else "true or false"
    if _REAL.search(key):
        finite = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST_REAL
        return "" if finite else "a finite number"
    most = MOST_BLOCKS if key == "block_count" else LARGEST
    return "" if type(value) is int and 0 <= value <= most else f"a whole number from 0 to {most}"


def _decoder(keys: Keys) -> tuple[Config, int]:
    """The keys that the Llama-like configs share, and the size of a head."""
    width, heads = keys.need("embedding_length"), keys.need("attention.head_count")
    head_dim = keys.get("attention.key_length", width // heads)
    if (value_length := keys.get("attention.value_length", head_dim)) != head_dim:
        raise keys.refusal(
            "attention.value_length", f"but keys have {head_dim}; they must be equal, not {value_length}"
        )
    if keys.get("expert_count", 0) or keys.get("expert_used_count", 0):
        raise keys.refusal("expert_count", "but mixtures of experts are not supported as GGUF")
    keys.ignore("vocab_size", "tensor_data_layout")
    config = {
        "vocab_size": _vocabulary(keys),
        "hidden_size": width,
        "intermediate_size": keys.need("feed_forward_length"),
        "num_hidden_layers": keys.need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.get("attention.head_count_kv", heads),
        "max_position_embeddings": keys.need("context_length"),
        **_tokens(keys),
    }
    return config, head_dim


def _rms_decoder(keys: Keys) -> tuple[Config, int]:
    """As `_decoder`, for RMS norms."""
    config, head_dim = _decoder(keys)
    return config | {"rms_norm_eps": keys.need("attention.layer_norm_rms_epsilon")}, head_dim


def _vocabulary(keys: Keys) -> int:
    if "token_embd.weight" not in keys.shapes:
        raise UserError(f"{keys.path} lacks the tensor token_embd.weight")
    return keys.shapes["token_embd.weight"][0]


def _tokens(keys: Keys) -> Config:
    ids = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    given = {name: keys.metadata.get(f"tokenizer.ggml.{short}_token_id") for name, short in ids.items()}
    return {
        "tie_word_embeddings": "output.weight" not in keys.shapes,
        **{name: token if type(token) is int else None for name, token in given.items()},
    }


def _derived_head(keys: Keys, config: Config, head_dim: int) -> None:
    """Refuses a head size that the family's config.json has no key for."""
    if head_dim * config["num_attention_heads"] != config["hidden_size"]:
        raise keys.refusal("attention.key_length", "but heads of this architecture share the width equally")


def _rope(keys: Keys, head_dim: int) -> Config:
    """`rope_theta` and `rope_scaling` of a head that is rotated whole."""
    if keys.get("rope.dimension_count", head_dim) != head_dim:
        raise keys.refusal("rope.dimension_count", f"but a head has {head_dim} features, all of them rotated")
    theta = keys.get("rope.freq_base", 10000.0)
    scaling = _rope_scaling(keys)
    factors = keys.factors("rope_freqs.weight")
    if factors is not None and np.any(factors != 1):
        if scaling is not None:
            raise keys.refusal("rope.scaling.type", "but the file also has rope_freqs.weight; one of the two must go")
        scaling = _frequency_factors(keys, factors, theta)
    return {"rope_theta": theta, "rope_scaling": scaling}


def _rope_scaling(keys: Keys) -> Config | None:
    """The scaling that metadata states; as in llama.cpp, a factor without a type is linear."""
    keys.ignore("rope.scaling.finetuned")
    factor = keys.get("rope.scaling.factor", keys.get("rope.scale_linear", 0))
    original = keys.get("rope.scaling.original_context_length")
    kind = keys.get("rope.scaling.type", "linear" if factor not in (0, 1) else "none")
    if kind == "none":
        return None
    if kind == "linear" and factor:
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and factor and original:
        betas = {f"beta_{end}": keys.get(f"rope.scaling.yarn_beta_{end}") for end in ("fast", "slow")}
        given = {key: value for key, value in betas.items() if value is not None}
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original, **given}
    raise keys.refusal("rope.scaling.type", f"with factor {factor}, which is not a rope scaling that is supported")


def _frequency_factors(keys: Keys, factors: np.ndarray, theta: float) -> Config:
    """The scaling whose frequencies are divided by a stored table.

    Llama 3.1 and later store the table and not what it was computed from. Where it is that of their published
    setting the config says so; any other table is handed on as it is.
    """
    factor, low, high, original = float(factors.max()), 1.0, 4.0, 8192
    wavelengths = 2 * math.pi * theta ** (np.arange(factors.size) / factors.size)
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    if np.allclose(1 / ((1 - smooth) / factor + smooth), factors, rtol=1e-4):  # the table is float32 of float32 powers
        ends = {"low_freq_factor": low, "high_freq_factor": high}
        return {"rope_type": "llama3", "factor": factor, **ends, "original_max_position_embeddings": original}
    table = factors.tolist()
    return {
        "rope_type": "longrope",
        "short_factor": table,
        "long_factor": table,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": keys.need("context_length"),
    }


def _partial_rotary(keys: Keys, head_dim: int) -> float:
    """The share of a head that is rotated, such that int(head_dim * share) is the stored number of features."""
    count = keys.get("rope.dimension_count", head_dim)
    share = count / head_dim
    return share if int(head_dim * share) == count else math.nextafter(share, 2)


def _llama(keys: Keys) -> Config:
    config, head_dim = _rms_decoder(keys)
    config |= {"head_dim": head_dim, "hidden_act": "silu", **_rope(keys, head_dim)}
    if window := keys.get("attention.sliding_window", 0):
        return {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": window, **config}
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": "blk.0.attn_q.bias" in keys.shapes,
        "mlp_bias": "blk.0.ffn_up.bias" in keys.shapes,
        **config,
    }


def _qwen2(keys: Keys) -> Config:
    config, head_dim = _rms_decoder(keys)
    _derived_head(keys, config, head_dim)
    named = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu"}
    return named | config | {"use_sliding_window": False, **_rope(keys, head_dim)}


def _qwen3(keys: Keys) -> Config:
    config, head_dim = _rms_decoder(keys)
    return {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_act": "silu",
        "head_dim": head_dim,
        "attention_bias": "blk.0.attn_q.bias" in keys.shapes,
        "use_sliding_window": False,
        **config,
        **_rope(keys, head_dim),
    }


def _gemma_decoder(keys: Keys) -> tuple[Config, int]:
    config, head_dim = _rms_decoder(keys)
    config |= {"head_dim": head_dim, "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False}
    return config | _rope(keys, head_dim), head_dim


def _gemma(keys: Keys) -> Config:
    config, _ = _gemma_decoder(keys)
    activation = config["hidden_activation"]  # under its older name too, which transformers 5 reads
    return {"model_type": "gemma", "architectures": ["GemmaForCausalLM"], "hidden_act": activation, **config}


def _gemma2(keys: Keys) -> Config:
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


def _gemma3(keys: Keys) -> Config:
    config, head_dim = _gemma_decoder(keys)
    window = keys.get("attention.sliding_window", 0)
    period = keys.get("attention.sliding_window_pattern", 6) if window else 1
    blocks = range(1, config["num_hidden_layers"] + 1)
    return {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        **config,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": keys.get("final_logit_softcapping"),
        "sliding_window": window or config["max_position_embeddings"],
        "layer_types": ["sliding_attention" if block % period else "full_attention" for block in blocks],
        "rope_local_base_freq": keys.get("rope.freq_base_swa", 10000.0),
        "query_pre_attn_scalar": _gemma_query_scale(config, head_dim, blocks_of_27b=62),
    }


def _gemma_query_scale(config: Config, head_dim: int, blocks_of_27b: int) -> int:
    """Not stored: llama.cpp knows the 27B model by its depth, where the scale is not the head size."""
    is_27b = config["num_hidden_layers"] == blocks_of_27b
    return config["hidden_size"] // config["num_attention_heads"] if is_27b else head_dim


def _phi2(keys: Keys) -> Config:
    config, head_dim = _decoder(keys)
    _derived_head(keys, config, head_dim)
    return {
        "model_type": "phi",
        "architectures": ["PhiForCausalLM"],
        **config,
        "hidden_act": "gelu_new",
        "layer_norm_eps": keys.need("attention.layer_norm_epsilon"),
        "partial_rotary_factor": _partial_rotary(keys, head_dim),
        "qk_layernorm": False,
        "rope_theta": keys.get("rope.freq_base", 10000.0),
        "rope_scaling": None,
    }


def _phi3(keys: Keys) -> Config:
    config, head_dim = _rms_decoder(keys)
    _derived_head(keys, config, head_dim)
    limit = config["max_position_embeddings"]
    original = keys.get("rope.scaling.original_context_length", limit)
    long, short = keys.factors("rope_factors_long.weight"), keys.factors("rope_factors_short.weight")
    attention = keys.get("rope.scaling.attn_factor", 1.0)
    scaling = None
    if long is not None and short is not None:
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
        "partial_rotary_factor": _partial_rotary(keys, head_dim),
        "rope_theta": keys.get("rope.freq_base", 10000.0),
        "rope_scaling": scaling,
    }


def _gpt2(keys: Keys) -> Config:
    width, heads = keys.need("embedding_length"), keys.need("attention.head_count")
    if keys.get("attention.head_count_kv", heads) != heads:
        raise keys.refusal("attention.head_count_kv", f"but gpt2 has as many as query heads, {heads}")
    keys.ignore("vocab_size")
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": "gelu_new",
        "vocab_size": _vocabulary(keys),
        "n_embd": width,
        "n_head": heads,
        "n_inner": keys.get("feed_forward_length", 4 * width),
        "n_layer": keys.need("block_count"),
        "n_positions": keys.need("context_length"),
        "layer_norm_epsilon": keys.need("attention.layer_norm_epsilon"),
        **_tokens(keys),
    }


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


def minus_one(weight: np.ndarray) -> np.ndarray:
    """Gemma's norms multiply by 1 + weight; the file holds that sum. Returns float32."""
    return weight.astype(np.float32) - np.float32(1)


def transposed(weight: np.ndarray) -> np.ndarray:
    """GPT-2 keeps matrices as [in, out]; the file holds [out, in]."""
    return np.ascontiguousarray(weight.T)


def halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Llama's query and key rows: the file pairs the features that rotate together, HF keeps two halves of a head."""
    paired = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return paired.swapaxes(1, 2).reshape(weight.shape)


def _undo_nothing(stem: str, config: Config) -> Undo | None:
    return None


def _undo_llama(stem: str, config: Config) -> Undo | None:
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    return partial(halves, heads=heads[stem]) if stem in heads else None


def _undo_gemma(stem: str, config: Config) -> Undo | None:
    return minus_one if stem.endswith("norm") else None


def _undo_gpt2(stem: str, config: Config) -> Undo | None:
    return transposed if stem in {"attn_qkv", "attn_output", "ffn_up", "ffn_down"} else None


class Architecture(NamedTuple):
    """How files of one `general.architecture` read."""

    config: Callable[[Keys], Config]
    names: Mapping[str, str | tuple[str, ...]]  # stem of a tensor's name -> HF's; a tuple is one tensor in equal parts
    undo: Callable[[str, Config], Undo | None] = _undo_nothing


ARCHITECTURES = {
    "llama": Architecture(_llama, _LLAMA_NAMES, _undo_llama),
    "qwen2": Architecture(_qwen2, _LLAMA_NAMES),
    "qwen3": Architecture(_qwen3, {**_LLAMA_NAMES, **_NORMED_HEADS}),
    "gemma": Architecture(_gemma, _LLAMA_NAMES, _undo_gemma),
    "gemma2": Architecture(_gemma2, _GEMMA2_NAMES, _undo_gemma),
    "gemma3": Architecture(_gemma3, {**_GEMMA2_NAMES, **_NORMED_HEADS}, _undo_gemma),
    "phi2": Architecture(_phi2, _PHI2_NAMES),
    "phi3": Architecture(_phi3, _PHI3_NAMES),
    "gpt2": Architecture(_gpt2, _GPT2_NAMES, _undo_gpt2),
}
