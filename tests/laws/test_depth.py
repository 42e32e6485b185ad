"""Terminal block, coherence and the summary of a depth curve, against examples worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from spinal_jax.errors import UserError
from spinal_jax.metrics.depth import Terminal, curve_coherence, summary, terminal_block

ONE, TWO = (3, 3), (5, 6)
SERIES = arrays(np.float64, st.integers(1, 20), elements=st.floats(-10, 10, width=32))


@pytest.mark.parametrize(
    ("depth", "block"),
    [(30, (21, 30)), (1, (1, 1)), (2, (2, 2)), (3, (3, 3)), (4, (3, 4)), (6, (5, 6)), (7, (5, 7)), (32, (22, 32))],
)
def test_terminal_block_is_the_last_third_rounded_up(depth: int, block: tuple[int, int]) -> None:
    assert terminal_block(depth) == block


@pytest.mark.parametrize(
    ("asked", "block"),
    [("third", (21, 30)), ("last:10", (21, 30)), ("last:1", (30, 30)), ((21, 30), (21, 30)), ((3, 7), (3, 7))],
)
def test_the_terminal_block_that_was_asked_for(asked: Terminal, block: tuple[int, int]) -> None:
    assert terminal_block(30, asked) == block


@pytest.mark.parametrize("asked", ["last:0", "last:31", "last:x", "half", (0, 3), (5, 4), (21, 31)])
def test_a_terminal_block_that_does_not_exist_is_refused(asked: Terminal) -> None:
    with pytest.raises(UserError, match=r"metrics\.terminal is .*; it takes third, last:K or \[first, last\]"):
        terminal_block(30, asked)


@pytest.mark.parametrize(
    ("series", "value"),
    [
        ([0, 1, 2, 3, 4], 1.0),  # ramp: no second difference
        ([4, 3, 2, 1], 1.0),
        ([2, 2, 2], 1.0),  # constant
        ([5], 1.0),
        ([1, 7], 1.0),
        ([0, 1, 0, 1], 1 - 4 / 6),  # zigzag of three steps: 1 - (2 + 2) / (2 * 3)
        ([0, 1, 3], 1 - 1 / 6),
        ([0, 0, 1], 1 - 1 / 2),
    ],
)
def test_coherence_by_hand(series: list[float], value: float) -> None:
    # Differences of small whole numbers are exact; one division rounds.
    assert curve_coherence(np.array(series, float)) == pytest.approx(value, abs=1e-15)


def test_coherence_of_a_long_zigzag_goes_to_zero() -> None:
    # n steps of size 1 have n - 1 turns of size 2: 1 - 2 (n - 1) / (2 n) = 1 / n.
    assert curve_coherence(np.arange(1001) % 2.0) == pytest.approx(1 / 1000, abs=1e-12)


def test_coherence_of_a_series_with_a_gap_is_unknown() -> None:
    assert math.isnan(curve_coherence(np.array([1.0, math.nan, 3.0])))
    assert math.isnan(curve_coherence(np.array([math.nan, math.nan])))


@given(SERIES, st.floats(0.1, 10), st.floats(-5, 5))
def test_coherence_stays_in_range_and_ignores_offset_scale_and_direction(
    series: np.ndarray, scale: float, offset: float
) -> None:
    value = curve_coherence(series)
    assert 0 <= value <= 1
    if np.ptp(series) > 0.1:  # below it, adding an offset rounds the steps themselves away
        # Steps of 1e-16 relative rounding against a total length above 0.1.
        assert curve_coherence(scale * series + offset) == pytest.approx(value, abs=1e-10)
    assert curve_coherence(series[::-1]) == pytest.approx(value, abs=1e-12)


def test_summary_by_hand() -> None:
    alpha = np.array([9, 9, 9, 9, 9, 1.0, 3.0])  # D = 6: the terminal block is 5..6
    steps = np.array([math.nan, 0.5, 0.5, 0.5, 0.5, 0.3, 0.5])
    found = summary(alpha, steps, direct=0.6, terminal=TWO)
    expected = {"contraction": 2.0, "transport": 0.4, "coherence": 1.0, "directness": 0.75, "path_length": 2.8}
    assert found == pytest.approx(expected, abs=1e-14)  # a few additions in float64


def test_summary_takes_the_mean_of_both_coherences() -> None:
    alpha = np.array([*[5.0] * 7, 0.0, 0.0, 1.0])  # D = 9: the terminal block is 7..9; coherence 1/2
    steps = np.array([math.nan, *[0.1] * 6, 0.1, 0.2, 0.3])  # coherence 1
    assert summary(alpha, steps, direct=0.6, terminal=(7, 9))["coherence"] == pytest.approx(0.75, abs=1e-12)


def test_directness_is_one_on_a_straight_path_and_never_more() -> None:
    steps = np.array([math.nan, 0.25, 0.25, 0.25])
    alpha = np.ones(4)
    assert summary(alpha, steps, direct=0.25, terminal=ONE)["directness"] == 1
    assert summary(alpha, steps, direct=0.25 + 1e-7, terminal=ONE)["directness"] == 1  # rounding of the two distances
    assert (
        summary(alpha, np.array([math.nan, 0.1, 0.1, 0.0]), direct=0.0, terminal=ONE)["directness"] == 1
    )  # nothing moved


def test_summary_of_an_unknown_boundary_is_unknown_where_it_counts() -> None:
    alpha = np.array([math.nan, 1, 1, 1, 1, 1, 1])
    steps = np.array([math.nan, 0.5, 0.5, 0.5, 0.5, 0.3, 0.5])
    assert summary(alpha, steps, 0.6, TWO)["contraction"] == 1  # boundary 0 is not in the terminal block
    alpha[6] = math.nan
    found = summary(alpha, steps, 0.6, TWO)
    assert math.isnan(found["contraction"])
    assert math.isnan(found["coherence"])
    assert found["transport"] == pytest.approx(0.4)
