"""`spinal verify` of every kind of source: Hugging Face and PEFT read it themselves, and a wrong value is found."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import DeepseekV3Config, GptOssConfig, PretrainedConfig, Qwen3Config

from spinal_jax import torch_reference
from spinal_jax.models.formats import adapter, quantised
from spinal_jax.models.formats.base import sha256_of
from spinal_jax.models.formats.convert import convert
from spinal_jax.models.formats.open import open_checkpoint
from spinal_jax.models.formats.safetensors import SafetensorsFolder
from spinal_jax.progress import no_bar
from spinal_jax.verify import Verification, _hash, verify

from . import test_adapters, test_gguf_mixers, test_gguf_models
from .gguf_files import write as write_gguf
from .test_gguf_tokens import byte_level, byte_level_keys  # noqa: F401 (a fixture)
from .test_verify import check, prompts, settings, write_model, write_tokenizer  # noqa: F401 (a fixture)

pytestmark = test_adapters.pytestmark

STREAM, READING = "residual stream and logits", "Hugging Face's reading of the file"
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}


def in_fp8(folder: Path, block: int = 8) -> Path:
    """The matrices of the blocks in float8, with a factor for each square of `block`."""
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        kept = tensor.ndim != 2 or "layers" not in name or name.endswith("mlp.gate.weight")
        if kept:
            tensors[name] = tensor
            continue
        rows, columns = (size // block for size in tensor.shape)
        squares = tensor.reshape(rows, block, columns, block)
        factors = np.abs(squares).max(axis=(1, 3)) / 448
        tensors[name] = (squares / factors[:, None, :, None]).reshape(tensor.shape).astype(ml_dtypes.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = factors
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return declared(folder, {"quant_method": "fp8", "weight_block_size": [block, block], "modules_to_not_convert": []})


def in_mxfp4(folder: Path) -> Path:
    """The experts as random blocks and scales, under the published names."""
    rng = np.random.default_rng(0)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        count, into, out = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = rng.integers(0, 256, (count, out, into // 32, 16), dtype=np.uint8)
        tensors[f"{name}_scales"] = rng.integers(121, 127, (count, out, into // 32), dtype=np.uint8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return declared(
        folder, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    )


def declared(folder: Path, quantisation: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantisation}))
    return folder


def passes(result: Verification) -> None:
    """Compared in full with what Hugging Face reads."""
    assert result.passed, str(result)
    assert READING not in {check.what for check in result.checks}
    assert result.difference is not None
    assert result.difference.residual.max() < 1e-5


def first_factor_doubled(folder: SafetensorsFolder, name: str) -> np.ndarray:
    values = read_tensor(folder, name)
    if name.endswith("layers.0.self_attn.o_proj.weight_scale_inv"):
        values[0, 0] *= 2
    return values


read_tensor = SafetensorsFolder.tensor

QUANTISED: dict[str, PretrainedConfig] = {
    "fp8": Qwen3Config(**SIZES),
    "fp8, experts": DeepseekV3Config(**{key: value for key, value in SIZES.items() if key != "head_dim"} | LATENT),
    "mxfp4": GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, sliding_window=7),
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_folders_are_dequantised_by_both(
    tmp_path: Path,
    prompts: Path,  # noqa: F811
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = write_model(tmp_path / "model", QUANTISED[kind])
    (in_mxfp4 if kind == "mxfp4" else in_fp8)(folder)
    passes(verify(settings(folder, prompts)))
    if kind == "mxfp4":  # one of sixteen values is read wrongly
        wrong = quantised._FP4_PAIRS.copy()
        wrong[wrong == 6] = 5
        monkeypatch.setattr(quantised, "_FP4_PAIRS", wrong)
    else:  # one factor is not what was stored when Hugging Face read it
        monkeypatch.setattr(quantised.SafetensorsFolder, "tensor", first_factor_doubled)
    assert check(verify(settings(folder, prompts)), STREAM) is False


def test_the_hub_s_hashes_of_quantised_folders_and_adapters(tmp_path: Path) -> None:
    folder = in_fp8(write_model(tmp_path / "snapshots" / "abc", Qwen3Config(**SIZES)))
    adapted = tmp_path / "adapter" / "snapshots" / "def"
    adapted.mkdir(parents=True)
    (adapted / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    layer = "base_model.model.model.layers.0.self_attn.o_proj.lora_"
    terms = {
        f"{layer}{name}.weight": np.ones(shape, np.float32) for name, shape in {"A": (4, 32), "B": (32, 4)}.items()
    }
    save_file(terms, adapted / "adapter_model.safetensors")
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for weights in (folder / "model.safetensors", adapted / "adapter_model.safetensors"):
        blob = blobs / sha256_of([weights])
        weights.rename(blob)
        weights.symlink_to(blob)
    sources = open_checkpoint(str(folder)), open_checkpoint(str(adapted), base=str(folder))
    assert [_hash(source, no_bar).passed for source in sources] == [True, True]
    blob.write_bytes(blob.read_bytes()[:-1] + b"!")
    assert [_hash(source, no_bar).passed for source in sources] == [True, False]


ADAPTERS = {"rslora": "modules to save", "dora": "dora", "tokens": "tokens", "tied": "tied, head saved"}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_are_merged_by_peft(
    tmp_path: Path,
    prompts: Path,  # noqa: F811
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model_type, tied, options = test_adapters.CASES[ADAPTERS[kind]]
    folder = test_adapters.adapted(tmp_path, model_type, tied, options | {"use_rslora": kind == "rslora"})
    write_tokenizer(tmp_path / "base")
    passes(verify(settings(folder, prompts)))
    if kind != "rslora":
        return
    converted = convert(open_checkpoint(str(tmp_path / "base")), str(tmp_path / "converted"))
    asked = settings(folder, prompts)
    passes(verify(replace(asked, model=replace(asked.model, base=str(converted)))))
    scale = adapter._Settings.scale
    monkeypatch.setattr(adapter._Settings, "scale", lambda *a: 1.01 * scale(*a))
    assert check(verify(settings(folder, prompts)), STREAM) is False
    monkeypatch.undo()
    monkeypatch.setattr(torch_reference, "find_spec", lambda name: None)
    result = verify(settings(folder, prompts))
    assert check(result, READING) is None
    assert check(result, STREAM) is True
    assert "peft, which merges adapters, is not installed" in str(result)


def test_gguf_parts_are_compared_with_their_export(
    tmp_path: Path,
    prompts: Path,  # noqa: F811
    byte_level: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    paths = [tmp_path / f"m-0000{part}-of-00002.gguf" for part in (1, 2)]

    def in_parts(path: Path, architecture: str, keys: Any, tensors: Any) -> Path:
        halves = dict(list(tensors.items())[::2]), dict(list(tensors.items())[1::2])
        for number, (own, half) in enumerate(zip(paths, halves, strict=True)):
            split = {"split.no": number, "split.count": 2, "split.tensors.count": len(tensors)}
            write_gguf(own, architecture, {**(keys if number == 0 else {}), **split}, half)
        return paths[0]

    keys = {key: value for key, value in byte_level_keys(byte_level).items() if key.startswith("tokenizer.")}
    case = test_gguf_models.llama({"vocab_size": len(keys["tokenizer.ggml.tokens"])}, keys)
    monkeypatch.setattr(test_gguf_models, "write", in_parts)
    first = test_gguf_models.export(case, test_gguf_models.random_model(case), tmp_path / "m.gguf")
    result = verify(settings(first, prompts))
    assert result.passed
    assert check(result, READING) is None
    assert check(result, STREAM) is True
    assert "GGUF files of one part, and this one has 2" in str(result)


@pytest.mark.parametrize("name", ["qwen3_5_moe_text", "stablelm"])
def test_what_transformers_reads_of_a_gguf_file(
    tmp_path: Path,
    prompts: Path,  # noqa: F811
    byte_level: Any,  # noqa: F811
    name: str,
) -> None:
    """It knows the order of heads in Qwen3.5's files, and not the norms of StableLM's."""
    keys = {key: value for key, value in byte_level_keys(byte_level).items() if key.startswith("tokenizer.")}
    case = test_gguf_mixers.CASES[name]
    config = {**case.config, "vocab_size": len(keys["tokenizer.ggml.tokens"])}
    test_gguf_mixers.exported(replace(case, config=config, keys={**case.keys, **keys}), tmp_path / "m.gguf")
    result = verify(settings(tmp_path / "m.gguf", prompts))
    assert check(result, STREAM) is True
    if name == "stablelm":
        assert "transformers leaves out model.layers.0.self_attn.k_layernorm.norms.0.weight" in str(result)
    else:
        assert READING not in {check.what for check in result.checks}
