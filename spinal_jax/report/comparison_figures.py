"""Figures of comparisons, in the style of `figures`. Every colour is paired with a dash, a filling or a place."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from spinal_jax.comparison.record import LOCALISED, METRICS, UNITS, Comparison
from spinal_jax.metrics.columns import PAIR, TRACE
from spinal_jax.report.figures import (
    BLUE,
    GREEN,
    HEIGHT,
    INK,
    MARKERS,
    MUTED,
    PURPLE,
    ROLES,
    SHADE,
    SURFACE,
    VERMILLION,
    WIDTH,
    axis_label,
    depth_axis,
    halo,
    padded,
    styled,
    terminal_name,
)

SURE = 0.05  # p-values below it, after Holm's correction, are marked
COLOURS = {about.name: ROLES[about.colour] for about in (*TRACE, *PAIR)}
MASSES = {
    "delta_contraction": "|Δ contraction|",
    "delta_transport": "|Δ transport|",
    "policy_distance": "policy distance",
    "gradient_norm": "preference gradient",
}
DASHED = (0, (4, 2))
ROW, LINE = 0.105, 0.19  # inches: of a dot of the robustness figure, and of the words above a group of them
Box = tuple[float, float, float, float]


@styled
def traces_figure(comparison: Comparison) -> Figure:
    """Contraction and transport of both models over depth, with 95 % intervals."""
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    panels: Any = figure.subplots(2, 1, sharex=True)
    for axes, name in zip(panels, ("contraction", "transport"), strict=True):
        _ground(comparison, axes)
        reference = {"color": INK, "ls": DASHED, "lw": 1.2, "marker": "s", "markerfacecolor": SURFACE}
        drawn = [
            *_curve(comparison, axes, f"aligned_{name}", color=COLOURS[name], marker="o", label="aligned", zorder=2.5),
            *_curve(comparison, axes, f"reference_{name}", **reference, label="reference"),
        ]
        axes.set_ylabel(axis_label(name))
        _limits(axes, drawn)
    _legend(panels[0], 2)
    depth_axis(comparison, figure, *panels)
    return figure


@styled
def deltas_figure(comparison: Comparison) -> Figure:
    """What changed at each boundary, a panel a metric, with 95 % intervals; filled where Holm leaves p below 0.05."""
    figure = Figure(figsize=(WIDTH, 1.12 * len(METRICS) + 0.9), layout="constrained")
    panels: Any = figure.subplots(len(METRICS), 1, sharex=True)
    size = 5.0 if comparison.depth <= 40 else 3.0
    for axes, name in zip(panels, METRICS, strict=True):
        values, low, high = (comparison.columns[f"delta_{name}{end}"] for end in ("", "_low", "_high"))
        _ground(comparison, axes)
        axes.axhline(0, color=INK, lw=0.9)
        unit = f" ({UNITS[name]})" if name in UNITS else ""
        axes.set_ylabel(f"Δ {name.replace('_', ' ')}{unit}".replace("effective rank", "eff. rank"), fontsize=9)
        at, colour = np.arange(comparison.boundaries), COLOURS[name]
        axes.plot(at, values, color=colour, lw=1.0, alpha=0.6)
        axes.vlines(at, low, high, color=colour, lw=1.3)
        sure = comparison.columns[f"delta_{name}_p_holm"] < SURE
        for chosen, fill in ((~sure, SURFACE), (sure, colour)):
            dots = {"color": colour, "ls": "", "marker": "o", "markersize": size, "markerfacecolor": fill}
            axes.plot(at[chosen], values[chosen], **dots)
        _limits(axes, [values, low, high, np.zeros(1)], bins=4)
    panels[0].set_title("filled: p < 0.05 (Holm)", fontsize=9, color=MUTED, pad=4)
    depth_axis(comparison, figure, panels[0], panels[-1], "lines")
    figure.align_ylabels(panels)
    return figure


@styled
def where_figure(comparison: Comparison) -> Figure:
    """Each block's share of what changed, a panel for each measure that was taken: bars; above them centroid and the
    shortest run of blocks that holds 80 %."""
    measured = [n for n in LOCALISED if n.startswith("delta_") or np.isfinite(comparison.columns[n]).any()]
    figure = Figure(figsize=(WIDTH, 1.15 * len(measured) + 0.9), layout="constrained")
    panels: Any = figure.subplots(len(measured), 1, sharex=True, squeeze=False)[:, 0]
    for axes, name in zip(panels, measured, strict=True):
        _ground(comparison, axes)
        place = comparison.summary["localisation"][name]
        shares = mass_shares(comparison, name)
        if shares is None:
            _nothing(axes, place["reason"])
            axes.set_title(MASSES[name], fontsize=9, pad=4)
            continue
        colour, top = COLOURS[name.removeprefix("delta_")], float(shares.max())
        axes.bar(np.arange(1, comparison.boundaries), shares, color=colour, width=0.8)
        axes.axhline(1 / comparison.depth, color=MUTED, ls=DASHED, lw=1)
        first, last = place["run"]
        axes.plot([first - 0.4, last + 0.4], [1.17 * top] * 2, color=INK, lw=3, solid_capstyle="butt")
        centre, low, high = (comparison.depth * place[f"centroid{end}"] for end in ("", "_low", "_high"))
        axes.plot([low, high], [1.4 * top] * 2, color=INK, lw=1.2)
        axes.plot([centre], [1.4 * top], color=INK, marker="D", markersize=5, ls="")
        axes.set_ylim(0, 1.58 * top)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0 if top > 0.02 else 1, symbol=" %"))
        axes.yaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
        axes.set_title(
            f"{MASSES[name]}: {place['share']:.0%} terminal (even: {place['share_even']:.0%})".replace("%", " %"),
            fontsize=9,
            pad=4,
        )
    _block_axis(panels[-1])
    figure.supxlabel("◆ centroid, 95 % interval;  ▬ 80 % of it;  dashed: even", fontsize=9, color=MUTED)
    return figure


@styled
def policy_figure(comparison: Comparison) -> Figure | None:
    """How far apart both models' predictions are at each boundary; None where it was not measured."""
    if np.isnan(comparison.columns["policy_distance"]).all():
        return None
    figure = Figure(figsize=(WIDTH, 0.66 * HEIGHT), layout="constrained")
    axes = figure.subplots()
    _ground(comparison, axes)
    colour = COLOURS["policy_distance"]
    drawn = _curve(comparison, axes, "policy_distance", color=colour, marker="D", label="policy distance")
    _limits(axes, [*drawn, np.zeros(1)])
    axes.set_ylim(bottom=0)
    axes.set_ylabel("policy distance (rad)")
    depth_axis(comparison, figure, axes, axes)
    return figure


