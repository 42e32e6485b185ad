"""A DPO step that computes the prompt of a pair once, against PyTorch on whole sequences in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F
from transformers import (
    DeepseekV2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen3_5TextConfig,
)

from spinal_jax.config.training import ObjectiveConfig
from spinal_jax.models.formats.memory import MemoryCheckpoint
from spinal_jax.models.parts import take_apart
from spinal_jax.objectives import token_scores
from spinal_jax.objectives.responses import Example, choose_shape, longest_unit, micro_batches, shareable, units
from spinal_jax.objectives.step import make_steps, metrics

from .reference import checkpoint_of, load, random_model

SIZES: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "dense": LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    # Shorter than prompts and responses: a window that counted in the row would reach past the chosen response.
    "windowed": MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=7, head_dim=8),
    "learned positions": GPT2Config(vocab_size=67, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "experts": MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2),
    # Nothing is shared where a state goes from token to token; each sequence begins its own.
    "recurrent": Qwen3_5TextConfig(
        **SIZES,
        layer_types=["linear_attention", "full_attention"],
        num_key_value_heads=2,
        head_dim=8,
        rms_norm_eps=1e-2,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
    "latent": DeepseekV2Config(
        **SIZES,
        num_key_value_heads=4,
        q_lora_rank=None,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        first_k_dense_replace=1,
        moe_intermediate_size=24,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        topk_method="greedy",
        n_group=1,
        topk_group=1,
    ),
}
BETA, PAIRS = 0.3, 5
TOLERANCE = 1e-6  # of a gradient, over the largest of its array or 1
# How far PyTorch's own float32 gradients are from the float64 ones, at most. Twice their error is allowed.
ROUNDED = {"latent": 2e-6, "recurrent": 2e-5}


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hugging Face's norms, softmaxes and rotations ask for float32 by name, also in a model in float64."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    for name in ("float32", "float"):
        monkeypatch.setattr(torch, name, torch.float64)


@dataclass(frozen=True, eq=False)
class Sequence:
    ids: np.ndarray
    start: int


def pairs(seed: int, count: int = PAIRS) -> list[Example]:
    """Prompts of 3 to 20 tokens; responses that begin alike now and then; one pair without anything in common."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        prompt = rng.integers(0, 67, rng.integers(3, 21))
        alike = rng.integers(0, 67, number % 3)
        ids = [np.concatenate([prompt, alike, rng.integers(0, 67, rng.integers(2, 12))]) for _ in range(2)]
        if number == count - 1:
            ids[1][0] = (ids[0][0] + 1) % 67
        made.append(tuple(Sequence(x.astype(np.int32), len(prompt)) for x in ids))
    return made


def theirs(
    model: Any, data: list[Example], reference: np.ndarray, dtype: torch.dtype = torch.float64
) -> tuple[float, dict[str, np.ndarray]]:
    """Mean loss and its gradient. Changes the dtype of the model."""
    model = model.to(dtype)
    model.zero_grad(set_to_none=True)
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")  # the grouped products have no float64
    logp = []
    for sequence in (s for example in data for s in example):
        ids = torch.tensor(sequence.ids.astype(np.int64))[None]
        logits = model(ids).logits[0, sequence.start - 1 : -1]
        logp.append(torch.log_softmax(logits, -1).gather(1, ids[0, sequence.start :, None]).sum())
    ratio = torch.stack(logp) - torch.tensor(reference.ravel(), dtype=dtype)
    loss = -F.logsigmoid(BETA * (ratio[0::2] - ratio[1::2])).mean()
    loss.backward()
    gradient = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), gradient


