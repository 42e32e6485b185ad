"""Summary numbers of a depth curve: terminal block, coherence, directness."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float

from spinal_jax.errors import UserError

Terminal = str | tuple[int, int]  # "third", "last:K", or (first, last) block


def terminal_block(depth: int, asked: Terminal = "third") -> tuple[int, int]:
    """(first, last) block of the terminal block, counted from 1.

    Args:
        depth: D.
        asked: "third" for the last ceil(D / 3) blocks, 21..30 of 30; "last:K" for the last K; or (first, last).

    Raises:
        UserError: `asked` is malformed or outside 1..D.
    """
    wrong = UserError(
        f"metrics.terminal is {list(asked) if isinstance(asked, tuple) else asked!r}; it takes third, last:K or "
        f"[first, last] with blocks of 1 to {depth}"
    )
    if isinstance(asked, str):
        kind, _, count = asked.partition(":")
        if asked == "third":
            return depth - math.ceil(depth / 3) + 1, depth
        if kind != "last" or not (count.isascii() and count.isdigit() and 1 <= int(count) <= depth):
            raise wrong
        return depth - int(count) + 1, depth
    first, last = asked
    if not 1 <= first <= last <= depth:
        raise wrong
    return first, last


def curve_coherence(series: Float[np.ndarray, " n"]) -> float:
    """`1 - sum|second differences| / (2 sum|first differences|)`, clipped to [0, 1].

    1 for a straight ramp or a constant, 0 for a zigzag, NaN if a value of `series` [n] is NaN.
    `stats.summary.coherence_estimate` also tests whether the series changes by more than its noise.
    """
    first = np.diff(series)
    length = float(np.sum(np.abs(first)))
    if math.isnan(length):
        return math.nan
    if length == 0:
        return 1.0
    return min(1.0, max(0.0, 1.0 - float(np.sum(np.abs(np.diff(first)))) / (2 * length)))


def summary(
    contraction: Float[np.ndarray, " boundaries"],
    transport: Float[np.ndarray, " boundaries"],
    direct: float,
    terminal: tuple[int, int],
) -> dict[str, float]:
    """Summary numbers of one depth curve.

    Args:
        contraction: [D + 1] alpha.
        transport: [D + 1] mean step that ends at each boundary, radians, NaN at 0.
        direct: mean distance from the boundary before the terminal block to boundary D, radians.
        terminal: (first, last) block of the terminal block.

    Returns:
        contraction and transport (means over the terminal block), coherence (S_coh, mean of the coherence of both over
        the terminal block), directness (`direct` over the sum of the steps to boundary D, in [0, 1]; 1 if that sum is
        0) and path_length (sum of all steps, radians).
    """
    first, last = terminal
    alpha, steps = contraction[first : last + 1], transport[first : last + 1]
    length = float(np.sum(transport[first:]))
    return {
        "contraction": float(np.mean(alpha)),
        "transport": float(np.mean(steps)),
        "coherence": (curve_coherence(alpha) + curve_coherence(steps)) / 2,
        "directness": min(1.0, direct / length) if length > 0 else 1.0,
        "path_length": float(np.sum(transport[1:])),
    }
