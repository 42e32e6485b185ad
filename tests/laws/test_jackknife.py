"""The delete-one-group jackknife, against textbook formulas, closed forms for a mean, and simulation."""

from __future__ import annotations

import numpy as np
import pytest

from spinal_jax.stats.jackknife import Estimate, pseudo_values, t_quantile
from spinal_jax.stats.signflip import sign_flip_p


def error_of(full: np.ndarray, without: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    return Estimate.of(full, without, sizes).error


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
    np.testing.assert_allclose(error_of(full, without, sizes), textbook, rtol=1e-12)


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
    assert error_of(np.float64(full), without, sizes) == pytest.approx(np.sqrt(variance), rel=1e-12)


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
    np.testing.assert_allclose(error_of(full, without, sizes), closed, rtol=1e-12)


@pytest.mark.parametrize("sizes", [[10] * 16, [2, 4, 5, 5, 6, 8, 8, 9, 10, 10, 12, 13, 14, 16, 18, 20]])
def test_squared_error_of_a_mean_is_unbiased(sizes: list[int]) -> None:
    trials, total = 4000, sum(sizes)
    values = np.random.default_rng(3).normal(size=(total, trials))
    full, without, counts = leave_one_out(values, np.repeat(np.arange(16), sizes))
    found = np.mean(error_of(full, without, counts) ** 2)
    # A mean square of 15 degrees of freedom, 4000 times: standard error sqrt(2 / 15 / 4000) = 0.6 % with equal groups,
    # a little more with unequal ones; 4 % is some five of them.
    assert found == pytest.approx(1 / total, rel=0.04)


def test_intervals_of_a_mean_cover() -> None:
    trials = 4000
    values = np.random.default_rng(4).normal(size=(160, trials))
    full, without, sizes = leave_one_out(values, np.repeat(np.arange(16), 10))
    outside = np.abs(full) > 2.1314495 * error_of(full, without, sizes)  # t, 15 degrees of freedom, 95 %
    assert outside.mean() == pytest.approx(0.05, abs=0.014)  # four standard errors of 4000 trials


def test_scale_and_offset() -> None:
    rng = np.random.default_rng(5)
    full, without, sizes = rng.normal(), rng.normal(size=6), np.array([1, 2, 3, 4, 5, 6])
    error = error_of(np.float64(full), without, sizes)
    assert error_of(np.float64(7 - 3 * full), 7 - 3 * without, sizes) == pytest.approx(3 * error, rel=1e-12)
    assert error_of(np.float64(full), without, 10 * sizes) == pytest.approx(error, rel=1e-12)
    assert error_of(np.float64(full), np.full(6, full), sizes) == pytest.approx(0, abs=1e-15)


def test_a_lost_replicate_makes_only_its_column_unknown() -> None:
    full, without = np.ones(3), np.array([[1.0, np.nan, 2.0], [1.5, 1.0, 2.0], [2.0, 1.0, 1.0]])
    found = error_of(full, without, np.array([4, 5, 6]))
    assert np.isnan(found).tolist() == [False, True, False]


@pytest.mark.parametrize("groups", [0, 1])
def test_fewer_than_two_groups_have_no_error(groups: int) -> None:
    found = error_of(np.ones(3), np.ones((groups, 3)), np.full(groups, 5))
    assert found.shape == (3,)
    assert np.isnan(found).all()


def weighted(values: np.ndarray, weights: np.ndarray, group: np.ndarray) -> Estimate:
    """The weighted mean of values [n, ...] over groups."""
    groups = np.unique(group)
    shape = (-1, *(1,) * (values.ndim - 1))
    scaled = weights.reshape(shape) * values
    without = [scaled[group != g].sum(axis=0) / weights[group != g].sum() for g in groups]
    sizes = np.array([weights[group == g].sum() for g in groups])
    return Estimate.of(scaled.sum(axis=0) / weights.sum(), np.array(without), sizes)


def test_an_estimate_has_the_error_and_pseudo_values_of_its_replicates() -> None:
    rng = np.random.default_rng(6)
    full, without, sizes = rng.normal(size=3), rng.normal(size=(7, 3)), np.array([1, 5, 2, 8, 3, 3, 4])
    found = Estimate.of(full, without, sizes)
    np.testing.assert_allclose(found.error, error_of(full, without, sizes), rtol=1e-12)
    np.testing.assert_allclose(found.pseudo_values, pseudo_values(full, without, sizes), rtol=1e-12)
    np.testing.assert_allclose(found.half, 2.4469119 * found.error, rtol=1e-7)  # t, 6 degrees of freedom, 95 %
    both = (found - Estimate.of(2 * full, without, sizes)).scaled(0.5)
    np.testing.assert_allclose(both.value, -full / 2, rtol=1e-12)
    assert float(found.mean(1, 2).value) == pytest.approx(full[1:].mean())
    np.testing.assert_allclose(found.mean(1, 2).influence, found.influence[:, 1:].mean(axis=1), rtol=1e-12)


def test_a_group_by_itself_says_its_own_difference() -> None:
    """Of a difference of two means over different counts, each group's part is formed with the count it has in each."""
    rng = np.random.default_rng(7)
    group = np.repeat(np.arange(5), [3, 5, 2, 6, 4])
    rows, positions = rng.integers(1, 30, 20).astype(float), np.full(20, 4.0)
    values = rng.normal(size=(2, 20))
    one, other = weighted(values[0], rows, group), weighted(values[1], positions, group)
    for found, of, weights in ((one, values[0], rows), (other, values[1], positions)):
        mean = np.average(of, weights=weights)
        parts = [np.sum((weights * (of - mean))[group == g]) / weights.sum() for g in range(5)]
        np.testing.assert_allclose(found.influence, parts, atol=1e-14)
    np.testing.assert_allclose((one - other).influence, one.influence - other.influence, rtol=1e-12)
    assert (one - other).share.sum() == pytest.approx(1)


def test_differences_of_means_over_different_counts_are_covered() -> None:
    """Rows vary with the length of prompts and positions do not, as contraction and transport count them."""
    trials, rng = 3000, np.random.default_rng(8)
    group = np.repeat(np.arange(16), [4, 2, 5, 3, 7, 4, 4, 2, 3, 6, 5, 4, 2, 4, 6, 3])
    rows, positions = rng.gamma(2, 20, len(group)) + 2, np.full(len(group), 4.0)
    first = rng.normal(size=(len(group), trials))
    second = 0.5 * first + rng.normal(size=(len(group), trials))
    found = weighted(first, rows, group) - weighted(second, positions, group)
    # Four standard errors of 3000 trials are 1.6 %; unequal variances of the groups cost degrees of freedom.
    assert np.mean(np.abs(found.value) > found.half) == pytest.approx(0.05, abs=0.025)
    exact = np.average(rows**2 / np.mean(rows) ** 2) / len(rows) + 1.25 / len(rows) - 2 * 0.5 / len(rows)
    assert np.mean(found.error**2) == pytest.approx(exact, rel=0.1)


def test_p_values_of_an_estimate_are_about_the_number_itself() -> None:
    rng = np.random.default_rng(9)
    full, without, sizes = np.array([0.4, 0.0]), rng.normal(0.1, 0.1, (8, 2)), np.arange(1.0, 9)
    found = Estimate.of(full, without, sizes)
    share = sizes[:, None] / sizes.sum()
    about = pseudo_values(full, without, sizes)
    about = about - np.sum(share * about, axis=0) + full  # moved to average to the number
    np.testing.assert_array_equal(np.round(found.p_value, 12), np.round(sign_flip_p(share * about), 12))
    np.testing.assert_array_equal((found - found).p_value, 1.0)


def test_one_group_leaves_an_estimate_without_error() -> None:
    found = Estimate.of(np.ones(2), np.full((1, 2), np.nan), np.array([3.0]))
    assert np.isnan(found.error).all()
    assert np.isnan(found.half).all()
    assert np.isnan(found.p_value).all()
    assert np.isnan(t_quantile(0))
