"""GGUF files against the gguf package and transformers: values, types, metadata, and refusals."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Quantisation
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from spinal_jax.errors import UserError
from spinal_jax.models.formats.base import ReadsParts
from spinal_jax.models.formats.gguf import GgufFile
from spinal_jax.models.formats.open import open_checkpoint

from .gguf_files import KEYS, RAW, normal, quantised, some_tensors, write


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


def test_a_part_of_a_tensor_is_read_without_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that lie paired in the file, blocks of 32 columns, and GPT-2's transposed matrices."""
    rng = np.random.default_rng(0)
    down = quantised(normal(rng, 64, 96), Quantisation.Q4_0)
    query, key = (quantised(normal(rng, rows, 64), Quantisation.Q8_0) for rows in (64, 32))
    changed = {"blk.0.attn_q": query, "blk.0.attn_k": key, "blk.0.ffn_down": down}
    llama = open_checkpoint(str(write(tmp_path / "a.gguf", "llama", KEYS, some_tensors(**changed))))
    gpt2_keys = {**KEYS, ".attention.layer_norm_epsilon": 1e-5, ".attention.head_count_kv": 4}
    del gpt2_keys[".attention.layer_norm_rms_epsilon"]
    qkv = quantised(normal(rng, 192, 64), Quantisation.Q8_0)
    gpt2_tensors = {"token_embd.weight": normal(rng, 24, 64), "blk.0.attn_qkv.weight": qkv}
    gpt2 = open_checkpoint(str(write(tmp_path / "b.gguf", "gpt2", gpt2_keys, gpt2_tensors)))
    read: list[int] = []
    whole = GgufFile._read

    def counted(self: GgufFile, *asked: Any) -> np.ndarray:
        read.append((found := whole(self, *asked)).size)
        return found

    monkeypatch.setattr(GgufFile, "_read", counted)
    for checkpoint in (llama, gpt2):
        assert isinstance(checkpoint, ReadsParts)
        for name, info in checkpoint.names().items():
            every = checkpoint.tensor(name)
            rows, columns = info.shape
            for bounds in (
                ((0, rows), (0, columns)),
                ((rows // 4, rows // 2), (0, columns)),
                ((0, rows), (columns // 2, columns)),
                ((1, rows - 3), (5, 41)),
                ((0, 0), (0, columns)),
            ):
                read.clear()
                found = checkpoint.part(name, bounds)
                np.testing.assert_array_equal(found, every[tuple(slice(*each) for each in bounds)], err_msg=name)
                assert found.dtype == every.dtype
                assert sum(read) == found.size


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
        (".expert_count", 8, ["llama.expert_used_count", "8"]),
        (".rope.scaling.type", "dynamic", ["llama.rope.scaling.type", "dynamic"]),
        (".rope.scaling.attn_factor", 1.5, ["llama.rope.scaling.attn_factor"]),
        (".rope.dimension_count", 8, ["llama.rope.dimension_count", "16"]),
        (".attention.value_length", 8, ["llama.attention.value_length"]),
        (".attention.head_count_kv", [1, 2], ["llama.attention.head_count_kv", "differs between blocks"]),
        ("general.type", "adapter", ["adapter"]),
        ("split.count", 3, ["3 parts", "00001-of-00003"]),
        ("split.count", "3", ["split.count"]),
        (".block_count", 2**31, ["llama.block_count", "2147483648"]),
        (".block_count", "two", ["llama.block_count", "'two'"]),
        (".embedding_length", 1.5, ["llama.embedding_length", "1.5"]),
        (".attention.head_count", 0, ["llama.attention.head_count"]),
        (".attention.layer_norm_rms_epsilon", "small", ["layer_norm_rms_epsilon"]),
        (".attention.layer_norm_rms_epsilon", float("nan"), ["layer_norm_rms_epsilon"]),
        (".rope.freq_base", float("inf"), ["llama.rope.freq_base"]),
        (".rope.scaling.type", ["none", "linear"], ["llama.rope.scaling.type"]),
        ("general.alignment", 48, ["alignment", "48"]),
        ("general.alignment", "32", ["alignment"]),
        ("general.type", ["model"], ["model"]),
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


def moved(whole: bytes, tensor: str, by: int) -> bytes:
    """The file with the offset of a tensor changed in its table."""
    at = whole.index(tensor.encode()) + len(tensor)
    dimensions = int.from_bytes(whole[at : at + 4], "little")
    at += 4 + 8 * dimensions + 4
    offset = int.from_bytes(whole[at : at + 8], "little") + by
    return whole[:at] + (offset % 2**64).to_bytes(8, "little") + whole[at + 8 :]


@pytest.mark.parametrize("by", [1, 7, 32, -32, 64 * 64 * 4, -(2**63), 2**40])
def test_a_tensor_that_is_not_where_the_format_puts_it_is_refused(tmp_path: Path, by: int) -> None:
    path = write(tmp_path / "m.gguf", "llama", KEYS, some_tensors())
    path.write_bytes(moved(path.read_bytes(), "blk.0.attn_k.weight", by))
    refusal(path, "blk.0.attn_k.weight", "begin")


def test_two_tensors_that_change_places_are_refused(tmp_path: Path) -> None:
    tensors = some_tensors()
    size = tensors["blk.0.attn_q.weight"].nbytes
    path = write(tmp_path / "m.gguf", "llama", KEYS, tensors | {"blk.0.attn_v.weight": tensors["blk.0.attn_k.weight"]})
    whole = moved(path.read_bytes(), "blk.0.attn_k.weight", size)
    path.write_bytes(moved(whole, "blk.0.attn_v.weight", -size))
    refusal(path, "begin")


def test_names_are_a_line_of_text(tmp_path: Path) -> None:
    for name in (".attention.head_coun\n_kv", ".a\x1b[2J", "." + "a" * 1000):
        refusal(write(tmp_path / "m.gguf", "llama", KEYS | {name: 2}, some_tensors()), "not a line")


def test_an_architecture_that_is_no_name_is_refused(tmp_path: Path) -> None:
    for value in (["llama"], 7, True):
        keys = KEYS | {"general.architecture": value}
        writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
        writer.kv_data[0].clear()
        add = {list: writer.add_array, int: writer.add_uint32, bool: writer.add_bool}[type(value)]
        add("general.architecture", keys["general.architecture"])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        refusal(tmp_path / "m.gguf", "general.architecture", "not a name")


def split(tmp_path: Path, names: list[str], **changed: Any) -> list[Path]:
    """A model in two parts, by what `llama-gguf-split` calls them."""
    tensors = some_tensors()
    half = dict(list(tensors.items())[:2]), dict(list(tensors.items())[2:])
    paths = []
    for number, (name, part) in enumerate(zip(names, half, strict=True)):
        keys = {"split.no": number, "split.count": 2, "split.tensors.count": len(tensors)} | changed
        paths.append(write(tmp_path / name, "llama", (KEYS if number == 0 else {}) | keys, part))
    return paths


def test_a_model_in_parts_is_the_model_in_one(tmp_path: Path) -> None:
    names = ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]
    whole = open_checkpoint(str(write(tmp_path / "m.gguf", "llama", KEYS, some_tensors())))
    for path in split(tmp_path, names):
        parts = open_checkpoint(str(path))
        assert parts.config == whole.config
        assert parts.names() == whole.names()
        assert all(parts.tensor(name).tobytes() == whole.tensor(name).tobytes() for name in whole.names())
    (tmp_path / names[1]).rename(tmp_path / "elsewhere")
    refusal(tmp_path / names[0], names[1], "is missing")
    (tmp_path / names[0]).rename(tmp_path / names[1])
    write(tmp_path / names[0], "llama", KEYS | {"split.no": 0, "split.count": 2}, {})
    refusal(tmp_path / names[1], "part 0 of 2")
    first, _ = split(tmp_path, names, **{"split.tensors.count": 9})
    refusal(first, "9")
    first, second = split(tmp_path, names)
    tensors = dict(list(some_tensors().items())[2:])
    write(second, "phi3", {"split.no": 1, "split.count": 2, "split.tensors.count": 4}, tensors)
    refusal(second, "general.architecture", "phi3", "llama")


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
    with pytest.raises(UserError, match=r"pip install gguf"):
        open_checkpoint(str(path))
