"""Losses, gradients and whole optimiser steps against plain PyTorch."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import nnx
from transformers import LlamaConfig

from spinal_jax.config.training import ObjectiveConfig, OptimizerConfig
from spinal_jax.models import lora
from spinal_jax.models.decoder import Remat
from spinal_jax.models.formats.memory import MemoryCheckpoint
from spinal_jax.models.parts import cast, take_apart
from spinal_jax.objectives.losses import LOSSES, Scores, preference_loss
from spinal_jax.objectives.responses import Example, ResponseBatch, choose_shape, longest_unit, micro_batches, shareable
from spinal_jax.objectives.step import TrainState, make_steps, metrics, summed
from spinal_jax.train.optimizer import optimizer

from .reference import checkpoint_of, load, random_model

STEPS, PAIRS, RATE = 10, 4, 1e-3
# Both sides round to float32's 6e-8, of log-probabilities of about 100 nats times beta.
LOSS_TOLERANCE = 1e-6


def torch_loss(kind: str, logp: Any, reference: Any, tokens: Any, beta: float, eps: float) -> Any:
    """The losses of docs/method.md, section 7, as TRL computes them."""
    ratio = logp - reference
    x = ratio[0::2] - ratio[1::2]
    match kind:
        case "sigmoid":
            return -F.logsigmoid(beta * x)
        case "cdpo":
            return -F.logsigmoid(beta * x) * (1 - eps) - F.logsigmoid(-beta * x) * eps
        case "robust":
            return (-F.logsigmoid(beta * x) * (1 - eps) + F.logsigmoid(-beta * x) * eps) / (1 - 2 * eps)
        case "ipo":
            mean = ratio / tokens
            return (mean[0::2] - mean[1::2] - 1 / (2 * beta)) ** 2
        case "hinge":
            return torch.relu(1 - beta * x)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("beta", [0.05, 0.5])
def test_losses_and_their_gradients(kind: str, beta: float) -> None:
    rng = np.random.default_rng(7)
    smoothing = 0.15 if kind in ("cdpo", "robust") else 0.0
    logp, reference = (-rng.gamma(4.0, 5.0, size=64).astype(np.float32) for _ in range(2))
    tokens = rng.integers(3, 40, size=64).astype(np.float32)
    theirs = torch.tensor(logp, requires_grad=True)
    expected = torch_loss(kind, theirs, torch.tensor(reference), torch.tensor(tokens), beta, smoothing)
    expected.sum().backward()

    def ours(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        losses = preference_loss(kind, x, jnp.asarray(reference), jnp.asarray(tokens), beta, smoothing).loss
        return jnp.sum(losses), losses

    gradient, losses = jax.grad(ours, has_aux=True)(jnp.asarray(logp))
    assert theirs.grad is not None
    np.testing.assert_allclose(losses, expected.detach().numpy(), rtol=LOSS_TOLERANCE, atol=LOSS_TOLERANCE)
    np.testing.assert_allclose(gradient, theirs.grad.numpy(), rtol=LOSS_TOLERANCE, atol=LOSS_TOLERANCE)


def test_rewards_are_beta_times_the_log_ratios() -> None:
    logp, reference = jnp.array([-3.0, -5.0], jnp.float32), jnp.array([-4.0, -4.5], jnp.float32)
    pairs = preference_loss("sigmoid", logp, reference, jnp.ones(2, jnp.float32), 0.2)
    np.testing.assert_allclose([pairs.chosen[0], pairs.rejected[0]], [0.2, -0.1], rtol=1e-6)


def test_what_is_counted_of_pairs_with_and_without_their_lengths() -> None:
    """Rewards are sums over tokens: the first chosen response wins as a whole and not by token, the second is the other
    way round. The third place is empty, for a micro-batch that is not full."""
    counts = jnp.array([2, 10, 10, 2, 0, 0], jnp.float32)
    zeros = jnp.zeros(6, jnp.float32)
    unused = dict.fromkeys(
        ("tokens", "positions", "segments", "lengths", "predicting", "targets", "owner", "weight"), zeros
    )
    batch = ResponseBatch(**unused, branches=None, counts=counts, reference=zeros)
    scores = Scores(jnp.array([-4, -10, -10, -4, 0, 0], jnp.float32), zeros, zeros, zeros)
    found = metrics(summed(scores, batch, ObjectiveConfig("dpo", beta=0.1)), "dpo", "eval_")
    assert found["eval_rewards/accuracies"] == 0.5
    assert found["eval_rewards/accuracies_per_token"] == 0.5
    assert found["eval_chosen_shorter"] == 0.5
    assert found["eval_rewards/chosen"] == pytest.approx(-0.7)
    longer = replace(batch, counts=counts[jnp.array([0, 1, 0, 1, 4, 5])])
    found = metrics(summed(scores, longer, ObjectiveConfig("dpo", beta=0.1)), "dpo")
    assert (found["rewards/accuracies"], found["rewards/accuracies_per_token"], found["chosen_shorter"]) == (0.5, 0, 1)


@dataclass(frozen=True, eq=False)
class Sequence:
    ids: np.ndarray
    start: int


def examples(vocab: int, count: int, width: int, seed: int = 0) -> list[Example]:
    """Random prompts with `width` responses each, of 3 to 12 tokens."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        prompt = rng.integers(0, vocab, rng.integers(2, 20))
        replies = [rng.integers(0, vocab, rng.integers(3, 12)) for _ in range(width)]
        found.append(tuple(Sequence(np.concatenate([prompt, r]).astype(np.int32), len(prompt)) for r in replies))
    return found


