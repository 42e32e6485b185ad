"""HF to ours and back, bit for bit, for every family; and one model from four kinds of source, with one trace."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PretrainedConfig

from spinal_jax.api import audit
from spinal_jax.models.families import FAMILIES, family_of
from spinal_jax.models.formats.base import Checkpoint
from spinal_jax.models.formats.convert import convert
from spinal_jax.models.formats.export import export
from spinal_jax.models.formats.open import open_checkpoint
from spinal_jax.models.translate import parameter_shapes, tensor_targets

from . import test_gguf_models
from .cases import CASES, draw_config
from .reference import COMPOSITES, checkpoint_of, random_model, translate
from .test_delta_net import composite
from .test_gguf_tokens import byte_level, byte_level_keys  # noqa: F401 (a fixture)
from .test_sparse import SWITCHES, tiny

SPARSE = {config.model_type: config for config in SWITCHES}


def config_of(model_type: str, number: int) -> PretrainedConfig:
    """A tiny config of a family."""
    if model_type in CASES:
        return draw_config(model_type, number)
    return composite(model_type) if model_type in COMPOSITES else tiny(SPARSE[model_type], number)


def known_names(checkpoint: Checkpoint) -> dict[str, str]:
    """The rules' names of a checkpoint's tensors and its own, without those that hold no parameter of ours."""
    family = family_of(checkpoint.config["model_type"])
    names = {}
    for name in checkpoint.names():
        if not any(re.fullmatch(pattern, name) for pattern in family.ignored):
            known = name
            for pattern, replacement in family.renamed:
                known = re.sub(pattern, replacement, known)
            names[known] = name
    return names


@pytest.mark.parametrize("model_type", FAMILIES)
def test_there_and_back_is_bit_identical(tmp_path: Path, model_type: str) -> None:
    """In bfloat16 for every other family, which is how most checkpoints are published."""
    dtype = torch.bfloat16 if list(FAMILIES).index(model_type) % 2 else torch.float32
    random_model(config_of(model_type, 0)).to(dtype).save_pretrained(tmp_path / "before")
    before = open_checkpoint(str(tmp_path / "before"))
    ours = open_checkpoint(str(convert(before, str(tmp_path / "ours"))))
    after = open_checkpoint(str(export(ours, str(tmp_path / "after"), shard_bytes=60_000)))
    originals = known_names(before)
    assert list(after.names()) == sorted(originals)
    for name, original in originals.items():
        assert after.names()[name] == before.names()[original]
        assert after.tensor(name).tobytes() == before.tensor(original).tobytes(), name
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "after", output_loading_info=True)
    assert not any(info.values()), info
    assert model.dtype == dtype
    if model_type not in ("gemma3", *COMPOSITES):  # of which only the text part is kept
        assert after.config == before.config


@pytest.mark.parametrize("model_type", FAMILIES)
def test_rules_join_what_they_split(model_type: str) -> None:
    """For another draw of switches."""
    checkpoint = checkpoint_of(random_model(config_of(model_type, 1)))
    family, config = family_of(model_type), translate(checkpoint.config)
    stored = known_names(checkpoint)
    for place in tensor_targets(family.rules(config), config, parameter_shapes(config)):
        tensor = checkpoint.tensor(stored[place.name]).astype(ml_dtypes.bfloat16)
        joined = place.rule.join(place.rule.split(tensor, config), config)
        assert (joined.shape, joined.dtype) == (tensor.shape, tensor.dtype)
        assert joined.tobytes() == tensor.tobytes(), place.name


@pytest.mark.parametrize(("model_type", "number"), [("gemma3", 0), ("mistral3", 0), ("mistral3", 1)])
def test_a_text_part_alone_gives_the_logits_of_the_whole(tmp_path: Path, model_type: str, number: int) -> None:
    whole = random_model(config_of(model_type, number))
    whole.save_pretrained(tmp_path / "whole")
    described = tmp_path / "whole" / "config.json"
    if model_type == "mistral3":  # published files leave it out: whether there is an lm_head says it
        kept = json.loads(described.read_text())
        del kept["tie_word_embeddings"]
        described.write_text(json.dumps(kept))
    export(open_checkpoint(str(tmp_path / "whole")), str(tmp_path / "text"))
    text = AutoModelForCausalLM.from_pretrained(tmp_path / "text", attn_implementation="eager").eval()
    tokens = torch.arange(30)[None]
    with torch.no_grad():
        torch.testing.assert_close(text(tokens).logits, whole(tokens).logits, rtol=0, atol=0)


def test_a_shard_holds_no_more_than_is_allowed(tmp_path: Path) -> None:
    random_model(config_of("llama", 0)).save_pretrained(tmp_path / "before")
    source = open_checkpoint(str(tmp_path / "before"))
    limit = 40_000
    folder = export(source, str(tmp_path / "after"), shard_bytes=limit)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    total = 0
    shards = sorted(folder.glob("*.safetensors"))
    assert [path.name for path in shards] == sorted(set(index["weight_map"].values()))
    for number, path in enumerate(shards, start=1):
        assert path.name == f"model-{number:05}-of-{len(shards):05}.safetensors"
        with safe_open(path, framework="np") as file:
            assert file.metadata() == {"format": "pt"}
            assert {name for name, shard in index["weight_map"].items() if shard == path.name} == set(file.keys())
            size = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
        assert size <= limit
        total += size
    assert index["metadata"]["total_size"] == total
    whole = export(source, str(tmp_path / "whole"))
    assert [path.name for path in whole.glob("*.safetensors*")] == ["model.safetensors"]


def test_the_dtype_that_is_written_is_the_one_that_config_json_says(tmp_path: Path) -> None:
    random_model(config_of("qwen2", 0)).save_pretrained(tmp_path / "before")
    source = open_checkpoint(str(tmp_path / "before"))
    after = open_checkpoint(str(export(source, str(tmp_path / "after"), dtype="bfloat16")))
    assert after.config == source.config | {"dtype": "bfloat16"}
    name = "model.embed_tokens.weight"
    assert after.tensor(name).tobytes() == source.tensor(name).astype(ml_dtypes.bfloat16).tobytes()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "after").dtype == torch.bfloat16


def test_the_bias_that_chooses_experts_stays_float32(tmp_path: Path) -> None:
    """Rounded to bfloat16 it would send tokens elsewhere; Hugging Face keeps it, and so do both that we write."""
    random_model(config_of("deepseek_v3", 0)).save_pretrained(tmp_path / "before")
    before = open_checkpoint(str(tmp_path / "before"))
    biases = {name for name in before.names() if name.endswith("e_score_correction_bias")}
    assert biases
    ours = convert(before, str(tmp_path / "ours"), dtype="bfloat16")
    for folder in (ours, export(before, str(tmp_path / "hf"), dtype="bfloat16"), export_of(ours, tmp_path / "hf2")):
        after = open_checkpoint(str(folder))
        for name, info in after.names().items():
            assert info.dtype == (np.float32 if name in biases else ml_dtypes.bfloat16), name
        for name in biases:
            values = before.tensor(name)
            assert (values.astype(ml_dtypes.bfloat16) != values).any()
            assert after.tensor(name).tobytes() == values.tobytes()
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values()), info
    loaded = {name: tensor for name, tensor in model.state_dict().items() if name in biases}
    assert loaded.keys() == biases
    for name, tensor in loaded.items():
        assert tensor.dtype == torch.float32
        assert tensor.numpy().tobytes() == before.tensor(name).tobytes()


def export_of(folder: Path, out: Path) -> Path:
    return export(open_checkpoint(str(folder)), str(out), dtype="bfloat16")


def test_one_model_from_four_sources_has_one_trace(tmp_path: Path, byte_level: Any) -> None:  # noqa: F811
    keys = {key: value for key, value in byte_level_keys(byte_level).items() if key.startswith("tokenizer.")}
    vocabulary = len(keys["tokenizer.ggml.tokens"])
    case = test_gguf_models.llama({"vocab_size": vocabulary}, keys)
    model = test_gguf_models.random_model(case)
    single = test_gguf_models.export(case, model, tmp_path / "model.gguf")
    model.save_pretrained(tmp_path / "hf")
    open_checkpoint(str(single)).tokenizer().save_pretrained(tmp_path / "hf")
    ours = convert(open_checkpoint(str(tmp_path / "hf")), str(tmp_path / "ours"))
    sources = [
        tmp_path / "hf",
        single,
        ours,
        export(open_checkpoint(str(ours)), str(tmp_path / "hf2"), shard_bytes=20_000),
        convert(open_checkpoint(str(single)), str(tmp_path / "ours2")),
    ]
    texts = [f"{word} {number}, and then some more of it" for word in ("hello", "world") for number in range(12)]
    traces = [audit(str(source), texts, groups=4, progress=False) for source in sources]
    assert np.isfinite(traces[0].columns["contraction"]).all()
    for trace in traces[1:]:
        assert trace.prompts["tokens"] == traces[0].prompts["tokens"]
        for name, column in traces[0].columns.items():
            np.testing.assert_allclose(trace.columns[name], column, rtol=0, atol=1e-6, err_msg=name)
        for name, value in traces[0].summary.items():
            np.testing.assert_allclose(trace.summary[name], value, rtol=0, atol=1e-6, err_msg=name)
