"""Figures of a training run, in the style of `figures`: depth traces, losses and gradients over steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, LogNorm, Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from spinal_jax.audit.trace import DepthTrace
from spinal_jax.report.figures import (
    BLUE,
    GREEN,
    HEIGHT,
    INK,
    MUTED,
    PURPLE,
    SHADE,
    SURFACE,
    VERMILLION,
    WIDTH,
    halo,
    padded,
    png_bytes,
    styled,
    terminal_name,
)
from spinal_jax.runs.training_run import TrainingRun

HEAT, PANEL, STRIP, FOOT = 1.55, 1.05, 0.32, 0.75  # inches
BINS = 60  # columns of a heat map over all steps
SHADES = 47  # of a colour map; matplotlib turns colour bars of 49 and more into pictures
# Blue to vermillion over near-white; none of these is a colour of the page, which would change with its theme.
DIVERGING = LinearSegmentedColormap.from_list("change", ["#0b4f7d", "#5fa5d2", "#f3f3f1", "#ee9d63", "#a83f00"], SHADES)
ON_DARK = "#c9dcea"  # hatches on dark cells
Spans = list[tuple[float, float]]


@styled
def over_training_figure(run: TrainingRun) -> Figure:
    """Contraction and transport over depth, one line a trace, dark to light by step; the reference is dashed."""
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes: Any = figure.subplots(2, 1, sharex=True)
    cmap, norm = _step_colours(run)
    first, last = run.traces[0].terminal
    depth = run.traces[0].depth
    boundary = np.arange(depth + 1)
    for ax, column, label in zip(
        axes, ("contraction", "transport"), ("contraction α", "transport L (rad)"), strict=True
    ):
        ax.axvspan(first - 0.5, last + 0.5, color=SHADE, lw=0, zorder=0)
        ax.grid(axis="y")
        start = run.comparisons[0].columns[f"reference_{column}"]
        for step, trace in zip(run.steps, run.traces, strict=True):
            if run.origin == f"step {step}":
                continue
            ax.plot(boundary, trace.columns[column], color=cmap(norm(step)), lw=1.3)
        ax.plot(boundary, start, color=INK, lw=1.3, ls=(0, (4, 2)), label=run.origin)
        ax.set(ylabel=label, xlim=(-0.5, depth + 0.5))
        values = np.concatenate([start, *(trace.columns[column] for trace in run.traces)])
        if np.isfinite(values).any():
            ax.set_ylim(*padded(values))
        ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes[0].set_title(terminal_name(run.traces[0]), loc="right", fontsize=9, pad=4)
    axes[0].legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0, handlelength=2.2, borderpad=0.2)
    axes[1].set_xlabel(f"boundary (0: embeddings, {depth}: after the last block)")
    axes[1].xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
    if len(run.traces) > 1:
        bar = figure.colorbar(ScalarMappable(norm, cmap), ax=axes, location="bottom", aspect=45, pad=0.02)
        _plain_bar(bar)
        bar.set_label("step of the optimiser", size=9)
        bar.ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return figure


@styled
def course_figure(run: TrainingRun) -> Figure:
    """Step by boundary, the changes of contraction and transport since step 0; on the same axis of steps below them
    Delta_align with 2 standard errors, reward margin, accuracy and KL, as far as they are known. Onset and
    destabilisation are marked through all panels."""
    draws: list[tuple[Callable[..., None], tuple[str, ...]]] = [(_align, ())]
    for name, *words in (
        ("rewards/margins", "reward margin", "chosen − rejected", BLUE),
        ("rewards/accuracies", "accuracy", "chosen reward larger", GREEN),
    ):
        if any(len(run.series(f"{side}{name}")[0]) for side in ("", "eval_")):
            draws.append((_train_and_eval, (name, *words)))
    draws.append((_kl, ()))
    strip = STRIP if run.onset["onset"] else 0.05
    heights = [strip, HEAT, HEAT, *(PANEL for _ in draws)]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.24 * len(heights) + FOOT), layout="constrained")
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights, width_ratios=(1, 0.03))
    marks = figure.add_subplot(grid[0, 0])
    panels = [figure.add_subplot(grid[row, 0], sharex=marks) for row in range(1, len(heights))]
    for row, column, words in ((1, "contraction", "contraction α"), (2, "transport", "transport L (rad)")):
        _change_map(run, panels[row - 1], figure.add_subplot(grid[row, 1]), f"delta_{column}", words)
    for ax, (draw, words) in zip(panels[2:], draws, strict=True):
        draw(run, ax, *words)
        _room(ax)
    for ax in panels[:-1]:
        ax.tick_params(labelbottom=False)
    spans = spans_of(run)
    marks.set_xlim(spans[0][0], max(spans[-1][1], run.last_step))
    _step_axis(panels[-1])
    _mark(run, marks, panels)
    return figure


@styled
def gradients_figure(run: TrainingRun) -> Figure | None:
    """Step by block, the norm of the gradient of the loss; below, the share of the terminal block. None where no norm
    was logged."""
    steps, norms = run.block_norms()
    if not len(steps):
        return None
    depth, (first, last) = norms.shape[1], run.traces[0].terminal
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(1.5, 1), width_ratios=(1, 0.03))
    upper = figure.add_subplot(grid[0, 0])
    lower = figure.add_subplot(grid[1, 0], sharex=upper)
    edges, means = _binned(steps, norms)
    shown = means[means > 0]
    low, high = (float(shown.min()), float(shown.max())) if len(shown) else (1.0, 1.0)
    norm = LogNorm(low, high) if high > low else LogNorm(low / 2, high * 2)
    upper.set_facecolor(SHADE)
    mesh = upper.pcolormesh(
        edges, np.arange(depth + 1) + 0.5, np.ma.masked_less_equal(means, 0).T, cmap=_viridis(0.1, 0.92), norm=norm
    )
    mesh.set(edgecolor="face", linewidth=0.3)  # as in `_plain_bar`
    upper.set(ylabel="block")
    upper.set_title("norm of the loss’s gradient", fontsize=9, color=MUTED, pad=4)
    upper.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    upper.tick_params(labelbottom=False)
    bar: Any = figure.colorbar(mesh, cax=figure.add_subplot(grid[0, 1]))
    _plain_bar(bar)
    if high / low < 30:
        bar.ax.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5), numticks=12))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    total = norms.sum(axis=1)
    share = np.divide(norms[:, first - 1 : last].sum(axis=1), total, out=np.full(len(total), np.nan), where=total > 0)
    even = (last - first + 1) / depth
    lower.plot(steps, share, color=PURPLE, lw=1.2, marker="o" if len(steps) < 40 else "", markersize=3)
    lower.axhline(even, color=MUTED, ls=(0, (4, 2)), lw=1)
    lower.set_ylim(*padded(np.append(share[np.isfinite(share)], even), 0.15))
    lower.set_ylabel("share")
    lower.set_title(f"share of the {terminal_name(run.traces[0])} (dashed: even)", fontsize=9, color=MUTED, pad=4)
    lower.grid(axis="y")
    lower.yaxis.set_major_locator(MaxNLocator(4))
    _step_axis(lower)
    return figure


@styled
def loss_figure(run: TrainingRun) -> Figure | None:
    """The loss over steps, in training and held out; below, the rewards of chosen and rejected responses, or how many
    tokens were the likeliest. None where no loss was logged."""
    if not any(len(run.series(name)[0]) for name in ("loss", "eval_loss")):
        return None
    tokens = any(len(run.series(name)[0]) for name in ("mean_token_accuracy", "eval_mean_token_accuracy"))
    rewards = len(run.series("rewards/chosen")[0]) > 0
    rows = 1 + (tokens or rewards)
    figure = Figure(figsize=(WIDTH, HEIGHT if rows == 2 else 0.6 * HEIGHT), layout="constrained")
    axes: Any = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    hint = "nats a token" if tokens else "mean over pairs"
    _train_and_eval(run, axes[0], "loss", "loss", hint, BLUE)
    if tokens:
        name = "mean_token_accuracy"
        _train_and_eval(run, axes[1], name, "token accuracy", "top-1 token accuracy", GREEN)
    elif rewards:
        for side, colour, dash, marker in (("chosen", BLUE, "-", "o"), ("rejected", VERMILLION, (0, (4, 2)), "s")):
            steps, values = run.series(f"rewards/{side}")
            axes[1].plot(steps, values, color=colour, ls=dash, lw=1.2, label=side)
            steps, values = run.series(f"eval_rewards/{side}")
            if len(steps):
                dots = {"color": colour, "ls": "", "marker": marker, "markersize": 6, "markeredgecolor": SURFACE}
                axes[1].plot(steps, values, **dots, label=f"{side}, held out")
        axes[1].set_ylabel("reward")
        axes[1].legend(loc="best", ncols=1, handlelength=1.8)
    for ax in axes:
        _room(ax)
    _step_axis(axes[-1])
    return figure


def training_figures(run: TrainingRun) -> dict[str, Figure]:
    """Every figure that the run can show, by name."""
    drawn = {
        "course": course_figure(run),
        "over_training": over_training_figure(run),
        "gradients": gradients_figure(run),
        "loss": loss_figure(run),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


@styled
def trace_figure(trace: DepthTrace, first: DepthTrace) -> bytes:
    """A small PNG of a trace on that of step 0, dashed: contraction above, transport below, over boundaries."""
    figure = Figure(figsize=(WIDTH, 3.2))
    axes: Any = figure.subplots(2, 1, sharex=True)
    figure.subplots_adjust(left=0.16, right=0.97, top=0.92, bottom=0.14, hspace=0.15)
    boundary = np.arange(trace.boundaries)
    at = trace.terminal
    for ax, column, label, colour in (
        (axes[0], "contraction", "contraction α", BLUE),
        (axes[1], "transport", "transport L (rad)", VERMILLION),
    ):
        ax.axvspan(at[0] - 0.5, at[1] + 0.5, color=SHADE, lw=0, zorder=0)
        ax.plot(boundary, first.columns[column], color=INK, lw=1.1, ls=(0, (4, 2)))
        ax.plot(boundary, trace.columns[column], color=colour)
        ax.set(ylabel=label, xlim=(-0.5, trace.depth + 0.5))
        ax.grid(axis="y")
    axes[0].set_title(f"{terminal_name(trace)}; dashed: the reference", fontsize=9, pad=3)
    axes[1].set_xlabel("boundary")
    return png_bytes(figure, dpi=80)


def spans_of(run: TrainingRun) -> Spans:
    """(from, to) in steps around each record: half way to its neighbours."""
    steps = run.steps.astype(float)
    if len(steps) == 1:
        return [(steps[0] - 0.5, steps[0] + 0.5)]
    middle = (steps[1:] + steps[:-1]) / 2
    edges = np.concatenate([[2 * steps[0] - middle[0]], middle, [2 * steps[-1] - middle[-1]]])
    return list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))


@styled
def record_bands(figure: Figure, run: TrainingRun) -> list[tuple[int, float, float, float, float]]:
    """(step, x, y, width, height) in SVG units of the strip over each record, across all panels of `course_figure`."""
    figure.draw_without_rendering()
    width, height = (72 * inches for inches in figure.get_size_inches())
    marks, *panels = figure.axes
    box = marks.get_position()
    low, high = marks.get_xlim()

    def across(step: float) -> float:
        share = (step - low) / (high - low)
        return float((box.x0 + min(max(share, 0), 1) * box.width) * width)

    top = (1 - max(ax.get_position().y1 for ax in panels)) * height
    bottom = (1 - min(ax.get_position().y0 for ax in panels)) * height
    return [
        (int(step), across(a), top, across(b) - across(a), bottom - top)
        for step, (a, b) in zip(run.steps, spans_of(run), strict=True)
    ]


def _change_map(run: TrainingRun, axes: Axes, bar_axes: Axes, column: str, words: str) -> None:
    """Step by boundary: a change since step 0, symmetric about 0; negative cells are hatched as well as blue."""
    changes = np.stack([comparison.columns[column] for comparison in run.comparisons])  # [R, D+1]
    spans = spans_of(run)
    edges = [spans[0][0], *(span[1] for span in spans)]
    boundaries = np.arange(changes.shape[1] + 1) - 0.5
    largest = float(np.nanmax(np.abs(changes))) if np.isfinite(changes).any() else 0.0
    norm = Normalize(-(largest or 1.0), largest or 1.0)
    axes.set_facecolor(SHADE)
    mesh = axes.pcolormesh(edges, boundaries, np.ma.masked_invalid(changes).T, cmap=DIVERGING, norm=norm)
    mesh.set(edgecolor="face", linewidth=0.3)
    # A hatch wherever it is clearly less than at step 0, for readers without colours; light on dark cells.
    with mpl.rc_context({"hatch.linewidth": 0.5}):
        for cells, colour in (
            ((changes < -0.05 * largest) & (changes >= -0.6 * largest), MUTED),
            (changes < -0.6 * largest, ON_DARK),
        ):
            _hatch(axes, edges, boundaries, cells, colour)
    axes.set_ylabel("boundary")
    axes.set_title(f"Δ {words} from {run.origin} (hatched: less)", fontsize=9, color=MUTED, pad=4)
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    bar: Any = axes.figure.colorbar(mesh, cax=bar_axes)
    _plain_bar(bar)
    bar.ax.yaxis.set_major_locator(MaxNLocator(4, symmetric=True, steps=[1, 2, 2.5, 5, 10]))
    bar.ax.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:+.3g}".replace("-", "−") if value else "0")
    )


def dark_changes() -> dict[str, str]:
    """Colour of DIVERGING -> the one that stands for it on a dark page, where no change is near-black."""
    dark = LinearSegmentedColormap.from_list("dark", ["#56b4e9", "#343a41", "#f0884a"], SHADES)
    shades = np.linspace(0, 1, SHADES)
    pairs = {to_hex(light): to_hex(shade) for light, shade in zip(DIVERGING(shades), dark(shades), strict=True)}
    return {**pairs, ON_DARK: "#16191d"}


def _hatch(axes: Axes, edges: list[float], boundaries: np.ndarray, cells: np.ndarray, colour: str) -> None:
    """Hatches the chosen cells [R, D+1], boundaries in a row as one rectangle."""
    for at, column in enumerate(cells):
        ends = np.flatnonzero(np.diff(np.concatenate([[False], column, [False]])))
        for low, high in ends.reshape(-1, 2).tolist():
            style: dict[str, Any] = {"hatch": "////", "facecolor": "none", "edgecolor": colour, "linewidth": 0.0}
            axes.fill_between(edges[at : at + 2], boundaries[low], boundaries[high], **style)


def _align(run: TrainingRun, axes: Axes) -> None:
    value, error = run.recorded("delta_align"), run.recorded("delta_align_se")
    axes.axhline(0, color=MUTED, lw=0.8)
    axes.fill_between(run.steps, value - 2 * error, value + 2 * error, color=PURPLE, alpha=0.25, lw=0)
    axes.plot(run.steps, value, color=PURPLE, marker="^", markersize=4)
    axes.set_ylabel("Δ align")
    axes.set_title("contraction gained, transport saved; band: ± 2 SE", fontsize=9, color=MUTED, pad=4)


def _train_and_eval(run: TrainingRun, axes: Axes, name: str, label: str, hint: str, colour: str) -> None:
    """A metric of each training step as a line, held out as dots."""
    steps, values = run.series(name)
    held_out, found = run.series(f"eval_{name}")
    said = [hint]
    if len(steps):
        axes.plot(steps, values, color=colour, lw=1.1, marker="." if len(steps) < 3 else "")
        said.append("line: batches" if len(held_out) else "of each training batch")
    if len(held_out):
        dots = {"ls": "", "marker": "o", "markersize": 6, "markeredgecolor": SURFACE, "markeredgewidth": 0.8}
        axes.plot(held_out, found, color=INK, **dots)
        said.append("dots: held out")
    axes.set_ylabel(label)
    axes.set_title("; ".join(said), fontsize=9, color=MUTED, pad=4)


def _kl(run: TrainingRun, axes: Axes) -> None:
    axes.plot(run.steps, run.recorded("kl"), color=INK, marker="D", markersize=3.5)
    axes.set_ylabel("KL (nats)")
    axes.set_title(f"divergence from {run.origin}, on the prompts", fontsize=9, color=MUTED, pad=4)


def _mark(run: TrainingRun, marks: Axes, panels: list[Axes]) -> None:
    """Onset and destabilisation: a line through all panels, named above the first."""
    marks.set_axis_off()
    low, high = marks.get_xlim()
    for name, dash, y in (("onset", (0, (4, 2)), 0.55), ("destabilisation", (0, (1, 1.2)), 0.0)):
        found = run.onset[name]
        if found is None:
            continue
        step = found["step"]
        for ax in panels:
            ax.axvline(step, color=INK, ls=dash, lw=1.3, path_effects=halo(), zorder=4)
        right = (step - low) / (high - low) > 0.55
        text = {"ha": "right" if right else "left", "va": "bottom", "fontsize": 9, "weight": "bold"}
        arrow = f"{name}, step {step} ▾" if right else f"▾ {name}, step {step}"
        marks.text(step, y, arrow, transform=marks.get_xaxis_transform(), **text)


def _binned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Edges [B+1] and means [B, D] of at most BINS bins of steps."""
    parts = np.array_split(np.arange(len(steps)), min(BINS, len(steps)))
    starts = np.array([steps[part[0]] for part in parts], float)
    gap = float(np.diff(steps).min()) if len(steps) > 1 else 1.0
    edges = np.append(starts, steps[-1] + gap) - gap / 2
    return edges, np.stack([values[part].mean(axis=0) for part in parts])


