"""Two samples of runs: Welch's test of their means, a permutation test, and rank correlation."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Num
from scipy.special import stdtrit
from scipy.stats import rankdata

EXACT_SPLITS = 20_000  # largest number of splits that are all counted; above it, DRAWS random splits
DRAWS = 20_000
ROUNDING = 1e-12  # relative: statistics that differ by less are equal


@dataclass(frozen=True)
class MeanDifference:
    """Difference of two sample means with Welch's 95 % interval; NaN if a sample has fewer than two values."""

    value: float
    error: float  # standard error, from the variances within both samples
    freedom: float  # degrees of freedom by Welch and Satterthwaite

    @property
    def half(self) -> float:
        """Half-width of the 95 % interval."""
        return float(stdtrit(self.freedom, 0.975)) * self.error if self.freedom >= 1 else math.nan

    @property
    def low(self) -> float:
        return self.value - self.half

    @property
    def high(self) -> float:
        return self.value + self.half


def welch(one: Num[np.ndarray, " S"], other: Num[np.ndarray, " R"]) -> MeanDifference:
    """Mean of `one` [S] minus mean of `other` [R], with Welch's t interval."""
    if len(one) < 2 or len(other) < 2 or not (np.isfinite(one).all() and np.isfinite(other).all()):
        value = float(np.mean(one) - np.mean(other)) if len(one) and len(other) else math.nan
        return MeanDifference(value, math.nan, math.nan)
    sizes = np.array([len(one), len(other)], np.float64)
    parts = np.array([one.var(ddof=1), other.var(ddof=1)]) / sizes
    square = float(parts.sum())
    freedom = square**2 / float(np.sum(parts**2 / (sizes - 1))) if square > 0 else float(sizes.sum() - 2)
    value = float(one.mean() - other.mean())
    return MeanDifference(value, math.sqrt(square), freedom)


def permutation_p(one: Num[np.ndarray, " S"], other: Num[np.ndarray, " R"]) -> float:
    """Two-sided permutation p-value for equal distributions: the share of splits whose Welch t is at least as far from
    0 as observed.

    The studentised statistic keeps the test asymptotically valid for unequal variances (Janssen 1997). All splits are
    counted up to EXACT_SPLITS; above, the result is `(1 + count) / (1 + DRAWS)` over random splits with a fixed seed.
    NaN if a sample has fewer than two values or contains NaN.
    """
    if len(one) < 2 or len(other) < 2 or not (np.isfinite(one).all() and np.isfinite(other).all()):
        return math.nan
    values = np.concatenate([one, other])
    values = values - values.mean()
    inside, drawn = _splits(len(values), len(one))
    statistics = _t(values, inside)
    seen = _t(values, (np.arange(len(values)) < len(one))[None])[0]
    count = int(np.sum(statistics >= seen * (1 - ROUNDING)))
    return (drawn + count) / (drawn + len(inside))


@functools.lru_cache(maxsize=4)
def _splits(total: int, size: int) -> tuple[Bool[np.ndarray, "n {total}"], int]:
    """bool [n, total] members of the first sample in each split; and 1 if the splits are random, 0 if they are all."""
    drawn = int(math.comb(total, size) > EXACT_SPLITS)
    if drawn:
        chosen = np.argsort(np.random.default_rng(0).random((DRAWS, total)), axis=1)[:, :size]
    else:
        chosen = np.array(list(itertools.combinations(range(total), size)))
    inside = np.zeros((len(chosen), total), bool)
    np.put_along_axis(inside, chosen, True, axis=1)
    return inside, drawn


def _t(values: Num[np.ndarray, " N"], inside: Bool[np.ndarray, "n N"]) -> Float[np.ndarray, " n"]:
    """[n] |Welch t| of the values [N] inside [n, N] against those outside; infinite without variance."""
    means, errors = [], []
    sums = inside @ np.stack([values, values**2], axis=1)  # [n, 2]
    whole, count = np.array([values.sum(), np.sum(values**2)]), int(inside[0].sum())
    for (first, second), size in ((sums.T, count), ((whole - sums).T, len(values) - count)):
        mean = first / size
        square = np.maximum(second / size - mean**2, 0) * size / (size - 1)
        means.append(mean)
        errors.append(square / size)
    difference, error = np.abs(means[0] - means[1]), np.sqrt(errors[0] + errors[1])
    scale = np.abs(values).max(initial=0)
    return np.divide(difference, error, out=np.where(difference > ROUNDING * scale, np.inf, 0.0), where=error > 0)


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's correlation with its 95 % interval; NaN for a constant series or fewer than 5 values."""

    value: float
    low: float
    high: float
    count: int


def rank_correlation(x: Num[np.ndarray, " n"], y: Num[np.ndarray, " n"]) -> RankCorrelation:
    """Spearman's rank correlation of the pairs (x, y) without NaN.

    The interval is Fisher's, with the standard error `sqrt((1 + r^2 / 2) / (n - 3))` of Bonett and Wright (2000).
    """
    both = np.isfinite(x) & np.isfinite(y)
    count = int(both.sum())
    a, b = rankdata(x[both]), rankdata(y[both])
    if count < 5 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return RankCorrelation(math.nan, math.nan, math.nan, count)
    r = float(np.clip(np.corrcoef(a, b)[0, 1], -1, 1))
    if abs(r) > 1 - 1e-12:
        return RankCorrelation(float(round(r)), math.nan, math.nan, count)
    half = 1.959964 * math.sqrt((1 + r * r / 2) / (count - 3))
    return RankCorrelation(r, math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half), count)
