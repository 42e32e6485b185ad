"""Figures of the scaling study, in the hand of the project's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from spinal_jax.comparison.record import load_comparison
from spinal_jax.files import write_whole
from spinal_jax.report.figures import (
    BLUE,
    GREEN,
    HEIGHT,
    INK,
    MARKERS,
    MUTED,
    VERMILLION,
    WIDTH,
    label_logs,
    png_bytes,
    styled,
)
from spinal_jax.runs.find import Run

LOOKS = {"dpo": (BLUE, "o"), "sft": (GREEN, "s"), "shuffled": (VERMILLION, "^")}
SHIFT = {"dpo": 0.96, "sft": 1.0, "shuffled": 1.04}  # arms side by side
PANELS = (
    ("abs_delta_align", "|Δ align|"),
    ("gradient_density", "terminal gradient share / even share"),
    ("coherence", "coherence"),
    ("policy_distance_centroid", "centroid of the policy distance"),
)
Row = Mapping[str, Any]


def draw(
    main: Sequence[Row],
    rows: Sequence[Row],
    fits: Sequence[Row],
    where: Sequence[tuple[Run, Row]],
    out: Path,
) -> None:
    """Writes every figure that the runs have something for, as PNG and SVG; `main` are the arms at all sizes."""
    drawn = {
        "against_size": against_size(main, fits),
        "delta_align": signed(main),
        "against_kl": scatter(main, "kl", "KL to the base, nats", "log"),
        "against_accuracy": scatter(main, "accuracy", "held-out preference accuracy", "linear"),
        "onset": onset(main),
        "where": where_it_is(where),
    }
    for swept, name, label in (("beta", "beta", "β"), ("rate", "learning_rate", "learning rate")):
        sizes = {row["size"] for row in rows if row["swept"] == swept}
        some = [row for row in rows if row["arm"] == "dpo" and row["swept"] in ("", swept) and row["size"] in sizes]
        if len({row[name] for row in some}) > 1:
            drawn[name] = scatter(some, name, label, "log")
    for name, figure in drawn.items():
        write_whole(out / f"{name}.png", png_bytes(figure))


@styled
def against_size(rows: Sequence[Row], fits: Sequence[Row]) -> Figure:
    """Four parts of the footprint against parameters: a small mark a seed, a large one their mean, DPO's power law."""
    panels = [panel for panel in PANELS if any(np.isfinite(row[panel[0]]) for row in rows)]
    down, across = (2, 2) if len(panels) == 4 else (1, len(panels))
    figure = Figure(figsize=(2 * WIDTH, (0.3 + 0.55 * down) * HEIGHT), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(down, across, sharex=True, squeeze=False).flat, panels, strict=True):
        _marks(axes, rows, name)
        axes.set_ylabel(label)
        _over_sizes(axes, rows)
        if name == "abs_delta_align":
            axes.set_yscale("log")
        law = next((f for f in fits if f["arm"] == "dpo" and f["quantity"] == name and f["kind"] == "power"), None)
        if law is not None:
            _line(axes, [row for row in rows if row["arm"] == "dpo" and np.isfinite(row[name])], name, law["slope"])
        if name == "abs_delta_align":
            label_logs(axes.yaxis)
    for axes in figure.axes[: (down - 1) * across]:
        axes.set_xlabel("")
    _legend(figure, "dashed: DPO's power law; large marks: means over seeds")
    return figure


@styled
def signed(rows: Sequence[Row]) -> Figure:
    """Delta_align with its sign against parameters."""
    figure = Figure(figsize=(WIDTH, 0.8 * HEIGHT), layout="constrained")
    axes = figure.subplots()
    axes.axhline(0, color=INK, lw=0.9)
    _marks(axes, rows, "delta_align")
    axes.set_ylabel("Δ align")
    _over_sizes(axes, rows)
    _legend(figure, "above 0: contraction, below: expansion")
    return figure


@styled
def scatter(rows: Sequence[Row], x: str, label: str, scale: str) -> Figure:
    """|Delta_align| of every run against something else of it; marks are larger for larger models."""
    figure = Figure(figsize=(WIDTH, 0.8 * HEIGHT), layout="constrained")
    axes = figure.subplots()
    largest = max(row["parameters"] for row in rows)
    for arm, (colour, marker) in LOOKS.items():
        some = [row for row in rows if row["arm"] == arm and np.isfinite(row[x]) and (scale == "linear" or row[x] > 0)]
        if some:
            sizes = [12 + 60 * np.sqrt(row["parameters"] / largest) for row in some]
            axes.scatter(
                [row[x] for row in some],
                [row["abs_delta_align"] for row in some],
                s=sizes,
                c=colour,
                marker=marker,
                alpha=0.7,
                lw=0,
                label=arm,
            )
    axes.set(xscale=scale, yscale="log", xlabel=label, ylabel="|Δ align|")
    for axis, kind in ((axes.xaxis, scale), (axes.yaxis, "log")):
        if kind == "log":
            label_logs(axis)
    axes.grid(axis="y")
    _legend(figure, "larger marks: larger models" if len({row["size"] for row in rows}) > 1 else "a mark a seed")
    return figure


