"""An audit from files to trace, against Hugging Face PyTorch in float64 with every distribution kept."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from spinal_jax.api import audit
from spinal_jax.audit.trace import DepthTrace

MAX_LENGTH = 64
LAST = 4


def prompts() -> list[str]:
    """48 texts of 1 to 40 words; the longest are cut to their last MAX_LENGTH bytes."""
    words = ["what", "how", "does", "a", "river", "explain", "please", "not", "my", "lamp", "über", "雨", "write"]
    draw = random.Random(0)
    return [" ".join(draw.choices(words, k=draw.choice([1, 3, 6, 12, 40]))) + f" {n}?" for n in range(48)]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def tiny_model() -> LlamaForCausalLM:
    """Grouped queries, an unembedding of its own, 300 tokens, weights wide enough that all boundaries differ."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=7,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.15)
            if "norm" in name:
                parameter.add_(1)
        model.model.embed_tokens.weight[:, 7] *= 60  # a massive activation
    return model.eval()


@torch.no_grad()
def oracle(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, np.ndarray]:
    """The columns of docs/method.md, a prompt at a time, float64 from the embedding on."""
    model = model.double()
    depth = model.config.num_hidden_layers
    seen: list[torch.Tensor] = []
    blocks = model.model.layers
    blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for block in blocks:
        block.register_forward_hook(lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    hidden, logp = [], []
    for text in prompts():
        ids = torch.tensor([tokenizer(text)["input_ids"][-MAX_LENGTH:]])
        seen.clear()
        output = model(ids, use_cache=False).logits[0, -LAST:]
        h = torch.stack([x[0] for x in seen])  # [D + 1, T, d]
        known = len(tokenizer)  # the rows of the unembedding behind them stand for no token
        lens = torch.log_softmax(model.lm_head(model.model.norm(h[:, -LAST:]))[..., :known], dim=-1)
        torch.testing.assert_close(lens[-1], torch.log_softmax(output[..., :known], dim=-1), atol=1e-6, rtol=0)
        hidden.append(h[:, 1:].numpy())
        logp.append(lens.numpy())
    p = np.exp(np.concatenate(logp, axis=1))  # [D + 1, M, V]
    columns: dict[str, Any] = {"entropy": -np.sum(p * np.log(p), axis=-1).mean(axis=1)}
    side = np.array(
        [[angle(p[i], p[j]) if i < j else 0 * p[0, :, 0] for j in range(depth + 1)] for i in range(depth + 1)]
    )
    columns["transport"] = [math.nan, *(2 * side[i - 1, i].mean() for i in range(1, depth + 1))]
    columns["curvature"] = [
        math.nan,
        *(turn(side[i - 1, i], side[i, i + 1], side[i - 1, i + 1]) for i in range(1, depth)),
        math.nan,
    ]
    for boundary in range(depth + 1):
        for name, value in spectrum(np.concatenate(hidden, axis=1)[boundary]).items():
            columns.setdefault(name, []).append(value)
    first = depth - math.ceil(depth / 3)
    steps = sum(side[i, i + 1].mean() for i in range(first, depth))
    columns["directness"] = [side[first, depth].mean() / steps]
    return {name: np.array(values) for name, values in columns.items()}


def angle(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Between the vectors of square roots: half the Fisher-Rao distance."""
    return 2 * np.arcsin(np.linalg.norm(np.sqrt(p) - np.sqrt(q), axis=-1) / 2)


def turn(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> float:
    """Mean turning angle, by the spherical law of cosines."""
    inner = np.arccos(np.clip((np.cos(c) - np.cos(a) * np.cos(b)) / (np.sin(a) * np.sin(b)), -1, 1))
    return float(np.mean((math.pi - inner)[(2 * a >= 1e-3) & (2 * b >= 1e-3)]))


def spectrum(rows: np.ndarray) -> dict[str, float]:
    s = np.linalg.svd(rows, compute_uv=False)
    share = s / s.sum()
    resolved = int(np.sum(s > np.finfo(np.float32).eps * s[0]))
    low, high = max(1, math.ceil(0.1 * min(rows.shape))), math.floor(0.5 * min(rows.shape))
    assert high <= resolved
    x, y = np.log(np.arange(low, high + 1)), np.log(s[low - 1 : high])
    slope, cut = np.polyfit(x, y, 1)
    return {
        "contraction": -slope,
        "fit_r2": 1 - np.sum((y - slope * x - cut) ** 2) / np.sum((y - y.mean()) ** 2),
        "fit_quadratic": np.polyfit(x, y, 2)[0],
        "resolved": resolved,
        "spike": math.log(s[0] / s[1]),
        "effective_rank": float(np.exp(-np.sum(share * np.log(share)))),
    }


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[DepthTrace, dict[str, np.ndarray]]:
    folder = tmp_path_factory.mktemp("checkpoint")
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    trace = audit(str(folder), prompts(), max_length=MAX_LENGTH, positions=f"last:{LAST}", progress=False)
    return trace, oracle(model, tokenizer)


# An audit of a real model must agree to 2e-3 (curvature 5e-3, effective rank 0.5 %). A narrow model's float32 forward
# is some 1e-7 from a float64 one; a hundred times that leaves room for how another machine orders its sums.
@pytest.mark.parametrize(
    ("column", "absolute", "relative"),
    [
        ("contraction", 1e-5, 0),
        ("fit_r2", 1e-5, 0),
        ("fit_quadratic", 1e-5, 0),
        ("resolved", 0, 0),
        ("spike", 1e-5, 0),
        ("effective_rank", 0, 1e-5),
        ("transport", 1e-5, 0),
        ("entropy", 2e-5, 0),
        ("curvature", 2e-5, 0),
    ],
)
def test_every_boundary(
    case: tuple[DepthTrace, dict[str, np.ndarray]], column: str, absolute: float, relative: float
) -> None:
    trace, exact = case
    assert trace.boundaries == 8
    np.testing.assert_allclose(trace.columns[column], exact[column], atol=absolute, rtol=relative)


def test_the_case_is_worth_comparing(case: tuple[DepthTrace, dict[str, np.ndarray]]) -> None:
    """Boundaries differ by far more than the tolerances, and the pool has what an audit has to cope with."""
    _, exact = case
    for column in ("contraction", "transport", "curvature"):
        assert np.nanmin(np.abs(np.diff(exact[column]))) > 1e-3
    sizes = [len(text.encode()) for text in prompts()]
    assert min(sizes) < 10
    assert sum(size > MAX_LENGTH for size in sizes) > 5


def test_the_summary_and_the_record(case: tuple[DepthTrace, dict[str, np.ndarray]]) -> None:
    trace, exact = case
    assert trace.terminal == (5, 7)
    assert trace.summary["contraction"] == pytest.approx(exact["contraction"][5:].mean(), abs=1e-5)
    assert trace.summary["transport"] == pytest.approx(exact["transport"][5:].mean(), abs=1e-5)
    assert trace.summary["path_length"] == pytest.approx(exact["transport"][1:].sum(), abs=1e-4)
    assert trace.summary["directness"] == pytest.approx(exact["directness"][0], abs=1e-5)
    sizes = [min(MAX_LENGTH, len(text.encode())) for text in prompts()]
    assert trace.prompts["count"] == len(sizes)
    assert trace.prompts["tokens"] == sum(sizes)
    assert trace.prompts["rows"] == sum(sizes) - len(sizes)
    assert trace.prompts["positions"] == sum(min(LAST, size) for size in sizes)
    assert trace.model["layers"] == 7
    assert trace.model["width"] == 64
