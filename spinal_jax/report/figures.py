"""Matplotlib figures of a depth trace, independent of the settings of the caller.

Every figure is 4.6 inches wide with text of 9 to 10 pt, legible in one column of a paper and on a phone. Colours are
those of Okabe and Ito, always combined with a marker or a dash.
"""

from __future__ import annotations

import functools
import io
import itertools
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import matplotlib as mpl
import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, Colormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patheffects import AbstractPathEffect, withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from mpl_toolkits.mplot3d.art3d import Line3DCollection

from spinal_jax.audit.trace import DepthTrace
from spinal_jax.comparison.record import Comparison
from spinal_jax.errors import UserError
from spinal_jax.files import write_whole
from spinal_jax.metrics import columns
from spinal_jax.wording import number

WIDTH, HEIGHT = 4.6, 4.7  # inches
SURFACE, INK, MUTED, GRID, SHADE = "#ffffff", "#1f2328", "#5a646e", "#dfe3e8", "#eef0f3"
BLUE, VERMILLION, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#aa4499"
MARKERS = "osD^vPX*"
ROLES = {"blue": BLUE, "vermillion": VERMILLION, "green": GREEN, "purple": PURPLE}  # of `metrics.columns`

STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "axes.linewidth": 0.8,
    "grid.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "figure.facecolor": SURFACE,
    "axes.facecolor": "none",
    "savefig.facecolor": SURFACE,
    "text.parse_math": False,  # names are plain text
    "svg.fonttype": "none",  # text is not converted to paths, so that it can be searched and recoloured
}


P = ParamSpec("P")
R = TypeVar("R")


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Runs a function with matplotlib's defaults and STYLE, and restores the rcParams of the caller."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> R:
        with style.context(["default", STYLE]):
            return draw(*args, **kwargs)

    return drawn


@styled
def depth_figure(trace: DepthTrace) -> Figure:
    """Contraction and transport over depth, in two panels, with 95 % intervals."""
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    _over_depth(trace, upper, "contraction", "o", "higher: small modes vanish faster")
    _over_depth(trace, lower, "transport", "s", "higher: predictions move further")
    lower.set_ylim(bottom=0)
    depth_axis(trace, figure, upper, lower)
    return figure


@styled
def entropy_figure(trace: DepthTrace) -> Figure:
    """Entropy of the lens distribution and turning angle of its path over depth, with 95 % intervals."""
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    _over_depth(trace, upper, "entropy", "D", "higher: predictions less certain")
    _over_depth(trace, lower, "curvature", "^", "0: straight on,  π: turns back")
    upper.set_ylim(bottom=0)
    depth_axis(trace, figure, upper, lower)
    return figure


@styled
def curve_figure(trace: DepthTrace) -> Figure:
    """The depth curve (boundary, contraction, transport) in three dimensions, coloured by depth, with its shadows."""
    figure = Figure(figsize=(WIDTH, HEIGHT))
    axes: Any = figure.add_axes((-0.065, 0.14, 1.0, 0.92), projection="3d", computed_zorder=False)
    alpha, length = trace.columns["contraction"], trace.columns["transport"]
    seen = np.flatnonzero(np.isfinite(alpha) & np.isfinite(length))
    axes.set(xlabel="boundary", ylabel="contraction α", zlabel="transport L (rad)", xlim=(0, trace.depth))
    if not len(seen):
        axes.set(xticks=[], yticks=[], zticks=[])
        axes.text2D(0.5, 0.5, "no boundary has both contraction and transport", transform=axes.transAxes, ha="center")
        return figure

    points = np.stack([seen, alpha[seen], length[seen]], -1)
    y_low, y_high = padded(points[:, 1], 0.12)
    z_high = padded(points[:, 2])[1]
    axes.set(ylim=(y_low, y_high), zlim=(0, z_high))
    axes.view_init(elev=24, azim=-58)
    axes.set_box_aspect((1.2, 1, 0.95), zoom=0.92)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.zaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.set_tick_params(pad=1)
        axis.set_pane_color((0, 0, 0, 0))
        axis.line.set_color(MUTED)

    cmap, norm = _depth_colours(trace)
    shadow = {"color": MUTED, "lw": 0.9, "ls": (0, (1, 1.5)), "zorder": 1}
    axes.plot(points[:, 0], points[:, 1], 0, **shadow)
    axes.plot(points[:, 0], np.full(len(points), y_high), points[:, 2], **shadow)
    joined = np.flatnonzero(np.diff(seen) == 1)
    segments = [points[i : i + 2] for i in joined]
    if segments:
        axes.add_collection3d(
            Line3DCollection(segments, colors=cmap(norm(seen[joined + 1])), linewidths=2.2, zorder=2), autolim=False
        )
    inside = seen >= trace.terminal[0]
    for chosen, size, edge in ((~inside, 14, "none"), (inside, 34, INK)):
        if chosen.any():
            dots = {"s": size, "c": cmap(norm(seen[chosen])), "edgecolors": edge, "linewidths": 0.9}
            axes.scatter(*points[chosen].T, **dots, depthshade=False, zorder=3)
    for i in sorted({0, len(points) - 1}):
        x, y, z = points[i]
        axes.text(x, y, z + 0.06 * z_high, f"{seen[i]}", ha="center", weight="bold", path_effects=halo(), zorder=4)

    bar_axes = figure.add_axes((0.2, 0.075, 0.6, 0.022))
    bar: Any = figure.colorbar(ScalarMappable(norm, cmap), cax=bar_axes, orientation="horizontal")
    bar.outline.set_visible(False)
    bar.solids.set_edgecolor("face")  # otherwise viewers show seams
    first, last = trace.terminal
    bar.set_ticks(sorted({0, first, last}), labels=[str(at) for at in sorted({0, first, last})])
    bar.ax.tick_params(length=2)
    bar.ax.minorticks_off()
    bar.ax.set_title(f"boundary (outlined: {terminal_name(trace)})", fontsize=9, loc="center", pad=3)
    return figure


