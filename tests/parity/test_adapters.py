"""PEFT adapters: what a folder gives is what PEFT merges, for every way of adapting; and refusals."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from spinal_jax.comparison.checkpoints import with_reference
from spinal_jax.config import CompareConfig, ComparedConfig
from spinal_jax.errors import UserError
from spinal_jax.models.families import read_checkpoint
from spinal_jax.models.formats import adapter
from spinal_jax.models.formats.adapter import row_norms
from spinal_jax.models.formats.byte_level import SIZES, byte_tokenizer
from spinal_jax.models.formats.convert import convert
from spinal_jax.models.formats.export import export
from spinal_jax.models.formats.memory import random_checkpoint
from spinal_jax.models.formats.open import open_checkpoint
from spinal_jax.models.translate import load_decoder

from .reference import MemoryCheckpoint, load, our_stream, pack, random_model, reference_stream, relative_errors

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # peft's own
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),  # it warns of tied weights, which these tests are about
]

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
ATTENTION = ["q_proj", "v_proj"]

# (model type, is tied, settings of LoraConfig)
CASES: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "lora": ("llama", False, {"target_modules": ATTENTION}),
    "all-linear": ("qwen2", False, {"target_modules": "all-linear", "lora_alpha": 7, "r": 5}),
    "regular expression": ("llama", False, {"target_modules": r".*layers\.[01]\..*(down|o)_proj"}),
    "rslora": ("llama", False, {"target_modules": ATTENTION, "use_rslora": True}),
    "dora": ("llama", False, {"target_modules": ["o_proj", "up_proj"], "use_dora": True}),
    "dora and rslora": ("llama", False, {"target_modules": ["gate_proj"], "use_dora": True, "use_rslora": True}),
    "some layers": ("llama", False, {"target_modules": ATTENTION, "layers_to_transform": [0, 2]}),
    "ranks": (
        "llama",
        False,
        {
            "target_modules": ["q_proj", "k_proj", "down_proj"],
            "rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\.down_proj": 6},
            "alpha_pattern": {"down_proj": 5, r"model\.layers\.0\.self_attn\.k_proj": 9},
        },
    ),
    "ranks and rslora": (
        "llama",
        False,
        {"target_modules": ["q_proj", "k_proj"], "rank_pattern": {"q_proj": 3}, "use_rslora": True},
    ),
    "modules to save": (
        "llama",
        False,
        {"target_modules": ATTENTION, "modules_to_save": ["lm_head", "embed_tokens", "input_layernorm"]},
    ),
    "tied, head saved": ("llama", True, {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]}),
    "tied, embedding saved": ("llama", True, {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens"]}),
    "embedding": ("llama", False, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "embedding with dora": ("llama", False, {"target_modules": ["embed_tokens"], "use_dora": True}),
    "tied embedding": ("llama", True, {"target_modules": ["embed_tokens", "q_proj"]}),
    "biases": ("qwen2", False, {"target_modules": ATTENTION, "bias": "all"}),
    "biases of lora": ("qwen2", False, {"target_modules": ATTENTION, "lora_bias": True}),
    "tokens": ("llama", False, {"target_modules": ATTENTION, "trainable_token_indices": [3, 5, 96]}),
    "tied, both": ("llama", True, {"target_modules": ["embed_tokens", "lm_head"]}),
    "tied tokens": ("llama", True, {"target_modules": ATTENTION, "trainable_token_indices": {"embed_tokens": [0, 7]}}),
    "conv1d": ("gpt2", True, {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "conv1d with dora": ("gpt2", True, {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "fused": ("phi3", False, {"target_modules": ["qkv_proj", "gate_up_proj"]}),
}


def base_config(model_type: str, tied: bool) -> PretrainedConfig:
    fields: dict[str, Any] = (GPT2 if model_type == "gpt2" else SMALL) | {"tie_word_embeddings": tied}
    return CONFIG_MAPPING[model_type](**fields)


def adapted(folder: Path, model_type: str, tied: bool, settings: dict[str, Any], seed: int = 0) -> Path:
    """A base with tokenizer in `folder`/base and an adapter of it, all of its values random, in `folder`/adapter."""
    base = random_model(base_config(model_type, tied), seed)
    base.save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    loaded = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    model = get_peft_model(loaded, LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | settings))
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(str(folder / "adapter"))
    return folder / "adapter"


def merged(folder: Path) -> Any:
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32, attn_implementation="eager")
    return PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload().eval()


@pytest.mark.parametrize("contiguous", [True, False])
def test_norms_of_dora_are_summed_in_the_order_of_torch(contiguous: bool) -> None:
    """To the last bit but one, where a sum in float64 differs by up to twelve of them."""
    rows = 0.02 * np.random.default_rng(0).standard_normal((100, 4096)).astype(np.float32)
    weight = rows if contiguous else np.asfortranarray(rows)
    wanted = torch.linalg.norm(torch.from_numpy(weight), dim=1).numpy()
    np.testing.assert_allclose(row_norms(weight, contiguous), wanted, rtol=1.2e-7)


@pytest.mark.parametrize("name", CASES)
def test_a_folder_is_what_peft_merges(tmp_path: Path, name: str) -> None:
    """Every tensor, and the states and logits of our model of each, to 1e-6 of the largest."""
    adapter = adapted(tmp_path, *CASES[name])
    theirs = merged(tmp_path)
    ours = open_checkpoint(str(adapter))
    family, config = read_checkpoint(ours)
    changed = 0
    for key, value in theirs.state_dict().items():
        if key in ours.names():
            found = ours.tensor(key)
            assert (found.shape, found.dtype) == ours.names()[key], key
            wanted = value.numpy()
            assert np.abs(found - wanted).max() <= 1e-6 * np.abs(wanted).max(), key
            before = ours.base.names()  # type: ignore[attr-defined]
            changed += key not in before or not np.array_equal(ours.base.tensor(key), found)  # type: ignore[attr-defined]
    assert changed > 0
    tokens = np.random.default_rng(0).integers(0, 97, (1, 24)).astype(np.int32)
    rows = pack(list(tokens), [[0]], 24, 0)
    stream = our_stream(load_decoder(ours, family, config, jnp.dtype(jnp.float32)), rows)
    tensors = {key: value.numpy() for key, value in theirs.state_dict().items() if key in ours.names()}
    same = our_stream(load(MemoryCheckpoint(dict(ours.config), tensors)), rows)
    errors = relative_errors([stream], [same])
    assert max(errors.values()) < 1e-6, errors
    # Beside the rounding of merging stands that of the two forward passes.
    errors = relative_errors([stream], [reference_stream(theirs, tokens)])
    assert max(errors.values()) < 5e-6, errors


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    adapted(folder, "llama", False, {"target_modules": ATTENTION})
    return folder


@pytest.fixture
def copied(lora: Path, tmp_path: Path) -> Path:
    """The adapter's folder and that of its base, to be changed at will."""
    return Path(shutil.copytree(lora, tmp_path / "copy"))


