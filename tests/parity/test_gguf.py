"""GGUF files against Hugging Face and the gguf package: values, names, layouts, configs, tokens, and refusals."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Quantisation
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from spinal_jax.errors import UserError
from spinal_jax.models.checkpoint import open_checkpoint

RAW = {Quantisation.F32: np.float32, Quantisation.F16: np.float16, Quantisation.BF16: ml_dtypes.bfloat16}


def write(path: Path, architecture: str, keys: Mapping[str, Any], tensors: Mapping[str, Any]) -> Path:
    """A GGUF file. A key that begins with a dot gets the architecture before it; a tensor may be (raw bytes, type)."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in keys.items():
        name = architecture + key if key.startswith(".") else key
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_array(name, value)
    for name, tensor in tensors.items():
        data, kind = tensor if isinstance(tensor, tuple) else (tensor, None)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


KEYS = {
    ".block_count": 1,
    ".context_length": 64,
    ".embedding_length": 64,
    ".feed_forward_length": 96,
    ".attention.head_count": 4,
    ".attention.head_count_kv": 2,
    ".attention.layer_norm_rms_epsilon": 1e-5,
}


def some_tensors(**changed: Any) -> dict[str, Any]:
    """Tensors of a file that opens; those named get another value."""
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (24, 64), "blk.0.attn_q": (64, 64), "blk.0.attn_k": (32, 64), "blk.0.ffn_down": (64, 96)}
    tensors = {f"{name}.weight": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return tensors | {f"{name}.weight": value for name, value in changed.items()}


def quantised(values: np.ndarray, kind: Quantisation) -> tuple[np.ndarray, Quantisation]:
    return gguf.quants.quantize(values, kind), kind


def random_blocks(kind: Quantisation, rows: int, blocks: int) -> np.ndarray:
    """Bytes that mean finite numbers in every type: no half-precision scale in them has a large exponent."""
    size = gguf.GGML_QUANT_SIZES[kind][1]
    return np.random.default_rng(kind).integers(0, 0x3C, (rows, blocks * size), np.uint8)


# Every type that the gguf package dequantises, found by asking it.
def _can_dequantise(kind: Quantisation) -> bool:
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


BLOCK_KINDS = [kind for kind in Quantisation if kind not in RAW and _can_dequantise(kind)]


def test_the_common_quantisations_are_among_those_tried() -> None:
    common = {"Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"}
    assert common <= {kind.name for kind in BLOCK_KINDS}


@pytest.mark.parametrize("kind", BLOCK_KINDS, ids=lambda kind: kind.name)
def test_dequantised_values_are_bit_equal(tmp_path: Path, kind: Quantisation) -> None:
    raw = random_blocks(kind, rows=5, blocks=2)
    path = write(tmp_path / "m.gguf", "llama", KEYS, some_tensors(output=(raw, kind)))
    read = open_checkpoint(str(path)).tensor("lm_head.weight")
    expected = gguf.quants.dequantize(raw, kind)
    assert np.isfinite(expected).all()
    assert (read.dtype, read.shape) == (np.float32, expected.shape)
    assert read.tobytes() == expected.tobytes()


@pytest.mark.parametrize("kind", RAW, ids=lambda kind: kind.name)
def test_floats_keep_their_dtype_and_bits(tmp_path: Path, kind: Quantisation) -> None:
    values = np.random.default_rng(1).normal(size=(5, 64)).astype(RAW[kind])
    path = write(tmp_path / "m.gguf", "llama", KEYS, some_tensors(output=(values.view(np.uint8), kind)))
    checkpoint = open_checkpoint(str(path))
    assert checkpoint.names()["lm_head.weight"] == ((5, 64), RAW[kind])
    read = checkpoint.tensor("lm_head.weight")
    assert read.dtype == RAW[kind]
    assert read.tobytes() == values.tobytes()


def test_a_tensor_of_several_pieces_is_whole(tmp_path: Path) -> None:
    values = np.random.default_rng(2).normal(size=(1100, 1024)).astype(np.float32)
    raw, kind = quantised(values, Quantisation.Q4_0)
    path = write(tmp_path / "m.gguf", "llama", KEYS, some_tensors(output=(raw, kind)))
    np.testing.assert_array_equal(
        open_checkpoint(str(path)).tensor("lm_head.weight"), gguf.quants.dequantize(raw, kind)
    )


def test_llama_loads_as_transformers_itself_loads_it(tmp_path: Path) -> None:
    """GQA, blocks of several kinds, F16, a bias-free attention whose query and key rows were permuted."""
    rng = np.random.default_rng(3)
    kinds = iter([Quantisation.Q4_0, Quantisation.Q8_0, Quantisation.Q5_1, Quantisation.F16, Quantisation.Q4_1] * 3)
    shapes = {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64)}
    shapes |= {"ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96)}
    tensors: dict[str, Any] = {"token_embd.weight": quantised(normal(rng, 24, 64), Quantisation.Q8_0)}
    for block in range(2):
        for name, shape in shapes.items():
            tensors[f"blk.{block}.{name}.weight"] = quantised(normal(rng, *shape), next(kinds))
        tensors[f"blk.{block}.attn_norm.weight"] = normal(rng, 64)
        tensors[f"blk.{block}.ffn_norm.weight"] = normal(rng, 64)
    tensors |= {
        "output_norm.weight": normal(rng, 64),
        "output.weight": quantised(normal(rng, 24, 64), Quantisation.Q5_0),
    }
    keys = KEYS | {".block_count": 2, ".rope.dimension_count": 16, ".rope.freq_base": 5e5, ".vocab_size": 24}
    path = write(tmp_path / "m.gguf", "llama", keys, tensors)

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    ours = open_checkpoint(str(path))
    expected = theirs.state_dict()
    assert set(ours.names()) == set(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(ours.tensor(name).astype(np.float32), tensor.numpy(), err_msg=name)
    settings = theirs.config.to_dict()
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"):
        assert ours.config[key] == settings[key]
    assert ours.config["vocab_size"] == settings["vocab_size"]
    assert ours.config["rope_theta"] == settings["rope_parameters"]["rope_theta"]


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


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


def refusal(path: Path, *holds: str) -> None:
    with pytest.raises(UserError) as error:
        open_checkpoint(str(path))
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in (str(path), *holds)), message


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        (".logit_scale", 2.0, ["llama.logit_scale", "2.0"]),
        (".expert_count", 8, ["llama.expert_count", "8"]),
        (".rope.scaling.type", "dynamic", ["llama.rope.scaling.type", "dynamic"]),
        (".rope.scaling.attn_factor", 1.5, ["llama.rope.scaling.attn_factor"]),
        (".rope.dimension_count", 8, ["llama.rope.dimension_count", "16"]),
        (".attention.value_length", 8, ["llama.attention.value_length"]),
        (".attention.head_count_kv", [1, 2], ["llama.attention.head_count_kv", "differs between blocks"]),
        ("general.type", "adapter", ["adapter"]),
        ("split.count", 3, ["3 parts", "merge"]),
    ],
)
def test_metadata_that_would_change_the_model_is_refused(tmp_path: Path, key: str, value: Any, words: list) -> None:
    refusal(write(tmp_path / "m.gguf", "llama", KEYS | {key: value}, some_tensors()), *words)


