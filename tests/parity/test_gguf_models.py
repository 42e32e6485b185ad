"""GGUF models against Hugging Face's: names, layouts and configs of every architecture, there and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from spinal_jax.models.formats.open import open_checkpoint

from .gguf_files import write

# From an HF model to GGUF as llama.cpp's convert_hf_to_gguf.py does it, then back through our reader to an HF model.
# The names come from the gguf package, so nothing here knows our tables.


@dataclass(frozen=True)
class Case:
    """An HF config, and how llama.cpp would write it."""

    architecture: gguf.MODEL_ARCH
    model_type: str
    config: Mapping[str, Any]
    keys: Mapping[str, Any]
    change: Callable[[str, np.ndarray, Any], np.ndarray] = lambda name, tensor, config: tensor
    extra: Mapping[str, np.ndarray] = field(default_factory=dict)
    tolerance: float = 0.0  # of the logits, relative to the largest


def permuted(name: str, tensor: np.ndarray, config: Any) -> np.ndarray:
    """llama.cpp's LlamaModel.permute."""
    if "q_proj" not in name and "k_proj" not in name:
        return tensor
    heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def plus_one(name: str, tensor: np.ndarray, config: Any) -> np.ndarray:
    return tensor + np.float32(1) if name.endswith("norm.weight") else tensor


def turned(name: str, tensor: np.ndarray, config: Any) -> np.ndarray:
    convolutions = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")
    return np.ascontiguousarray(tensor.T) if name.endswith(convolutions) else tensor


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "rms_norm_eps": 3e-5,
    "tie_word_embeddings": False,
    "pad_token_id": None,
}
SMALL_KEYS = {
    ".embedding_length": 32,
    ".feed_forward_length": 48,
    ".block_count": 2,
    ".attention.head_count": 4,
    ".attention.head_count_kv": 2,
    ".context_length": 128,
    ".attention.layer_norm_rms_epsilon": 3e-5,
    ".rope.freq_base": 1e6,
}
HEADS_OF_16 = {".attention.key_length": 16, ".attention.value_length": 16}
THETA = {"rope_theta": 1e6}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def llama3_factors(theta: float, head: int, original: int) -> np.ndarray:
    """llama.cpp's rope_freqs.weight, frequency by frequency."""
    factors = []
    for frequency in 1.0 / (theta ** (torch.arange(0, head, 2, dtype=torch.float32) / head)):
        wavelength = 2 * np.pi / float(frequency)
        smooth = (original / wavelength - 1) / (4 - 1)
        inside = 1 / ((1 - smooth) / 8 + smooth)
        factors.append(1.0 if wavelength < original / 4 else 8.0 if wavelength > original else inside)
    return np.array(factors, np.float32)


def llama(config: Mapping[str, Any] = {}, keys: Mapping[str, Any] = {}, **more: Any) -> Case:
    return Case(gguf.MODEL_ARCH.LLAMA, "llama", SMALL | THETA | config, SMALL_KEYS | keys, change=permuted, **more)


GEMMA = SMALL | {"head_dim": 16, "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh"}
PHI3 = SMALL | {"num_key_value_heads": 2, "original_max_position_embeddings": 32, "rope_theta": 1e4}
PHI3_KEYS = SMALL_KEYS | {".rope.freq_base": 1e4, ".rope.scaling.original_context_length": 32}
LONG, SHORT = [1.0, 2.5, 6.0, 9.0], [1.0, 1.1, 1.2, 1.5]

