"""Where: how a non-negative amount per block lies over depth. Measured, never assumed to be in the terminal block.

Sampling error is part of the absolute value of a noisy difference, and spreads evenly over depth. So the magnitude of a
difference `delta` with standard error `se` is estimated as `sqrt(max(0, delta^2 - se^2))`. Where there is no difference
that is still 0.34 `se` on average, because negative values are cut off. Intervals allow for it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jaxtyping import Float, Num

from spinal_jax.stats.jackknife import Estimate, Numbers

MASS = 0.8  # that the shortest run of blocks holds
CLEAR = 2.0  # standard errors that the total must exceed for its place to be told, and a block to be no noise alone
RESIDUE = 0.3426  # mean of sqrt(max(0, z^2 - 1)) for a standard normal z
TOO_LITTLE = "too little changed to say where"


def magnitude(delta: Float[np.ndarray, "*#n"], error: Float[np.ndarray, "*#n"]) -> Float[np.ndarray, "*#n"]:
    """[...] `sqrt(max(0, delta^2 - error^2))`: the size of a difference, less what sampling error adds to it."""
    return np.sqrt(np.maximum(0.0, delta**2 - error**2))


def share(mass: Num[np.ndarray, "*n D"], terminal: tuple[int, int]) -> Float[np.ndarray, "*n"]:
    """[...] part of the mass [..., D] that lies in the blocks first..last, counted from 1; NaN where there is none."""
    first, last = terminal
    return _ratio(mass[..., first - 1 : last].sum(axis=-1), mass.sum(axis=-1))


def centroid(mass: Num[np.ndarray, "*n D"]) -> Float[np.ndarray, "*n"]:
    """[...] mean relative depth l / D of the mass [..., D], in (0, 1]: (D + 1) / 2D when spread evenly."""
    depth = mass.shape[-1]
    return _ratio(mass @ np.arange(1.0, depth + 1), depth * mass.sum(axis=-1))


def shortest_run(mass: Num[np.ndarray, " D"]) -> tuple[int, int] | None:
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


def localise_difference(
    full: Float[np.ndarray, " D"],
    without: Float[np.ndarray, "G D"],
    sizes: Num[np.ndarray, " G"],
    terminal: tuple[int, int],
) -> dict[str, Any]:
    """Where a signed difference lies, as `localise`, from its magnitudes less their sampling error.

    The interval of share and centroid is widened by what blocks that are not told from 0 may hold by noise alone.

    Args:
        full: [D] differences at blocks 1..D.
        without: [G, D] the same without each group.
        sizes: [G] of the groups.
        terminal: first and last block of the terminal block, counted from 1.
    """
    error = Estimate.of(full, without, sizes).error
    if np.isnan(error).any() and np.isfinite(full).all():
        return _untold(len(full), terminal, "its sampling error is not known")
    residue = np.where(np.abs(full) < CLEAR * error, RESIDUE * error, 0.0)
    return localise(magnitude(full, error), magnitude(without, error), sizes, terminal, residue)


def localise(
    full: Float[np.ndarray, " D"],
    without: Float[np.ndarray, "G D"],
    sizes: Num[np.ndarray, " G"],
    terminal: tuple[int, int],
    residue: Float[np.ndarray, " D"] | None = None,
) -> dict[str, Any]:
    """Where the mass lies, with delete-one-group jackknife 95 % intervals.

    Args:
        full: [D] amounts of blocks 1..D, at least 0.
        without: [G, D] the same without each group.
        sizes: [G] of the groups.
        terminal: first and last block of the terminal block, counted from 1.
        residue: [D] how much of each amount may be noise alone; none where it is not given.

    Returns:
        share of the terminal block and share_even, which it would have if all blocks had the same; centroid and
        centroid_even; each with `_low` and `_high`, within [0, 1]. run: first and last block of the shortest run that
        holds MASS. A run jumps from block to block, for which the jackknife has no valid error, so instead
        run_least..run_most is the range over the G runs found without each group, run_agreement how many of them are
        the same run. mass: [D] the amounts, as given. reason: why there is no number, or empty.

        There is none where the total does not exceed 2 of its standard errors: run and mass are empty, the rest NaN.
    """
    depth = len(full)
    if not np.isfinite(full).all():
        lost = ", ".join(str(block) for block in np.flatnonzero(np.isnan(full)) + 1)
        whole = "it was not measured" if np.isnan(full).all() else f"it is undefined at block {lost}"
        return _untold(depth, terminal, whole)
    total = Estimate.of(full.sum(), without.sum(axis=-1), sizes)
    if not float(total.value) > 0 or float(total.value) <= CLEAR * float(total.error):
        return _untold(depth, terminal, TOO_LITTLE)
    first, last = terminal
    weights = {
        "share": np.array([float(first <= block <= last) for block in range(1, depth + 1)]),
        "centroid": np.arange(1.0, depth + 1) / depth,
    }
    found: dict[str, Any] = {}
    for name, weight in weights.items():
        estimate = Estimate.of(_mean(weight, full), _mean(weight, without), sizes)
        value, half = float(estimate.value), float(estimate.half)
        low, high = value, value
        if residue is not None:
            high = _without_noise(weight, full, np.where(weight < value, residue, 0.0), value)
            low = _without_noise(weight, full, np.where(weight > value, residue, 0.0), value)
        low, high = max(0.0, low - half), min(1.0, high + half)
        found |= {name: value, f"{name}_low": low, f"{name}_high": high}
        if math.isnan(half):
            found |= {f"{name}_low": math.nan, f"{name}_high": math.nan}
    run, others = shortest_run(full), [r for r in map(shortest_run, without) if r is not None]
    return found | {
        **_even(depth, terminal),
        "run": list(run or ()),
        "run_least": min((r[0] for r in others), default=math.nan),
        "run_most": max((r[1] for r in others), default=math.nan),
        "run_agreement": f"{sum(r == run for r in others)} of {len(without)}",
        "mass": full.tolist(),
        "reason": "",
    }


def _even(depth: int, terminal: tuple[int, int]) -> dict[str, float]:
    first, last = terminal
    return {"share_even": (last - first + 1) / depth, "centroid_even": (depth + 1) / (2 * depth)}


def _untold(depth: int, terminal: tuple[int, int], reason: str) -> dict[str, Any]:
    nothing = ("share", "share_low", "share_high", "centroid", "centroid_low", "centroid_high", "run_least", "run_most")
    return {
        **dict.fromkeys(nothing, math.nan),
        **_even(depth, terminal),
        "run": [],
        "run_agreement": "",
        "mass": [],
        "reason": reason,
    }


def _mean(weight: Float[np.ndarray, " D"], mass: Num[np.ndarray, "*n D"]) -> Float[np.ndarray, "*n"]:
    """[...] mean of a weight [D] over the mass [..., D]."""
    return _ratio(mass @ weight, mass.sum(axis=-1))


def _without_noise(weight: np.ndarray, mass: np.ndarray, noise: np.ndarray, value: float) -> float:
    """The mean of `weight` over the mass less the noise, of which no block may have more than it holds in all."""
    left = mass - noise
    total = left.sum()
    if not total > 0:
        return value
    return float(np.clip(left @ weight / total, 0.0, 1.0))


def _ratio(part: Num[Numbers, "*n"], whole: Num[Numbers, "*n"]) -> Float[np.ndarray, "*n"]:
    part, whole = np.asarray(part), np.asarray(whole)
    return np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)
