"""Block-scaled weights against the products they stand for, and Hugging Face's own decoding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import GptOssConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from spinal_jax.errors import UserError
from spinal_jax.models.families import read_checkpoint
from spinal_jax.models.formats.base import ReadsParts
from spinal_jax.models.formats.open import open_checkpoint
from spinal_jax.models.translate import load_decoder

from .reference import checkpoint_of, our_stream, pack, random_model, reference_stream, relative_errors

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [4, 8], "activation_scheme": "dynamic"}


def write(folder: Path, settings: Any, tensors: dict[str, np.ndarray]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": settings}))
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def refusal(folder: Path, *words: str) -> None:
    with pytest.raises(UserError) as error:
        open_checkpoint(str(folder))
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
@pytest.mark.parametrize("scale_dtype", [np.float32, ml_dtypes.float8_e8m0fnu])
@pytest.mark.parametrize("shape", [(8, 16), (9, 21), (3, 5)])
def test_fp8_is_the_product_with_the_factor_of_its_block(
    tmp_path: Path, dtype: Any, scale_dtype: Any, shape: tuple[int, int]
) -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=shape).astype(dtype)
    blocks = -(-shape[0] // 4), -(-shape[1] // 8)
    scale = np.exp2(rng.integers(-6, 6, blocks)).astype(scale_dtype)
    norm = rng.normal(size=5).astype(ml_dtypes.bfloat16)
    found = open_checkpoint(str(write(tmp_path / "m", FP8, {"w": weight, "w_scale_inv": scale, "norm": norm})))
    spread = np.repeat(np.repeat(scale.astype(np.float32), 4, axis=0), 8, axis=1)[: shape[0], : shape[1]]
    wanted = weight.astype(np.float32) * spread
    assert dict(found.names()) == {"norm": ((5,), norm.dtype), "w": (shape, np.dtype(np.float32))}
    assert np.array_equal(found.tensor("w"), wanted)
    assert found.tensor("norm").tobytes() == norm.tobytes()
    assert isinstance(found, ReadsParts)
    assert np.array_equal(found.part("w", ((1, 3), (2, 5))), wanted[1:3, 2:5])
    assert "quantization_config" not in found.config


def test_fp8_with_one_factor_for_a_tensor_and_one_for_what_it_multiplies(tmp_path: Path) -> None:
    weight = np.arange(12, dtype=np.float32).reshape(3, 4).astype(ml_dtypes.float8_e4m3fn)
    settings = FP8 | {"weight_block_size": None}
    factors = {"l.weight_scale_inv": np.asarray([0.5], np.float32), "l.activation_scale": np.ones(1, np.float32)}
    found = open_checkpoint(str(write(tmp_path / "m", settings, {"l.weight": weight, **factors})))
    assert list(found.names()) == ["l.weight"]
    assert np.array_equal(found.tensor("l.weight"), weight.astype(np.float32) * 0.5)


@pytest.mark.parametrize("lead", [(3,), ()])
def test_mxfp4_is_what_hugging_face_decodes(tmp_path: Path, lead: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (*lead, 6, 2, 16), dtype=np.uint8)
    scales = rng.integers(112, 136, (*lead, 6, 2), dtype=np.uint8)
    tensors = {"e.down_proj_blocks": blocks, "e.down_proj_scales": scales, "e.down_proj_bias": np.ones(4, np.float32)}
    found = open_checkpoint(str(write(tmp_path / "m", {"quant_method": "mxfp4"}, tensors)))
    whole = (torch.from_numpy(x if lead else x[None]) for x in (blocks, scales))
    wanted = convert_moe_packed_tensors(*whole).float().numpy()
    values = found.tensor("e.down_proj")
    assert found.names()["e.down_proj"] == (values.shape, np.dtype(ml_dtypes.bfloat16))
    assert np.array_equal(values.astype(np.float32), wanted if lead else wanted[0])
    assert list(found.names()) == ["e.down_proj", "e.down_proj_bias"]


@torch.no_grad()
def test_a_gpt_oss_folder_is_the_model_of_its_decoded_weights(tmp_path: Path) -> None:
    """Blocks and scales under the names that the published checkpoints have, against Hugging Face in float32."""
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_local_experts": 4}
    heads: dict[str, Any] = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 61,
        "pad_token_id": 0,
    }
    model: Any = random_model(GptOssConfig(**sizes, **heads, sliding_window=5, num_experts_per_tok=2))
    rng = np.random.default_rng(0)
    packed = {}
    for layer, block in enumerate(model.model.layers):
        for name, rows, width in (("gate_up_proj", 128, 32), ("down_proj", 32, 64)):
            blocks = rng.integers(0, 256, (4, rows, width // 32, 16), dtype=np.uint8)
            scales = rng.integers(121, 127, (4, rows, width // 32), dtype=np.uint8)
            whole = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales))
            getattr(block.mlp.experts, name).copy_(whole.float())
            stored = f"model.layers.{layer}.mlp.experts.{name}"
            packed |= {f"{stored}_blocks": blocks, f"{stored}_scales": scales}
    saved = checkpoint_of(model)
    plain = {name: tensor for name, tensor in saved.tensors.items() if f"{name}_blocks" not in packed}
    folder = write(tmp_path / "m", {"quant_method": "mxfp4"}, plain | packed)
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    (folder / "config.json").write_text(json.dumps(saved.config | {"quantization_config": settings}))
    found = open_checkpoint(str(folder))
    decoder = load_decoder(found, *read_checkpoint(found), np.dtype(np.float32))
    tokens = rng.integers(0, 61, (1, 24)).astype(np.int32)
    ours = our_stream(decoder, pack([tokens[0]], [[0]], 24, 0))
    assert max(relative_errors([ours], [reference_stream(model, tokens)]).values()) < 1e-5


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    eight = np.ones((8, 16), ml_dtypes.float8_e4m3fn)
    folder = tmp_path / "m"
    refusal(write(folder, FP8, {"w": eight}), "w is float8", "w_scale_inv")
    refusal(write(folder, FP8, {"w": eight, "w_scale_inv": np.ones((2, 3), np.float32)}), "(2, 3)")
    refusal(write(folder, FP8, {"w": np.ones((8, 16), np.float32), "w_scale_inv": np.ones((2, 2), np.float32)}), "w of")
    for scale in ((), (1,), (1, 1)):  # one factor for eight blocks
        refusal(write(folder, FP8, {"w": eight, "w_scale_inv": np.ones(scale, np.float32)}), "blocks of [4, 8]")
    for block in ([0, 8], [], [4], "48", [4, 8, 1], False):
        refusal(write(folder, FP8 | {"weight_block_size": block}, {"w": eight}), "weight_block_size")
    refusal(write(folder, {"quant_method": "gptq"}, {"w": eight}), "gptq", "fp8")
    refusal(write(folder, [1], {"w": eight}), "quantization_config")
    blocks = np.ones((2, 6, 2, 16), np.uint8)
    refusal(write(folder, {"quant_method": "mxfp4"}, {"w_blocks": blocks}), "w_blocks", "MXFP4")
    wrong = {"w_blocks": blocks, "w_scales": np.ones((2, 6, 3), np.uint8)}
    refusal(write(folder, {"quant_method": "mxfp4"}, wrong), "MXFP4")