CASES = {
    "llama": llama(),
    "llama, tied": llama({"tie_word_embeddings": True}, {".rope.dimension_count": 8, ".vocab_size": 64}),
    "llama, head size of its own": llama({"head_dim": 16}, HEADS_OF_16 | {".rope.dimension_count": 16}),
    "llama, biases": llama({"attention_bias": True, "mlp_bias": True}),
    "llama, one kv head": llama({"num_key_value_heads": 1}, {".attention.head_count_kv": 1}),
    "llama, linear": llama(
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {".rope.scaling.type": "linear", ".rope.scaling.factor": 4.0},
    ),
    "llama, linear as once written": llama(
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, {".rope.scale_linear": 4.0}
    ),
    "llama, yarn": llama(
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
        {
            ".rope.scaling.type": "yarn",
            ".rope.scaling.factor": 4.0,
            ".rope.scaling.original_context_length": 32,
            ".rope.scaling.finetuned": True,
        },
    ),
    "llama, llama3": llama(
        {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8192}},
        extra={"rope_freqs.weight": llama3_factors(1e6, 8, 8192)},
    ),
    "llama, factors of no published model": llama(
        {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 60}},
        extra={"rope_freqs.weight": llama3_factors(1e6, 8, 60)},
        tolerance=1e-5,  # the frequencies are divided by a float32 factor, not computed in one go
    ),
    "mistral": Case(
        gguf.MODEL_ARCH.LLAMA,
        "mistral",
        SMALL | THETA | {"sliding_window": 8},
        SMALL_KEYS | {".attention.sliding_window": 8},
        change=permuted,
    ),
    "qwen2": Case(gguf.MODEL_ARCH.QWEN2, "qwen2", SMALL | THETA, SMALL_KEYS),
    "qwen3": Case(gguf.MODEL_ARCH.QWEN3, "qwen3", SMALL | THETA | {"head_dim": 16}, SMALL_KEYS | HEADS_OF_16),
    "gemma": Case(
        gguf.MODEL_ARCH.GEMMA,
        "gemma",
        GEMMA | {"rope_theta": 1e4},
        {key: value for key, value in (SMALL_KEYS | HEADS_OF_16).items() if key != ".rope.freq_base"},
        change=plus_one,
        tolerance=1e-5,  # a norm weight near 0 is stored as its sum with 1
    ),
    "gemma2": Case(
        gguf.MODEL_ARCH.GEMMA2,
        "gemma2",
        GEMMA
        | {"rope_theta": 1e6, "sliding_window": 8, "query_pre_attn_scalar": 16}
        | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
        SMALL_KEYS
        | HEADS_OF_16
        | {".attention.sliding_window": 8, ".attn_logit_softcapping": 5.0, ".final_logit_softcapping": 3.0},
        change=plus_one,
        tolerance=1e-5,
    ),
    "gemma3": Case(
        gguf.MODEL_ARCH.GEMMA3,
        "gemma3_text",
        GEMMA
        | {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window": 8, "query_pre_attn_scalar": 16}
        | {"num_hidden_layers": 7, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        SMALL_KEYS
        | HEADS_OF_16
        | {".block_count": 7, ".attention.sliding_window": 8}
        | {".rope.scaling.type": "linear", ".rope.scaling.factor": 8.0},
        change=plus_one,
        tolerance=1e-5,
    ),
    "phi2": Case(
        gguf.MODEL_ARCH.PHI2,
        "phi",
        SMALL | {"num_key_value_heads": 4, "layer_norm_eps": 3e-5, "partial_rotary_factor": 0.5, "rope_theta": 1e4},
        {key: value for key, value in SMALL_KEYS.items() if "rms" not in key and "freq_base" not in key}
        | {".attention.head_count_kv": 4, ".attention.layer_norm_epsilon": 3e-5, ".rope.dimension_count": 4},
    ),
    "phi3": Case(
        gguf.MODEL_ARCH.PHI3,
        "phi3",
        PHI3 | {"sliding_window": 8},
        PHI3_KEYS | {".attention.sliding_window": 8, ".rope.dimension_count": 8},
    ),
    "phi3, longrope": Case(
        gguf.MODEL_ARCH.PHI3,
        "phi3",
        PHI3 | {"rope_scaling": {"type": "longrope", "long_factor": LONG, "short_factor": SHORT}},
        PHI3_KEYS | {".attention.sliding_window": 0, ".rope.scaling.attn_factor": (1 + np.log(4) / np.log(32)) ** 0.5},
        extra={
            "rope_factors_long.weight": np.array(LONG, np.float32),
            "rope_factors_short.weight": np.array(SHORT, np.float32),
        },
        tolerance=1e-6,  # the factors come back as float32
    ),
    "gpt2": Case(
        gguf.MODEL_ARCH.GPT2,
        "gpt2",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 64, "layer_norm_epsilon": 3e-5},
        {key: SMALL_KEYS[key] for key in (".embedding_length", ".block_count", ".attention.head_count")}
        | {".context_length": 128, ".feed_forward_length": 128, ".attention.layer_norm_epsilon": 3e-5},
        change=turned,
    ),
}