@styled
def onset(rows: Sequence[Row]) -> Figure:
    """The step of the onset against parameters; runs without one are not drawn."""
    figure = Figure(figsize=(WIDTH, 0.8 * HEIGHT), layout="constrained")
    axes = figure.subplots()
    _marks(axes, rows, "onset")
    without = sum(not np.isfinite(row["onset"]) for row in rows)
    axes.set_ylabel("onset, step")
    _over_sizes(axes, rows)
    axes.set_ylim(bottom=0)
    _legend(figure, f"{without} of {len(rows)} runs have no onset")
    return figure


@styled
def where_it_is(runs: Sequence[tuple[Run, Row]]) -> Figure:
    """|delta contraction| and policy distance over relative depth, means over seeds, one line a size, for DPO and for
    shuffled labels."""
    figure = Figure(figsize=(2 * WIDTH, 1.3 * HEIGHT), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey="col")
    sizes = sorted({row["parameters"] for _, row in runs})
    shades = np.linspace(0.25, 1, len(sizes))
    for across, arm in zip(panels, ("dpo", "shuffled"), strict=True):
        colour, _ = LOOKS[arm]
        for axes, name in zip(across, ("delta_contraction", "policy_distance"), strict=True):
            for size, shade, marker in zip(sizes, shades, MARKERS, strict=False):
                some = [run for run, row in runs if row["arm"] == arm and row["parameters"] == size]
                if some:
                    share = np.mean([_shares(run, name) for run in some], axis=0)
                    depth = np.arange(1, len(share) + 1) / len(share)
                    line = {"color": colour, "alpha": float(shade), "marker": marker, "markersize": 4}
                    # A share of a block is as large as its slice of the depth: densities compare models of other depth.
                    axes.plot(depth, share * len(share), **line, label=f"{size / 1e6:.1f}M")
            axes.axhline(1, color=MUTED, lw=0.9, ls=(0, (4, 2)))
            axes.axvspan(2 / 3, 1, color=MUTED, alpha=0.12, lw=0)
            axes.set_title(f"{arm}: {'|Δ contraction|' if name == 'delta_contraction' else 'policy distance'}")
    for axes in panels[1]:
        axes.set_xlabel("relative depth")
    for across in panels:
        across[0].set_ylabel("density (1: even)")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6)
    return figure


def _shares(run: Run, name: str) -> np.ndarray:
    """[D] each block's share of a measure's sum at the last trace."""
    columns = load_comparison(max((run.folder / "traces").iterdir())).columns
    mass = np.abs(columns[name])[1:]
    return mass / mass.sum() if mass.sum() else np.full(len(mass), 1 / len(mass))


def _marks(axes: Axes, rows: Sequence[Row], name: str) -> None:
    for arm, (colour, marker) in LOOKS.items():
        some = [row for row in rows if row["arm"] == arm and np.isfinite(row[name])]
        x = np.array([row["parameters"] * SHIFT[arm] for row in some])
        y = np.array([row[name] for row in some], float)
        axes.plot(x, y, ls="", marker=marker, color=colour, markersize=3, alpha=0.5)
        middle = [(at, y[x == at].mean()) for at in np.unique(x)]
        if middle:
            axes.plot(*zip(*middle, strict=True), ls="", marker=marker, color=colour, markersize=7, label=arm)
    axes.grid(axis="y")


def _over_sizes(axes: Axes, rows: Sequence[Row]) -> None:
    """The horizontal axis, marked at the sizes that there are."""
    sizes = sorted({row["parameters"] for row in rows})
    axes.set(xscale="log", xlabel="parameters")
    axes.set_xticks(sizes, [f"{size / 1e6:.1f}M" for size in sizes])
    axes.minorticks_off()


def _line(axes: Axes, rows: Sequence[Row], name: str, slope: float) -> None:
    """The power law through the middle of the means over seeds."""
    sizes = np.unique([row["parameters"] for row in rows]).astype(float)
    values = [np.mean([row[name] for row in rows if row["parameters"] == size]) for size in sizes]
    level = np.mean(np.log10(values)) - slope * np.mean(np.log10(sizes))
    axes.plot(sizes, 10 ** (level + slope * np.log10(sizes)), color=BLUE, lw=1.1, ls=(0, (4, 2)))


def _legend(figure: Figure, words: str) -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, title=words)
