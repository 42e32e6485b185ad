"""Where: how a non-negative amount per block lies over depth. Measured, never assumed to be in the terminal block."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from spinal_jax.metrics.depth import terminal_block
from spinal_jax.stats.jackknife import Estimate

MASS = 0.8  # that the shortest run of blocks holds


def share(mass: np.ndarray) -> np.ndarray:
    """[...] the terminal block's part of the mass [..., D] of all blocks, in [0, 1]; NaN where there is none."""
    first, last = terminal_block(mass.shape[-1])
    return _ratio(mass[..., first - 1 : last].sum(axis=-1), mass.sum(axis=-1))


def centroid(mass: np.ndarray) -> np.ndarray:
    """[...] mean relative depth l / D of the mass [..., D], in (0, 1]: (D + 1) / 2D when spread evenly."""
    depth = mass.shape[-1]
    return _ratio(mass @ np.arange(1.0, depth + 1), depth * mass.sum(axis=-1))


def shortest_run(mass: np.ndarray) -> tuple[int, int] | None:
    """(first, last) block, counted from 1, of the shortest run that holds MASS of the mass [D]; of equally short ones
    that with most. None where there is no mass."""
    total = mass.sum()
    if not total > 0:
        return None
    sums = np.concatenate([[0.0], np.cumsum(mass)])
    for length in range(1, len(mass) + 1):
        held = sums[length:] - sums[:-length]
        if held.max() >= MASS * total * (1 - 1e-12):
            first = int(held.argmax()) + 1
            return first, first + length - 1
    raise AssertionError("all blocks together hold all of the mass")


def localise(full: np.ndarray, without: np.ndarray, sizes: np.ndarray) -> dict[str, Any]:
    """Where the mass lies, with delete-one-group jackknife 95 % intervals.

    Args:
        full: [D] amounts of blocks 1..D, at least 0.
        without: [G, D] the same without each group.
        sizes: [G] of the groups.

    Returns:
        share of the terminal block and share_even, which it would have if all blocks had the same; centroid and
        centroid_even; each with `_low` and `_high`, within [0, 1]. run: first and last block of the shortest run that
        holds MASS. A run jumps from block to block, for which the jackknife has no valid error, so instead
        run_least..run_most is the range over the G runs found without each group, run_agreement how many of them are
        the same run. Without any mass the run is empty and the rest NaN.
    """
    depth = len(full)
    found: dict[str, Any] = {}
    for name, of in (("share", share), ("centroid", centroid)):
        estimate = Estimate.of(of(full), of(without), sizes)
        value, half = float(estimate.value), float(estimate.half)
        found |= {name: value, f"{name}_low": max(0.0, value - half), f"{name}_high": min(1.0, value + half)}
        if math.isnan(half):
            found |= {f"{name}_low": math.nan, f"{name}_high": math.nan}
    first, last = terminal_block(depth)
    run, others = shortest_run(full), [r for r in map(shortest_run, without) if r is not None]
    return found | {
        "share_even": (last - first + 1) / depth,
        "centroid_even": (depth + 1) / (2 * depth),
        "run": list(run or ()),
        "run_least": min((r[0] for r in others), default=math.nan),
        "run_most": max((r[1] for r in others), default=math.nan),
        "run_agreement": f"{sum(r == run for r in others)} of {len(without)}",
    }


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    part, whole = np.asarray(part), np.asarray(whole)
    return np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)
