"""Model folders that are damaged, hostile or contradict themselves: one sentence, no memory, no wrong number."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from spinal_jax.audit import pipeline
from spinal_jax.config import ModelConfig
from spinal_jax.errors import UserError
from spinal_jax.models.families import FAMILIES, read_checkpoint, read_model
from spinal_jax.models.formats.base import read_json
from spinal_jax.models.formats.byte_level import SIZES, byte_tokenizer
from spinal_jax.models.formats.export import export
from spinal_jax.models.formats.memory import random_checkpoint
from spinal_jax.models.formats.open import open_checkpoint
from spinal_jax.models.translate import load_decoder, parameter_shapes, require_finite


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama folder with tokenizer, in two shards."""
    folder = tmp_path_factory.mktemp("model") / "sound"
    config = SIZES["0.3m"] | {"num_hidden_layers": 2}
    source = random_checkpoint("random", config, byte_tokenizer(), 0)
    return export(source, str(folder), shard_bytes=100_000)


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(sound, tmp_path / "model"))


def load(folder: Path) -> None:
    checkpoint = open_checkpoint(str(folder))
    family, decoder = read_checkpoint(checkpoint)
    load_decoder(checkpoint, family, decoder, np.dtype(np.float32))


def refusal(folder: Path, *words: str) -> str:
    with pytest.raises(UserError) as error:
        load(folder)
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message
    assert len(message) < 800
    return message


