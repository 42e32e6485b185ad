"""Tail exponents that were planted are found, and many fits at once are those of one fit after the other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spinal_jax.comparison.robustness import WINDOWS
from spinal_jax.metrics.contraction import singular_values
from spinal_jax.metrics.tail import EPS32, effective_rank, tail_fit, tail_slopes

WIDTH = 128


def found_alpha(alpha: float, times: int) -> float:
    """Mean over 16 samples of `times` d rows; one varies by 1 % at 8 d."""
    rng, found = np.random.default_rng(0), []
    basis = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
    for _ in range(16):
        rows = rng.normal(size=(times * WIDTH, WIDTH)) * np.arange(1, WIDTH + 1.0) ** -alpha @ basis
        rows = rows.astype(np.float32).astype(np.float64)
        found.append(tail_fit(singular_values(rows.T @ rows), len(rows), (0.10, 0.50)).alpha)
    return float(np.mean(found))


@pytest.mark.parametrize(("alpha", "times"), [(0.7, 8), (1.0, 8), (1.5, 8), (1.0, 16), (0.4, 32)])
def test_hidden_states_with_a_known_exponent_give_it(alpha: float, times: int) -> None:
    assert found_alpha(alpha, times) == pytest.approx(alpha, rel=0.02)


def test_sampling_steepens_flat_spectra_most() -> None:
    """At 8 d by 1 % from 0.7 on, but by 3 % at 0.4; at 4 d by 2 % and 8 %."""
    assert 0.01 < found_alpha(1.0, 4) / 1.0 - 1 < 0.04
    assert 0.02 < found_alpha(0.4, 8) / 0.4 - 1 < 0.05
    assert 0.06 < found_alpha(0.4, 4) / 0.4 - 1 < 0.11


@given(st.integers(0, 2**32 - 1), st.sampled_from([20, 64]), st.booleans())
def test_many_fits_are_those_of_one_after_the_other(seed: int, width: int, noisy: bool) -> None:
    rng = np.random.default_rng(seed)
    s = np.sort(rng.random((3, 2, width)) ** rng.uniform(0.5, 8 if noisy else 1))[..., ::-1]
    if noisy:  # ranks of their own, an empty spectrum, one that is all noise
        s = s * np.where(np.arange(width) < rng.integers(1, width, (3, 2, 1)), 1, EPS32 * 1e-3)
        s[0, 0] = 0
    rows = int(rng.integers(1, 10**6))
    found = tail_slopes(s, rows, WINDOWS)
    assert found.shape == (len(WINDOWS), 3, 2)
    for number, window in enumerate(WINDOWS):
        for i in range(3):
            for j in range(2):
                # The same sums in another order.
                alone = tail_fit(s[i, j], rows, window).alpha
                assert found[number, i, j] == pytest.approx(alone, rel=1e-9, abs=1e-9, nan_ok=True)


def test_every_logarithm_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What 200 layers x 16 groups x all windows cost: one logarithm for each singular value."""
    taken, log = [], np.log

    def counting(x: np.ndarray, *arguments: object, **options: object) -> np.ndarray:
        taken.append(np.size(x))
        return log(x, *arguments, **options)  # type: ignore[call-overload]

    s = np.random.default_rng(0).random((5, 7, 64)).cumsum(axis=-1)[..., ::-1]
    monkeypatch.setattr(np, "log", counting)
    tail_slopes(s, 1000, WINDOWS)
    assert sum(taken) <= s.size + len(WINDOWS) * 64


def test_effective_rank_counts_equal_directions() -> None:
    assert effective_rank(np.array([3.0, 3, 3, 3, 0])) == pytest.approx(4)
    assert np.isnan(effective_rank(np.zeros(3)))
