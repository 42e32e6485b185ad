"""Numbers of a whole depth curve: the terminal block, coherence, directness."""

from __future__ import annotations

import math

import numpy as np


def terminal_block(depth: int) -> tuple[int, int]:
    """(first, last) of the last ceil(D / 3) blocks, counted from 1: 21..30 of 30."""
    return depth - math.ceil(depth / 3) + 1, depth


def coherence(series: np.ndarray) -> float:
    """`1 - sum|second differences| / (2 sum|first differences|)`, in [0, 1].

    1 for a straight ramp or a constant, 0 for a zigzag. NaN where a value of `series` [n] is.
    """
    first = np.diff(series)
    length = float(np.sum(np.abs(first)))
    if math.isnan(length):
        return math.nan
    return 1.0 - float(np.sum(np.abs(np.diff(first)))) / (2 * length) if length > 0 else 1.0


def summary(contraction: np.ndarray, transport: np.ndarray, direct: float) -> dict[str, float]:
    """The summary numbers of one curve.

    Args:
        contraction: [D + 1] alpha.
        transport: [D + 1] mean step arriving at each boundary, radians, NaN at 0.
        direct: mean distance from the boundary before the terminal block to boundary D, radians.

    Returns:
        contraction, transport (means over the terminal block), coherence (S_coh, the mean of both curves' there),
        directness (in [0, 1]: `direct` over the steps between; 1 when there are none), path_length (all steps,
        radians).
    """
    first, last = terminal_block(len(contraction) - 1)
    alpha, steps = contraction[first : last + 1], transport[first : last + 1]
    length = float(np.sum(steps))
    return {
        "contraction": float(np.mean(alpha)),
        "transport": float(np.mean(steps)),
        "coherence": (coherence(alpha) + coherence(steps)) / 2,
        "directness": min(1.0, direct / length) if length > 0 else 1.0,
        "path_length": float(np.sum(transport[1:])),
    }
