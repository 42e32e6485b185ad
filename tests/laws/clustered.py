"""Delta_align with a planted value on rows like real ones: clustered by prompt, heavy tails, a massive direction.

`python -m tests.laws.clustered --trials 4000` prints coverage and null rates; 300 trials take about a minute.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from spinal_jax.metrics.tail import tail_slopes
from spinal_jax.stats.jackknife import Estimate

GROUPS, WIDTH, WINDOW, TERMINAL = 16, 32, (0.10, 0.50), 2


@dataclass(frozen=True)
class World:
    """How hidden states come about.

    Attributes:
        times: N / d, about.
        length: rows of each prompt.
        alike: share of a row's variance that all rows of its prompt have in common.
        tails: whether prompts have scales of Student's t with 3 degrees of freedom.
        massive: factor on the largest direction.
        copies: how often each prompt is there, in one group.
        likeness: correlation of the two models' rows.
        moving: standard deviation over prompts of the change in transport, t3. In Delta_align of SmolLM2 after DPO the
            error of transport is five times that of contraction (experiments/smollm2_hh); 1.0 makes it about three.
    """

    times: int
    length: int = 2
    alike: float = 0.3
    tails: bool = True
    massive: float = 100.0
    copies: int = 1
    likeness: float = 0.8
    moving: float = 1.0


def layout(world: World, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(component of each prompt, group of each component): every group has a component, the rest are dealt out."""
    wanted, component = world.times * WIDTH // world.length, []
    while len(component) < wanted:
        number = component[-1] + 1 if component else 0
        component += [number] * world.copies
    count = component[-1] + 1
    group = np.concatenate([np.arange(GROUPS), rng.integers(0, GROUPS, max(0, count - GROUPS))])
    return np.array(component), rng.permutation(group)[:count]


def trial(
    world: World,
    place: tuple[np.ndarray, np.ndarray],
    alpha: tuple[float, float],
    moved: float,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Gram sums [2, T, G, d, d] of two models and sums of their transport [2, T, G] over groups."""
    component, group_of = place
    count, prompts = len(group_of), len(component)
    k = np.arange(1, WIDTH + 1.0)
    grams, steps = np.empty((2, TERMINAL, GROUPS, WIDTH, WIDTH)), np.zeros((2, TERMINAL, GROUPS))
    groups = group_of[component]
    order = np.argsort(groups, kind="stable")
    edges = np.searchsorted(groups[order], np.arange(GROUPS + 1)) * world.length
    scale = 1 / np.sqrt(rng.chisquare(3, count) / 3) if world.tails else np.ones(count)
    for boundary in range(TERMINAL):
        shape = (2, count, world.length, WIDTH)
        z = rng.normal(size=shape)
        z = math.sqrt(1 - world.alike) * z + math.sqrt(world.alike) * rng.normal(size=(2, count, 1, WIDTH))
        z[1] = world.likeness * z[0] + math.sqrt(1 - world.likeness**2) * z[1]
        length = rng.gamma(4, 0.1, count)
        change = world.moving * rng.standard_t(3, count) / math.sqrt(3)
        for model in range(2):
            s = k ** -alpha[model]
            s[0] *= world.massive
            rows = (z[model] * s * scale[:, None, None])[component][order].reshape(prompts * world.length, WIDTH)
            grams[model, boundary] = [rows[a:b].T @ rows[a:b] for a, b in pairwise(edges)]
            step = length + (change + moved if model == 0 else 0.0)
            steps[model, boundary] = np.bincount(groups, step[component], GROUPS)
    return grams, steps


def delta_align(world: World, alpha: tuple[float, float], moved: float, trials: int, seed: int = 0) -> Estimate:
    """Delta_align of many trials, value [trials], as a comparison forms it."""
    rng = np.random.default_rng(seed)
    place = layout(world, rng)
    prompts = np.bincount(place[1][place[0]], minlength=GROUPS).astype(float)
    rows = int(prompts.sum()) * world.length
    full, without = np.empty((2, 2, trials)), np.empty((2, 2, GROUPS, trials))  # [model, alpha or L]
    for number in range(trials):
        grams, steps = trial(world, place, alpha, moved, rng)
        whole = grams.sum(axis=2, keepdims=True)
        every = np.concatenate([whole, whole - grams], axis=2)
        s = np.sqrt(np.maximum(np.linalg.eigvalsh(every)[..., ::-1], 0))
        slopes = tail_slopes(s, rows, [WINDOW])[0].mean(axis=1)  # [2, 1 + G]
        full[:, 0, number], without[:, 0, :, number] = slopes[:, 0], slopes[:, 1:]
        total = steps.sum(axis=2, keepdims=True)
        full[:, 1, number] = total[..., 0].mean(axis=1) / prompts.sum()
        without[:, 1, :, number] = ((total - steps) / (prompts.sum() - prompts)).mean(axis=1)
    gained, changed = (
        Estimate.of(full[0, which], without[0, which], prompts)
        - Estimate.of(full[1, which], without[1, which], prompts)
        for which in (0, 1)
    )
    return gained - changed


def rates(found: Estimate, truth: float) -> dict[str, float]:
    """Shares of trials: whose interval holds the truth, and whose p-value is below 5 % and 1 %."""
    p = found.p_value
    return {
        "covered": float(np.mean(np.abs(found.value - truth) <= found.half)),
        "5 %": float(np.mean(p < 0.05)),
        "1 %": float(np.mean(p < 0.01)),
    }


WORLDS = {
    "4 d": World(times=4),
    "16 d": World(times=16),
    "28 d": World(times=28, length=4),
    "28 d, each prompt 8 times": World(times=28, copies=8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=4000)
    trials = parser.parse_args().trials
    for name, world in WORLDS.items():
        null = rates(delta_align(world, (1.0, 1.0), 0.0, trials), 0.0)
        found = delta_align(world, (1.1, 1.0), -0.05, trials, seed=1)
        planted = rates(found, float(found.value.mean()))
        shown = ", ".join(f"{what} {share:.2%}" for what, share in null.items())
        print(f"{name}: null {shown}; planted covered {planted['covered']:.2%}", flush=True)


if __name__ == "__main__":
    main()