def errors(gradient: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> dict[str, float]:
    """By array: the largest difference over the largest expected value or 1."""
    shared = sorted(gradient.keys() & expected.keys())
    largest = {name: max(1.0, float(np.abs(expected[name]).max())) for name in shared}
    return {name: float(np.abs(gradient[name] - expected[name]).max()) / largest[name] for name in shared}


@pytest.mark.parametrize("family", CONFIGS)
def test_loss_and_gradients_with_shared_prompts(
    family: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setitem(token_scores.TILE_BYTES, "cpu", 4 * 2 * 40 * 20)  # several tiles of the vocabulary
    model = random_model(CONFIGS[family])
    checkpoint = checkpoint_of(model)
    decoder = load(checkpoint)
    parts, arrays = take_apart(decoder)
    parameters = {name: x for name, x in arrays.items() if not name.endswith(".correction")}
    fixed = {name: x for name, x in arrays.items() if name.endswith(".correction")}
    data = pairs(3)
    shares = shareable(decoder.config)
    shape = choose_shape([data], longest_unit(data, shares), 120, shares_up_to=shares)
    assert [len(units(example, shares)) for example in data] == [1 if shares else 2] * (PAIRS - 1) + [2]
    reference = -np.random.default_rng(0).gamma(9.0, 4.0, size=(PAIRS, 2)).astype(np.float32)
    steps = make_steps(
        parts, decoder.config, ObjectiveConfig("dpo", beta=BETA), optax.identity(), dtype="float32", remat="blocks"
    )
    gradients: Any = None
    sums: Any = None
    batches = micro_batches(data, shape, reference)
    assert len(batches) > 1
    for _, batch in batches:
        arguments = (parameters, fixed, batch, jnp.float32(PAIRS))
        gradients, sums = steps.first(*arguments) if gradients is None else steps.more(*arguments, gradients, sums)
    _, rounded = theirs(model, data, reference, torch.float32)
    request.getfixturevalue("wide")
    loss, expected = theirs(model, data, reference)
    allowed = TOLERANCE
    if family in ROUNDED:
        theirs_off = max(errors(rounded, expected).values())
        assert theirs_off < ROUNDED[family]
        allowed = max(TOLERANCE, 2 * theirs_off)
    ours = MemoryCheckpoint("gradients", checkpoint.config, {**fixed, **gradients}, None)  # type: ignore[arg-type]
    found = metrics(jax.device_get(sums), "dpo")["loss"]
    assert found == pytest.approx(loss, abs=1e-6, rel=1e-6 if family == "recurrent" else 0)
    # Of a stack of experts that Hugging Face keeps in one array, the sum tells as much as the parts.
    off = errors({name: ours.tensor(name) for name in ours.names() if name in expected}, expected)
    assert len(off) >= 8
    assert {name: error for name, error in off.items() if error > allowed} == {}


def test_units_share_the_prompt_alone() -> None:
    """Responses that begin alike stay apart, so that every response token is predicted once by each sequence; prompts
    that differ share what they begin with; sequences beyond the bound share nothing."""
    same = (Sequence(np.array([5, 6, 7, 1, 2]), 3), Sequence(np.array([5, 6, 7, 1, 9, 9]), 3))
    (unit,) = units(same, 100)
    assert (unit.members, unit.prefix, unit.size) == ((0, 1), 3, 8)
    other = (Sequence(np.array([5, 6, 8, 1, 2]), 3), Sequence(np.array([5, 6, 7, 1, 9]), 3))
    assert units(other, 100)[0].prefix == 2
    assert [unit.size for unit in units(same, 5)] == [5, 6]
    apart = (Sequence(np.array([5, 6, 8]), 1), Sequence(np.array([4, 6]), 1))
    assert [unit.prefix for unit in units(apart, 100)] == [0, 0]
    assert [unit.size for unit in units(same[:1], 100)] == [5]


def test_every_token_lies_where_its_sequence_says() -> None:
    data = pairs(1, 9)
    shape = choose_shape([data], longest_unit(data, 100), 120, shares_up_to=100)
    seen = []
    for numbers, batch in micro_batches(data, shape):
        host = jax.tree.map(np.asarray, batch)
        seen += numbers
        for slot in np.flatnonzero(host.counts).tolist():
            sequence = data[numbers[slot // 2]][slot % 2]
            mine = (host.owner == slot) & (host.weight > 0)
            assert host.targets[mine].tolist() == sequence.ids[sequence.start :].tolist()
            (row,) = set(np.nonzero(mine)[0].tolist())
            at = host.predicting[row][mine[row]]
            assert host.positions[row, at].tolist() == list(range(sequence.start - 1, len(sequence.ids) - 1))
            segment, branch = host.segments[row, at[-1]], host.branches[row, at[-1]]
            own = (host.segments[row] == segment) & np.isin(host.branches[row], [0, branch])
            own &= host.positions[row] < len(sequence.ids)
            assert host.tokens[row, own].tolist() == sequence.ids.tolist()
            assert host.positions[row, own].tolist() == list(range(len(sequence.ids)))
    assert sorted(seen) == list(range(9))