@styled
def spectra_figure(trace: DepthTrace, layers: Iterable[int] | None = None) -> Figure:
    """Singular values against rank, both logarithmic, of some boundaries (five spread over depth unless `layers` says
    which), each with the line that contraction is the slope of, over its fit window.

    Raises:
      UserError: the trace has no singular values, or there is no such boundary.
    """
    if trace.singular_values is None:
        raise UserError("this trace has no singular values: load it from a run folder with spectra.safetensors in it")
    layers = spread(trace) if layers is None else list(layers)
    for at in layers:
        if not 0 <= at <= trace.depth:
            raise UserError(f"there is no boundary {at}; this trace has 0 to {trace.depth}")
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = figure.subplots()
    cmap, norm = _depth_colours(trace)
    dashed = {"color": INK, "lw": 1.1, "ls": (0, (4, 2)), "zorder": 3}
    for at, marker in zip(layers, itertools.cycle(MARKERS), strict=False):
        s = trace.singular_values[at]
        resolved = int(np.nan_to_num(trace.columns["resolved"][at]))
        k = np.unique(np.geomspace(1, max(resolved, 1), 300).round().astype(int))
        k = k[s[k - 1] > 0]
        alpha, r2 = trace.columns["contraction"][at], trace.columns["fit_r2"][at]
        label = f"{at}:  α {number(alpha)},  R² {number(r2)}"
        (curve,) = axes.plot(k, s[k - 1], color=cmap(norm(at)), marker=marker, markevery=_marks(k), label=label)
        curve.set(markersize=5, markeredgecolor=SURFACE, markeredgewidth=0.5)
        line = tail_line(s, trace.settings["ranks"])
        if line is not None and np.isfinite(alpha):
            axes.plot(*line, **dashed)
    axes.set(xscale="log", yscale="log", xlabel="rank k", ylabel="singular value σ")
    axes.grid(True, which="major")
    for axis in (axes.xaxis, axes.yaxis):
        label_logs(axis)
    axes.plot([], [], **dashed, label="fit, slope −α")
    figure.legend(loc="outside lower center", ncols=2, title="boundary", columnspacing=1.5, handlelength=2.2)
    return figure


FIGURES: dict[str, Callable[[DepthTrace], Figure]] = {
    "depth": depth_figure,
    "curve": curve_figure,
    "spectra": spectra_figure,
    "entropy": entropy_figure,
}


def figures(trace: DepthTrace) -> dict[str, Figure]:
    """All figures of a trace by name; "spectra" needs singular values."""
    names = [name for name in FIGURES if name != "spectra" or trace.singular_values is not None]
    return {name: FIGURES[name](trace) for name in names}


@styled
def svg_text(figure: Figure, name: str) -> str:
    """The figure as a deterministic SVG document; `name` is part of its element ids."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": f"spinal_jax {name}"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": "spinal_jax"})
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


@styled
def png_bytes(figure: Figure, dpi: int = 200) -> bytes:
    """The figure as a deterministic PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": "spinal_jax"})
    return buffer.getvalue()


def save_figures(trace: DepthTrace, folder: str | os.PathLike[str]) -> list[Path]:
    """Writes figures/NAME.png and figures/NAME.svg into the folder and returns their paths."""
    target = Path(folder) / "figures"
    target.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in figures(trace).items():
        for suffix, data in ((".png", png_bytes(figure)), (".svg", svg_text(figure, name).encode())):
            write_whole(target / f"{name}{suffix}", data)
            written.append(target / f"{name}{suffix}")
    return written