@styled
def gradient_figure(comparison: Comparison) -> Figure | None:
    """Norm of the preference gradient over each block's parameters; None where it was not measured."""
    norms = comparison.columns["gradient_norm"]
    if np.isnan(norms).all():
        return None
    figure = Figure(figsize=(WIDTH, 0.66 * HEIGHT), layout="constrained")
    axes = figure.subplots()
    _ground(comparison, axes)
    at, low, high = (
        np.arange(comparison.boundaries),
        comparison.columns["gradient_norm_low"],
        comparison.columns["gradient_norm_high"],
    )
    axes.bar(at, norms, color=COLOURS["gradient_norm"], width=0.8)
    axes.vlines(at, low, high, color=INK, lw=1.3)
    axes.set_ylim(0, 1.08 * float(np.nanmax(np.concatenate([norms, high]))) or 1.0)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.set_ylabel("norm of the gradient")
    share = comparison.summary["gradient_concentration"]
    even = comparison.summary["localisation"]["gradient_norm"]["share_even"]
    axes.set_title(f"{terminal_name(comparison)}: {100 * share:.0f} % (even: {100 * even:.0f} %)", fontsize=9, pad=4)
    _block_axis(axes)
    if np.isfinite(low).any():
        figure.supxlabel("lines: 95 % intervals over groups of preference pairs", fontsize=9, color=MUTED)
    return figure


