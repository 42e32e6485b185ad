"""GGUF files of architectures with experts, delta nets, latent attention and heads fused in one matrix, written as
llama.cpp's converter writes them: every tensor, the config, and the states of Hugging Face's model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from spinal_jax.errors import UserError
from spinal_jax.models.config import DecoderConfig
from spinal_jax.models.families import read_checkpoint
from spinal_jax.models.formats.base import ReadsParts
from spinal_jax.models.formats.open import open_checkpoint
from spinal_jax.models.translate import load_decoder

from .gguf_files import write
from .reference import (
    checkpoint_of,
    in_float64,
    our_stream,
    pack,
    random_model,
    reference_stream,
    relative_errors,
    translate,
)

Tensors = dict[str, np.ndarray]
Config = Mapping[str, Any]
Change = Callable[[Tensors, Config], Tensors]
ARCH = gguf.MODEL_ARCH

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
QUARTER = {**PLAIN, "partial_rotary_factor": 0.25}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
MSCALE = {**YARN, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.707, "mscale_all_dim": 0.707}


def one_by_one(tensors: Tensors) -> Tensors:
    """A tensor for each expert, of those that hold gate and up, or down, of all."""
    out: Tensors = {}
    for name, tensor in tensors.items():
        stem, _, last = name.rpartition(".")
        if last == "gate_up_proj" or (last == "down_proj" and tensor.ndim == 3):
            for expert, matrix in enumerate(tensor):
                if last == "down_proj":
                    out[f"{stem}.{expert}.down_proj.weight"] = matrix
                else:
                    gate, up = np.split(matrix, 2)
                    out |= {f"{stem}.{expert}.gate_proj.weight": gate, f"{stem}.{expert}.up_proj.weight": up}
        else:
            out[name] = tensor
    return out


def stacked(tensors: Tensors, config: Config) -> Tensors:
    """The experts of a block in one tensor for each layer of theirs."""
    out = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for first in [name for name in tensors if ".experts.0." in name and name.endswith(".weight")]:
        stem, last = first.split(".experts.0.")
        parts = [tensors[name] for expert in range(99) if (name := f"{stem}.experts.{expert}.{last}") in tensors]
        out[f"{stem}.experts.{last}"] = np.stack(parts)
    return out


def gate_and_up_together(tensors: Tensors, config: Config) -> Tensors:
    """--fuse-gate-up-exps, of experts that are stacked."""
    out = dict(tensors)
    for name in [name for name in out if name.endswith("experts.gate_proj.weight")]:
        both = [out.pop(name), out.pop(name.replace("gate_proj", "up_proj"))]
        out[name.replace("gate_proj", "gate_up_proj")] = np.concatenate(both, axis=1)
    return out


def tiled_gate_and_up_together(tensors: Tensors, config: Config) -> Tensors:
    return gate_and_up_together(tiled_values(tensors, config), config)


def shared_gate_as_vector(tensors: Tensors, config: Config) -> Tensors:
    out = stacked(tensors, config)
    return {name: t.reshape(-1) if "shared_expert_gate" in name else t for name, t in out.items()}


def mixtral(tensors: Tensors, config: Config) -> Tensors:
    """Experts stacked, and queries and keys in the order of adjacent rotations."""
    out = {}
    for name, tensor in stacked(tensors, config).items():
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
        count = next((count for layer, count in heads.items() if layer in name), 0)
        out[name] = tensor
        if count:
            by_half = tensor.reshape(count, 2, tensor.shape[0] // count // 2, -1)
            out[name] = by_half.swapaxes(1, 2).reshape(tensor.shape)
    return out


def queries_keys_values(tensors: Tensors, config: Config) -> Tensors:
    """GPT-NeoX: all queries, then all keys, then all values."""
    heads = config["num_attention_heads"]
    out = {}
    for name, tensor in tensors.items():
        out[name] = tensor
        if "query_key_value" in name:
            parts = tensor.reshape(heads, 3, -1, *tensor.shape[1:])
            out[name] = np.concatenate([parts[:, i].reshape(-1, *tensor.shape[1:]) for i in range(3)])
    return out


def stacked_norms(tensors: Tensors, config: Config) -> Tensors:
    """StableLM: the norms of a head each in one tensor."""
    out = {name: tensor for name, tensor in tensors.items() if ".norms." not in name}
    for first in [name for name in tensors if ".norms.0." in name]:
        stem = first.removesuffix(".norms.0.weight")
        parts = [tensors[name] for head in range(9) if (name := f"{stem}.norms.{head}.weight") in tensors]
        out[f"{stem}.weight"] = np.stack(parts)
    return out


def delta_nets(tensors: Tensors, config: Config) -> Tensors:
    """Qwen3NextModel.modify_tensors, but for in_proj_qkvz: 1 + norms, -exp of decays, convolutions squeezed."""
    out = {}
    for name, tensor in stacked(tensors, config).items():
        if name.endswith(".A_log"):
            tensor = -np.exp(tensor)
        elif "conv1d" in name:
            tensor = tensor.squeeze(1)
        elif name.endswith("norm.weight") and "linear_attn" not in name:
            tensor = tensor + np.float32(1)
        out[name.replace(".dt_bias", ".dt_proj.bias")] = tensor
    return out


def inputs_apart(tensors: Tensors, config: Config) -> Tensors:
    """Qwen3-Next of later converters: queries, keys and values in one matrix, gates in another."""
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    of_key, of_value = config["linear_key_head_dim"], config["linear_value_head_dim"] * values // keys
    out = {}
    for name, tensor in delta_nets(tensors, config).items():
        if "in_proj_qkvz" not in name:
            out[name] = tensor
            continue
        by_head = tensor.reshape(keys, 2 * of_key + 2 * of_value, -1)
        q, k, v, z = np.split(by_head, np.cumsum([of_key, of_key, of_value]), axis=1)
        flat = [part.reshape(-1, tensor.shape[1]) for part in (q, k, v, z)]
        out[name.replace("qkvz", "qkv")] = np.concatenate(flat[:3])
        out[name.replace("qkvz", "z")] = flat[3]
    return out


def tiled(tensor: np.ndarray, axis: int, config: Config) -> np.ndarray:
    """_reorder_v_heads: value heads from "by key head" to "first of every key head, then second"."""
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    moved = np.moveaxis(tensor, axis, 0)
    grouped = moved.reshape(keys, values // keys, -1, *moved.shape[1:])
    return np.moveaxis(grouped.swapaxes(0, 1).reshape(moved.shape), 0, axis)


def tiled_values(tensors: Tensors, config: Config) -> Tensors:
    """Qwen3.5: `delta_nets`, with the value heads in another order."""
    first = 2 * config["linear_num_key_heads"] * config["linear_key_head_dim"]
    out = {}
    for name, tensor in delta_nets(tensors, config).items():
        layer = name.split("linear_attn.")[-1].split(".")[0] if "linear_attn" in name else ""
        if layer in ("in_proj_qkv", "conv1d"):
            tensor = np.concatenate([tensor[:first], tiled(tensor[first:], 0, config)])
        elif layer in ("in_proj_z", "in_proj_a", "in_proj_b", "A_log", "dt_proj"):
            tensor = tiled(tensor, 0, config)
        elif layer == "out_proj":
            tensor = tiled(tensor, 1, config)
        out[name] = tensor
    return out


def predicting(tensors: Tensors, config: Config) -> Tensors:
    """As `tiled_values`, with a block behind the last that predicts tokens further ahead."""
    out = tiled_values(tensors, config)
    depth = config["num_hidden_layers"]
    return out | {f"model.layers.{depth}.input_layernorm.weight": np.ones(config["hidden_size"], np.float32)}


def latent(tensors: Tensors, config: Config) -> Tensors:
    """DeepSeek of later converters: keys and values of the latent apart, keys transposed."""
    nope, value = config["qk_nope_head_dim"], config["v_head_dim"]
    out = {}
    for name, tensor in old_latent(tensors, config).items():
        if "kv_b_proj" not in name:
            out[name] = tensor
            continue
        by_head = tensor.reshape(-1, nope + value, tensor.shape[1])
        out[name.replace("kv_b", "k_b")] = by_head[:, :nope].swapaxes(1, 2)
        out[name.replace("kv_b", "v_b")] = by_head[:, nope:]
    return out


def old_latent(tensors: Tensors, config: Config) -> Tensors:
    return {
        name.replace("e_score_correction_bias", "e_score_correction.bias"): tensor
        for name, tensor in stacked(tensors, config).items()
    }


@dataclass(frozen=True)
class Case:
    """An HF config, what the converter states, and what it does to tensors."""

    architecture: gguf.MODEL_ARCH
    model_type: str
    config: Config
    keys: Config
    change: Change = stacked
    stated: tuple[str, ...] = ("rope.freq_base", "attention.layer_norm_rms_epsilon")  # of `keys_of`


LAYER_NORM = ("attention.layer_norm_epsilon",)
MIXTURE = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MIXTURE_KEYS = {".expert_count": 5, ".expert_used_count": 2, ".expert_feed_forward_length": 24}
SHARED, SHARED_KEYS = {"shared_expert_intermediate_size": 20}, {".expert_shared_feed_forward_length": 20}
HEADS_OF_16 = {".attention.key_length": 16, ".attention.value_length": 16}
DELTA = {
    "num_hidden_layers": 4,
    "head_dim": 16,
    "rope_parameters": QUARTER,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 10,
    "linear_conv_kernel_dim": 4,
}
DELTA_KEYS = {
    ".ssm.conv_kernel": 4,
    ".ssm.state_size": 8,
    ".ssm.group_count": 2,
    ".ssm.time_step_rank": 6,
    ".ssm.inner_size": 60,
    ".full_attention_interval": 4,
    ".rope.dimension_count": 4,
    **HEADS_OF_16,
}
IMAGES = {".rope.dimension_sections": [11, 11, 10, 0]}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 14,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 6,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}
LATENT_KEYS = {
    ".attention.q_lora_rank": 14,
    ".attention.kv_lora_rank": 12,
    ".rope.dimension_count": 8,
    ".vocab_size": 64,
    ".expert_count": 8,
    ".expert_used_count": 3,
    ".expert_shared_count": 2,
    ".expert_feed_forward_length": 24,
    ".leading_dense_block_count": 1,
    ".expert_group_count": 4,
    ".expert_group_used_count": 2,
}
COMPRESSED = {
    ".attention.head_count_kv": 1,
    ".attention.key_length": 20,
    ".attention.value_length": 12,
    ".attention.key_length_mla": 14,
    ".attention.value_length_mla": 10,
}
V2 = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0}
V2 |= {"norm_topk_prob": False}
V3 = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": True}
V3_KEYS = {".expert_gating_func": 2, ".expert_weights_scale": 2.5, ".expert_weights_norm": True}

CASES = {
    "mixtral": Case(
        ARCH.LLAMA,
        "mixtral",
        {"head_dim": 16, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": None},
        {".expert_count": 5, ".expert_used_count": 2, ".rope.dimension_count": 16, **HEADS_OF_16},
        mixtral,
    ),
    "gpt_neox": Case(
        ARCH.GPTNEOX,
        "gpt_neox",
        {"num_key_value_heads": 4, "use_parallel_residual": False, "rope_parameters": QUARTER, "layer_norm_eps": 1e-5},
        {".rope.dimension_count": 2, ".use_parallel_residual": False},
        queries_keys_values,
        LAYER_NORM,
    ),
    "stablelm": Case(
        ARCH.STABLELM,
        "stablelm",
        {"use_qkv_bias": True, "qk_layernorm": True, "rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}},
        {".rope.dimension_count": 4, ".use_parallel_residual": False},
        stacked_norms,
        LAYER_NORM,
    ),
    "stablelm, parallel": Case(
        ARCH.STABLELM,
        "stablelm",
        {"use_parallel_residual": True, "rope_parameters": QUARTER},
        {".rope.dimension_count": 2, ".use_parallel_residual": True},
        stated=LAYER_NORM,
    ),
    "qwen2_moe": Case(
        ARCH.QWEN2MOE, "qwen2_moe", {**MIXTURE, **SHARED, "norm_topk_prob": False}, MIXTURE_KEYS | SHARED_KEYS
    ),
    "qwen2_moe, as older converters left it": Case(
        ARCH.QWEN2MOE,
        "qwen2_moe",
        {**MIXTURE, **SHARED, "norm_topk_prob": False},
        {".expert_count": 5, ".expert_used_count": 2},
        shared_gate_as_vector,
    ),
    "qwen3_moe": Case(
        ARCH.QWEN3MOE,
        "qwen3_moe",
        {**MIXTURE, "norm_topk_prob": True, "head_dim": 16},
        MIXTURE_KEYS | HEADS_OF_16,
    ),
    "qwen3_next": Case(
        ARCH.QWEN3NEXT,
        "qwen3_next",
        DELTA | MIXTURE | SHARED,
        DELTA_KEYS | MIXTURE_KEYS | SHARED_KEYS,
        inputs_apart,
    ),
    "qwen3_next, as first converted": Case(
        ARCH.QWEN3NEXT,
        "qwen3_next",
        DELTA | MIXTURE | SHARED,
        DELTA_KEYS | MIXTURE_KEYS | SHARED_KEYS,
        delta_nets,
    ),
    "qwen3_5_text": Case(ARCH.QWEN35, "qwen3_5_text", DELTA, DELTA_KEYS | IMAGES, tiled_values),
    "qwen3_5_text, predicting": Case(
        ARCH.QWEN35, "qwen3_5_text", DELTA, DELTA_KEYS | {".block_count": 5, ".nextn_predict_layers": 1}, predicting
    ),
    "qwen3_5_moe_text": Case(
        ARCH.QWEN35MOE,
        "qwen3_5_moe_text",
        DELTA | MIXTURE | SHARED,
        DELTA_KEYS | MIXTURE_KEYS | SHARED_KEYS | IMAGES | {".feed_forward_length": None},
        tiled_values,
    ),
    "qwen3_5_moe_text, gate and up together": Case(
        ARCH.QWEN35MOE,
        "qwen3_5_moe_text",
        DELTA | MIXTURE | SHARED,
        DELTA_KEYS | MIXTURE_KEYS | SHARED_KEYS | IMAGES | {".feed_forward_length": None},
        tiled_gate_and_up_together,
    ),
    "deepseek_v2": Case(
        ARCH.DEEPSEEK2,
        "deepseek_v2",
        {**LATENT, **V2, "rope_parameters": MSCALE},
        LATENT_KEYS | COMPRESSED | {".expert_weights_scale": 16.0, ".rope.scaling.yarn_log_multiplier": 0.0707},
        latent,
    ),
    "deepseek_v2, as older converters left it": Case(
        ARCH.DEEPSEEK2,
        "deepseek_v2",
        {**LATENT, "q_lora_rank": None, "n_routed_experts": 64, "topk_method": "greedy", "norm_topk_prob": False},
        {key: value for key, value in LATENT_KEYS.items() if "group" not in key and "q_lora" not in key}
        | {".attention.key_length": 14, ".attention.value_length": 10, ".expert_count": 64},
        old_latent,
    ),
    "deepseek_v3": Case(
        ARCH.DEEPSEEK2,
        "deepseek_v3",
        {**LATENT, **V3, "rope_parameters": {**MSCALE, "mscale": 1.0, "mscale_all_dim": 1.0}},
        LATENT_KEYS | COMPRESSED | V3_KEYS | {".rope.scaling.yarn_log_multiplier": 0.1},
        latent,
    ),
}


DELTA_NETS = (ARCH.QWEN3NEXT, ARCH.QWEN35, ARCH.QWEN35MOE)


def keys_of(case: Case, config: Config) -> dict[str, Any]:
    """What the converter states for every text model, and for this one."""
    rope = config["rope_parameters"]
    keys: dict[str, Any] = {
        ".block_count": config["num_hidden_layers"],
        ".context_length": config["max_position_embeddings"],
        ".embedding_length": config["hidden_size"],
        ".feed_forward_length": config.get("intermediate_size"),
        ".attention.head_count": config["num_attention_heads"],
    }
    if "num_key_value_heads" in config:
        keys[".attention.head_count_kv"] = config["num_key_value_heads"]
    values = {
        "rope.freq_base": float(rope["rope_theta"]),
        "attention.layer_norm_rms_epsilon": config.get("rms_norm_eps"),
        "attention.layer_norm_epsilon": config.get("layer_norm_eps"),
    }
    keys |= {f".{name}": values[name] for name in case.stated}
    if rope["rope_type"] == "yarn":
        original = rope["original_max_position_embeddings"]
        keys |= {".rope.scaling.type": "yarn", ".rope.scaling.factor": rope["factor"]}
        keys |= {".rope.scaling.original_context_length": original}
        keys |= {f".rope.scaling.yarn_{key}": rope[key] for key in ("beta_fast", "beta_slow")}
    return {key: value for key, value in (keys | dict(case.keys)).items() if value is not None}


def exported(case: Case, path: Path) -> tuple[PreTrainedModel, Config, Tensors]:
    """A random model, its config.json and tensors, after the file is written."""
    values = SIZES | {"rope_parameters": PLAIN} | dict(case.config)
    model = random_model(CONFIG_MAPPING[case.model_type](**values))
    saved = checkpoint_of(model)
    own = one_by_one(dict(saved.tensors))
    stems = gguf.get_tensor_name_map(case.architecture, saved.config["num_hidden_layers"] + 1)
    tensors = {}
    for name, tensor in sorted(case.change(own, saved.config).items()):
        stored = stems.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        tensors[stored] = np.ascontiguousarray(tensor)
    write(path, gguf.MODEL_ARCH_NAMES[case.architecture], keys_of(case, saved.config), tensors)
    return model, saved.config, own


def same_config(ours: DecoderConfig, theirs: DecoderConfig) -> bool:
    """Equal but for settings that no block uses."""
    used = (
        ours if ours.expert_layers is None or not all(ours.expert_layers) else replace(ours, mlp_width=theirs.mlp_width)
    )
    return used == theirs


@pytest.mark.parametrize("name", CASES)
def test_a_file_is_the_checkpoint_that_it_comes_from(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    model, config, tensors = exported(case, tmp_path / "m.gguf")
    found = open_checkpoint(str(tmp_path / "m.gguf"))
    assert found.config["model_type"] == case.model_type
    assert isinstance(found, ReadsParts)
    tensors = {name.replace("embed_out.", "lm_head."): tensor for name, tensor in tensors.items()}
    assert list(found.names()) == sorted(tensors)
    for tensor, info in found.names().items():
        read = found.tensor(tensor)
        assert (read.shape, read.dtype) == info, tensor
        rounded = case.architecture in DELTA_NETS and tensor.endswith(("norm.weight", "A_log"))  # 1 + w - 1, log exp
        assert np.allclose(read, tensors[tensor], rtol=0, atol=1e-6 if rounded else 0), tensor
        part = tuple((size // 3, size) for size in read.shape)
        assert np.array_equal(found.part(tensor, part), read[tuple(slice(*each) for each in part)]), tensor
    assert same_config(translate(found.config), translate(config))
    family, decoder = read_checkpoint(found)
    tokens = np.random.default_rng(0).integers(0, 64, (1, 40)).astype(np.int32)
    ours = our_stream(load_decoder(found, family, decoder, np.dtype(np.float32)), pack([tokens[0]], [[0]], 40, 0))
    with in_float64(model) as wide:
        errors = relative_errors([ours], [reference_stream(wide, tokens)])
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize(
    ("name", "keys", "named"),
    [
        ("mixtral", {".expert_used_count": 9}, "expert_used_count"),
        ("qwen3_moe", {".expert_used_count": 9}, "expert_used_count"),
        ("qwen3_5_moe_text", {".expert_weights_norm": False}, "expert_weights_norm"),
        ("qwen3_5_text", {".expert_count": 4}, "expert_count"),
        ("qwen3_5_text", {".nextn_predict_layers": 4}, "nextn_predict_layers"),
        ("qwen3_5_text", {".ssm.inner_size": 61}, "ssm.inner_size"),
        ("qwen3_next", {".ssm.inner_size": 54}, "attn_qkv"),
        ("deepseek_v2", {".expert_group_count": None}, "expert_group_count"),
        ("deepseek_v2", {".expert_weights_norm": True}, "expert_weights_norm"),
        ("deepseek_v2", {".expert_gating_func": 3}, "expert_gating_func"),
        ("deepseek_v2", {".attention.key_length_mla": 7}, "key_length"),
        ("deepseek_v2", {".rope.scaling.yarn_log_multiplier": None}, "yarn_log_multiplier"),
        ("stablelm", {".use_parallel_residual": 1}, "use_parallel_residual"),
    ],
)
def test_what_a_file_may_not_say(tmp_path: Path, name: str, keys: Config, named: str) -> None:
    case = CASES[name]
    exported(replace(case, keys=dict(case.keys) | dict(keys)), tmp_path / "m.gguf")
    with pytest.raises(UserError, match=named) as error:
        open_checkpoint(str(tmp_path / "m.gguf"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("deepseek_v2", lambda tensors: tensors | {KV_B: np.ones((64, 12), np.float32)}, "stands for too"),
        ("deepseek_v2", lambda tensors: {k: v for k, v in tensors.items() if "v_b_proj" not in k}, "attn_v_b"),
        ("qwen3_5_text", lambda tensors: {k: t[0] if "conv1d" in k else t for k, t in tensors.items()}, "ssm_conv1d"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    tmp_path: Path, name: str, change: Callable[[Tensors], Tensors], named: str
) -> None:
    case = CASES[name]
    exported(replace(case, change=lambda tensors, config: change(case.change(tensors, config))), tmp_path / "m.gguf")
    with pytest.raises(UserError, match=named):
        open_checkpoint(str(tmp_path / "m.gguf"))


KV_B = "model.layers.0.self_attn.kv_b_proj.weight"