def torch_logp(model: Any, example: Example) -> Any:
    """Summed log-probability of each response, one sequence at a time and without padding."""
    found = []
    for sequence in example:
        ids = torch.tensor(sequence.ids.astype(np.int64))[None]
        logits = model(ids).logits[0, sequence.start - 1 : -1].float()
        found.append(torch.log_softmax(logits, -1).gather(1, ids[0, sequence.start :, None]).sum())
    return torch.stack(found)


CONFIG = LlamaConfig(
    vocab_size=67,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    tie_word_embeddings=True,
)


def run_ours(
    objective: ObjectiveConfig,
    data: list[Example],
    rank: int = 0,
    micro_tokens: int = 40,
    remat: Remat = "all_but_linear",
    shares: bool = True,
) -> tuple[list[float], dict[str, np.ndarray], Any]:
    """Losses of STEPS steps, and the trained model's HF tensors."""
    model = random_model(CONFIG)
    checkpoint = checkpoint_of(model)
    decoder = load(checkpoint)
    if rank:
        lora.attach(decoder, rank, 2.0 * rank, ["q_proj", "down_proj"])
    parts, arrays = take_apart(decoder)
    trained = parts.paths(nnx.LoRAParam if rank else nnx.Param)
    parameters = cast({k: v for k, v in arrays.items() if k in trained}, jnp.float32)
    fixed = {k: v for k, v in arrays.items() if k not in trained}
    method = optimizer(OptimizerConfig(learning_rate=RATE, weight_decay=0.0), STEPS)
    with jax.numpy_dtype_promotion("standard"):
        state = TrainState(parameters, method.init(parameters), jnp.int32(0))
    steps = make_steps(parts, decoder.config, objective, method, dtype="float32", remat=remat)
    width = len(data[0])
    batches = [data[PAIRS * n : PAIRS * (n + 1)] for n in range(STEPS)]
    shares_up_to = shareable(decoder.config) if shares and width == 2 else 0
    shape = choose_shape(batches, longest_unit(data, shares_up_to), micro_tokens, shares_up_to=shares_up_to)
    assert any(len(micro_batches(batch, shape)) > 1 for batch in batches) == (micro_tokens < 100)  # accumulated
    known = []
    for batch in batches:
        reference = np.zeros((PAIRS, width), np.float32)
        for numbers, micro in micro_batches(batch, shape):
            found = np.asarray(steps.score(state.parameters, fixed, micro))[: width * len(numbers)]
            reference[numbers] = found.reshape(-1, width)
        known.append(reference)
    losses = []
    for batch, reference in zip(batches, known, strict=True):
        pairs = objective.kind == "dpo"
        normaliser = len(batch) if pairs else sum(len(s.ids) - s.start for e in batch for s in e)
        gradients, sums = None, None
        for _, micro in micro_batches(batch, shape, reference):
            arguments = (state.parameters, fixed, micro, jnp.float32(normaliser))
            gradients, sums = steps.first(*arguments) if gradients is None else steps.more(*arguments, gradients, sums)
        updated = steps.update(state, gradients, sums)
        assert bool(updated.fine)
        state = updated.state
        losses.append(metrics(jax.device_get(sums), objective.kind)["loss"])
    whole = parts.assemble({**fixed, **state.parameters})
    lora.merge(whole)
    arrays = take_apart(whole)[1]
    memory = MemoryCheckpoint("trained", checkpoint.config, arrays, None)  # type: ignore[arg-type]
    return losses, {name: memory.tensor(name) for name in memory.names()}, model


