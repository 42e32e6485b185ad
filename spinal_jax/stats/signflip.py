"""Exact sign-flip test of the contributions of groups of prompts, and Holm's correction.

Under the null hypothesis each contribution is symmetric about 0. The test compares the sum of contributions with its
values under all choices of signs (Fisher 1935).
"""

from __future__ import annotations

import itertools
import math

import numpy as np
from jaxtyping import Float, Num

MIN_GROUPS = 6  # fewer groups cannot give a p-value below 0.05
EXACT_GROUPS = 28  # largest G for which all 2^G choices are counted; above it, DRAWS random choices
DRAWS = 2**17
ROUNDING = 1e-12  # relative to the sum of magnitudes; sums that differ by less are equal


def sign_flip_p(contributions: Num[np.ndarray, " G *n"]) -> Float[np.ndarray, "*n"]:
    """[...] the share of sign choices for which the sum over groups is at least as far from 0 as observed.

    Args:
        contributions: [G, ...], one for each group; their sum is the statistic.

    The smallest possible value is `2 / 2^G`. All `2^G` choices are counted without enumeration: each sum is the sum of
    two half-sums, and one half is sorted. Above EXACT_GROUPS groups the result is `(1 + count) / (1 + DRAWS)` over
    random choices with a fixed seed. NaN if a contribution is NaN, or without groups.
    """
    groups, shape = len(contributions), contributions.shape[1:]
    columns = contributions.reshape(groups, math.prod(shape)).T  # [M, G]
    p = np.full(len(columns), np.nan)
    if groups:
        limits = np.abs(columns.sum(axis=1)) - ROUNDING * np.abs(columns).sum(axis=1)
        defined = np.isfinite(limits)
        p[defined & (limits <= 0)] = 1.0
        wanted = np.flatnonzero(defined & (limits > 0))
        if groups <= EXACT_GROUPS:
            p[wanted] = [_exact(columns[m], limits[m]) for m in wanted]
        else:
            p[wanted] = _drawn(columns[wanted], limits[wanted])
    return p.reshape(shape)


def sign_flip_method(groups: int) -> str:
    """Name of the method that `sign_flip_p` uses for this number of groups."""
    return "exact" if groups <= EXACT_GROUPS else f"{DRAWS} random sign flips, seed 0"


def _exact(values: np.ndarray, limit: float) -> float:
    half = len(values) // 2
    one, other = _sums(values[:half]), np.sort(_sums(values[half:]))
    # Pairs of half-sums at or above the limit. By symmetry as many are at or below its negative.
    above = len(one) * len(other) - np.searchsorted(other, limit - one, "left").sum()
    return min(1.0, 2 * float(above) / (len(one) * len(other)))


def _sums(values: Num[np.ndarray, " n"]) -> Float[np.ndarray, " 2**n"]:
    """[2^n] sums of the n values for all choices of signs."""
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums + value, sums - value])
    return sums


def _drawn(
    columns: Num[np.ndarray, "M G"], limits: Num[np.ndarray, " M"], chunk: int = 4096
) -> Float[np.ndarray, " M"]:
    rng, count = np.random.default_rng(0), np.zeros(len(columns))
    for _ in itertools.repeat(None, DRAWS // chunk):
        signs = rng.integers(0, 2, (chunk, columns.shape[1]), np.int8) * 2.0 - 1
        count += np.sum(np.abs(signs @ columns.T) >= limits, axis=0)
    return (1 + count) / (1 + DRAWS)


def holm(p: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
    """[...] p-values of one family after Holm's step-down correction (1979); NaN is passed through and not counted."""
    flat = p.ravel()
    order = np.argsort(flat)[: np.isfinite(flat).sum()]  # NaN sorts last
    adjusted = np.full(flat.shape, np.nan)
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(factors * flat[order])) if len(order) else []
    return adjusted.reshape(p.shape)