def change(folder: Path, **values: Any) -> None:
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refusal(folder: Path, *words: str, **how: Any) -> None:
    with pytest.raises(UserError) as error:
        open_checkpoint(str(folder / "adapter"), **how)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_the_base_is_named_by_the_folder_or_by_the_user(copied: Path) -> None:
    change(copied, base_model_name_or_path=str(copied / "base"))
    wanted = open_checkpoint(str(copied / "adapter"))
    change(copied, base_model_name_or_path="../base")
    digests = set()
    for how in ({}, {"base": str(copied / "base")}):
        found = open_checkpoint(str(copied / "adapter"), **how)
        assert all(np.array_equal(found.tensor(name), wanted.tensor(name)) for name in wanted.names())
        digests.add(found.sha256())
        assert len(found.tokenizer()) == len(byte_tokenizer())
    assert len(digests) == 1
    change(copied, base_model_name_or_path="/no/such/folder")
    refusal(copied, "/no/such/folder", "model.base=")
    change(copied, base_model_name_or_path=None)
    refusal(copied, "model.base=")
    with pytest.raises(UserError, match="a whole model"):
        open_checkpoint(str(copied / "base"), base=str(copied / "base"))
    change(copied, base_model_name_or_path=str(copied / "base"))
    refusal(copied, "an adapter itself", base=str(copied / "adapter"))
    change(copied, base_model_name_or_path=str(copied / "adapter"))
    refusal(copied, "an adapter itself")


def test_the_reference_of_a_comparison_is_the_base(copied: Path) -> None:
    change(copied, base_model_name_or_path=str(copied / "base"))
    config = CompareConfig(ComparedConfig(source=str(copied / "adapter"), dtype="bfloat16"), ComparedConfig())
    assert with_reference(config).reference == ComparedConfig(source=str(copied / "base"), dtype="bfloat16")
    with pytest.raises(UserError, match=r"reference\.source"):
        with_reference(CompareConfig(ComparedConfig(source=str(copied / "base")), ComparedConfig()))
    with pytest.raises(UserError, match="reference is missing"):
        CompareConfig(ComparedConfig(trace="run"), ComparedConfig())


@pytest.mark.parametrize("write", [export, convert])
def test_a_merged_model_is_written(copied: Path, write: Any) -> None:
    change(copied, base_model_name_or_path=str(copied / "base"))
    source = open_checkpoint(str(copied / "adapter"))
    written = open_checkpoint(str(write(source, str(copied / "out"))))
    assert written.names().keys() == source.names().keys()
    for name in source.names():
        assert np.array_equal(written.tensor(name), source.tensor(name)), name
    assert len(written.tokenizer()) == len(source.tokenizer())