def run_theirs(model: Any, objective: ObjectiveConfig, data: list[Example]) -> list[float]:
    """The same in PyTorch: AdamW, linear decay, clipping at 1, a frozen copy as the reference."""
    reference = copy.deepcopy(model)
    method = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(method, lambda n: 1 - n / STEPS)
    losses = []
    for n in range(STEPS):
        batch = data[PAIRS * n : PAIRS * (n + 1)]
        if objective.kind == "dpo":
            logp = torch.cat([torch_logp(model, example) for example in batch])
            with torch.no_grad():
                known = torch.cat([torch_logp(reference, example) for example in batch])
            tokens = torch.tensor([len(s.ids) - s.start for e in batch for s in e])
            smoothing = objective.label_smoothing
            loss = torch_loss(objective.loss, logp, known, tokens, objective.beta, smoothing).mean()
        else:
            tokens = sum(len(s.ids) - s.start for e in batch for s in e)
            loss = -torch.cat([torch_logp(model, example) for example in batch]).sum() / tokens
        method.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        method.step()
        schedule.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "robust", "sft"])
def test_ten_steps(kind: str) -> None:
    smoothing = 0.1 if kind == "robust" else 0.0
    objective = ObjectiveConfig("sft") if kind == "sft" else ObjectiveConfig("dpo", kind, 0.3, smoothing)  # type: ignore[arg-type]
    data = examples(CONFIG.vocab_size, STEPS * PAIRS, 1 if kind == "sft" else 2)
    ours, tensors, model = run_ours(objective, data)
    theirs = run_theirs(model, objective, data)
    if kind == "sigmoid":
        assert ours[0] == pytest.approx(np.log(2), abs=1e-6)
    # Ten steps amplify float32 rounding through AdamW's division by small second moments.
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    for name, weight in model.state_dict().items():
        if name in tensors:
            expected = weight.numpy()
            assert np.abs(tensors[name] - expected).max() <= 1e-3 * np.abs(expected).max(), name


def test_accumulation_and_remat_change_nothing() -> None:
    """Many micro-batches or one, blocks recomputed or not: the same steps."""
    objective, data = ObjectiveConfig("dpo", beta=0.3), examples(CONFIG.vocab_size, STEPS * PAIRS, 2)
    one, tensors, _ = run_ours(objective, data, micro_tokens=40)
    other, others, _ = run_ours(objective, data, micro_tokens=4096, remat="none")
    np.testing.assert_allclose(one, other, atol=1e-5)
    for name, tensor in tensors.items():
        np.testing.assert_allclose(tensor, others[name], atol=1e-5 * np.abs(tensor).max(), err_msg=name)


def test_lora_trains_adapters_alone_and_merges_what_it_computes() -> None:
    """The loss falls, the weights without adapters stay, and those with them change by a matrix of the rank."""
    objective, data = ObjectiveConfig("dpo", beta=0.3), examples(CONFIG.vocab_size, STEPS * PAIRS, 2)
    losses, tensors, model = run_ours(objective, data[:PAIRS] * STEPS, rank=2)
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6)
    assert losses[-1] < losses[0]
    for name, weight in model.state_dict().items():
        if name not in tensors:
            continue
        change = tensors[name] - weight.numpy()
        if "q_proj" in name or "down_proj" in name:
            values = np.linalg.svd(change, compute_uv=False)
            assert values[1] > 1e-6
            assert values[2] < 1e-5 * values[0]
        else:
            assert not change.any(), name
