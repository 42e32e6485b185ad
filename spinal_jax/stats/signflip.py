"""Could it be chance: exact sign flips of what each group of prompts contributes, and Holm's correction.

Were there no effect, each group's contribution would as likely have had the other sign. So the sum of contributions is
compared with its values under every choice of signs (Fisher 1935).
"""

from __future__ import annotations

import itertools
import math

import numpy as np
from jaxtyping import Float, Num

FEWEST_GROUPS = 6  # with fewer no p-value can be below 0.05, and none is given
EXACT_GROUPS = 28  # up to here all 2^G choices are counted; beyond, DRAWS of them are drawn
DRAWS = 2**17
ROUNDING = 1e-12  # of the sum of magnitudes: sums that differ by less are equal


def sign_flip_p(contributions: Num[np.ndarray, " G *n"]) -> Float[np.ndarray, "*n"]:
    """[...] the share of all choices of signs under which the sum over groups is at least as far from 0 as it is.

    Args:
        contributions: [G, ...], one for each group, whose sum is the number in question.

    The smallest possible value is `2 / 2^G`. All `2^G` choices are counted without being listed: a sum is one from each
    half of the groups, and one half's are sorted. With more than EXACT_GROUPS groups it is `(1 + count) / (1 + DRAWS)`
    over random choices from a fixed seed. NaN where a contribution is, and without groups.
    """
    groups, shape = len(contributions), contributions.shape[1:]
    columns = contributions.reshape(groups, math.prod(shape)).T  # [M, G]
    found = np.full(len(columns), np.nan)
    if groups:
        limits = np.abs(columns.sum(axis=1)) - ROUNDING * np.abs(columns).sum(axis=1)
        defined = np.isfinite(limits)
        found[defined & (limits <= 0)] = 1.0
        wanted = np.flatnonzero(defined & (limits > 0))
        if groups <= EXACT_GROUPS:
            found[wanted] = [_exact(columns[m], limits[m]) for m in wanted]
        else:
            found[wanted] = _drawn(columns[wanted], limits[wanted])
    return found.reshape(shape)


def sign_flip_method(groups: int) -> str:
    """How `sign_flip_p` counts for this many groups, in words."""
    return "exact" if groups <= EXACT_GROUPS else f"{DRAWS} random sign flips, seed 0"


def _exact(values: np.ndarray, limit: float) -> float:
    half = len(values) // 2
    one, other = _sums(values[:half]), np.sort(_sums(values[half:]))
    # Pairs of sums from the halves that reach the limit; as many reach its negative, by flipping all signs.
    above = len(one) * len(other) - np.searchsorted(other, limit - one, "left").sum()
    return min(1.0, 2 * float(above) / (len(one) * len(other)))


def _sums(values: Num[np.ndarray, " n"]) -> Float[np.ndarray, " 2**n"]:
    """[2^n] sums of the n values under all choices of signs."""
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
    """[...] p-values [...] of one family after Holm's step-down correction (1979); NaN stays and does not count."""
    flat = p.ravel()
    order = np.argsort(flat)[: np.isfinite(flat).sum()]  # NaN sorts last
    adjusted = np.full(flat.shape, np.nan)
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(factors * flat[order])) if len(order) else []
    return adjusted.reshape(p.shape)
