"""Gradients of adapters, whose frozen weights and unembedding skip work, against the gradient of all weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from spinal_jax.config.training import ObjectiveConfig
from spinal_jax.models import lora
from spinal_jax.models.config import DecoderConfig
from spinal_jax.models.decoder import Decoder
from spinal_jax.models.parts import take_apart
from spinal_jax.models.rope import Rope
from spinal_jax.objectives import token_scores
from spinal_jax.objectives.responses import choose_shape, longest_unit, micro_batches
from spinal_jax.objectives.step import make_steps

RANK, SCALE, VOCAB = 3, 2.0, 67
TINY = DecoderConfig(
    family="llama",
    vocab_size=VOCAB,
    width=32,
    depth=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    mlp_width=48,
    max_positions=64,
    tied=False,
    ropes=(Rope(8, 10_000.0),),
    layer_rope=(0, 0),
    windows=(0, 0),
    final_softcap=0.5,
)


@dataclass(frozen=True, eq=False)
class Sequence:
    ids: np.ndarray
    start: int


def pairs(count: int) -> list[tuple[Sequence, Sequence]]:
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        prompt = rng.integers(0, VOCAB, rng.integers(3, 9))
        ids = [np.concatenate([prompt, rng.integers(0, VOCAB, rng.integers(2, 9))]).astype(np.int32) for _ in range(2)]
        made.append((Sequence(ids[0], len(prompt)), Sequence(ids[1], len(prompt))))
    return made


def gradient_of(model: Decoder, trained: set[str] | None, merges: bool) -> dict[str, np.ndarray]:
    """By path, of the parameters named (None: all), summed over micro-batches."""
    parts, arrays = take_apart(model)
    parameters = {name: x for name, x in arrays.items() if trained is None or name in trained}
    fixed = {name: x for name, x in arrays.items() if name not in parameters}
    steps = make_steps(
        parts, model.config, ObjectiveConfig("dpo", beta=0.5), optax.identity(), dtype="float32", remat="all_but_linear"
    )
    data = pairs(5)
    shape = choose_shape([data], longest_unit(data, 100), 48, shares_up_to=100)
    reference = -np.random.default_rng(1).gamma(9.0, 2.0, size=(5, 2)).astype(np.float32)
    batches = micro_batches(data, shape, reference)
    assert len(batches) > 1
    merged = steps.merge(parameters, fixed)
    assert bool(merged) == (trained is not None)
    given = {**fixed, **merged} if merges else fixed
    gradients: Any = None
    sums: Any = None
    for _, batch in batches:
        arguments = (parameters, given, batch, jnp.float32(5))
        gradients, sums = steps.first(*arguments) if gradients is None else steps.more(*arguments, gradients, sums)
    return {name: np.asarray(x) for name, x in gradients.items()}


def test_gradients_of_adapters_follow_from_those_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """`dL/dA = s B^T dL/dW` and `dL/dB = s dL/dW A^T`, at W + s B A; the unembedding is read in several tiles."""
    monkeypatch.setitem(token_scores.TILE_BYTES, "cpu", 4 * 2 * 40 * 20)
    model = Decoder(TINY, rngs=nnx.Rngs(0))
    lora.attach(model, RANK, SCALE * RANK, ["q_proj", "down_proj", "up_proj"])
    parts, arrays = take_apart(model)
    trained = parts.paths(nnx.LoRAParam)
    rng = np.random.default_rng(2)
    arrays |= {
        name: jnp.asarray(0.1 * rng.normal(size=arrays[name].shape), jnp.float32)
        for name in sorted(trained)
        if name.endswith(".b")
    }
    whole = parts.assemble(arrays)
    lora.merge(whole)
    full = gradient_of(whole, None, merges=False)
    adapted = {merges: gradient_of(parts.assemble(arrays), trained, merges=merges) for merges in (False, True)}
    assert adapted[True].keys() == trained
    largest = max(float(np.abs(x).max()) for x in adapted[True].values())
    for name in sorted(trained):
        layer, _, side = name.rpartition(".adapter.")
        a, b = (np.asarray(arrays[f"{layer}.adapter.{which}"]) for which in "ab")
        of_weight = full[f"{layer}.weight"]
        expected = SCALE * (b.swapaxes(-1, -2) @ of_weight if side == "a" else of_weight @ a.swapaxes(-1, -2))
        assert np.abs(expected).max() > 1e-3 * largest, name
        for merges, found in adapted.items():
            np.testing.assert_allclose(found[name], expected, atol=2e-6 * largest, err_msg=f"{name}, {merges}")
