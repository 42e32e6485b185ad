"""Coverage of the intervals of Delta_align and rate of significant null pairs, on rows like real ones."""

from __future__ import annotations

import pytest

from .clustered import WORLDS, delta_align, rates

TRIALS = 1000


@pytest.mark.parametrize("name", WORLDS)
def test_a_null_pair_is_significant_as_often_as_it_says(name: str) -> None:
    """Standard errors of 1000 trials are 0.7 % at 5 % and 0.3 % at 1 %; the bounds at 1 % are 0.5 % to 2 % and that."""
    found = rates(delta_align(WORLDS[name], (1.0, 1.0), 0.0, TRIALS), 0.0)
    assert 0.92 <= found["covered"] <= 0.98
    assert 0.03 <= found["5 %"] <= 0.07
    assert 0.002 <= found["1 %"] <= 0.02


@pytest.mark.parametrize("name", WORLDS)
def test_an_interval_holds_what_was_planted(name: str) -> None:
    """The truth is what such pairs read on average at this N; sampling steepens both tails."""
    found = delta_align(WORLDS[name], (1.1, 1.0), -0.05, TRIALS // 4, seed=1)
    truth = float(found.value.mean())
    assert 0.92 <= rates(found, truth)["covered"] <= 0.98
    assert truth == pytest.approx(0.15, abs=0.05)