def test_a_resized_vocabulary(copied: Path) -> None:
    """As PEFT saves it where tokens were added: both matrices whole, beside the adapter."""
    path = copied / "adapter" / "adapter_model.safetensors"
    rng = np.random.default_rng(0)
    names = ("base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight")
    save_file(load_file(path) | {name: rng.normal(size=(101, 32)).astype(np.float32) for name in names}, path)
    found = open_checkpoint(str(copied / "adapter"), base=str(copied / "base"))
    family, config = read_checkpoint(found)
    assert config.vocab_size == 101
    load_decoder(found, family, config, jnp.dtype(jnp.float32))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"peft_type": "IA3"}, ["IA3"]),
        ({"peft_type": ["LORA"]}, ["peft_type"]),
        ({"init_lora_weights": "pissa"}, ["init_lora_weights", "pissa"]),
        ({"target_parameters": ["mlp.experts.down_proj"]}, ["target_parameters"]),
        ({"layer_replication": [[0, 2]]}, ["layer_replication"]),
        ({"use_qalora": True}, ["use_qalora"]),
        ({"alora_invocation_tokens": [1]}, ["alora_invocation_tokens"]),
        ({"from_the_future": {"x": 1}}, ["from_the_future"]),
        ({"r": 5}, ["rank", "5"]),
        ({"r": 0}, ["r is 0"]),
        ({"lora_alpha": "8"}, ["lora_alpha"]),
        ({"lora_alpha": float("nan")}, ["lora_alpha"]),
        ({"rank_pattern": {"q_proj": 9}}, ["rank", "9"]),
        ({"rank_pattern": {"(": 9}}, ["rank_pattern"]),
        ({"rank_pattern": {r"([\w.]|[\w.]{2})+[^\w.]": 9}}, ["rank_pattern", "more than 0.01 s"]),
        ({"alpha_pattern": [1]}, ["alpha_pattern"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_are_not_understood_are_refused(
    copied: Path, values: dict[str, Any], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "more than 0.01 s" in words:
        monkeypatch.setattr(adapter, "SECONDS", 0.01)
    change(copied, **values)
    refusal(copied, "adapter_config.json", *words, base=str(copied / "base"))


def test_tensors_that_do_not_fit_are_refused(copied: Path) -> None:
    path, base = copied / "adapter" / "adapter_model.safetensors", str(copied / "base")
    sound = load_file(path)
    first = next(name for name in sound if "lora_A" in name)
    save_file({name: value for name, value in sound.items() if name != first}, path)
    refusal(copied, "lora_A", base=base)
    save_file(sound | {first.replace("q_proj", "r_proj"): sound[first]}, path)
    refusal(copied, "r_proj", base=base)
    save_file(sound | {"base_model.model.model.layers.0.lora_C.weight": sound[first]}, path)
    refusal(copied, "lora_C", base=base)
    save_file({"model.x": sound[first]}, path)
    refusal(copied, "model.x", base=base)
    save_file(sound | {first: np.ascontiguousarray(sound[first][:, :-1])}, path)
    found = open_checkpoint(str(copied / "adapter"), base=base)
    with pytest.raises(UserError, match="inputs"):
        found.tensor(first.removeprefix("base_model.model.").replace("lora_A.", ""))
    # NumPy would repeat one row, or one number, for all.
    rows = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    magnitude = first.replace("lora_A.weight", "lora_magnitude_vector")
    change(copied, trainable_token_indices={"embed_tokens": [1, 2, 3]})
    for key, shape, words in ((rows, (1, 32), "needs (3, 32)"), (magnitude, (1,), "1 numbers")):
        save_file(sound | {key: np.ones(shape, np.float32)}, path)
        found = open_checkpoint(str(copied / "adapter"), base=base)
        name = "model.embed_tokens.weight" if key == rows else first.removeprefix("base_model.model.")
        with pytest.raises(UserError, match=re.escape(words)):
            found.tensor(name.replace("lora_A.", ""))
    path.write_bytes(path.read_bytes()[:-3])
    refusal(copied, "truncated", base=base)
    path.rename(path.with_suffix(".bin"))
    refusal(copied, "pickle", base=base)


def test_a_step_of_a_folder_by_its_name(tmp_path: Path) -> None:
    source = random_checkpoint("random", SIZES["0.3m"] | {"num_hidden_layers": 2}, byte_tokenizer(), 0)
    for name in ("step-100", "checkpoint-1000", "other"):
        export(source, str(tmp_path / "run" / name))
    digest = source.names().keys()
    for revision in ("step-100", "step100", "checkpoint-1000", "step-1000"):
        assert open_checkpoint(str(tmp_path / "run"), revision).names().keys() == digest
    for revision in ("step-10", "step-2000", "main", "../run"):
        with pytest.raises(UserError, match="revision"):
            open_checkpoint(str(tmp_path / "run"), revision)
    export(source, str(tmp_path / "run" / "global_step1000"))
    with pytest.raises(UserError, match="several"):
        open_checkpoint(str(tmp_path / "run"), "step-1000")
