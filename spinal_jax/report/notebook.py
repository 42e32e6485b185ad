"""Figures of traces and comparisons by name, for notebooks."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TypeVar

from matplotlib.figure import Figure

from spinal_jax.audit.trace import DepthTrace
from spinal_jax.comparison.record import Comparison
from spinal_jax.errors import UserError
from spinal_jax.report.comparison_figures import comparison_figures
from spinal_jax.report.figures import FIGURES, png_bytes

T = TypeVar("T")


def plot(record: DepthTrace | Comparison, kind: str | None = None) -> Figure:
    """A figure of a record, which a notebook shows.

    Args:
        record: a trace or a comparison.
        kind: the figure's name; None: depth of a trace, deltas of a comparison.

    Raises:
        UserError: there is no such figure, or the record lacks what it shows.
    """
    if isinstance(record, DepthTrace):
        figure = _named(FIGURES, kind or "depth")(record)
    else:
        figure = _named(comparison_figures(record), kind or "deltas")
    # IPython shows an object that has this method; it would show a figure that pyplot did not make as text.
    vars(figure)["_repr_png_"] = partial(png_bytes, figure, 90)
    return figure


def _named(figures: Mapping[str, T], kind: str) -> T:
    if kind not in figures:
        raise UserError(f"there is no figure {kind!r}; there are {', '.join(figures)}")
    return figures[kind]
