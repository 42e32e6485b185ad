"""Llama and Mistral against Hugging Face, switch by switch, and what the decoder promises whatever the family."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.extend.core import jaxprs_in_params
from transformers import LlamaConfig, MistralConfig

from spinal_jax.models import attention
from spinal_jax.models.attention import attend
from spinal_jax.models.config import DecoderConfig
from spinal_jax.models.decoder import Decoder, Remat, Tap, collect, fold
from spinal_jax.models.rope import Rope

from .reference import (
    LENGTHS,
    MemoryCheckpoint,
    Rows,
    assert_parity,
    checkpoint_of,
    load,
    old_style,
    our_stream,
    pack,
    random_model,
    reference_stream,
    relative_errors,
)

# Both sides round every operation to float32's 6e-8; a stream of a few blocks gathers about 1e-6 of that.
TOLERANCE = 1e-5

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LONGEST, SECOND, SHORTEST = LENGTHS

SWITCHES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one key head": {"num_key_value_heads": 1},
    "a key head each": {"num_key_value_heads": 4},
    "wide heads": {"head_dim": 20},
    "narrow heads": {"head_dim": 8},
    "attention bias": {"attention_bias": True},
    "MLP bias": {"mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "epsilon": {"rms_norm_eps": 1e-2},
    "GELU": {"hidden_act": "gelu"},
    "tanh GELU": {"hidden_act": "gelu_new"},
    "ReLU": {"hidden_act": "relu"},
    "one block": {"num_hidden_layers": 1},
    "everything": {
        "num_key_value_heads": 1,
        "head_dim": 20,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
}

# The lengths 40, 23 and 17 lie on both sides of the limits below. With theta = 100 the six frequencies of a head of 12
# have wavelengths of 6 to 292 tokens, so that llama3 and yarn meet all three of their cases.
ROPES: dict[str, dict[str, Any]] = {
    "theta": {"rope_type": "default", "rope_theta": 5e5},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.5},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 100.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 48,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 48},
    "yarn of DeepSeek": {
        "rope_type": "yarn",
        "rope_theta": 100.0,
        "factor": 4.0,
        "original_max_position_embeddings": 48,
        "mscale": 0.7,
        "mscale_all_dim": 0.4,
        "beta_fast": 1.5,
        "beta_slow": 0.2,
    },
    "yarn untruncated": {
        "rope_type": "yarn",
        "rope_theta": 100.0,
        "factor": 4.0,
        "original_max_position_embeddings": 48,
        "beta_fast": 1.5,
        "truncate": False,
        "attention_factor": 1.3,
    },
    "longrope": {
        "rope_type": "longrope",
        "original_max_position_embeddings": 20,
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
        "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0],
    },
    "longrope by factor": {
        "rope_type": "longrope",
        "original_max_position_embeddings": SECOND,
        "factor": 5.0,
        "short_factor": [1.0] * 6,
        "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0],
    },
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_switch_of_llama(switch: str) -> None:
    assert_parity(LlamaConfig(**{**SIZES, **SWITCHES[switch]}), TOLERANCE)


@pytest.mark.parametrize("kind", ROPES)
def test_every_kind_of_rope(kind: str) -> None:
    rope = {"rope_theta": 10000.0, **ROPES[kind]}
    assert_parity(LlamaConfig(**SIZES, rope_parameters=rope), TOLERANCE, seed=1)


@pytest.mark.parametrize("limit", [SHORTEST + 1, SECOND, LONGEST - 1])
def test_dynamic_rope_where_some_sequences_exceed_the_limit(limit: int) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.5, "rope_theta": 100.0}
    assert_parity(LlamaConfig(**SIZES | {"max_position_embeddings": limit}, rope_parameters=rope), TOLERANCE)


@pytest.mark.parametrize("window", [1, 7, SECOND, None])
def test_mistral_with_and_without_a_window(window: int | None) -> None:
    assert_parity(MistralConfig(**SIZES, sliding_window=window, head_dim=16), TOLERANCE)


def test_a_window_changes_what_it_should() -> None:
    model = random_model(MistralConfig(**SIZES, sliding_window=7))
    checkpoint = checkpoint_of(model)
    wider = MemoryCheckpoint({**checkpoint.config, "sliding_window": 8}, checkpoint.tensors)
    rows = pack([np.arange(LONGEST, dtype=np.int32)], [[0]], LONGEST, 0)
    narrow, wide = our_stream(load(checkpoint), rows), our_stream(load(wider), rows)
    assert np.array_equal(narrow.residual[:, :, :7], wide.residual[:, :, :7])
    assert not np.allclose(narrow.residual[1, :, 7], wide.residual[1, :, 7])


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, MemoryCheckpoint, Decoder]:
    """A random Llama: theirs, its checkpoint, ours."""
    model = random_model(LlamaConfig(**SIZES))
    checkpoint = checkpoint_of(model)
    return model, checkpoint, load(checkpoint)


def assert_close(ours: Any, wanted: Any) -> None:
    """The relative error of `reference`, between two programs of ours."""
    gap = float(np.abs(np.asarray(ours) - np.asarray(wanted)).max())
    assert gap <= TOLERANCE * float(np.abs(wanted).max()), gap


def tokens(rows: int = 2, length: int = 24) -> np.ndarray:
    """int32 [rows, length] at random."""
    return np.random.default_rng(0).integers(0, SIZES["vocab_size"], (rows, length)).astype(np.int32)


def test_bfloat16_is_as_near_to_float32_as_theirs(tiny: tuple[Any, MemoryCheckpoint, Decoder]) -> None:
    """Both round to 8 bits at every step, in another order, so they differ from each other as from float32."""
    model, checkpoint, _ = tiny
    ids = tokens(1)
    exact = reference_stream(model, ids)
    half = random_model(LlamaConfig(**SIZES)).to(torch.bfloat16)
    # Positions are no parameters: `to` would round the frequencies that from_pretrained keeps in float32.
    half.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq
    theirs = max(relative_errors([reference_stream(half, ids)], [exact]).values())
    decoder = load(checkpoint, jnp.bfloat16)
    assert decoder.dtype == jnp.bfloat16
    ours = our_stream(decoder, pack([ids[0]], [[0]], ids.shape[1], 0))
    errors = relative_errors([ours], [exact])
    assert errors["boundary 0"] < 2**-8
    assert max(errors.values()) < 1.5 * theirs < 0.1


def test_the_arguments_that_may_be_left_out(tiny: tuple[Any, MemoryCheckpoint, Decoder]) -> None:
    decoder = tiny[2]
    ids = tokens()
    explicit = pack(list(ids), [[0], [1]], ids.shape[1], 0)
    last, state = jax.jit(lambda model, ids: model.forward(ids))(decoder, ids)
    assert state is None
    wanted = our_stream(decoder, explicit)
    assert_close(last, wanted.residual[-1])
    assert_close(decoder.lens(last), wanted.logits)


def test_taps_read_every_boundary(tiny: tuple[Any, MemoryCheckpoint, Decoder]) -> None:
    decoder = tiny[2]
    ids = tokens()
    every = our_stream(decoder, pack(list(ids), [[0], [1]], ids.shape[1], 0)).residual
    depth = decoder.config.depth

    @jax.jit
    def taps(model: Decoder, ids: jax.Array) -> tuple[Any, ...]:
        pairs = collect(lambda h: {"top": model.lens(h).argmax(-1), "norm": jnp.linalg.norm(h, axis=-1)})
        total = fold(
            lambda state, h, i: state + h * (i + 1).astype(h.dtype), jnp.zeros((*ids.shape, model.config.width))
        )
        shape = Tap(lambda h, boundaries: jnp.full((boundaries,), h.shape[-1]), lambda state, h, i: state.at[i].add(1))
        last, everything = model.forward(ids, tap=collect(lambda h: h))
        return last, everything, *(model.forward(ids, tap=tap)[1] for tap in (pairs, total, shape))

    last, everything, pairs, total, shape = taps(decoder, ids)
    assert everything.shape == (depth + 1, *ids.shape, decoder.config.width)
    assert_close(everything, every)
    assert np.array_equal(last, everything[-1])
    assert np.array_equal(pairs["top"], decoder.lens(everything).argmax(-1))
    assert_close(pairs["norm"], np.linalg.norm(everything, axis=-1))
    assert_close(total, np.einsum("lbtd,l->btd", everything, np.arange(1, depth + 2)))
    assert np.array_equal(shape, np.full(depth + 1, decoder.config.width + 1))


@pytest.mark.parametrize("remat", ["all_but_linear", "blocks"])
def test_remat_changes_neither_forward_nor_gradient(tiny: tuple[Any, MemoryCheckpoint, Decoder], remat: Remat) -> None:
    ids = tokens()

    @partial(jax.jit, static_argnames="remat")
    def loss_and_gradient(model: Decoder, remat: Remat) -> tuple[jax.Array, Any]:
        return jax.value_and_grad(lambda model: jnp.sum(model.forward(ids, remat=remat)[0] ** 2))(model)

    kept, kept_gradient = loss_and_gradient(tiny[2], "none")
    again, again_gradient = loss_and_gradient(tiny[2], remat)
    assert_close(again, kept)
    for a, b in zip(jax.tree.leaves(again_gradient), jax.tree.leaves(kept_gradient), strict=True):
        assert_close(a, b)


def equations(jaxpr: Any) -> int:
    """How many equations a jaxpr has, those inside of others included."""
    inner = [sub for equation in jaxpr.eqns for sub in jaxprs_in_params(equation.params)]
    return len(jaxpr.eqns) + sum(equations(getattr(sub, "jaxpr", sub)) for sub in inner)


def llama_of(depth: int) -> DecoderConfig:
    """A Llama with windows and two ropes, so that blocks differ."""
    return DecoderConfig(
        family="llama",
        vocab_size=32,
        width=16,
        depth=depth,
        heads=2,
        kv_heads=1,
        head_dim=8,
        mlp_width=16,
        max_positions=32,
        tied=True,
        ropes=(Rope(8, 1e4), Rope(8, 1e6)),
        layer_rope=tuple(i % 2 for i in range(depth)),
        windows=tuple(4 * (i % 2) for i in range(depth)),
    )


def test_the_program_does_not_grow_with_depth() -> None:
    def size(depth: int) -> int:
        decoder = nnx.eval_shape(lambda: Decoder(llama_of(depth), rngs=nnx.Rngs(0)))
        program = jax.make_jaxpr(lambda model, ids: model.forward(ids, tap=collect(lambda h: h)))
        return equations(program(decoder, jax.ShapeDtypeStruct((2, 8), jnp.int32)).jaxpr)

    assert size(2) == size(8) > 50


@pytest.mark.parametrize("window", [None, 5, 150])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attention_by_blocks_of_queries(
    window: int | None, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three blocks, the second sequence beginning within one; the reference is the textbook formula in float64."""
    monkeypatch.setattr(attention, "QUERY_BLOCK", 64)
    length, heads, kv_heads, dim = 192, 4, 2, 4
    random = np.random.default_rng(0)
    q, k, v = (random.normal(size=(1, length, n, dim)).astype(np.float32) for n in (heads, kv_heads, kv_heads))
    segments = (np.arange(length)[None] >= 160).astype(np.int32) + 1
    ours = attend(
        *(jnp.asarray(x) for x in (q, k, v, segments)),
        window=None if window is None else jnp.int32(window),
        scale=0.7,
        softcap=softcap,
    )
    k, v = (np.repeat(x, heads // kv_heads, axis=2) for x in (k, v))
    scores = np.einsum("bqhd,bkhd->bhqk", q.astype(np.float64), k) * 0.7
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    back = np.arange(length)[:, None] - np.arange(length)[None]
    seen = (back >= 0) & (segments[0][:, None] == segments[0][None]) & (back < (window or math.inf))
    weights = np.where(seen, np.exp(scores - scores.max(-1, keepdims=True)), 0)
    wanted = np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)
    assert_close(ours, wanted)


def test_rows_that_are_no_multiple_of_a_block_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = load(checkpoint_of(random_model(MistralConfig(**SIZES, sliding_window=7))))
    ids = tokens(2, 24)
    plain, _ = jax.jit(lambda model: model.forward(ids))(decoder)
    for block in (8, 16):  # 16 does not divide 24, so one block it is
        monkeypatch.setattr(attention, "QUERY_BLOCK", block)
        blocks, _ = jax.jit(lambda model: model.forward(ids))(decoder)
        assert_close(blocks, plain)


def test_a_token_beyond_the_vocabulary_is_not_silently_another(tiny: tuple[Any, MemoryCheckpoint, Decoder]) -> None:
    first = tiny[2].forward(np.array([[1, SIZES["vocab_size"] - 1], [1, SIZES["vocab_size"]]], np.int32))[0]
    assert np.isfinite(first[0]).all()
    assert np.isnan(first[1, 1]).all()


def test_both_spellings_of_the_config_load_the_same(tiny: tuple[Any, MemoryCheckpoint, Decoder]) -> None:
    _, checkpoint, decoder = tiny
    old = load(MemoryCheckpoint(old_style(checkpoint.config), checkpoint.tensors))
    for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(decoder), strict=True):
        assert np.array_equal(a, b)


def test_tables_and_prefixes_that_old_releases_left(tiny: tuple[Any, MemoryCheckpoint, Decoder]) -> None:
    _, checkpoint, decoder = tiny
    tensors = dict(checkpoint.tensors)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(6, np.float32)
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    ids = Rows(*(np.ones((1, 4), np.int32) for _ in Rows._fields))
    wanted = our_stream(decoder, ids).logits
    for variant in (tensors, bare):
        assert np.array_equal(our_stream(load(MemoryCheckpoint(checkpoint.config, variant)), ids).logits, wanted)
