"""Numbers for people: as text, and as a small curve."""

from __future__ import annotations

import math

import numpy as np


def decimals(value: float, digits: int = 3) -> int:
    """How many decimals show `value` to `digits` significant digits."""
    if value == 0 or not math.isfinite(value):
        return digits - 1
    return max(0, digits - 1 - math.floor(math.log10(abs(value))))


def number(value: float, digits: int = 3) -> str:
    """`value` to `digits` significant digits, in plain notation unless it is tiny; an en dash for NaN."""
    if not math.isfinite(value):
        return "–"
    if 0 < abs(value) < 1e-4:
        return f"{value:.{digits - 1}e}".replace("-", "−")
    return f"{value:,.{decimals(value, digits)}f}".replace("-", "−")


def plus_minus(value: float, half: float) -> str:
    """`value ± half` with equal decimals: three significant digits of the value, at least one of the half."""
    if not math.isfinite(value) or not math.isfinite(half):
        return number(value)
    places = min(max(decimals(value), decimals(half, 1) if half else 0), 6)
    return f"{value:,.{places}f} ± {half:.{places}f}".replace("-", "−")


def sparkline(values: np.ndarray, first: int, width: int = 180, height: int = 30) -> str:
    """A column over depth as a small inline SVG in the text's colour, the terminal block shaded."""
    seen = values[np.isfinite(values)]
    if not len(seen):
        return ""
    step = width / len(values)
    low, span = seen.min(), np.ptp(seen) or 1.0
    points = [
        f"{(at + 0.5) * step:.1f},{height - 3 - (v - low) / span * (height - 6):.1f}"
        for at, v in enumerate(values)
        if np.isfinite(v)
    ]
    return (
        f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" aria-label="over depth">'
        f'<rect x="{first * step:.1f}" width="{width - first * step:.1f}" height="{height}" fill="currentColor" '
        f'opacity="0.1"/><polyline points="{" ".join(points)}" fill="none" stroke="currentColor"/></svg>'
    )
