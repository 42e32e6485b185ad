"""The delete-one-group jackknife, against textbook formulas, closed forms for a mean, and simulation."""

from __future__ import annotations

import numpy as np
import pytest

from spinal_jax.metrics.jackknife import pseudo_values, standard_error


def leave_one_out(
    values: np.ndarray, group: np.ndarray, statistic=np.mean
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(full, without [G, ...], sizes [G]) of a statistic over axis 0."""
    groups = np.unique(group)
    without = np.array([statistic(values[group != g], axis=0) for g in groups])
    return np.asarray(statistic(values, axis=0)), without, np.array([np.sum(group == g) for g in groups])


def test_equal_groups_give_the_textbook_jackknife() -> None:
    rng = np.random.default_rng(0)
    values, group = rng.normal(size=(80, 3)) ** 2, np.repeat(np.arange(8), 10)
    full, without, sizes = leave_one_out(values, group, np.median)
    spread = without - without.mean(axis=0)
    textbook = np.sqrt(7 / 8 * np.sum(spread**2, axis=0))
    # The same sums in another order, float64.
    np.testing.assert_allclose(standard_error(full, without, sizes), textbook, rtol=1e-12)


def test_unequal_groups_follow_busing_meijer_and_van_der_leeden() -> None:
    rng = np.random.default_rng(1)
    sizes = np.array([3, 11, 5, 40, 7])
    full, without, n = rng.normal(), rng.normal(size=5), sizes.sum()
    # Their equations, one group at a time.
    estimate = 5 * full - sum((1 - m / n) * t for m, t in zip(sizes, without, strict=True))
    variance = 0.0
    for m, t in zip(sizes, without, strict=True):
        h = n / m
        pseudo = h * full - (h - 1) * t
        variance += (pseudo - estimate) ** 2 / (h - 1) / 5
    assert standard_error(np.float64(full), without, sizes) == pytest.approx(np.sqrt(variance), rel=1e-12)


def test_pseudo_values_of_a_mean_are_the_means_of_the_groups() -> None:
    rng = np.random.default_rng(2)
    group = np.repeat(np.arange(4), [2, 9, 4, 5])
    values = rng.normal(size=(20, 2, 3))
    full, without, sizes = leave_one_out(values, group)
    means = np.array([values[group == g].mean(axis=0) for g in range(4)])
    np.testing.assert_allclose(pseudo_values(full, without, sizes), means, atol=1e-13)  # a few float64 roundings
    # And so the squared error is the mean over groups of m / (n - m) (group mean - mean) ** 2.
    weight = (sizes / (20 - sizes))[:, None, None]
    closed = np.sqrt(np.mean(weight * (means - full) ** 2, axis=0))
    np.testing.assert_allclose(standard_error(full, without, sizes), closed, rtol=1e-12)


@pytest.mark.parametrize("sizes", [[10] * 16, [2, 4, 5, 5, 6, 8, 8, 9, 10, 10, 12, 13, 14, 16, 18, 20]])
def test_squared_error_of_a_mean_is_unbiased(sizes: list[int]) -> None:
    trials, total = 4000, sum(sizes)
    values = np.random.default_rng(3).normal(size=(total, trials))
    full, without, counts = leave_one_out(values, np.repeat(np.arange(16), sizes))
    found = np.mean(standard_error(full, without, counts) ** 2)
    # A mean square of 15 degrees of freedom, 4000 times: standard error sqrt(2 / 15 / 4000) = 0.6 % with equal groups,
    # a little more with unequal ones; 4 % is some five of them.
    assert found == pytest.approx(1 / total, rel=0.04)


def test_intervals_of_a_mean_cover() -> None:
    trials = 4000
    values = np.random.default_rng(4).normal(size=(160, trials))
    full, without, sizes = leave_one_out(values, np.repeat(np.arange(16), 10))
    outside = np.abs(full) > 2.1314495 * standard_error(full, without, sizes)  # t, 15 degrees of freedom, 95 %
    assert outside.mean() == pytest.approx(0.05, abs=0.014)  # four standard errors of 4000 trials


def test_scale_and_offset() -> None:
    rng = np.random.default_rng(5)
    full, without, sizes = rng.normal(), rng.normal(size=6), np.array([1, 2, 3, 4, 5, 6])
    error = standard_error(np.float64(full), without, sizes)
    assert standard_error(np.float64(7 - 3 * full), 7 - 3 * without, sizes) == pytest.approx(3 * error, rel=1e-12)
    assert standard_error(np.float64(full), without, 10 * sizes) == pytest.approx(error, rel=1e-12)
    assert standard_error(np.float64(full), np.full(6, full), sizes) == pytest.approx(0, abs=1e-15)


def test_a_lost_replicate_makes_only_its_column_unknown() -> None:
    full, without = np.ones(3), np.array([[1.0, np.nan, 2.0], [1.5, 1.0, 2.0], [2.0, 1.0, 1.0]])
    found = standard_error(full, without, np.array([4, 5, 6]))
    assert np.isnan(found).tolist() == [False, True, False]


@pytest.mark.parametrize("groups", [0, 1])
def test_fewer_than_two_groups_have_no_error(groups: int) -> None:
    found = standard_error(np.ones(3), np.ones((groups, 3)), np.full(groups, 5))
    assert found.shape == (3,)
    assert np.isnan(found).all()
