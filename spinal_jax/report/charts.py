"""Data of interactive charts, drawn by assets/charts.js with uPlot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spinal_jax.jsontypes import Json


@dataclass(frozen=True)
class Line:
    """One curve of a chart.

    Attributes:
      label: in the legend, plain text.
      values: [X], NaN where undefined.
      low, high: [X] interval, or None.
      colour: name of a colour of the page ("blue", "ink", ...).
      look: 0 solid, 1 dashed, 2 dotted, 3 markers alone.
    """

    label: str
    values: np.ndarray
    colour: str
    look: int = 0
    low: np.ndarray | None = None
    high: np.ndarray | None = None


def panel(
    label: str,
    x: Sequence[float] | np.ndarray,
    lines: Sequence[Line],
    shaded: tuple[float, float] | None = None,
    zero: bool = False,
) -> Json:
    """One panel: lines over a common x.

    Args:
      label: of the vertical axis.
      x: [X], ascending.
      shaded: the ends of a part of the axis that is shaded, such as the terminal block.
      zero: whether a line marks 0.
    """
    return {
        "label": label,
        "x": _numbers(x),
        "shaded": list(shaded) if shaded else None,
        "zero": zero,
        "lines": [
            {
                "label": line.label,
                "colour": line.colour,
                "look": line.look,
                "values": _numbers(line.values),
                "low": None if line.low is None else _numbers(line.low),
                "high": None if line.high is None else _numbers(line.high),
            }
            for line in lines
        ],
    }


def stacked(x_label: str, panels: Sequence[Json], height: int = 210, joined: bool = False) -> Json:
    """Stacked panels with a common cursor and zoom; `joined` lines skip points without a value."""
    return {"kind": "lines", "x_label": x_label, "height": height, "joined": joined, "panels": list(panels)}


def rotated(axes: tuple[str, str, str], lines: Sequence[tuple[str, str, np.ndarray]], first: int) -> Json:
    """Rotatable curves in three dimensions.

    Args:
      axes: names of the three axes; the first is depth.
      lines: (label, colour, points [N, 3]) of each curve; rows with NaN are left out.
      first: depth at which the terminal block begins; its points are outlined.
    """
    drawn = [
        {"label": label, "colour": colour, "points": [_numbers(row) for row in points[np.isfinite(points).all(axis=1)]]}
        for label, colour, points in lines
    ]
    return {"kind": "rotated", "axes": list(axes), "first": first, "lines": drawn}


def _numbers(values: Sequence[float] | np.ndarray) -> list[float | None]:
    """Numbers with six significant digits; None for NaN."""
    found = np.asarray(values, float).tolist()
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in found]
