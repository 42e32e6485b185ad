"""Coherence is a number only where a curve moves, with an interval that holds what was planted."""

from __future__ import annotations

import math

import numpy as np
import pytest

from spinal_jax.metrics import depth
from spinal_jax.stats.summary import FLAT_SE, Replicates, coherence_estimate

GROUPS, BOUNDARIES, T = 16, 13, (3, 12)
SIZES = np.array([4, 2, 5, 3, 7, 4, 4, 2, 3, 6, 5, 4, 2, 4, 6, 4], float)


def curves(truth: np.ndarray, noise: float, seed: int) -> Replicates:
    """A mean over prompts of `truth` [D + 1] with an error of `noise` at each boundary, t3 by group."""
    rng = np.random.default_rng(seed)
    each = truth + noise * math.sqrt(GROUPS / 3) * rng.standard_t(3, (GROUPS, BOUNDARIES))
    full = np.average(each, axis=0, weights=SIZES)
    without = (SIZES.sum() * full - SIZES[:, None] * each) / (SIZES.sum() - SIZES)[:, None]
    return Replicates(full, without, SIZES)


RAMP = np.linspace(0.0, 1.2, BOUNDARIES)
BENT = RAMP + 0.1 * np.sin(np.arange(BOUNDARIES))


def test_a_curve_that_moves_has_the_coherence_of_the_method() -> None:
    noise = {"contraction": curves(BENT, 0.002, 0), "transport": curves(RAMP, 0.002, 1)}
    found = coherence_estimate(noise, T)
    exact = [depth.curve_coherence(c.full[T[0] : T[1] + 1]) for c in noise.values()]
    assert found.reason == ""
    assert float(found.estimate.value) == pytest.approx(np.mean(exact), rel=1e-12)


def test_a_curve_that_is_flat_within_noise_has_none() -> None:
    """Flat curves read anything without the rule; it leaves nearly all of them without a number, and says why."""
    flat = [
        coherence_estimate(
            {"contraction": curves(np.ones(BOUNDARIES), 0.01, seed), "transport": curves(RAMP, 0.001, seed)}, T
        )
        for seed in range(200)
    ]
    told = [found.reason for found in flat]
    assert np.mean([bool(reason) for reason in told]) > 0.95
    assert set(told) <= {"", "contraction is flat within noise in the terminal block"}
    assert all(math.isnan(float(f.estimate.value)) == bool(f.reason) for f in flat)
    assert all(np.isnan(f.estimate.error) == bool(f.reason) for f in flat)


def test_short_and_undefined_blocks_say_so() -> None:
    lost = RAMP.copy()
    lost[9] = math.nan
    columns = {"contraction": curves(RAMP, 0.001, 0), "transport": curves(lost, 0.001, 1)}
    assert coherence_estimate(columns, T).reason == "transport is undefined in the terminal block"
    assert coherence_estimate(columns, (10, 12)).reason == "the terminal block has 3 boundaries and coherence needs 4"
    one = {name: Replicates(c.full, np.full((1, BOUNDARIES), np.nan), np.ones(1)) for name, c in columns.items()}
    one["transport"] = one["contraction"]
    assert coherence_estimate(one, T).reason == ""  # without groups there is no noise to compare with
    assert np.isnan(coherence_estimate(one, T).estimate.error)


def test_intervals_of_coherence_where_it_is_given_hold_the_truth() -> None:
    """400 trials: 0.95 is found within 0.92..0.98 (a standard error of 0.011)."""
    truth = np.mean([depth.curve_coherence(x[T[0] : T[1] + 1]) for x in (BENT, BENT)])
    covered = []
    for seed in range(400):
        found = coherence_estimate(
            {"contraction": curves(BENT, 0.004, seed), "transport": curves(BENT, 0.004, 10**6 + seed)}, T
        )
        if not found.reason:
            low, high = found.estimate.value - found.estimate.half, found.estimate.value + found.estimate.half
            covered.append(max(low, 0.0) <= truth <= min(high, 1.0))
    assert len(covered) > 350
    assert 0.92 <= np.mean(covered) <= 0.98
    assert FLAT_SE == 3.0
