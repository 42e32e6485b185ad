"""The metadata of a GGUF file, read key by key, and the parts of a config.json that most architectures share."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from spinal_jax.errors import UserError
from spinal_jax.jsontypes import Json, ReadJson
from spinal_jax.models.hf_config import LARGEST, LARGEST_REAL, MOST_BLOCKS, value_text

Config = Json

# Tensors with divisors of rotary frequencies, which become part of the config.
ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


class Keys:
    """Metadata of a file, read by key without the architecture prefix; `done` raises UserError for unread keys."""

    def __init__(
        self,
        path: Path,
        architecture: str,
        metadata: ReadJson,
        shapes: Mapping[str, tuple[int, ...]],
        read_tensor: Callable[[str], np.ndarray],
    ) -> None:
        self.path = path
        self.metadata = metadata
        self.shapes = shapes
        self.predicting = 0  # blocks behind the last that predict tokens further ahead; set by the architecture
        self._prefix = f"{architecture}."
        self._read_tensor = read_tensor
        self._read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """The value or the default. A list by block must have equal values."""
        self._read.add(key)
        value = self.metadata.get(self._prefix + key, default)
        if isinstance(value, np.ndarray | list):
            distinct = set(np.asarray(value).tolist())
            if len(distinct) != 1:
                raise UserError(f"{self.path}: {self._prefix}{key} differs between blocks, which is not supported")
            value = distinct.pop()
        if value is not None and (wrong := _not_a_setting(key, value)):
            raise UserError(f"{self.path}: {self._prefix}{key} is {value_text(value)}, which is not {wrong}")
        return value

    def blocks(self, key: str, depth: int) -> list[Any] | None:
        """The values of a key by block, or None for a single value or an absent key."""
        value = self.metadata.get(self._prefix + key)
        if not isinstance(value, np.ndarray | list):
            return None
        self._read.add(key)
        if len(value) != depth:
            raise self.refusal(key, f"which has not one value for each of {depth} blocks")
        return np.asarray(value).tolist()

    def need(self, key: str) -> Any:
        """The value of a required key; sizes are at least 1."""
        if (value := self.get(key)) is None:
            raise UserError(f"{self.path} lacks {self._prefix}{key}")
        if type(value) is int and value < 1:
            raise self.refusal(key, "but must be at least 1")
        return value

    def ignore(self, *keys: str) -> None:
        """Marks keys without effect on the forward pass as read."""
        self._read.update(keys)

    def factors(self, tensor: str) -> np.ndarray | None:
        """One of ROPE_FACTORS, or None."""
        if tensor not in self.shapes:
            return None
        self._read.add(tensor)
        return self._read_tensor(tensor).reshape(-1)

    def refusal(self, key: str, why: str) -> UserError:
        """The error that names a key and its value."""
        return UserError(
            f"{self.path}: {self._prefix}{key} is {value_text(self.metadata.get(self._prefix + key))}, {why}"
        )

    def done(self) -> None:
        """Raises UserError for unread keys of the architecture and unread tables of rotary factors."""
        for name in sorted(self.metadata):
            if name.startswith(self._prefix) and (key := name.removeprefix(self._prefix)) not in self._read:
                raise self.refusal(key, "a setting that is not known for this architecture")
        for tensor in ROPE_FACTORS:
            if tensor in self.shapes and tensor not in self._read:
                raise UserError(f"{self.path} has {tensor}, which is not known for {self._prefix[:-1]}")


# Which settings are no whole numbers: real numbers by a part of their name, and the few that are no numbers at all.
_REAL = re.compile(r"epsilon|freq_base|factor|softcapping|scale|beta|multiplier|clamp")
_TEXT = ("rope.scaling.type",)
_FLAGS = ("rope.scaling.finetuned", "attention.causal", "use_parallel_residual", "expert_weights_norm")


def _not_a_setting(key: str, value: object) -> str:
    """The required type of the value of a key, or "" if it is correct."""
    if key in _TEXT:
        return "" if isinstance(value, str) else "a name"
    if key in _FLAGS:
        return "" if isinstance(value, bool) else "true or false"
    if _REAL.search(key):
        finite = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST_REAL
        return "" if finite else "a finite number"
    most = MOST_BLOCKS if key == "block_count" else LARGEST
    return "" if type(value) is int and 0 <= value <= most else f"a whole number from 0 to {most}"


def decoder(keys: Keys, experts: bool = False) -> tuple[Config, int]:
    """Keys that Llama-like configs share, and the head size; `experts`: whether experts are allowed."""
    config = sizes(keys, experts)
    width, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = keys.get("attention.key_length", width // heads)
    if head_dim < 1:
        raise UserError(f"{keys.path}: {heads} attention heads of a width of {width} cannot have {head_dim} features")
    if (value_length := keys.get("attention.value_length", head_dim)) != head_dim:
        raise keys.refusal(
            "attention.value_length", f"but keys have {head_dim}; they must be equal, not {value_length}"
        )
    return config, head_dim


def sizes(keys: Keys, experts: bool = False) -> Config:
    """The part of `decoder` without the sizes of a head."""
    heads = keys.need("attention.head_count")
    if not experts and (keys.get("expert_count", 0) or keys.get("expert_used_count", 0)):
        raise keys.refusal("expert_count", "but experts are not supported in files of this architecture")
    keys.ignore("vocab_size", "tensor_data_layout")
    width = keys.get("feed_forward_length")
    if width is None and experts:  # no block is dense
        width = keys.get("expert_feed_forward_length")
    return {
        "vocab_size": vocabulary(keys),
        "hidden_size": keys.need("embedding_length"),
        "intermediate_size": keys.need("feed_forward_length") if width is None else width,
        "num_hidden_layers": keys.need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.get("attention.head_count_kv", heads),
        "max_position_embeddings": keys.need("context_length"),
        **tokens(keys),
    }


def rms_decoder(keys: Keys, experts: bool = False) -> tuple[Config, int]:
    """`decoder` with RMS norms."""
    config, head_dim = decoder(keys, experts)
    return config | {"rms_norm_eps": keys.need("attention.layer_norm_rms_epsilon")}, head_dim


def vocabulary(keys: Keys) -> int:
    if "token_embd.weight" not in keys.shapes:
        raise UserError(f"{keys.path} lacks the tensor token_embd.weight")
    return keys.shapes["token_embd.weight"][0]


def tokens(keys: Keys) -> Config:
    ids = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    given = {name: keys.metadata.get(f"tokenizer.ggml.{short}_token_id") for name, short in ids.items()}
    return {
        "tie_word_embeddings": "output.weight" not in keys.shapes,
        **{name: token if type(token) is int else None for name, token in given.items()},
    }


def require_derived_head(keys: Keys, config: Config, head_dim: int) -> None:
    """Raises UserError for a head size that config.json of the family cannot express."""
    if head_dim * config["num_attention_heads"] != config["hidden_size"]:
        raise keys.refusal("attention.key_length", "but heads of this architecture share the width equally")


def rope_settings(keys: Keys, head_dim: int) -> Config:
    """`rope_theta` and `rope_scaling` of fully rotated heads."""
    if keys.get("rope.dimension_count", head_dim) != head_dim:
        raise keys.refusal("rope.dimension_count", f"but a head has {head_dim} features, all of them rotated")
    theta = keys.get("rope.freq_base", 10000.0)
    scaling = rope_scaling(keys)
    factors = keys.factors("rope_freqs.weight")
    if factors is not None and np.any(factors != 1):
        if theta <= 0:
            raise keys.refusal("rope.freq_base", "but must be positive")
        if scaling is not None:
            raise keys.refusal("rope.scaling.type", "but the file also has rope_freqs.weight; one of the two must go")
        scaling = frequency_factors(keys, factors, theta)
    return {"rope_theta": theta, "rope_scaling": scaling}


def rope_scaling(keys: Keys) -> Config | None:
    """The scaling of the metadata; as in llama.cpp, a factor without a type is linear."""
    keys.ignore("rope.scaling.finetuned")
    factor = keys.get("rope.scaling.factor", keys.get("rope.scale_linear", 0))
    original = keys.get("rope.scaling.original_context_length")
    kind = keys.get("rope.scaling.type", "linear" if factor not in (0, 1) else "none")
    if kind == "none":
        return None
    if kind == "linear" and factor:
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and factor and original:
        if keys.get("rope.scaling.yarn_ext_factor", 1.0) != 1:
            raise keys.refusal("rope.scaling.yarn_ext_factor", "but only 1 is supported")
        stored = {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow", "attention_factor": "yarn_attn_factor"}
        found = {name: keys.get(f"rope.scaling.{key}") for name, key in stored.items()}
        given = {name: value for name, value in found.items() if value is not None}
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original, **given}
    raise keys.refusal("rope.scaling.type", f"with factor {factor}, which is not a rope scaling that is supported")


def frequency_factors(keys: Keys, factors: np.ndarray, theta: float) -> Config:
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


def partial_rotary(keys: Keys, head_dim: int) -> float:
    """The share of a head that is rotated, such that int(head_dim * share) is the stored number of features."""
    count = keys.get("rope.dimension_count", head_dim)
    share = count / head_dim
    return share if int(head_dim * share) == count else math.nextafter(share, 2)


def rope_parameters(keys: Keys, head_dim: int) -> Config:
    """`rope_settings` in the format of transformers 5."""
    both = rope_settings(keys, head_dim)
    return {"rope_theta": both["rope_theta"], **(both["rope_scaling"] or {"rope_type": "default"})}


def partial_rope_parameters(keys: Keys, head_dim: int) -> Config:
    """`rope_parameters` of heads that are rotated in part."""
    scaling = rope_scaling(keys) or {"rope_type": "default"}
    theta = keys.get("rope.freq_base", 10000.0)
    return {"rope_theta": theta, **scaling, "partial_rotary_factor": partial_rotary(keys, head_dim)}


def layer_types(keys: Keys, depth: int, period: int) -> list[str]:
    """Layer types: sliding by a flag for each block, or all but the last of each stored period, else of `period`."""
    key = "attention.sliding_window_pattern"
    flags = keys.blocks(key, depth)
    if flags is None:
        every = keys.get(key, period)
        flags = [every != 0 and (block + 1) % every != 0 for block in range(depth)]
    elif not all(flag in (0, 1) for flag in flags):
        raise keys.refusal(key, "which is not true or false for each block")
    return ["sliding_attention" if flag else "full_attention" for flag in flags]