def spread(trace: DepthTrace) -> list[int]:
    """About five representative boundaries: 1, two between, the first of the terminal block, the last."""
    first, last = trace.terminal
    return sorted({1, max(1, first // 3), max(1, 2 * first // 3), first, last})


def terminal_name(trace: DepthTrace | Comparison) -> str:
    """The terminal block with the boundaries its blocks end at: `terminal block 21-30`."""
    first, last = trace.terminal
    return f"terminal block {first}–{last}" if first < last else f"terminal block {last}"


def tail_line(s: np.ndarray, ranks: tuple[int, int]) -> tuple[np.ndarray, np.ndarray] | None:
    """Ends (k, sigma) of the least-squares line of log s on log k over the fitted ranks (first, last), or None for
    fewer than 2 ranks."""
    low, high = ranks
    if high <= low:
        return None
    x, y = np.log(np.arange(low, high + 1)), np.log(s[low - 1 : high])
    slope = np.dot(x - x.mean(), y) / np.dot(x - x.mean(), x - x.mean())
    ends = np.array([low, high], float)
    return ends, np.exp(y.mean() + slope * (np.log(ends) - x.mean()))


@styled
def hover_bands(figure: Figure, trace: DepthTrace | Comparison) -> list[tuple[int, float, float, float, float]]:
    """(boundary, x, y, width, height) in SVG units of the strip over each boundary, across all panels of a figure."""
    figure.draw_without_rendering()
    width, height = (72 * inches for inches in figure.get_size_inches())
    boxes = [axes.get_position() for axes in figure.axes]
    left, right = boxes[0].x0 * width, boxes[0].x1 * width
    top, bottom = (1 - max(box.y1 for box in boxes)) * height, (1 - min(box.y0 for box in boxes)) * height
    step = (right - left) / trace.boundaries
    return [(at, left + at * step, top, step, bottom - top) for at in range(trace.boundaries)]


def axis_label(name: str) -> str:
    """The label of a column with its unit."""
    about = columns.column(name)
    return f"{about.label} ({about.unit})" if about.unit else about.label


def _over_depth(trace: DepthTrace, axes: Axes, column: str, marker: str, hint: str) -> None:
    """Draws one column by boundary: interval, line, terminal block, and a hint at the meaning of higher values."""
    label, colour = axis_label(column), ROLES[columns.column(column).colour]
    first, last = trace.terminal
    axes.axvspan(first - 0.5, last + 0.5, color=SHADE, lw=0, zorder=0)
    axes.set_ylabel(label)
    axes.set_title(hint, fontsize=9, color=MUTED, pad=4)
    axes.set_xlim(-0.5, trace.depth + 0.5)
    axes.grid(axis="y")
    values = trace.columns[column]
    if not np.isfinite(values).any():
        axes.set_yticks([])
        axes.text(0.5, 0.5, "not defined at any boundary", transform=axes.transAxes, ha="center", va="center")
        return
    low, high = trace.interval(column)
    boundary = np.arange(trace.boundaries)
    axes.fill_between(boundary, low, high, color=colour, alpha=0.25, lw=0)
    size = 4.0 if trace.depth <= 40 else 2.5
    axes.plot(boundary, values, color=colour, marker=marker, markersize=size)
    axes.set_ylim(*padded(np.concatenate([values, low, high])))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))


def depth_axis(
    trace: DepthTrace | Comparison, figure: Figure, upper: Axes, lower: Axes, interval: str = "band"
) -> None:
    """Common parts of two stacked panels: name of the terminal block, boundary axis, legend of intervals."""
    upper.set_title(terminal_name(trace), loc="right", fontsize=9, pad=4)
    lower.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
    lower.set_xlabel(f"boundary (0: embeddings, {trace.depth}: after the last block)")
    words = "no intervals: they need two prompt groups or more"
    if trace.summary["degrees_of_freedom"] >= 1:
        words = f"{interval}: 95 % interval over {trace.prompts['groups']} prompt groups"
    figure.supxlabel(words, fontsize=9, color=MUTED)


def _depth_colours(trace: DepthTrace) -> tuple[Colormap, BoundaryNorm]:
    """A colour for each boundary from the middle of viridis, visible on white and on black."""
    colours = mpl.colormaps["viridis"](np.linspace(0.28, 0.8, trace.boundaries))
    return ListedColormap(colours), BoundaryNorm(np.arange(trace.boundaries + 1) - 0.5, trace.boundaries)


def padded(values: np.ndarray, share: float = 0.06) -> tuple[float, float]:
    """Axis limits around the finite values, never empty."""
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    margin = share * (high - low) or 0.1 * abs(high) or 0.5
    return low - margin, high + margin


def _marks(k: np.ndarray) -> list[int]:
    """About seven indices into k, evenly apart on the logarithmic axis."""
    return sorted(set(np.searchsorted(k, np.geomspace(1, k[-1], 7).round(), side="left").tolist())) if len(k) else []


def label_logs(axis: Axis) -> None:
    """Labels a logarithmic axis in plain text, after its data are drawn: 1, 2 and 5 of each decade where it spans less
    than two."""
    low, high = axis.get_view_interval()
    few = high < 100 * low
    axis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if few else (1,), numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}") if few else FuncFormatter(_power_of_ten))
    axis.set_minor_formatter(NullFormatter())


def _power_of_ten(value: float, _position: int | None = None) -> str:
    if value <= 0:
        return ""
    exponent = round(math.log10(value))
    if 0 <= exponent <= 3:
        return f"{10**exponent:,}"
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def halo() -> list[AbstractPathEffect]:
    return [withStroke(linewidth=2.5, foreground=SURFACE)]
