"""The comparison of two traces, against planted truth: spectra of rows drawn with known tail exponents."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest

from spinal_jax.compare import compare
from spinal_jax.metrics.depth import terminal_block
from spinal_jax.metrics.tail import effective_rank, tail_slopes
from spinal_jax.result import SECTIONS, DepthTrace

WINDOW = (0.10, 0.50)
WIDTH = 32
GROUPS = 16
# Of prompts in each group, as hashing 64 prompts into 16 groups gives them.
PROMPTS = np.array([4, 2, 5, 3, 7, 4, 4, 2, 3, 6, 5, 4, 1, 4, 6, 4])
ROWS = 12 * PROMPTS
POSITIONS = 4 * PROMPTS


class Truth(NamedTuple):
    """What is planted at each boundary, D + 1 of each."""

    alpha: np.ndarray  # of the reference
    delta_alpha: np.ndarray
    delta_transport: np.ndarray


def spectra(second: np.ndarray) -> np.ndarray:
    return np.sqrt(np.maximum(np.linalg.eigvalsh(second)[..., ::-1], 0.0))


def simulated(truth: Truth, pairs: int, seed: int, likeness: float = 0.8) -> Iterator[tuple[DepthTrace, DepthTrace]]:
    """Pairs (aligned, reference) of traces of the same prompts.

    Rows are Gaussian with singular values `k ** -alpha` of their distribution; the rows of one model resemble those of
    the other, as hidden states of the same tokens do. Transport differs from prompt to prompt, and by group.
    """
    rng, boundaries = np.random.default_rng(seed), len(truth.alpha)
    k, group = np.arange(1, WIDTH + 1.0), np.repeat(np.arange(GROUPS), ROWS)
    edges = np.concatenate([[0], np.cumsum(PROMPTS)])[:-1]
    for _ in range(pairs):
        common, own = rng.normal(size=(2, boundaries, ROWS.sum(), WIDTH))
        rows = common, likeness * common + math.sqrt(1 - likeness**2) * own
        step = rng.gamma(4, 0.1, (boundaries, PROMPTS.sum()))  # radians of each prompt
        change = truth.delta_transport[:, None] + 0.1 * rng.normal(size=step.shape)
        found = []
        for z, alpha, steps in (
            (rows[0], truth.alpha + truth.delta_alpha, step + change),
            (rows[1], truth.alpha, step),
        ):
            h = z * k ** -alpha[:, None, None]
            grams = np.stack([h[:, group == g].transpose(0, 2, 1) @ h[:, group == g] for g in range(GROUPS)])
            found.append(trace_of(grams, 4 * np.add.reduceat(steps, edges, axis=1).T))
        yield found[0], found[1]


def trace_of(grams: np.ndarray, steps: np.ndarray, name: str = "model", **settings: Any) -> DepthTrace:
    """A trace from the Gram sums [G, D+1, d, d] and the sums of steps [G, D+1] of its groups."""
    total, whole, depth = int(ROWS.sum()), spectra(grams.sum(axis=0)), grams.shape[1] - 1
    without = spectra(grams.sum(axis=0) - grams)
    replicates = {
        "contraction": tail_slopes(without, (total - ROWS)[:, None], [WINDOW])[0],
        "effective_rank": np.array([[effective_rank(s) for s in at] for at in without])
        if depth < 3
        else without[..., 0],
        "transport": (steps.sum(axis=0) - steps) / (POSITIONS.sum() - POSITIONS)[:, None],
    }
    columns = {
        "contraction": tail_slopes(whole, np.asarray(total), [WINDOW])[0],
        "effective_rank": np.array([effective_rank(s) for s in whole]) if depth < 3 else whole[..., 0],
        "transport": steps.sum(axis=0) / POSITIONS.sum(),
    }
    columns["transport"][0] = replicates["transport"][:, 0] = np.nan
    for other in ("entropy", "curvature"):
        columns[other], replicates[other] = 2 * columns["transport"], 2 * replicates["transport"]
    columns = {name: columns.get(name, np.ones(depth + 1)) for name in SECTIONS["columns"]}
    model = (name, "folder", None, "llama", 9, depth, WIDTH, 99, "float32", name)
    prompts = ("pool.txt", "text", int(PROMPTS.sum()), 0, GROUPS, total, total, int(POSITIONS.sum()), 128, False, "cd")
    return DepthTrace(
        model=dict(zip(SECTIONS["model"], model, strict=True)),
        prompts=dict(zip(SECTIONS["prompts"], prompts, strict=True)),
        settings=dict(zip(SECTIONS["settings"], (list(WINDOW), 1, False, "last:4", None, 1.0, GROUPS), strict=True))
        | settings,
        columns=columns,
        summary=dict.fromkeys(SECTIONS["summary"], 0.0)
        | {"terminal": terminal_block(depth), "degrees_of_freedom": GROUPS - 1},
        environment={},
        arrays={
            "singular_values": whole,
            "groups/singular_values": without,
            "groups/rows": ROWS,
            "groups/positions": POSITIONS,
            **{f"groups/{name}": values for name, values in replicates.items()},
        },
    )


def flat(depth: int, alpha: float = 1.0, delta_alpha: float = 0.0, delta_transport: float = 0.0) -> Truth:
    return Truth(*(np.full(depth + 1, value) for value in (alpha, delta_alpha, delta_transport)))


@pytest.fixture(scope="module")
def pair() -> tuple[DepthTrace, DepthTrace]:
    """One pair of depth 6 with an effect in the terminal block, boundaries 5 and 6."""
    truth = flat(6)
    truth.delta_alpha[5:], truth.delta_transport[5:] = 0.2, -0.1
    ((aligned, reference),) = simulated(truth, 1, seed=1)
    return replace(aligned, model=aligned.model | {"name": "tuned", "sha256": "aa"}), reference


PAIRS = 400
# Of 400 trials at 5 %, the share found lies within these in 93 % of seeds; that is what is asked of the method.
COVERED, NULL = (0.92, 0.98), (0.03, 0.07)


def test_intervals_cover_what_was_planted() -> None:
    truth = Truth(np.array([0.9, 1.0, 1.1, 1.0]), np.array([0.0, 0.1, -0.05, 0.15]), np.array([0.0, -0.05, 0.0, -0.1]))
    found = [compare(*traces) for traces in simulated(truth, PAIRS, seed=2)]
    low, high = (np.array([c.summary[f"delta_align_{end}"] for c in found]) for end in ("low", "high"))
    planted = truth.delta_alpha[3] - truth.delta_transport[3]  # the terminal block of 3 is the last
    assert COVERED[0] <= np.mean((low <= planted) & (planted <= high)) <= COVERED[1]
    for name, planted in (("contraction", truth.delta_alpha), ("transport", truth.delta_transport)):
        low, high = (np.array([c.columns[f"delta_{name}_{end}"] for c in found])[:, 1:] for end in ("low", "high"))
        assert COVERED[0] <= np.mean((low <= planted[1:]) & (planted[1:] <= high)) <= COVERED[1]
    assert {c.verdict for c in found} == {"contraction"}
    assert all(c.summary["p_value"] < 0.001 for c in found)


def test_null_pairs_are_rarely_significant() -> None:
    found = [compare(*traces) for traces in simulated(flat(3), PAIRS, seed=3)]
    p = np.array([c.summary["p_value"] for c in found])
    assert NULL[0] <= np.mean(p < 0.05) <= NULL[1]
    assert NULL[0] <= np.mean([c.verdict != "no detectable change" for c in found]) <= NULL[1]
    for name in ("contraction", "transport"):
        by_layer = np.array([c.columns[f"delta_{name}_p"] for c in found])[:, 1:]
        assert NULL[0] <= np.mean(by_layer < 0.05) <= NULL[1]
        corrected = np.array([c.columns[f"delta_{name}_p_holm"] for c in found])[:, 1:]
        assert np.mean(np.any(corrected < 0.05, axis=1)) <= NULL[1]
