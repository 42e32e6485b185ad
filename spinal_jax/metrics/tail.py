"""The tail of a singular spectrum: the line through part of it on log-log axes, and its effective rank. NumPy alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

EPS32 = float(np.finfo(np.float32).eps)
MIN_RANKS = 8  # fewer in the window give no number


@dataclass(frozen=True)
class TailFit:
    """A line through part of a log-log spectrum. NaN where fewer than MIN_RANKS ranks lie in the window."""

    alpha: float  # minus the slope
    r2: float
    quadratic: float  # coefficient of (log k)^2 when a parabola is fitted instead; 0 for a straight line
    rank: int  # singular values above the numerical noise
    low: int  # first rank fitted, counted from 1
    high: int  # last rank fitted
    intercept: float  # of log s on log k


def tail_fit(s: np.ndarray, rows: int, window: tuple[float, float]) -> TailFit:
    """Fits the window `(lo, hi)` of the spectrum `s` [d], descending, of `rows` hidden states.

    Ranks k from `max(1, ceil(lo r))` to `floor(hi r)`, r the numerical rank: ordinary least squares of log s_k on log
    k.
    """
    rank = int(np.sum(s > max(rows, len(s)) * EPS32 * s[0])) if s[0] > 0 else 0
    low, high = max(1, math.ceil(window[0] * rank)), math.floor(window[1] * rank)
    if high - low + 1 < MIN_RANKS:
        return TailFit(math.nan, math.nan, math.nan, rank, low, high, math.nan)
    x, y = np.log(np.arange(low, high + 1)), np.log(s[low - 1 : high])
    mean_x, mean_y = x.mean(), y.mean()
    dx, dy = x - mean_x, y - mean_y
    slope = float(dx @ dy / (dx @ dx))
    residual, spread = dy - slope * dx, float(dy @ dy)
    bend = dx * dx
    bend = bend - bend.mean() - (bend @ dx) / (dx @ dx) * dx  # what a parabola has that no line has
    r2 = 1 - float(residual @ residual) / spread if spread > 0 else math.nan
    return TailFit(-slope, r2, float(bend @ residual / (bend @ bend)), rank, low, high, float(mean_y - slope * mean_x))


def tail_slopes(s: np.ndarray, rows: np.ndarray, windows: Sequence[tuple[float, float]]) -> np.ndarray:
    """[W, ...] the `alpha` of `tail_fit` for many spectra and windows at once, each logarithm taken once.

    Args:
        s: [..., d] spectra, descending.
        rows: [...] hidden states behind each.
        windows: W of them.
    """
    width = s.shape[-1]
    spectra, count = s.reshape(-1, width), np.broadcast_to(rows, s.shape[:-1]).reshape(-1, 1)
    above = spectra > np.maximum(count, width) * EPS32 * spectra[:, :1]
    ranks, logs = above.sum(axis=1), np.log(spectra, out=np.zeros(spectra.shape), where=above)
    found = np.full((len(windows), len(spectra)), np.nan)
    for rank in np.unique(ranks):  # all but a few are full
        here = slice(None) if np.all(ranks == rank) else ranks == rank
        for number, (lo, hi) in enumerate(windows):
            low, high = max(1, math.ceil(lo * rank)), math.floor(hi * rank)
            if high - low + 1 >= MIN_RANKS:
                x = np.log(np.arange(low, high + 1))
                dx = x - x.mean()
                found[number, here] = -(logs[here, low - 1 : high] @ (dx / (dx @ dx)))
    return found.reshape(len(windows), *s.shape[:-1])


def effective_rank(s: np.ndarray) -> float:
    """exp of the entropy of s / sum(s): how many directions share the spectrum (Roy and Vetterli 2007; RankMe)."""
    p = s[s > 0] / np.sum(s)
    return float(np.exp(-np.sum(p * np.log(p)))) if len(p) else math.nan
