"""Pairs of traces with a planted difference: Gaussian rows with known tail exponents, through Gram sums to spectra."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from spinal_jax.audit.trace import SECTIONS, DepthTrace
from spinal_jax.comparison.compare import BothModels
from spinal_jax.metrics.depth import terminal_block
from spinal_jax.metrics.tail import EPS32, fitted_ranks, spike, tail_slopes

WINDOW = (0.10, 0.50)
WIDTH = 32
GROUPS = 16
# Of prompts in each group, as hashing 64 prompts into 16 groups gives them.
PROMPTS = np.array([4, 2, 5, 3, 7, 4, 4, 2, 3, 6, 5, 4, 1, 4, 6, 4])
ROWS = 8 * PROMPTS  # N = 512, 16 for each feature
POSITIONS = 4 * PROMPTS


class Truth(NamedTuple):
    """What is planted at each boundary, D + 1 of each."""

    alpha: np.ndarray  # of the reference
    delta_alpha: np.ndarray
    delta_transport: np.ndarray
    transport: np.ndarray | None = None  # of both, on top of a mean of 0.4 rad


def spectra(second: np.ndarray) -> np.ndarray:
    return np.sqrt(np.maximum(np.linalg.eigvalsh(second)[..., ::-1], 0.0))


def simulated(truth: Truth, pairs: int, seed: int, likeness: float = 0.8) -> Iterator[tuple[DepthTrace, DepthTrace]]:
    """Pairs (aligned, reference) of traces of the same prompts.

    Rows are Gaussian with singular values `k ** -alpha` of their distribution; the rows of one model resemble those of
    the other, as hidden states of the same tokens do. Transport differs from prompt to prompt, and by group.
    """
    rng, boundaries = np.random.default_rng(seed), len(truth.alpha)
    k, ends, edges = np.arange(1, WIDTH + 1.0), np.cumsum(ROWS)[:-1], np.cumsum(PROMPTS) - PROMPTS
    for _ in range(pairs):
        common, own = rng.normal(size=(2, boundaries, ROWS.sum(), WIDTH))
        rows = common, likeness * common + math.sqrt(1 - likeness**2) * own
        step = rng.gamma(4, 0.1, (boundaries, PROMPTS.sum()))  # radians of each prompt
        if truth.transport is not None:
            step = step + truth.transport[:, None]
        change = truth.delta_transport[:, None] + 0.1 * rng.normal(size=step.shape)
        found = []
        aligned = "aligned", rows[0], truth.alpha + truth.delta_alpha, step + change
        for name, z, alpha, steps in (aligned, ("reference", rows[1], truth.alpha, step)):
            h = z * k ** -alpha[:, None, None]
            grams = np.stack([part.transpose(0, 2, 1) @ part for part in np.split(h, ends, axis=1)])
            found.append(trace_of(name, grams, 4 * np.add.reduceat(steps, edges, axis=1).T))
        yield found[0], found[1]


def trace_of(name: str, grams: np.ndarray, steps: np.ndarray) -> DepthTrace:
    """A trace from the Gram sums [G, D+1, d, d] and the sums of steps [G, D+1] of its groups."""
    total, whole, depth = int(ROWS.sum()), spectra(grams.sum(axis=0)), grams.shape[1] - 1
    without = spectra(grams.sum(axis=0) - grams)
    replicates = {
        "contraction": tail_slopes(without, total, [WINDOW])[0],
        "effective_rank": without.sum(axis=-1) / without[..., 0],
        "spike": spike(without),
        "transport": (steps.sum(axis=0) - steps) / (POSITIONS.sum() - POSITIONS)[:, None],
    }
    # Effective rank, entropy and curvature are stand-ins: any function of the rows, and of the steps, will do.
    columns = {
        "contraction": tail_slopes(whole, total, [WINDOW])[0],
        "effective_rank": whole.sum(axis=-1) / whole[..., 0],
        "spike": spike(whole),
        "transport": steps.sum(axis=0) / POSITIONS.sum(),
    }
    columns["transport"][0] = replicates["transport"][:, 0] = np.nan
    for other in ("entropy", "curvature"):
        columns[other], replicates[other] = 2 * columns["transport"], 2 * replicates["transport"]
    columns = {name: columns.get(name, np.ones(depth + 1)) for name in SECTIONS["columns"]}
    model = (name, "folder", None, "llama", 9, depth, WIDTH, 99, 99, "cd", "float32", name)
    prompts = ("pool.txt", "text", int(PROMPTS.sum()), 0, GROUPS, total, total, int(POSITIONS.sum()), 128, False, "cd")
    ranks = list(fitted_ranks(total, WIDTH, WINDOW))
    settings = (list(WINDOW), 1, False, "last:4", None, 1.0, GROUPS, ranks, EPS32, "third")
    return DepthTrace(
        model=dict(zip(SECTIONS["model"], model, strict=True)),
        prompts=dict(zip(SECTIONS["prompts"], prompts, strict=True)),
        settings=dict(zip(SECTIONS["settings"], settings, strict=True)),
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


def flat(depth: int, alpha: float = 1.0) -> Truth:
    """No difference anywhere; a test plants what it wants."""
    return Truth(np.full(depth + 1, alpha), np.zeros(depth + 1), np.zeros(depth + 1))


def both_models(depth: int) -> BothModels:
    """What two models of this depth would give: more of each measure towards the end."""
    rng = np.random.default_rng(0)
    mean, norms = 0.1 + np.arange(depth + 1.0) / 100, np.arange(1.0, depth + 1)
    return BothModels(
        policy_distance=mean,
        policy_distance_without=mean * (1 + 0.01 * rng.normal(size=(GROUPS, depth + 1))),
        kl=0.5,
        kl_without=0.5 * (1 + 0.01 * rng.normal(size=GROUPS)),
        gradient_norm=norms,
        gradient_norm_without=norms * (1 + 0.01 * rng.normal(size=(5, depth))),
        reference_gradient_norm=np.ones(depth),
        reference_gradient_norm_without=1 + 0.01 * rng.normal(size=(5, depth)),
        pairs=np.array([3, 4, 5, 6, 7]),
        gradient_apart={"embedding": 0.5, "final_norm": 0.1, "unembedding": 0.4},
        reward_accuracy=0.98,
        reward_accuracy_without=0.98 + 0.03 * rng.normal(size=5),
        reward_margin=1.5,
        reward_margin_without=1.5 + 0.1 * rng.normal(size=5),
    )