@styled
def robustness_figure(comparison: Comparison) -> Figure:
    """Delta_align with its 95 % interval under every setting: a marker a fit window, a row a way to measure."""
    ways, windows = _ways(comparison), _windows(comparison)
    step = LINE + ROW * len(windows)
    figure = Figure(figsize=(WIDTH, step * len(ways) + 1.35), layout="constrained")
    axes = figure.subplots()
    settings = comparison.robustness["settings"]
    ends = np.array([[s["delta_align"], s["low"], s["high"]] for s in settings], float)
    axes.axvline(0, color=INK, lw=0.9)
    if math.isfinite(settings[0]["delta_align"]):
        axes.axvline(settings[0]["delta_align"], color=VERMILLION, ls=DASHED, lw=1)
    for row, way in enumerate(ways):
        if row % 2:
            axes.axhspan(row * step, (row + 1) * step, color=SHADE, lw=0, zorder=0)
        axes.text(
            0.01,
            row * step + 0.12,
            way,
            transform=axes.get_yaxis_transform(),
            fontsize=9,
            va="center",
            path_effects=halo(),
        )
    for i, (setting, (value, low, high)) in enumerate(zip(settings, ends, strict=True)):
        colour, y = VERMILLION if i == 0 else BLUE, _height(comparison, setting)
        sure = low > 0 or high < 0
        marker = MARKERS[windows.index(tuple(setting["window"])) % len(MARKERS)]
        axes.plot([low, high], [y, y], color=colour, lw=1.2)
        dot = {"color": colour, "marker": marker, "markersize": 7 if i == 0 else 5, "ls": "", "zorder": 3}
        axes.plot([value], [y], **dot, markerfacecolor=colour if sure else SURFACE)
    axes.set_ylim(step * len(ways), 0)
    if np.isfinite(ends).any():
        axes.set_xlim(*padded(np.append(ends.ravel(), 0)))
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.set(yticks=[], xlabel="Δ align")
    axes.spines["left"].set_visible(False)
    axes.set_title("filled: the interval excludes 0", fontsize=9, color=MUTED, pad=4)
    axes.set_title("large, dashed: the headline", fontsize=9, loc="right", pad=4)
    for window, marker in zip(windows, itertools.cycle(MARKERS), strict=False):
        look = {"color": MUTED, "marker": marker, "ls": "", "markersize": 5}
        axes.plot([], [], **look, label=f"{100 * window[0]:g}–{100 * window[1]:g} %")
    figure.legend(loc="outside lower center", ncols=5, columnspacing=0.9, handletextpad=0.1, title="fit window")
    return figure


@styled
def setting_bands(figure: Figure, comparison: Comparison) -> list[tuple[int, Box]]:
    """(index of the setting, (x, y, width, height) in SVG units) of the strip over each dot of `robustness_figure`."""
    figure.draw_without_rendering()
    width, height = (72 * inches for inches in figure.get_size_inches())
    axes, box = figure.axes[0], figure.axes[0].get_position()
    total = axes.get_ylim()[0]
    unit = (box.y1 - box.y0) * height / total
    bands = []
    for i, setting in enumerate(comparison.robustness["settings"]):
        y = (1 - box.y1) * height + unit * (_height(comparison, setting) - ROW / 2)
        bands.append((i, (box.x0 * width, y, (box.x1 - box.x0) * width, unit * ROW)))
    return bands


@styled
def ranking_figure(ranked: Sequence[Comparison]) -> Figure:
    """Delta_align with its 95 % interval, a row a comparison, in the order given."""
    figure = Figure(figsize=(WIDTH, 0.42 * len(ranked) + 0.75), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color=INK, lw=0.9)
    ends = np.array([[f.summary[f"delta_align{end}"] for end in ("", "_low", "_high")] for f in ranked], float)
    for row, (comparison, (value, low, high)) in enumerate(zip(ranked, ends, strict=True)):
        sure = low > 0 or high < 0
        name = short_name(comparison.aligned["name"], 50)
        axes.text(
            0.0,
            row - 0.22,
            f"{row + 1}  {name}",
            transform=axes.get_yaxis_transform(),
            fontsize=9,
            va="center",
            path_effects=halo(),
        )
        axes.plot([low, high], [row + 0.18] * 2, color=BLUE, lw=1.6)
        axes.plot([value], [row + 0.18], color=BLUE, marker="o", ls="", markerfacecolor=BLUE if sure else SURFACE)
    axes.set_ylim(len(ranked) - 0.5, -0.5)
    if np.isfinite(ends).any():
        axes.set_xlim(*padded(np.append(ends.ravel(), 0)))
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.set(yticks=[], xlabel="Δ align, 95 % interval")
    axes.set_title("filled: the interval excludes 0", fontsize=9, color=MUTED, pad=4)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    return figure


