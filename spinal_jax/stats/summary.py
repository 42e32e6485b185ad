"""Coherence of a depth curve with its standard error; undefined for a curve that is flat within noise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from spinal_jax.metrics import depth
from spinal_jax.stats.jackknife import Estimate, Numbers, Replicates

FLAT_SE = 3.0  # standard errors by which the path must exceed its expectation under noise
NOISE_STEP = math.sqrt(2 / math.pi)  # E|z| of a standard normal z
MIN_BOUNDARIES = 4  # size of the terminal block below which coherence is undefined


class Coherence(NamedTuple):
    """S_coh with its error. If the value is NaN, `reason` says why."""

    estimate: Estimate
    reason: str


def coherence_estimate(columns: Mapping[str, Replicates], terminal: tuple[int, int]) -> Coherence:
    """S_coh: the mean over columns of `1 - sum|second differences| / (2 sum|first differences|)` over the terminal
    block.

    A curve is flat within noise if its path `sum|first differences|` does not exceed the expectation under noise,
    `sqrt(2 / pi) sum SE(first differences)`, by more than FLAT_SE standard errors of the path. Its coherence is then
    undefined. (Without the expectation term, a fifth of flat curves of 10 boundaries would pass.)

    Args:
        columns: by name, contraction and transport.
        terminal: (first, last) block, counted from 1.
    """
    first, last = terminal
    span = slice(first, last + 1)
    parts, reasons = [], []
    for name, column in columns.items():

        def path(x: Float[np.ndarray, "*n boundaries"]) -> Float[Numbers, "*n"]:
            return np.abs(np.diff(x[..., span], axis=-1)).sum(axis=-1)

        def smooth(x: Float[np.ndarray, "*n boundaries"]) -> Float[Numbers, "*n"]:
            return np.apply_along_axis(depth.curve_coherence, -1, x[..., span])

        parts.append(Estimate.of(smooth(column.full), smooth(column.without), column.sizes))
        steps = Estimate.of(np.diff(column.full[span]), np.diff(column.without[:, span], axis=-1), column.sizes)
        moved = Estimate.of(path(column.full), path(column.without), column.sizes)
        if last - first + 1 < MIN_BOUNDARIES:
            reasons.append(f"the terminal block has {last - first + 1} boundaries and coherence needs {MIN_BOUNDARIES}")
        elif math.isnan(float(moved.value)):
            reasons.append(f"{name} is undefined in the terminal block")
        elif float(moved.value) <= NOISE_STEP * float(steps.error.sum()) + FLAT_SE * float(moved.error):
            reasons.append(f"{name} is flat within noise in the terminal block")
    mean = parts[0]
    for other in parts[1:]:
        mean = mean + other
    mean = mean.scaled(1 / len(parts))
    if reasons:
        mean = Estimate(np.array(math.nan), np.full_like(mean.influence, np.nan), mean.share)
    return Coherence(mean, "; ".join(dict.fromkeys(reasons)))