def random_model(case: Case) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(case.model_type, **case.config)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def export(case: Case, model: Any, path: Path) -> Path:
    stems = gguf.get_tensor_name_map(case.architecture, model.config.num_hidden_layers)
    tensors = dict(case.extra)
    tied = model.config.tie_word_embeddings
    for name, parameter in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        stored = stems.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        tensors[stored] = case.change(name, parameter.numpy(), model.config)
    return write(path, gguf.MODEL_ARCH_NAMES[case.architecture], case.keys, tensors)


def logits_of(model: Any, tokens: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return model(tokens).logits.numpy()


def rebuilt(checkpoint: Any) -> Any:
    """An HF model from our config and tensors alone, with no name missing and none left over."""
    config = AutoConfig.for_model(**checkpoint.config)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    tensors = {name: torch.from_numpy(checkpoint.tensor(name)) for name in checkpoint.names()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert unexpected == []
    assert missing == (["lm_head.weight"] if checkpoint.config["tie_word_embeddings"] else [])
    return model


@pytest.mark.parametrize("name", CASES)
def test_a_model_survives_export_and_reading(tmp_path: Path, name: str) -> None:
    """Longer than any window and than the first context of the rope scalings, so that every setting counts."""
    case = CASES[name]
    model = random_model(case)
    checkpoint = open_checkpoint(str(export(case, model, tmp_path / "m.gguf")))
    assert checkpoint.config["model_type"] == case.model_type
    originals = model.state_dict()
    for tensor, info in checkpoint.names().items():
        read = checkpoint.tensor(tensor)
        assert (read.shape, read.dtype) == info
        np.testing.assert_allclose(read, originals[tensor].numpy(), atol=1e-6 if case.change is plus_one else 0, rtol=0)
    tokens = torch.arange(40)[None] % 64
    expected = logits_of(model, tokens)
    difference = np.abs(logits_of(rebuilt(checkpoint), tokens) - expected).max()
    assert difference <= case.tolerance * np.abs(expected).max()


def test_phi2_with_one_tensor_for_query_key_and_value(tmp_path: Path) -> None:
    case = CASES["phi2"]
    model = random_model(case)
    split = gguf.GGUFReader(export(case, model, tmp_path / "split.gguf"))
    tensors = {tensor.name: np.array(tensor.data) for tensor in split.tensors}
    for block in range(2):
        for suffix in ("weight", "bias"):
            parts = [tensors.pop(f"blk.{block}.attn_{part}.{suffix}") for part in "qkv"]
            tensors[f"blk.{block}.attn_qkv.{suffix}"] = np.concatenate(parts)
    checkpoint = open_checkpoint(str(write(tmp_path / "m.gguf", "phi2", case.keys, tensors)))
    for name, info in checkpoint.names().items():
        assert info.shape == checkpoint.tensor(name).shape
    tokens = torch.arange(12)[None]
    np.testing.assert_array_equal(logits_of(rebuilt(checkpoint), tokens), logits_of(model, tokens))


@pytest.mark.parametrize(("depth", "scale"), [(46, 8), (2, 16)])
def test_gemma_scales_queries_of_the_27b_model_otherwise(tmp_path: Path, depth: int, scale: int) -> None:
    keys = CASES["gemma2"].keys | {".block_count": depth}
    path = write(tmp_path / "m.gguf", "gemma2", keys, {"token_embd.weight": np.zeros((8, 32), np.float32)})
    assert open_checkpoint(str(path)).config["query_pre_attn_scalar"] == scale
