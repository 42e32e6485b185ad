"""GGUF files of the newer families, written as llama.cpp's converter writes them, against the HF checkpoints they come
from: every tensor bit for bit, and a config that means the same; states of those whose layout differs most."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from spinal_jax.errors import UserError
from spinal_jax.models.families import FAMILIES, read_checkpoint
from spinal_jax.models.formats.base import ReadsParts
from spinal_jax.models.formats.gguf_architectures import ARCHITECTURES
from spinal_jax.models.formats.open import open_checkpoint
from spinal_jax.models.translate import load_decoder

from .gguf_files import write
from .gguf_names import MODEL_TYPES
from .reference import checkpoint_of, our_stream, pack, random_model, reference_stream, relative_errors, translate
from .test_gguf_mixers import CASES as MIXERS
from .test_gguf_models import CASES as FIRST
from .test_gguf_models import SMALL, llama3_factors, permuted

Tensors = dict[str, np.ndarray]


def as_it_is(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    return tensors


def paired(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    """Queries and keys in the order of llama.cpp's adjacent rotations."""
    heads = CONFIG_MAPPING[config["model_type"]](**{k: v for k, v in config.items() if k != "model_type"})
    return {name: permuted(name, tensor, heads) for name, tensor in tensors.items()}


def stacked(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    """The experts of a block in one tensor for each layer of theirs."""
    out = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for block in range(config["num_hidden_layers"]):
        for layer in ("gate_proj", "up_proj", "down_proj"):
            stem = f"model.layers.{block}.mlp.experts"
            parts = [tensors[f"{stem}.{expert}.{layer}.weight"] for expert in range(config["num_experts"])]
            out[f"{stem}.{layer}.weight"] = np.stack(parts)
    return out


def pulled_apart(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    """gpt-oss: gate and up apart, [experts, out, in], and names with a suffix."""
    out = {}
    for name, tensor in tensors.items():
        turned = tensor.swapaxes(1, 2) if tensor.ndim == 3 else tensor
        suffix = ".bias" if name.endswith("_bias") else ".weight"
        plain = name.removesuffix("_bias")
        if "gate_up_proj" in name:
            out[plain.replace("gate_up_proj", "gate_proj") + suffix] = turned[:, ::2]
            out[plain.replace("gate_up_proj", "up_proj") + suffix] = turned[:, 1::2]
        elif "experts.down_proj" in name:
            out[plain + suffix] = turned
        else:
            out[name + (".weight" if "sinks" in name else "")] = tensor
    return {name: np.ascontiguousarray(tensor) for name, tensor in out.items()}


@dataclass(frozen=True)
class Case:
    """An HF config, what its converter states besides what all do, and what it does to tensors."""

    architecture: gguf.MODEL_ARCH
    model_type: str
    config: Mapping[str, Any] = field(default_factory=dict)
    keys: Mapping[str, Any] = field(default_factory=dict)
    change: Callable[[Tensors, Mapping[str, Any]], Tensors] = as_it_is
    extra: Mapping[str, np.ndarray] = field(default_factory=dict)
    states: bool = False  # whether a forward is compared too


ARCH = gguf.MODEL_ARCH
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
PLAIN = {"rope_type": "default", "rope_theta": 1e6}
SLIDES = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
WINDOW = {"sliding_window": 7, "layer_types": SLIDES, "num_hidden_layers": 4}
FLAGS = [kind == "sliding_attention" for kind in SLIDES]
WINDOW_KEYS = {".attention.sliding_window": 7, ".attention.sliding_window_pattern": FLAGS}
ALPHA_THETA = float(np.float32(1e4 * 50.0 ** (8 / 6)))

CASES = {
    "olmo": Case(ARCH.OLMO, "olmo", {"clip_qkv": 0.5}, {".attention.clamp_kqv": 0.5}, paired),
    "olmo2": Case(ARCH.OLMO2, "olmo2"),
    "olmo3": Case(
        ARCH.OLMO2,
        "olmo3",
        {**WINDOW, "rope_parameters": {"full_attention": YARN, "sliding_attention": {**PLAIN, "rope_theta": 1e4}}},
        WINDOW_KEYS | {".rope.freq_base_swa": 1e4},
        states=True,
    ),
    "olmo3, as older converters left it": Case(
        ARCH.OLMO2,
        "olmo3",
        {"sliding_window": 7, "num_hidden_layers": 4, "layer_types": [*["sliding_attention"] * 3, "full_attention"]}
        | {"rope_parameters": {"full_attention": PLAIN, "sliding_attention": PLAIN}},
        {".attention.sliding_window": 7},
    ),
    "olmoe": Case(
        ARCH.OLMOE,
        "olmoe",
        {"num_experts": 5, "num_experts_per_tok": 2, "norm_topk_prob": False},
        change=stacked,
        states=True,
    ),
    "smollm3": Case(
        ARCH.SMOLLM3,
        "smollm3",
        {"num_hidden_layers": 5, "use_sliding_window": False, "no_rope_layers": None},
        {".vocab_size": 64, ".rope.dimension_count": 8},
        paired,
    ),
    "granite": Case(
        ARCH.GRANITE,
        "granite",
        {"attention_multiplier": 0.3, "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0},
        {".attention.scale": 0.3, ".embedding_scale": 12.0, ".residual_scale": 0.22, ".logit_scale": 8.0},
        paired,
    ),
    "glm4": Case(
        ARCH.GLM4,
        "glm4",
        {"head_dim": 16, "attention_bias": True, "rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}},
        {".rope.dimension_count": 8},
        states=True,
    ),
    "seed_oss": Case(ARCH.SEED_OSS, "seed_oss", {"head_dim": 16, "attention_bias": True, "attention_out_bias": False}),
    "ernie4_5": Case(ARCH.ERNIE4_5, "ernie4_5", {"head_dim": 16, "use_bias": False}),
    "apertus": Case(
        ARCH.APERTUS,
        "apertus",
        {"hidden_act": "xielu", "dtype": "float32"}
        | {
            "rope_parameters": {"rope_type": "llama3", "rope_theta": 12e6, "factor": 8.0, "low_freq_factor": 1.0}
            | {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        },
        {".vocab_size": 64, ".rope.dimension_count": 8},
        extra={"rope_freqs.weight": llama3_factors(12e6, 8, 8192)},
        states=True,
    ),
    "exaone4": Case(ARCH.EXAONE4, "exaone4", WINDOW, WINDOW_KEYS | {".vocab_size": 64}, states=True),
    "exaone4, without windows": Case(
        ARCH.EXAONE4,
        "exaone4",
        {"sliding_window": None, "layer_types": ["full_attention"] * 2},
    ),
    "ministral3": Case(
        ARCH.MISTRAL3,
        "ministral3",
        {
            "head_dim": 16,
            "rope_parameters": {**YARN, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0}
            | {"mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1},
        },
        {".rope.scaling.yarn_log_multiplier": 1.0, ".attention.temperature_scale": 0.1, ".rope.dimension_count": 16},
        paired,
        states=True,
    ),
    "mistral, as mistral3": Case(ARCH.MISTRAL3, "mistral", {"head_dim": 16, "sliding_window": None}, change=paired),
    "arcee": Case(ARCH.ARCEE, "arcee", {"hidden_act": "relu2", "rope_parameters": YARN}, change=paired),
    "hunyuan": Case(
        ARCH.HUNYUAN_DENSE,
        "hunyuan_v1_dense",
        {"head_dim": 8, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 1.0, "alpha": 50.0}},
        {".rope.freq_base": ALPHA_THETA, ".rope.scaling.type": "none", ".rope.scaling.factor": 1.0}
        | {".rope.scaling.original_context_length": 262144},
    ),
    "gpt-oss": Case(
        ARCH.GPT_OSS,
        "gpt_oss",
        {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 7, "head_dim": 16}
        | {"rope_parameters": {**YARN, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}},
        {".attention.sliding_window": 7, ".expert_feed_forward_length": 48},
        pulled_apart,
        states=True,
    ),
}


def keys_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the converter states for every text model, from the keys of config.json."""
    rope = config["rope_parameters"]
    rope = rope.get("full_attention", rope)
    keys: dict[str, Any] = {
        ".block_count": config["num_hidden_layers"],
        ".context_length": config["max_position_embeddings"],
        ".embedding_length": config["hidden_size"],
        ".feed_forward_length": config["intermediate_size"],
        ".attention.head_count": config["num_attention_heads"],
        ".attention.head_count_kv": config["num_key_value_heads"],
        ".rope.freq_base": float(rope["rope_theta"]),
    }
    if rope["rope_type"] == "yarn":
        keys |= {
            ".rope.scaling.type": "yarn",
            ".rope.scaling.factor": rope["factor"],
            ".rope.scaling.original_context_length": rope["original_max_position_embeddings"],
        }
        keys |= {f".rope.scaling.yarn_{key}": rope[key] for key in ("beta_fast", "beta_slow") if key in rope}
    if config["model_type"] == "olmo":
        keys |= {".attention.layer_norm_epsilon": 1e-5}
    else:
        keys |= {".attention.layer_norm_rms_epsilon": config["rms_norm_eps"]}
    for count in ("num_local_experts", "num_experts"):
        if count in config:
            keys |= {".expert_count": config[count], ".expert_used_count": config["num_experts_per_tok"]}
    if config.get("head_dim"):
        keys |= {".attention.key_length": config["head_dim"], ".attention.value_length": config["head_dim"]}
    return keys


def exported(case: Case, path: Path) -> tuple[PreTrainedModel, Any]:
    """A random model and its HF checkpoint, after the file is written."""
    values = dict(SMALL) | {"rope_parameters": PLAIN, "tie_word_embeddings": False} | dict(case.config)
    if case.model_type == "olmo":
        del values["rms_norm_eps"]
    model = random_model(CONFIG_MAPPING[case.model_type](**values))
    saved = checkpoint_of(model)
    stems = gguf.get_tensor_name_map(case.architecture, saved.config["num_hidden_layers"])
    keys, tensors = {**keys_of(saved.config), **case.keys}, dict(case.extra)
    slopes: dict[str, list[float]] = {}
    for name, tensor in sorted(case.change(dict(saved.tensors), saved.config).items()):
        if ".act_fn." in name:
            slopes.setdefault(f"xielu.{name.rpartition('.')[2]}", []).append(float(tensor.reshape(())))
            continue
        stored = stems.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        tensors[stored] = tensor
    write(path, gguf.MODEL_ARCH_NAMES[case.architecture], slopes | keys, tensors)
    return model, saved


@pytest.mark.parametrize("name", CASES)
def test_a_file_is_the_checkpoint_that_it_comes_from(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    model, saved = exported(case, tmp_path / "m.gguf")
    found = open_checkpoint(str(tmp_path / "m.gguf"))
    assert found.config["model_type"] == case.model_type
    assert isinstance(found, ReadsParts)
    assert list(found.names()) == sorted(saved.tensors)
    for tensor, info in found.names().items():
        read = found.tensor(tensor)
        assert (read.shape, read.dtype) == info, tensor
        assert np.array_equal(read, saved.tensors[tensor]), tensor
        part = tuple((size // 3, size) for size in read.shape)
        assert np.array_equal(found.part(tensor, part), read[tuple(slice(*each) for each in part)]), tensor
    ours, theirs = translate(found.config), translate(saved.config)
    if case.model_type == "hunyuan_v1_dense":  # whose theta is stored as a float32
        (rope,) = ours.ropes
        assert math.isclose(rope.theta, theirs.ropes[0].theta, rel_tol=1e-7)
        ours = dataclasses.replace(ours, ropes=theirs.ropes)
    assert ours == theirs
    if case.states:
        tokens = np.random.default_rng(0).integers(0, 64, (1, 40)).astype(np.int32)
        decoder = load_decoder(found, *read_checkpoint(found), np.dtype(np.float32))
        errors = relative_errors(
            [our_stream(decoder, pack([tokens[0]], [[0]], 40, 0))], [reference_stream(model, tokens)]
        )
        assert max(errors.values()) < 1e-5, errors


def test_every_architecture_has_a_case() -> None:
    cases = (*FIRST.values(), *CASES.values(), *MIXERS.values())
    tried = {(gguf.MODEL_ARCH_NAMES[case.architecture], case.model_type) for case in cases}
    assert tried == {(name, model_type) for name, types in MODEL_TYPES.items() for model_type in types}
    assert MODEL_TYPES.keys() == ARCHITECTURES.keys()
    assert {model_type for types in MODEL_TYPES.values() for model_type in types} <= FAMILIES.keys()


@pytest.mark.parametrize(
    ("name", "keys", "named"),
    [
        ("olmo", {".attention.layer_norm_epsilon": 1e-3}, "layer_norm_epsilon"),
        ("olmo2", {".expert_count": 4}, "expert_count"),
        ("olmo3", {".attention.sliding_window_pattern": [True]}, "sliding_window_pattern"),
        ("olmo3", {".attention.sliding_window_pattern": [1, 2, 0, 0]}, "sliding_window_pattern"),
        ("arcee", {".rope.scaling.yarn_ext_factor": 0.5}, "yarn_ext_factor"),
        ("ministral3", {".rope.scaling.yarn_log_multiplier": 0.5}, "yarn_log_multiplier"),
        ("ministral3", {".attention.temperature_length": 99}, "temperature_length"),
        ("mistral, as mistral3", {".attention.temperature_scale": 0.1}, "rope.scaling.type"),
        ("apertus", {"xielu.beta": [0.5]}, "xielu.beta"),
        ("apertus", {"xielu.eps": [float("nan"), 0.5]}, "xielu.eps"),
        ("gpt-oss", {".expert_feed_forward_length": 32}, "expert_feed_forward_length"),
        ("granite", {".attention.scale": None}, "attention.scale"),
    ],
)
def test_what_a_file_may_not_say(tmp_path: Path, name: str, keys: Mapping[str, Any], named: str) -> None:
    case = CASES[name]
    changed = {key: value for key, value in (dict(case.keys) | dict(keys)).items() if value is not None}
    exported(dataclasses.replace(case, keys=changed), tmp_path / "m.gguf")
    with pytest.raises(UserError, match=named):
        open_checkpoint(str(tmp_path / "m.gguf"))


def test_experts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    for change, words in ((lambda t: t[:, :-1], "shape"), (None, "lacks the tensor blk.0.ffn_up_exps.weight")):

        def less(tensors: Tensors, config: Mapping[str, Any], change: Any = change) -> Tensors:
            apart = pulled_apart(tensors, config)
            up = "model.layers.0.mlp.experts.up_proj.weight"
            kept = {name: tensor for name, tensor in apart.items() if name != up}
            return kept if change is None else kept | {up: np.ascontiguousarray(change(apart[up]))}

        exported(dataclasses.replace(CASES["gpt-oss"], change=less), tmp_path / "m.gguf")
        with pytest.raises(UserError, match=words):
            open_checkpoint(str(tmp_path / "m.gguf"))
