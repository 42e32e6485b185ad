"""Gated delta nets: the rule against its definition, sequences that share a row, models that read images, training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from spinal_jax.config import ParallelConfig
from spinal_jax.errors import UserError
from spinal_jax.models.config import BlockKind, DecoderConfig, DeltaNet
from spinal_jax.models.delta_net import convolve, delta_rule
from spinal_jax.models.families import read_checkpoint
from spinal_jax.models.formats.byte_level import byte_tokenizer
from spinal_jax.models.formats.convert import convert
from spinal_jax.models.formats.export import export
from spinal_jax.models.formats.open import open_checkpoint
from spinal_jax.models.parts import take_apart
from spinal_jax.models.translate import load_decoder
from spinal_jax.objectives.responses import shareable
from spinal_jax.parallel.mesh import make_mesh, shard_parameters, shard_rows

from .reference import (
    LONG,
    MemoryCheckpoint,
    Rows,
    assert_parity,
    checkpoint_of,
    load,
    our_stream,
    pack,
    random_model,
)

DELTA: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
}
SMALL: dict[str, Any] = DELTA | {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-2,  # so that no head that reads next to nothing is normed to full size, rounding and all
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SPARSE: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 20,
}
KINDS: dict[str, Any] = {
    "qwen3_next": Qwen3NextConfig(**SMALL, **SPARSE),
    "qwen3_5_text": Qwen3_5TextConfig(**SMALL),
    "qwen3_5_moe_text": Qwen3_5MoeTextConfig(**SMALL, **SPARSE),
}


def by_definition(q: Any, k: Any, v: Any, log_decay: Any, rate: Any, segments: Any) -> np.ndarray:
    """Token by token, in float64."""
    out = np.zeros(v.shape)
    for b, at in enumerate(segments):
        state = np.zeros((*v.shape[2:4], q.shape[-1], v.shape[-1]))  # [K, G, dk, dv]
        for t in range(len(at)):
            if t and at[t] != at[t - 1]:
                state[:] = 0
            state *= np.exp(log_decay[b, t])[..., None, None]
            known = np.einsum("kgde,kd->kge", state, k[b, t])
            change = rate[b, t][..., None] * (v[b, t] - known)
            state += k[b, t][:, None, :, None] * change[:, :, None, :]
            out[b, t] = np.einsum("kgde,kd->kge", state, q[b, t])
    return out


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_the_rule_in_chunks_is_the_rule_token_by_token(chunk: int) -> None:
    """Sequences begin and end within chunks and at their edges; some are shorter than a chunk, some longer."""
    rng = np.random.default_rng(chunk)
    length = 150
    segments = np.ones((2, length), np.int32)
    segments[0, 40:43], segments[0, 43:64], segments[0, 64:] = 2, 3, 4
    segments[1, 130:] = 0
    q, k = (rng.normal(size=(2, length, 2, 8)).astype(np.float32) for _ in range(2))
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    v = rng.normal(size=(2, length, 2, 3, 6)).astype(np.float32)
    # Decays from none to all at once, rates on the whole of (0, 1).
    log_decay = -np.exp(rng.normal(-2, 2, size=(2, length, 2, 3))).astype(np.float32)
    rate = rng.uniform(size=(2, length, 2, 3)).astype(np.float32)
    found = jax.jit(delta_rule, static_argnums=6)(q, k, v, log_decay, rate, segments, chunk)
    wide: list[Any] = [x.astype(np.float64) for x in (q, k, v, log_decay, rate)]
    wanted = by_definition(*wide, segments=segments)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=5e-6 * np.abs(wanted).max())


def test_the_convolution_stays_within_a_sequence() -> None:
    rng = np.random.default_rng(0)
    x, filters = rng.normal(size=(1, 11, 5)).astype(np.float32), rng.normal(size=(5, 4)).astype(np.float32)
    segments = jnp.asarray([[1, 1, 2, 2, 2, 2, 2, 3, 0, 0, 0]], jnp.int32)
    wanted = np.zeros_like(x)
    for t in range(11):
        for back in range(min(4, t + 1)):
            if segments[0, t - back] == segments[0, t]:
                wanted[0, t] += x[0, t - back] * filters[:, 3 - back]
    np.testing.assert_allclose(convolve(jnp.asarray(x), jnp.asarray(filters), segments), wanted, rtol=0, atol=1e-6)
    one = convolve(jnp.asarray(x[:, :1]), jnp.asarray(filters), segments[:, :1])  # shorter than the filter
    np.testing.assert_allclose(one, x[:, :1] * filters[:, 3], rtol=1e-6)


def test_what_else_is_in_a_row_changes_no_bit() -> None:
    """Neither the padding behind a sequence nor the sequence before it."""
    decoder = load(checkpoint_of(random_model(KINDS["qwen3_5_text"], 1)))
    rng = np.random.default_rng(0)
    first, other, second = (rng.integers(3, 61, n).astype(np.int32) for n in (70, 70, 50))
    rows = [pack([start, second], [[0, 1]], 140, padding) for start, padding in ((first, 0), (first, 7), (other, 9))]
    found = [our_stream(decoder, row) for row in rows]
    assert np.array_equal(found[0].logits[0, :120], found[1].logits[0, :120])
    assert np.array_equal(found[0].logits[0, 70:120], found[2].logits[0, 70:120])
    assert not np.array_equal(found[0].logits[0, :70], found[2].logits[0, :70])


def composite(kind: str, vocabulary: int = 61) -> PretrainedConfig:
    """A model that reads images, with a vision tower of next to nothing."""
    text = SMALL | {"vocab_size": vocabulary} | (SPARSE if kind == "qwen3_5_moe" else {})
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 4}
    make: Any = CONFIG_MAPPING[kind]
    return make(
        text_config=text | {"tie_word_embeddings": True},
        vision_config=vision | {"out_hidden_size": 32, "num_position_embeddings": 16},
        tie_word_embeddings=True,
    )


@pytest.mark.parametrize("kind", ["qwen3_5", "qwen3_5_moe"])
def test_the_text_part_of_a_model_that_reads_images(kind: str) -> None:
    config = composite(kind)
    saved = checkpoint_of(random_model(config, 2))
    assert any(".visual." in name for name in saved.tensors)
    assert_parity(config, 1e-5, seed=2)
    # What guesses further ahead is left out, here as there.
    ahead = {"mtp.layers.0.mlp.down_proj.weight": np.zeros((2, 2), np.float32)}
    load(MemoryCheckpoint(saved.config, saved.tensors | ahead))


@pytest.mark.parametrize("kind", ["qwen3_5", "qwen3_5_moe"])
def test_a_folder_as_published_comes_back_bit_for_bit(tmp_path: Path, kind: str) -> None:
    """All experts of a block in one tensor; exported, it is the text part that Hugging Face loads alone."""
    published = composite(kind)
    saved = checkpoint_of(random_model(published, 2))
    tensors, experts = dict(saved.tensors), 0
    for layer in range(4):
        prefix = f"model.language_model.layers.{layer}.mlp.experts"
        own = {name: tensors.pop(name) for name in sorted(tensors) if name.startswith(f"{prefix}.")}
        if not own:
            continue
        experts += 1
        gate, up, down = (
            np.stack([own[f"{prefix}.{e}.{part}_proj.weight"] for e in range(4)]) for part in ("gate", "up", "down")
        )
        tensors[f"{prefix}.gate_up_proj"], tensors[f"{prefix}.down_proj"] = np.concatenate([gate, up], axis=1), down
    assert experts == (4 if kind == "qwen3_5_moe" else 0)
    folder = tmp_path / "published"
    folder.mkdir()
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(saved.config))
    byte_tokenizer().save_pretrained(folder)
    opened = open_checkpoint(str(folder))
    family, config = read_checkpoint(opened)
    ours = take_apart(load_decoder(opened, family, config, jnp.dtype(jnp.float32)))[1]
    for path, wanted in take_apart(load(saved))[1].items():
        assert np.array_equal(ours[path], wanted), path
    written = open_checkpoint(str(export(opened, str(tmp_path / "out"))))
    converted = open_checkpoint(str(convert(opened, str(tmp_path / "converted"))))
    for name, wanted in saved.tensors.items():
        if ".visual." not in name:
            own = name.replace("model.language_model.", "model.")
            assert np.array_equal(written.tensor(own), wanted), name
            assert np.array_equal(converted.tensor(own), wanted), name
    whole, alone = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()
        for path in (folder, tmp_path / "out")
    )
    assert all(torch.equal(whole[name], alone[name]) for name in whole)


def test_experts_that_lie_both_together_and_apart(tmp_path: Path) -> None:
    saved = checkpoint_of(random_model(KINDS["qwen3_5_moe_text"]))
    name = "model.layers.0.mlp.experts.down_proj"
    (tmp_path / "config.json").write_text(json.dumps(saved.config))
    for shape, words in (((4, 32, 24), "both in"), ((4, 32), "not one matrix for each expert")):
        save_file(saved.tensors | {name: np.zeros(shape, np.float32)}, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=words):
            open_checkpoint(str(tmp_path))


def test_stacks_follow_the_pattern_of_the_blocks() -> None:
    """Parameters of a pattern that repeats are stacked by place in the pattern, so that few blocks are compiled."""

    def stacks(pattern: str, sparse: str = "") -> list[list[list[int]]]:
        fields: dict[str, Any] = dict.fromkeys(("vocab_size", "width", "heads", "kv_heads", "head_dim", "mlp_width"), 8)
        fields |= {"family": "qwen3_next", "max_positions": 8, "tied": True, "ropes": (), "layer_rope": ()}
        layers = tuple(c == "d" for c in pattern)
        config = DecoderConfig(
            **fields,
            depth=len(pattern),
            windows=(0,) * len(pattern),
            delta=DeltaNet(1, 1, 8, 8, 2),
            delta_layers=layers,
            expert_layers=tuple(c == "x" for c in sparse),
        )
        found = [[list(stack.layers) for stack in group] for group in config.groups]
        flat = [layer for group in found for stack in group for layer in stack]
        assert sorted(flat) == list(range(len(pattern)))
        for layer, (stack, row) in enumerate(config.rows):
            assert config.layers_of_stacks[stack][row] == layer
            assert config.stacks[stack].kind == BlockKind(bool(sparse) and sparse[layer] == "x", layers[layer])
        return found

    assert stacks("dddd") == [[[0, 1, 2, 3]]]
    assert stacks("dddadddaddda") == [[[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]]
    assert stacks("addd") == [[[0]], [[1, 2, 3]]]
    assert stacks("ddad") == [[[0, 1]], [[2]], [[3]]]
    assert stacks("adadada") == [[[0, 2, 4], [1, 3, 5]], [[6]]]
    assert stacks("aaaaa", "--xxx") == [[[0, 1]], [[2, 3, 4]]]
    assert stacks("dada", "--xx") == [[[0]], [[1]], [[2]], [[3]]]


def test_no_prompt_is_shared_by_its_continuations() -> None:
    decoder = load(checkpoint_of(random_model(KINDS["qwen3_5_text"])))
    assert shareable(decoder.config) == 0
    tokens = jnp.ones((1, 8), jnp.int32)
    with pytest.raises(AssertionError, match="recurrent state"):
        decoder.forward(tokens, branches=jnp.zeros_like(tokens))


def test_devices_share_a_model() -> None:
    """Heads over the tensor axis, rows over the others."""
    decoder = load(checkpoint_of(random_model(KINDS["qwen3_next"], 4)))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 61, n).astype(np.int32) for n in LONG]
    rows = pack(prompts, [[0], [1, 2], [2, 1], [0]], LONG[0], 0)
    wanted = our_stream(decoder, rows)
    mesh = make_mesh(ParallelConfig(2, 2, 2))
    parts, arrays = take_apart(decoder)
    spread: dict[str, Any] = shard_parameters(arrays, mesh)
    assert spread["stacks.0.delta.value.weight"].sharding.spec == jax.sharding.PartitionSpec(None, "tensor", "fsdp")
    assert spread["stacks.0.delta.out.weight"].sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor")
    found = our_stream(parts.assemble(spread), Rows(*shard_rows(tuple(rows), mesh)))
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