def test_metadata_that_changes_nothing_is_accepted(tmp_path: Path) -> None:
    keys = KEYS | {".expert_count": 0, ".tensor_data_layout": "Meta AI original pth", ".rope.scaling.type": "none"}
    keys |= {".attention.head_count_kv": [2, 2], "general.name": "some mistral", "other.key": 1}
    config = open_checkpoint(str(write(tmp_path / "m.gguf", "llama", keys, some_tensors()))).config
    assert config["rope_scaling"] is None
    assert config["num_key_value_heads"] == 2


def test_floats_of_the_config_are_the_decimals_they_were(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", "llama", KEYS, some_tensors())
    assert open_checkpoint(str(path)).config["rms_norm_eps"] == 1e-5


def test_missing_or_unknown_parts_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    refusal(write(path, "mamba", KEYS, some_tensors()), "'mamba'", "llama, qwen2")
    refusal(write(path, "llama", {k: v for k, v in KEYS.items() if k != ".block_count"}, some_tensors()), "block_count")
    refusal(write(path, "llama", KEYS, {"output.weight": np.zeros((8, 64), np.float32)}), "token_embd.weight")
    refusal(write(path, "llama", KEYS, some_tensors(**{"blk.0.ssm_conv1d": np.zeros(4, np.float32)})), "ssm_conv1d")
    refusal(write(path, "llama", KEYS, some_tensors(attn_q=np.zeros((4, 4), np.float32))), "attn_q.weight")
    factors = np.full(4, 2, np.float32)
    refusal(write(path, "llama", KEYS, some_tensors(rope_factors_long=factors)), "rope_factors_long.weight")
    both = KEYS | {".rope.scaling.type": "linear", ".rope.scaling.factor": 2.0}
    refusal(write(path, "llama", both, some_tensors(rope_freqs=factors)), "rope_freqs.weight", "linear")


def test_a_quantisation_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", "llama", KEYS, some_tensors(output=np.zeros((4, 64), np.int8)))
    refusal(path, "output.weight", "I8")
    whole = path.read_bytes()
    number = whole.index(b"output.weight") + len(b"output.weight") + 4 + 2 * 8
    assert whole[number] == Quantisation.I8
    path.write_bytes(whole[:number] + b"\xfa" + whole[number + 1 :])
    refusal(path, "output.weight", "250")


def test_rows_that_are_no_whole_blocks_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write(path, "llama", KEYS, some_tensors(output=quantised(np.ones((4, 64), np.float32), Quantisation.Q8_0)))
    whole = path.read_bytes()
    width = whole.index(b"output.weight") + len(b"output.weight") + 4
    assert whole[width] == 64
    path.write_bytes(whole[:width] + b"\x41" + whole[width + 1 :])
    refusal(path, "output.weight", "65", "32")


def test_what_is_not_a_gguf_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"")
    refusal(path, "truncated or damaged")
    path.write_bytes(b"PK\x03\x04 a zip file")
    refusal(path, "not a GGUF file")
    whole = write(path, "llama", KEYS, some_tensors()).read_bytes()
    path.write_bytes(whole[:4] + b"\1" + whole[5:])
    refusal(path, "version 1")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_found_at_opening(tmp_path: Path, share: float) -> None:
    whole = write(tmp_path / "whole.gguf", "llama", KEYS, some_tensors()).read_bytes()
    path = tmp_path / "m.gguf"
    path.write_bytes(whole[: int(share * len(whole))])
    refusal(path)


