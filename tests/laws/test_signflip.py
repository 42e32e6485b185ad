"""Exact sign flips against a listing of all choices, and Holm's correction against its definition."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spinal_jax.stats import signflip
from spinal_jax.stats.signflip import EXACT_GROUPS, holm, sign_flip_method, sign_flip_p


def listed(values: np.ndarray) -> float:
    signs = np.array(list(itertools.product([-1, 1], repeat=len(values))))
    return float(np.mean(np.abs(signs @ values) >= abs(values.sum()) - 1e-12 * np.abs(values).sum()))


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=10))
def test_counts_every_choice_of_signs_ties_included(values: list[int]) -> None:
    found = sign_flip_p(np.array(values, float))
    assert float(found) == listed(np.array(values, float))
    assert float(sign_flip_p(-np.array(values, float))) == float(found)
    assert float(sign_flip_p(0.1 * np.array(values[::-1]))) == float(found)  # whatever the unit and order of groups


def test_columns_are_tested_one_by_one() -> None:
    values = np.random.default_rng(0).normal(0.3, 1, (9, 4, 3))
    found = sign_flip_p(values)
    assert found.shape == (4, 3)
    np.testing.assert_array_equal(found, [[listed(values[:, i, j]) for j in range(3)] for i in range(4)])


def test_the_ends() -> None:
    assert float(sign_flip_p(np.ones(16))) == 2 / 2**16
    assert float(sign_flip_p(np.zeros(16))) == 1
    assert float(sign_flip_p(np.array([1.0, -1.0]))) == 1
    assert np.isnan(sign_flip_p(np.array([1.0, np.nan])))
    assert np.isnan(sign_flip_p(np.zeros((0, 2)))).all()
    assert float(sign_flip_p(np.ones(EXACT_GROUPS))) == 2 / 2**EXACT_GROUPS


def test_more_groups_are_drawn_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).normal(0.35, 1, (20, 5))
    exact = sign_flip_p(values)
    monkeypatch.setattr(signflip, "EXACT_GROUPS", 19)
    drawn = sign_flip_p(values)
    assert sign_flip_method(19) == "exact"
    assert sign_flip_method(20) == f"{signflip.DRAWS} random sign flips, seed 0"
    error = np.sqrt(exact * (1 - exact) / signflip.DRAWS)
    assert np.all(np.abs(drawn - exact) <= 5 * error + 2 / signflip.DRAWS)
    np.testing.assert_array_equal(drawn, sign_flip_p(values))


def test_p_values_are_uniform_under_no_effect() -> None:
    p = sign_flip_p(np.random.default_rng(2).standard_t(3, (10, 4000)))
    for level in (0.01, 0.05, 0.2, 0.5):
        # An exact test: the error is that of 4000 trials, four times over, and of steps of 2 / 2^10.
        assert np.mean(p <= level) == pytest.approx(level, abs=4 * np.sqrt(level * (1 - level) / 4000) + 0.002)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.integers(0, 3))
def test_holm_steps_down(values: list[float], holes: int) -> None:
    p = np.array(values + [np.nan] * holes)
    found = holm(p)
    assert np.isnan(found[len(values) :]).all()
    order = np.argsort(values)
    largest = 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - place) * values[index]))
        assert found[index] == largest
    assert np.all(found[: len(values)] >= np.array(values))


def test_holm_of_nothing() -> None:
    assert np.isnan(holm(np.full(3, np.nan))).all()
    np.testing.assert_allclose(holm(np.array([[0.01, 0.04], [0.03, 0.005]])), [[0.03, 0.06], [0.06, 0.02]])
