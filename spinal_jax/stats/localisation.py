"""Localisation: how a non-negative quantity by block is distributed over depth.

The absolute value of a noisy difference contains sampling error, which is spread over all blocks. The magnitude of a
difference `delta` with standard error `se` is therefore estimated as `sqrt(max(0, delta^2 - se^2))`. Without any
difference its mean is still 0.34 `se`, because negative values are clipped; intervals are widened for that.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float, Num

from spinal_jax.stats.jackknife import Estimate, Numbers

MASS = 0.8  # share of the mass in the shortest run of blocks
CLEAR_SE = 2.0  # standard errors above which the total is localised, and a block is not noise
RESIDUE = 0.3426  # mean of sqrt(max(0, z^2 - 1)) for a standard normal z
TOO_LITTLE = "too little changed to say where"


def magnitude(delta: Float[np.ndarray, "*#n"], error: Float[np.ndarray, "*#n"]) -> Float[np.ndarray, "*#n"]:
    """[...] `sqrt(max(0, delta^2 - error^2))`: the magnitude of a difference, corrected for sampling error."""
    return np.sqrt(np.maximum(0.0, delta**2 - error**2))


def share(mass: Num[np.ndarray, "*n D"], terminal: tuple[int, int]) -> Float[np.ndarray, "*n"]:
    """[...] share of the mass [..., D] in blocks first..last, counted from 1; NaN without mass."""
    first, last = terminal
    return _ratio(mass[..., first - 1 : last].sum(axis=-1), mass.sum(axis=-1))


def centroid(mass: Num[np.ndarray, "*n D"]) -> Float[np.ndarray, "*n"]:
    """[...] mean relative depth l / D of the mass [..., D], in (0, 1]; (D + 1) / 2D for a uniform mass."""
    depth = mass.shape[-1]
    return _ratio(mass @ np.arange(1.0, depth + 1), depth * mass.sum(axis=-1))


def shortest_run(mass: Num[np.ndarray, " D"]) -> tuple[int, int] | None:
    """(first, last) block, counted from 1, of the shortest run with a share MASS of the mass [D]; of several, the one
    with the largest mass. None without mass."""
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
) -> dict[str, object]:
    """`localise` of a signed difference, from its magnitudes corrected for sampling error.

    The intervals of share and centroid are widened by the noise that blocks close to 0 may contain.

    Args:
        full: [D] differences at blocks 1..D.
        without: [G, D] the differences without each group.
        sizes: [G] sizes of the groups.
        terminal: first and last block of the terminal block, counted from 1.
    """
    error = Estimate.of(full, without, sizes).error
    if np.isnan(error).any() and np.isfinite(full).all():
        return _undefined(len(full), terminal, "its sampling error is not known")
    residue = np.where(np.abs(full) < CLEAR_SE * error, RESIDUE * error, 0.0)
    return localise(magnitude(full, error), magnitude(without, error), sizes, terminal, residue)


def localise(
    full: Float[np.ndarray, " D"],
    without: Float[np.ndarray, "G D"],
    sizes: Num[np.ndarray, " G"],
    terminal: tuple[int, int],
    residue: Float[np.ndarray, " D"] | None = None,
) -> dict[str, object]:
    """Share, centroid and shortest run of the mass, with 95 % delete-one-group jackknife intervals.

    Args:
        full: [D] amounts at blocks 1..D, at least 0.
        without: [G, D] the amounts without each group.
        sizes: [G] sizes of the groups.
        terminal: first and last block of the terminal block, counted from 1.
        residue: [D] part of each amount that may be noise; None is 0.

    Returns:
        share: of the terminal block, and share_even for a uniform mass; centroid and centroid_even; share and centroid
        with `_low` and `_high` in [0, 1]. run: first and last block of the shortest run with a share MASS. A run is
        not smooth, so the jackknife gives no valid error; instead, run_least..run_most is the range over the runs
        without each group, and run_agreement counts the runs that are equal. mass: [D] `full`. reason: why the
        numbers are undefined, or empty.

        If the total is below 2 of its standard errors, run and mass are empty and the numbers NaN.
    """
    depth = len(full)
    if not np.isfinite(full).all():
        lost = ", ".join(str(block) for block in np.flatnonzero(np.isnan(full)) + 1)
        whole = "it was not measured" if np.isnan(full).all() else f"it is undefined at block {lost}"
        return _undefined(depth, terminal, whole)
    total = Estimate.of(full.sum(), without.sum(axis=-1), sizes)
    if not float(total.value) > 0 or float(total.value) <= CLEAR_SE * float(total.error):
        return _undefined(depth, terminal, TOO_LITTLE)
    first, last = terminal
    weights = {
        "share": np.array([float(first <= block <= last) for block in range(1, depth + 1)]),
        "centroid": np.arange(1.0, depth + 1) / depth,
    }
    result: dict[str, object] = {}
    for name, weight in weights.items():
        estimate = Estimate.of(_mean(weight, full), _mean(weight, without), sizes)
        value, half = float(estimate.value), float(estimate.half)
        low, high = value, value
        if residue is not None:
            high = _without_noise(weight, full, np.where(weight < value, residue, 0.0), value)
            low = _without_noise(weight, full, np.where(weight > value, residue, 0.0), value)
        low, high = max(0.0, low - half), min(1.0, high + half)
        result |= {name: value, f"{name}_low": low, f"{name}_high": high}
        if math.isnan(half):
            result |= {f"{name}_low": math.nan, f"{name}_high": math.nan}
    run, others = shortest_run(full), [r for r in map(shortest_run, without) if r is not None]
    return result | {
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


def _undefined(depth: int, terminal: tuple[int, int], reason: str) -> dict[str, object]:
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
    """The mean of `weight` over the mass minus the noise, or `value` if nothing is left."""
    left = mass - noise
    total = left.sum()
    if not total > 0:
        return value
    return float(np.clip(left @ weight / total, 0.0, 1.0))


def _ratio(part: Num[Numbers, "*n"], whole: Num[Numbers, "*n"]) -> Float[np.ndarray, "*n"]:
    part, whole = np.asarray(part), np.asarray(whole)
    return np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)