@styled
def changes_figure(ranked: Sequence[Comparison]) -> Figure:
    """Changes of contraction and of transport over relative depth, one line a comparison, in the order given."""
    rows = math.ceil(len(ranked) / 2)
    figure = Figure(figsize=(WIDTH, HEIGHT + 0.2 * rows), layout="constrained")
    panels: Any = figure.subplots(2, 1, sharex=True)
    looks = [(colour, dash) for dash in ("-", DASHED, (0, (1, 1.2))) for colour in (BLUE, VERMILLION, GREEN, PURPLE)]
    for axes, name, label in zip(
        panels, ("contraction", "transport"), ("Δ contraction α", "Δ transport L (rad)"), strict=True
    ):
        axes.axhline(0, color=INK, lw=0.9)
        axes.grid(axis="y")
        axes.set_ylabel(label)
        drawn = [np.zeros(1)]
        for place, (comparison, (colour, dash), marker) in enumerate(
            zip(ranked, itertools.cycle(looks), itertools.cycle(MARKERS), strict=False), 1
        ):
            values = comparison.columns[f"delta_{name}"]
            drawn.append(values)
            depth = np.arange(comparison.boundaries) / comparison.depth
            line = {"color": colour, "ls": dash, "lw": 1.4, "marker": marker, "markersize": 4}
            label = f"{place}  {short_name(comparison.aligned['name'], 24)}"
            axes.plot(depth, values, **line, markevery=max(1, comparison.depth // 10), label=label)
        _limits(axes, drawn)
    panels[1].set_xlabel("relative depth (0: embeddings, 1: after the last block)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, columnspacing=1.2, handlelength=2.4)
    return figure


def comparison_figures(comparison: Comparison, ranked: Sequence[Comparison] = ()) -> dict[str, Figure]:
    """Every figure that the comparison and, where there are more, their ranking can show, by name."""
    drawn = {
        "traces": traces_figure(comparison),
        "deltas": deltas_figure(comparison),
        "where": where_figure(comparison),
        "policy": policy_figure(comparison),
        "gradient": gradient_figure(comparison),
        "robustness": robustness_figure(comparison),
    }
    if ranked:
        drawn |= {"ranking": ranking_figure(ranked), "overlay": changes_figure(ranked)}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def mass_shares(comparison: Comparison, name: str) -> np.ndarray | None:
    """[D] each block's share of a measure's mass, or None where it is not told where it lies."""
    mass = np.array(comparison.summary["localisation"][name]["mass"])
    return mass / mass.sum() if len(mass) else None


def way(setting: dict[str, Any]) -> str:
    """How a setting of the robustness grid measures, its window apart."""
    hows = [setting[side] for side in ("contraction", "transport") if setting[side] != "as measured"]
    return ", ".join(hows) if hows else "as measured"


def short_name(name: str, length: int) -> str:
    """A name that fits, in letters that the figures' font has."""
    name = " ".join(name.encode("ascii", "replace").decode().split())
    if len(name) > length:
        name = f"{name[: length // 2 - 1]}…{name[-(length - length // 2) :]}"
    return name


def _ways(comparison: Comparison) -> list[str]:
    return list(dict.fromkeys(way(setting) for setting in comparison.robustness["settings"]))


def _windows(comparison: Comparison) -> list[tuple[float, float]]:
    return sorted({(s["window"][0], s["window"][1]) for s in comparison.robustness["settings"]})


def _height(comparison: Comparison, setting: dict[str, Any]) -> float:
    """Inches from the top of the robustness figure's panel down to the setting's dot."""
    windows = _windows(comparison)
    row, place = _ways(comparison).index(way(setting)), windows.index(tuple(setting["window"]))
    return row * (LINE + ROW * len(windows)) + LINE + ROW * (place + 0.4)


def _ground(comparison: Comparison, axes: Axes) -> None:
    """The shaded terminal block, and room for every boundary."""
    first, last = comparison.terminal
    axes.axvspan(first - 0.5, last + 0.5, color=SHADE, lw=0, zorder=0)
    axes.set_xlim(-0.5, comparison.depth + 0.5)
    axes.grid(axis="y")


def _block_axis(axes: Axes) -> None:
    """Boundaries 1..D by the blocks that end there; nothing ends at 0."""
    axes.set_xlabel("block, at the boundary that it ends at")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}" if value else ""))


def _curve(comparison: Comparison, axes: Axes, name: str, color: str, **look: Any) -> list[np.ndarray]:
    """A column with its band; returns what was drawn."""
    values, low, high = (comparison.columns[f"{name}{end}"] for end in ("", "_low", "_high"))
    at, size = np.arange(comparison.boundaries), 4.0 if comparison.depth <= 40 else 2.5
    axes.fill_between(at, low, high, color=color, alpha=0.22, lw=0)
    axes.plot(at, values, color=color, markersize=size, **look)
    return [values, low, high]


def _limits(axes: Axes, drawn: Sequence[np.ndarray], bins: int = 5) -> None:
    values = np.concatenate(list(drawn))
    if np.isfinite(values).any():
        axes.set_ylim(*padded(values))
        axes.yaxis.set_major_locator(MaxNLocator(bins, steps=[1, 2, 2.5, 5, 10]))
    else:
        _nothing(axes, "not defined at any boundary")


def _nothing(axes: Axes, words: str) -> None:
    axes.set_yticks([])
    axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", va="center")


def _legend(axes: Axes, columns: int) -> None:
    """Above the panel, on the left."""
    where = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0, "borderpad": 0.2}
    axes.legend(ncols=columns, handlelength=2.2, columnspacing=1.2, **where)