def _viridis(low: float, high: float) -> Colormap:
    """A part of viridis, dark to light, which shows on white and on black."""
    return LinearSegmentedColormap.from_list("part", mpl.colormaps["viridis"](np.linspace(low, high, SHADES)), SHADES)


def _step_colours(run: TrainingRun) -> tuple[Colormap, Normalize]:
    return _viridis(0.28, 0.85), Normalize(0, max(1, int(run.steps[-1])))


def _signed(value: float) -> str:
    return f"{value:+.3g}".replace("-", "−") if value else "0"


def _room(axes: Axes) -> None:
    """Few ticks, and no magnified noise where all values are one."""
    low, high = axes.get_ylim()
    if high - low < 1e-6:
        axes.set_ylim((low + high) / 2 - 0.05, (low + high) / 2 + 0.05)
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.grid(axis="y")


def _step_axis(axes: Axes) -> None:
    low, high = axes.get_xlim()
    if high - low < 2:
        low, high = math.floor(low), math.ceil(high)
        axes.set(xlim=(low, high), xticks=range(low, high + 1))
    else:
        ticks = [tick for tick in MaxNLocator(7, integer=True).tick_values(low, high) if max(low, 0) <= tick <= high]
        axes.set(xlim=(low, high), xticks=ticks)
    axes.set_xlabel("step of the optimiser")


def _plain_bar(bar: Any) -> None:
    bar.outline.set_visible(False)
    bar.solids.set_edgecolor("face")  # without it, viewers show seams between the steps
    bar.ax.tick_params(length=2)
    bar.ax.minorticks_off()