def test_the_gguf_package_is_asked_for_when_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "m.gguf", "llama", KEYS, some_tensors())
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'spinal-jax\[gguf\]'"):
        open_checkpoint(str(path))


# Tokens.

TEXTS = [
    "",
    "Hello world! It's 1234 and I'LL pay $5,678.90 -- OK?",
    "def f(x):\n    return x ** 2  # squared\n\n\tprint('a  b   c')\r\n",
    " leading and trailing  ",
    "emoji 🙂👩‍👩‍👧 and naïve café, 中文字 日本語 한국어 العربية",
    "<|im_start|>user\nhi<|im_end|> <think>hm</think>\n\n\n1) one\n\n2) two",
    "CamelCase snake_case don't DON'T 3.14e10 x=1;y=22;z=333;w=4444",
]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.fixture(scope="module")
def byte_level() -> tuple[list[str], list[str]]:
    """Vocabulary and merges of a small byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [" ".join(merge) for merge in model["merges"]]


def byte_level_keys(byte_level: tuple[list[str], list[str]], **changed: Any) -> dict[str, Any]:
    vocabulary, merges = byte_level
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", *vocabulary]
    keys = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [3, 3, 3, 4, 4] + [1] * len(vocabulary),
        "merges": merges,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "padding_token_id": 2,
        "add_bos_token": False,
    }
    keys = {f"tokenizer.ggml.{key}": value for key, value in (keys | changed).items() if value is not None}
    return KEYS | keys | {"tokenizer.chat_template": TEMPLATE}


def sentencepiece_keys(beginning: str = "<s>", end: str = "</s>", **changed: Any) -> dict[str, Any]:
    special = ["<unk>", beginning, end, "<pad>", "<mask>", "<think>"]
    words = ["▁", "he", "lo", "llo", "hello", "▁hello", "or", "▁w", "▁wor", "ld", "▁a", "nd", "an", "12", "▁1", "▁▁"]
    letters = [letter for letter in "abcdefghijklmnopqrstuvwxyz123()=*,." if letter not in words]
    pieces = [*words, *letters]
    keys = {
        "model": "llama",
        "pre": "default",
        "tokens": [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces],
        "scores": [0.0] * 262 + [-float(rank) for rank in range(len(pieces))],
        "token_type": [2, 3, 3, 3, 3, 4] + [6] * 256 + [1] * len(pieces),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "padding_token_id": 3,
        "add_bos_token": True,
    }
    return KEYS | {f"tokenizer.ggml.{key}": value for key, value in (keys | changed).items() if value is not None}


def both_tokenizers(path: Path, architecture: str, keys: Mapping[str, Any]) -> tuple[Any, Any]:
    write(path, architecture, keys, {"token_embd.weight": np.zeros((8, 64), np.float32)})
    ours = open_checkpoint(str(path)).tokenizer()
    return ours, AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def assert_same_tokens(ours: Any, theirs: Any) -> None:
    assert ours.is_fast
    assert len(ours) == len(theirs)
    for name in ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id"):
        assert getattr(ours, name) == getattr(theirs, name)
    for text in TEXTS:
        ids = ours(text).input_ids
        assert ids == theirs(text).input_ids, text
        assert ours.decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize("pre", ["default", "gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2", "tekken", "gpt-4o"])
def test_byte_level_tokens_are_those_of_transformers(tmp_path: Path, byte_level: Any, pre: str) -> None:
    keys = byte_level_keys(byte_level, pre=pre)
    ours, theirs = both_tokenizers(tmp_path / "m.gguf", "llama", keys)
    assert_same_tokens(ours, theirs)
    assert len(ours) == len(keys["tokenizer.ggml.tokens"])
    messages = [{"role": "user", "content": "hi"}]
    assert ours.apply_chat_template(messages, tokenize=False) == theirs.apply_chat_template(messages, tokenize=False)
    assert ours.apply_chat_template(messages, tokenize=False) == "<|im_start|>user\nhi<|im_end|>\n"


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "phi3"])
def test_sentencepiece_tokens_are_those_of_transformers(tmp_path: Path, architecture: str) -> None:
    keys = sentencepiece_keys("<bos>", "<eos>") if architecture == "gemma2" else sentencepiece_keys()
    ours, theirs = both_tokenizers(tmp_path / "m.gguf", architecture, keys)
    assert_same_tokens(ours, theirs)
    assert ours("hello and hello").input_ids[0] == 1


def test_a_space_prefix_is_left_out_where_the_file_says_so(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    tokens = {}
    for flag in (True, False):
        write(path, "llama", sentencepiece_keys(add_space_prefix=flag), some_tensors())
        tokenizer = open_checkpoint(str(path)).tokenizer()
        tokens[flag] = tokenizer.convert_ids_to_tokens(tokenizer("hello").input_ids)
        assert tokenizer.decode(tokenizer("hello").input_ids, skip_special_tokens=True) == "hello"
    assert tokens == {True: ["<s>", "▁hello"], False: ["<s>", "hello"]}


def test_control_tokens_may_be_written_in_any_letters(tmp_path: Path, byte_level: Any) -> None:
    """As DeepSeek's are: they keep their number, and the vocabulary its size."""
    keys = byte_level_keys(byte_level, pre="deepseek-llm")
    beginning = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
    keys["tokenizer.ggml.tokens"][1] = beginning
    path = write(tmp_path / "m.gguf", "llama", keys, some_tensors())
    tokenizer = open_checkpoint(str(path)).tokenizer()
    assert len(tokenizer) == len(keys["tokenizer.ggml.tokens"])
    assert tokenizer.bos_token_id == 1
    hi = tokenizer("hi").input_ids
    assert tokenizer(beginning + "hi").input_ids == [1, *hi]


