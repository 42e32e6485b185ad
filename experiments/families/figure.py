"""The figure of the families, in the hand of the project's own."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from spinal_jax.comparison.record import Comparison
from spinal_jax.report.figures import BLUE, GREEN, INK, MARKERS, MUTED, PURPLE, SURFACE, VERMILLION, WIDTH, styled

DASHES = ("-", (0, (4, 2)), (0, (1, 1.2)))
ROW = 0.26  # inches
Row = Mapping[str, Any]


@styled
def draw(rows: Sequence[Row], found: Sequence[Comparison]) -> Figure:
    """Delta_align and the terminal block's share of the policy distance, a row a pair, with verdicts; below them the
    changes of contraction and transport over relative depth."""
    heights = [ROW * len(rows) + 0.5, 2.6]
    figure = Figure(figsize=(2 * WIDTH, sum(heights) + 0.9 + 0.2 * ((len(rows) + 3) // 4)), layout="constrained")
    (left, right), below = figure.subplots(2, 2, gridspec_kw={"height_ratios": heights})
    _aligned(left, rows)
    _share(right, rows)
    for axes, name, label in zip(
        below, ("contraction", "transport"), ("Δ contraction α", "Δ transport L (rad)"), strict=True
    ):
        _over_depth(axes, rows, found, name)
        axes.set(ylabel=label, xlabel="relative depth (1: after the last block)")
    handles, labels = below[0].get_legend_handles_labels()
    more = "" if all(row["dpo_alone"] for row in rows) else "* between these two lies more than DPO"
    figure.legend(handles, labels, loc="outside lower center", ncols=4, columnspacing=1.4, handlelength=2.6, title=more)
    return figure


def _aligned(axes: Axes, rows: Sequence[Row]) -> None:
    axes.axvline(0, color=INK, lw=0.9)
    for at, row in enumerate(rows):
        low, high = row["delta_align_low"], row["delta_align_high"]
        fill = BLUE if low > 0 or high < 0 else SURFACE
        axes.plot([low, high], [at, at], color=BLUE, lw=1.6)
        axes.plot([row["delta_align"]], [at], color=BLUE, marker="o", ls="", markerfacecolor=fill)
    _rows(axes, [row["pair"] + ("" if row["dpo_alone"] else " *") for row in rows])
    axes.set_title("Δ align, 95 % interval; filled: 0 is left out", fontsize=9, color=MUTED)
    axes.set_xlabel("expansion < 0 < contraction")
    axes.xaxis.set_major_locator(MaxNLocator(5))


def _share(axes: Axes, rows: Sequence[Row]) -> None:
    for at, row in enumerate(rows):
        value, low, high = (row[f"policy_distance_share{end}"] for end in ("", "_low", "_high"))
        axes.plot([row["share_even"]] * 2, [at - 0.35, at + 0.35], color=MUTED, lw=1.4)
        axes.plot([low, high], [at, at], color=PURPLE, lw=1.6)
        axes.plot([value], [at], color=PURPLE, marker="D", ls="", markersize=5)
    _rows(axes, [row["verdict"] for row in rows])
    axes.yaxis.tick_right()
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 1.04)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axes.set_title("policy distance in the terminal block; grey: even", fontsize=9, color=MUTED)
    axes.set_xlabel("share")


def _rows(axes: Axes, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(axis="x")


def _over_depth(axes: Axes, rows: Sequence[Row], found: Sequence[Comparison], name: str) -> None:
    axes.axhline(0, color=INK, lw=0.9)
    axes.axvspan(2 / 3, 1, color=MUTED, alpha=0.12, lw=0)
    axes.grid(axis="y")
    axes.set_xlim(-0.03, 1.03)
    looks = itertools.product(DASHES, (BLUE, VERMILLION, GREEN, PURPLE))
    for row, each, (dash, colour), marker in zip(rows, found, looks, itertools.cycle(MARKERS), strict=False):
        depth = np.arange(each.boundaries) / each.depth
        line = {"color": colour, "ls": dash, "lw": 1.3, "marker": marker, "markersize": 4}
        axes.plot(depth, each.columns[f"delta_{name}"], **line, markevery=max(1, each.depth // 10), label=row["pair"])
