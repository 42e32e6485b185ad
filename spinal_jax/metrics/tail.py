"""The tail of a singular spectrum: power-law fit and effective rank. Needs NumPy only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

EPS32 = float(np.finfo(np.float32).eps)  # hidden states are float32, so smaller fractions of s_1 are rounding errors
MIN_RANKS = 8  # ranks in the window that a fit needs


@dataclass(frozen=True)
class TailFit:
    """A line fitted to part of a log-log spectrum. NaN if the window is too short or not resolved."""

    alpha: float  # minus the slope
    r2: float
    quadratic: float  # coefficient of (log k)^2 when a parabola is fitted instead; 0 for a straight line
    resolved: int  # singular values above the resolution of the arithmetic
    low: int  # first rank fitted, counted from 1
    high: int  # last rank fitted
    intercept: float  # of log s on log k


def fitted_ranks(rows: int, width: int, window: tuple[float, float]) -> tuple[int, int]:
    """(first, last) fitted rank, counted from 1: `max(1, ceil(lo K))` to `floor(hi K)`, `K = min(N, d)`.

    The ranks depend on N, d and the window only. They are equal at every boundary, in every jackknife replicate and in
    both models of a pair.

    Args:
        rows: N, over all prompts.
        width: d.
        window: (lo, hi).
    """
    most = min(rows, width)
    return max(1, math.ceil(window[0] * most)), math.floor(window[1] * most)


def resolved_ranks(s: Float[np.ndarray, "*n d"], resolution: float = EPS32) -> Int[np.ndarray | np.int64, "*n"]:
    """int [...] number of singular values [..., d] above `resolution * s_1`."""
    return np.sum(s > resolution * s[..., :1], axis=-1)


def tail_fit(s: Float[np.ndarray, " d"], rows: int, window: tuple[float, float], resolution: float = EPS32) -> TailFit:
    """Fits the window `(lo, hi)` of a spectrum: ordinary least squares of `log s_k` on `log k` over `fitted_ranks`.

    Args:
        s: [d] singular values, descending.
        rows: N over all prompts, also if `s` is the spectrum of some of them.
        window: (lo, hi), fractions of `min(N, d)`.
        resolution: smallest resolved fraction of s_1 (`contraction.resolution`).

    Returns:
        The fit; NaN if the window has fewer than MIN_RANKS ranks or its last rank is not resolved. The window never
        shrinks to the resolved ranks.
    """
    low, high = fitted_ranks(rows, len(s), window)
    resolved = int(resolved_ranks(s, resolution))
    if high - low + 1 < MIN_RANKS or high > resolved:
        return TailFit(math.nan, math.nan, math.nan, resolved, low, high, math.nan)
    x, y = np.log(np.arange(low, high + 1)), np.log(s[low - 1 : high])
    mean_x, mean_y = x.mean(), y.mean()
    dx, dy = x - mean_x, y - mean_y
    slope = float(dx @ dy / (dx @ dx))
    residual, spread = dy - slope * dx, float(dy @ dy)
    bend = dx * dx
    bend = bend - bend.mean() - (bend @ dx) / (dx @ dx) * dx  # the part of a parabola that is orthogonal to lines
    r2 = 1 - float(residual @ residual) / spread if spread > 0 else math.nan
    quadratic = float(bend @ residual / (bend @ bend))
    return TailFit(-slope, r2, quadratic, resolved, low, high, float(mean_y - slope * mean_x))


def tail_slopes(
    s: Float[np.ndarray, "*n d"], rows: int, windows: Sequence[tuple[float, float]], resolution: float = EPS32
) -> Float[np.ndarray, " W *n"]:
    """[W, ...] the `alpha` of `tail_fit` for many spectra and windows; each logarithm is computed once.

    Args:
        s: [..., d] spectra, descending.
        rows: N over all prompts, equal for all spectra.
        windows: W pairs (lo, hi).
        resolution: as in `tail_fit`.
    """
    width = s.shape[-1]
    spectra = s.reshape(-1, width)
    resolved = resolved_ranks(spectra, resolution)
    ranks = [fitted_ranks(rows, width, window) for window in windows]
    first, last = min(low for low, _ in ranks) - 1, max(high for _, high in ranks)
    part = spectra[:, first:last]
    logs = np.log(part, out=np.zeros(part.shape), where=part > 0)
    alphas = np.full((len(windows), len(spectra)), np.nan)
    for number, (low, high) in enumerate(ranks):
        if high - low + 1 >= MIN_RANKS:
            x = np.log(np.arange(low, high + 1))
            dx = x - x.mean()
            slopes = logs[:, low - 1 - first : high - first] @ (dx / (dx @ dx))
            alphas[number] = np.where(resolved >= high, -slopes, np.nan)
    return alphas.reshape(len(windows), *s.shape[:-1])


def spike(s: Float[np.ndarray, "*n d"]) -> Float[np.ndarray | np.float64, "*n"]:
    """[...] `log(s_1 / s_2)` of spectra [..., d]. NaN if s_2 is 0."""
    first, second = s[..., 0], s[..., 1]
    ratio = np.divide(first, second, out=np.full(first.shape, np.nan), where=second > 0)
    return np.log(ratio)


def effective_rank(s: Float[np.ndarray, " d"]) -> float:
    """exp of the entropy of s / sum(s) (Roy and Vetterli 2007; RankMe)."""
    p = s[s > 0] / np.sum(s)
    return float(np.exp(-np.sum(p * np.log(p)))) if len(p) else math.nan