@pytest.mark.parametrize("pre", ["deepseek-llm", "deepseek-coder"])
def test_deepseek_cuts_letters_digits_and_lines_apart(tmp_path: Path, byte_level: Any, pre: str) -> None:
    path = write(tmp_path / "m.gguf", "llama", byte_level_keys(byte_level, pre=pre), some_tensors())
    splitter = open_checkpoint(str(path)).tokenizer().backend_tokenizer.pre_tokenizer
    pieces = [piece for piece, _ in splitter.pre_tokenize_str("Ab cd12,\n\n x\u4e2d\u6587")]
    spaced = [piece.replace("\u0120", " ").replace("\u010a", "\n") for piece in pieces[:8]]
    assert spaced == ["Ab", " cd", "1", "2", ",", "\n", "\n", " x"]
    assert len(pieces) == 9


@pytest.mark.parametrize(("pre", "adds"), [("gpt-2", False), ("llama-bpe", True)])
def test_a_beginning_is_added_as_the_file_or_its_kind_says(
    tmp_path: Path, byte_level: Any, pre: str, adds: bool
) -> None:
    path = tmp_path / "m.gguf"
    for flag in (True, False, None):
        write(path, "llama", byte_level_keys(byte_level, pre=pre, add_bos_token=flag), some_tensors())
        first = open_checkpoint(str(path)).tokenizer()("hi").input_ids[0]
        assert (first == 1) == (adds if flag is None else flag)