def change(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_sound_folder_loads(folder: Path) -> None:
    load(folder)


# config.json: every key of every family, with values that are none of it.


def nested(depth: int) -> list[Any]:
    return [] if depth == 0 else [nested(depth - 1)]


BAD: list[Any] = [None, True, [], {}, [[]], {"a": 1}, "", "1e5", -1, 0, 1, 0.5, -1e-3, math.inf, math.nan, 10**400]
BAD += [2**31, 2**63, 1e308, 1e-320, nested(500)]


def every_key(config: dict[str, Any], before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in config.items():
        yield (*before, key)
        if isinstance(value, dict):
            yield from every_key(value, (*before, key))


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_a_config_is_read_or_refused_whatever_its_values(model_type: str) -> None:
    """No traceback, no time and no memory beyond what an honest config takes."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[model_type]().to_dict()
    read = longest = 0
    for path in every_key(config):
        for bad in BAD:
            changed = copy.deepcopy(config)
            inner = changed
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = bad
            try:
                _, decoder = read_model(changed)
            except UserError as error:
                longest = max(longest, len(str(error)))
                continue
            read += 1
            assert 0 <= decoder.norm_eps <= 1, path
            assert math.isfinite(decoder.query_scale), path
            assert all(math.isfinite(rope.theta) and rope.theta > 0 for rope in decoder.ropes), path
    assert read > 0
    assert longest < 800


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rms_norm_eps": -1e-3}, ["rms_norm_eps", "-0.001"]),
        ({"rms_norm_eps": 10**400}, ["rms_norm_eps"]),
        ({"rope_theta": math.inf}, ["rope_theta", "inf"]),
        ({"rope_theta": 0}, ["rope_theta"]),
        ({"rope_parameters": {"rope_type": []}}, ["rope_type", "[]"]),
        ({"rope_parameters": {"rope_type": "linear", "factor": -2.0}}, ["factor"]),
        ({"rope_parameters": []}, ["rope_parameters"]),
        (
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [0.0] * 8}},
            ["long_factor", "positive"],
        ),
        ({"num_hidden_layers": 2**31}, ["num_hidden_layers"]),
        ({"num_hidden_layers": 4000}, ["2 blocks", "4000"]),
        ({"num_hidden_layers": -1}, ["num_hidden_layers"]),
        ({"num_attention_heads": 0}, ["num_attention_heads"]),
        ({"num_key_value_heads": 0}, ["num_key_value_heads"]),
        ({"hidden_size": 2**31 - 2}, ["features"]),
        ({"hidden_size": 2**17}, ["model.embed_tokens.weight"]),
        ({"vocab_size": 2**31 - 1}, ["model.embed_tokens.weight"]),
        ({"intermediate_size": 10**9}, ["gate_proj"]),
        ({"model_type": ["llama"]}, ["model_type"]),
        ({"model_type": {}}, ["model_type"]),
        ({"model_type": "x" * 10_000}, ["model_type"]),
        ({"x" * 5: "y" * 100_000}, ["xxxxx"]),
    ],
    ids=lambda value: "-".join(value)[:40] if isinstance(value, dict) else None,
)
def test_configs_that_no_model_has(folder: Path, values: dict[str, Any], words: list[str]) -> None:
    change(folder, **values)
    refusal(folder, *words)


def test_configs_that_are_no_configs(folder: Path) -> None:
    digits = '{"a": ' + "1" * 5000 + "}"
    twice = (folder / "config.json").read_text().replace('"vocab_size"', '"vocab_size": 7, "vocab_size"')
    texts = (("[" * 200_000, "nested"), ("[]", "list"), ("{", "not JSON"), (digits, "JSON"), (twice, "twice"))
    for text, word in texts:
        (folder / "config.json").write_text(text)
        refusal(folder, "config.json", word)
    (folder / "config.json").write_bytes(b"\xff\xfe{}")
    refusal(folder, "config.json")


def test_a_description_of_any_size_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "big.json"
    with path.open("wb") as file:
        file.truncate(1 << 32)  # sparse: takes no room
    with pytest.raises(UserError, match="MiB"):
        read_json(path)


def test_more_experts_than_there_are_tensors(folder: Path) -> None:
    change(folder, model_type="mixtral", num_local_experts=16_000, num_experts_per_tok=2)
    refusal(folder, "lacks the tensor")


# Safetensors.


def index_of(folder: Path) -> dict[str, str]:
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def write_index(folder: Path, weight_map: dict[str, Any]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_one_tensor_in_two_shards(folder: Path) -> None:
    weight_map = index_of(folder)
    name, shard = next(iter(weight_map.items()))
    other = next(each for each in sorted(set(weight_map.values())) if each != shard)
    tensor = load_file(folder / shard)[name]
    save_file(load_file(folder / other) | {name: tensor}, folder / other)
    load(folder)  # the same content twice is the same tensor
    for wrong in (tensor + 1, tensor[:1], tensor.astype(np.float16)):
        save_file(load_file(folder / other) | {name: np.ascontiguousarray(wrong)}, folder / other)
        refusal(folder, name, shard, other, "differ")


def test_a_header_that_names_a_tensor_twice(folder: Path) -> None:
    """The parser of the safetensors library takes the last of the two."""
    name, shard = next(iter(index_of(folder).items()))
    data = (folder / shard).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    other = f'"{name}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}},"{name}":'
    header = data[8:end].replace(f'"{name}":'.encode(), other.encode(), 1)
    (folder / shard).write_bytes(len(header).to_bytes(8, "little") + header + data[end:])
    refusal(folder, shard, name, "twice")


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2J", "a" * 2000])
def test_the_name_of_a_tensor_is_a_line_of_text(folder: Path, name: str) -> None:
    shard = min(folder.glob("*.safetensors"))
    save_file(load_file(shard) | {name: np.zeros(1, np.float32)}, shard)
    refusal(folder, "not a line of text")


def test_an_index_with_entries_too_many(folder: Path) -> None:
    weight_map = index_of(folder)
    name, shard = next(iter(weight_map.items()))
    write_index(folder, weight_map | {"model.layers.0.self_attn.rotary_emb.inv_freq": shard})
    load(folder)
    write_index(folder, {key: value for key, value in weight_map.items() if key != name})
    refusal(folder, "lacks the tensor", name)
    other = next(each for each in sorted(set(weight_map.values())) if each != shard)
    write_index(folder, weight_map | {name: other})
    refusal(folder, name, shard, other)
    for wrong in (None, 3, ["model.safetensors"]):
        write_index(folder, weight_map | {name: wrong})
        refusal(folder, name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs on this system")
@pytest.mark.parametrize("what", ["config.json", "shard", "model.safetensors.index.json"])
def test_only_regular_files_are_read(folder: Path, what: str) -> None:
    path = folder / (next(iter(index_of(folder).values())) if what == "shard" else what)
    path.unlink()
    os.mkfifo(path)
    refusal(folder, path.name, "regular file")
    path.unlink()
    path.mkdir()
    refusal(folder, path.name)


# Weights that are not finite.


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_first_tensor_that_is_not_finite_is_named(folder: Path, value: float) -> None:
    weight_map = index_of(folder)
    name = "model.layers.1.mlp.up_proj.weight"
    shard = folder / weight_map[name]
    tensors = load_file(shard)
    tensors[name][3, 5] = value
    save_file(tensors, shard)
    refusal(folder, name, "1 values")


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_finite_values_of_every_size_pass(dtype: Any) -> None:
    limits = ml_dtypes.finfo(dtype)
    values = np.asarray([[0.0, -0.0, limits.max, limits.min, limits.smallest_subnormal, 1.0]], dtype)
    require_finite(values, "a model", "w")
    require_finite(values[0, 0], "a model", "w")
    for bad in (math.nan, math.inf, -math.inf):
        wrong = np.concatenate([values, np.full_like(values, bad)])
        with pytest.raises(UserError, match="6 values of w"):
            require_finite(wrong, "a model", "w")


# Random models.


@pytest.mark.parametrize("seed", ["9999999999999999999999", str(2**32), "1" * 5000])
def test_a_seed_beyond_what_the_generator_takes(seed: str) -> None:
    with (
        pytest.raises(UserError, match="seed"),
        pipeline.opened(ModelConfig(f"random:0.3m@{seed}")),
    ):
        pass


def test_shapes_are_made_of_no_memory() -> None:
    _, decoder = read_model(SIZES["0.3m"] | {"hidden_size": 2**20, "num_attention_heads": 2**13, "vocab_size": 2**30})
    assert parameter_shapes(decoder)["embedding"].shape == (2**30, 2**20)