def test_a_saved_tokenizer_still_gives_the_same_tokens(tmp_path: Path, byte_level: Any) -> None:
    write(tmp_path / "m.gguf", "llama", byte_level_keys(byte_level, pre="qwen2", add_bos_token=True), some_tensors())
    tokenizer = open_checkpoint(str(tmp_path / "m.gguf")).tokenizer()
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert [again(text).input_ids for text in TEXTS] == [tokenizer(text).input_ids for text in TEXTS]
    assert again.chat_template == TEMPLATE


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"pre": "from-the-future"}, ["from-the-future", "llama-bpe"]),
        ({"pre": None}, ["None", "llama-bpe"]),
        ({"model": "t5"}, ["'t5'", "gpt2"]),
        ({"tokens": None}, ["no tokenizer"]),
        ({"merges": None}, ["lacks tokenizer.ggml.merges"]),
        ({"tokens": ["a", "b", "a"]}, ["twice"]),
        ({"merges": ["x yz"]}, ["cannot be built", "yz"]),
        ({"merges": ["xyz"]}, ["cannot be built"]),
    ],
)
def test_a_tokenizer_that_would_be_wrong_is_refused(
    tmp_path: Path, byte_level: Any, changed: dict[str, Any], words: list[str]
) -> None:
    path = write(tmp_path / "m.gguf", "llama", byte_level_keys(byte_level, **changed), some_tensors())
    checkpoint = open_checkpoint(str(path))
    with pytest.raises(UserError) as error:
        checkpoint.tokenizer()
    assert all(word in str(error.value) for word in (str(path), *words)), error.value
