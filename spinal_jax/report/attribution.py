"""The page of an attribution: verdict, figure of all runs, effects, boundaries and correlations, from saved files."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from spinal_jax.comparison.attribution import NUMBERS, Attribution, load_attribution
from spinal_jax.files import write_whole
from spinal_jax.metrics import columns
from spinal_jax.report import charts
from spinal_jax.report.cells import ends
from spinal_jax.report.comparison_figures import COLOURS
from spinal_jax.report.figures import (
    BLUE,
    HEIGHT,
    INK,
    MUTED,
    ROLES,
    SHADE,
    VERMILLION,
    WIDTH,
    axis_label,
    png_bytes,
    styled,
    svg_text,
)
from spinal_jax.report.inline import inline
from spinal_jax.report.sections import (
    Cell,
    Chart,
    Element,
    Page,
    Picture,
    Pictures,
    Points,
    Section,
    Table,
    Text,
    Tile,
    Tiles,
    number_key,
    render,
)
from spinal_jax.stats.jackknife import t_quantile
from spinal_jax.wording import number, plus_minus

ARMS = (("aligned", BLUE, "o"), ("control", VERMILLION, "s"), ("beside", COLOURS["gradient_norm"], "^"))
DEPTH = ("delta_contraction", "delta_transport")
TITLES = {"beside": "third arm"}
LIMITS = (
    "It holds for this base, these prompts and this training budget, and for runs that differ by seed alone.",
    "The margin says how far a single control run moves by itself; another margin may be set with margin=.",
)


def write_attribution_report(folder: str | os.PathLike[str]) -> Path:
    """Draws figures/, summary.md and report.html of an attribution's run folder from its saved files, and returns the
    page's path. UserError where the folder holds none."""
    folder = Path(folder)
    attribution = load_attribution(folder)
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for name, figure in (("runs", runs_figure(attribution)), ("depth", depth_figure(attribution))):
        write_whole(folder / "figures" / f"{name}.png", png_bytes(figure))
        write_whole(folder / "figures" / f"{name}.svg", svg_text(figure, name).encode())
    write_whole(folder / "summary.md", attribution_markdown(attribution).encode("utf-8", errors="xmlcharrefreplace"))
    page = folder / "report.html"
    write_whole(page, render_attribution(attribution).encode("utf-8", errors="xmlcharrefreplace"))
    return page


@styled
def runs_figure(attribution: Attribution) -> Figure:
    """Delta_align of every run, a row an arm, with each arm's mean and its 95 % interval, and the margin shaded; below,
    the effect with its interval."""
    arms = [arm for arm in ARMS if len(attribution.arm(arm[0], "delta_align"))]
    figure = Figure(figsize=(WIDTH, 0.28 * HEIGHT + 0.36 * len(arms)), layout="constrained")
    axes = figure.subplots()
    main = attribution.effects["delta_align"]
    if math.isfinite(main["margin"]):
        axes.axvspan(-main["margin"], main["margin"], color=SHADE, lw=0, zorder=0)
    axes.axvline(0, color=INK, lw=0.8)
    for row, (arm, colour, marker) in enumerate(arms):
        values = attribution.arm(arm, "delta_align")
        at = len(arms) - row
        spread = 0.12 * np.cos(np.pi * np.arange(len(values)))
        axes.plot(values, at + spread, color=colour, marker=marker, ls="", markersize=5, alpha=0.75)
        mean = values.mean()
        axes.plot([mean], [at - 0.3], color=INK, marker="D", markersize=5)
        if len(values) > 1:
            half = t_quantile(len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
            axes.plot([mean - half, mean + half], [at - 0.3] * 2, color=INK, lw=1.4)
    axes.plot([main["low"], main["high"]], [0, 0], color=INK, lw=2.2)
    axes.plot([main["effect"]], [0], color=INK, marker="D", markersize=7)
    axes.set_yticks(range(len(arms) + 1), ["effect", *(TITLES.get(arm, arm) for arm, *_ in reversed(arms))])
    axes.set_ylim(-0.6, len(arms) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(5))  # more labels would touch
    axes.set_xlabel("Δ align;  ◆ mean, 95 % interval;  shaded: the margin", color=MUTED, fontsize=9)
    return figure


def render_attribution(attribution: Attribution) -> str:
    """The page as text: equal attributions give equal text."""
    figure = runs_figure(attribution)
    main = attribution.effects["delta_align"]
    counts = {arm: sum(run["arm"] == arm for run in attribution.runs) for arm, *_ in ARMS}
    margin = "given" if attribution.settings["margin"] is not None else "95 % quantile of |Δ align| over controls"
    first = Tiles(
        [
            Tile(
                "Effect on Δ align",
                *_halved(main["effect"], main["high"] - main["effect"]),
                note="95 % interval, Welch",
            ),
            Tile(
                "Margin",
                number(main["margin"]),
                note=margin,
            ),
            Tile("p", number(main["p_value"], 2), note="permutation of runs"),
            Tile("d over seeds", number(main["d_seed"]), note="mean over sd of aligned runs"),
            Tile("Runs", f"{counts['aligned']} and {counts['control']}", note="aligned and control"),
        ]
    )
    caption = (
        "Δ align of every run against the base, with the mean of each arm; the effect is the aligned arm’s mean minus "
        "the control’s."
    )
    if counts["beside"]:
        caption += " The third arm is shown beside them and not tested."
    sections = [
        Section("All effects", [_effects(attribution)], unfolded=True),
        Section(
            "Geometry and behaviour",
            [Points([c["sentence"] for c in attribution.correlations.values() if c["runs"] > 4])],
        ),
        Section("All boundaries", _boundaries(attribution)),
        Section("All runs", [_runs(attribution)]),
        Section("Caveats", [Points([*attribution.warnings, *LIMITS])]),
    ]
    return render(
        Page(
            title=f"Attribution: {attribution.verdict}",
            kicker="Attribution · several runs against controls",
            heading=attribution.verdict[0].upper() + attribution.verdict[1:],
            answer=[Text(attribution.sentence.replace("Delta_align", "Δ align"), "lead"), first],
            glance=[Pictures([Picture("runs", inline(figure, "runs", []), caption)]), *_over_depth(attribution)],
            sections=sections,
            footer=Markup(
                "The same numbers are in <code>attribution.json</code>, <code>attribution.csv</code> and "
                "<code>effects.csv</code> beside this file. To draw this page again from them: <code>spinal report "
                "DIR</code>, where DIR is the folder this file is in."
            ),
        )
    )


def _over_depth(attribution: Attribution) -> list[Element]:
    """The effect on contraction and transport at each boundary, with 95 % intervals."""
    if not any(np.isfinite(attribution.boundaries[name]["effect"]).any() for name in DEPTH):
        return []
    panels, shaded = [], _terminal(attribution)
    for name in DEPTH:
        effect, low, high = (attribution.boundaries[name][key] for key in ("effect", "low", "high"))
        metric = name.removeprefix("delta_")
        line = charts.Line("effect", effect, columns.column(metric).colour, 0, low, high)
        panels.append(charts.panel(f"Δ {axis_label(metric)}", np.arange(len(effect)), [line], shaded, zero=True))
    words = Markup(
        "<b>The effect over depth.</b> Aligned minus control at each boundary, with 95 % intervals over runs. The "
        "shaded part is the terminal block."
    )
    data = charts.stacked("boundary (0: embeddings)", panels, height=120)
    return [Chart("depth", data, inline(depth_figure(attribution), "depth", []), words)]


def _terminal(attribution: Attribution) -> tuple[float, float] | None:
    """The ends of the terminal block as a chart shades them; None where the runs do not say."""
    first_and_last = attribution.settings["measured"].get("terminal")
    return (first_and_last[0] - 0.5, first_and_last[1] + 0.5) if first_and_last else None


@styled
def depth_figure(attribution: Attribution) -> Figure:
    """The effect on contraction and on transport at each boundary, with its 95 % interval."""
    figure = Figure(figsize=(WIDTH, 0.7 * HEIGHT), layout="constrained")
    axes: Any = figure.subplots(len(DEPTH), 1, sharex=True)
    for ax, name in zip(axes, DEPTH, strict=True):
        effect, low, high = (attribution.boundaries[name][key] for key in ("effect", "low", "high"))
        metric, at = name.removeprefix("delta_"), np.arange(len(effect))
        if shaded := _terminal(attribution):
            ax.axvspan(*shaded, color=SHADE, lw=0, zorder=0)
        ax.axhline(0, color=INK, lw=0.8)
        colour = ROLES[columns.column(metric).colour]
        ax.fill_between(at, low, high, color=colour, alpha=0.2, lw=0)
        ax.plot(at, effect, color=colour, marker="o", markersize=4)
        ax.set_ylabel(f"Δ {axis_label(metric)}")
        ax.grid(axis="y")
    axes[-1].set_xlabel("boundary (0: embeddings)")
    return figure


def _correlations(attribution: Attribution) -> list[str]:
    return [str(each["sentence"]) for each in attribution.correlations.values() if math.isfinite(each["value"])]


def _halved(value: float, half: float) -> tuple[str, str]:
    text, _, rest = plus_minus(value, half).partition(" ± ")
    return text, rest


def _cell(value: float) -> Cell:
    return Cell(number(value), number_key(value))


def _effects(attribution: Attribution) -> Table:
    rows, keys = [], []
    for name, (title, unit) in NUMBERS.items():
        effect = attribution.effects[name]
        if not math.isfinite(effect["effect"]):
            continue
        keys.append(f"{title} ({unit})" if unit else title)
        means = [_cell(effect[f"mean_{arm}"]) for arm in ("aligned", "control")]
        interval = Cell(ends(effect["low"], effect["high"]), number_key(effect["low"]))
        rows.append(
            [*means, _cell(effect["effect"]), interval, Cell(number(effect["p_value"], 2)), _cell(effect["d_seed"])]
        )
    head = [
        ("mean aligned", ""),
        ("mean control", ""),
        ("effect", ""),
        ("95 % interval", ""),
        ("p", ""),
        ("d over seeds", ""),
    ]
    return Table("Effects on every number", "number", head, keys, rows, in_order=False)


def _boundaries(attribution: Attribution) -> list[Element]:
    blocks: list[Element] = [
        Text("p by permutation of runs; p (Holm) after Holm’s correction over boundaries.", "note")
    ]
    head = [("effect", ""), ("95 % interval", ""), ("p", ""), ("p (Holm)", "")]
    for name, column in attribution.boundaries.items():
        rows = [
            [
                _cell(column["effect"][at]),
                Cell(ends(column["low"][at], column["high"][at]), number_key(column["low"][at])),
                Cell(number(column["p"][at], 2), number_key(column["p"][at])),
                Cell(number(column["p_holm"][at], 2), number_key(column["p_holm"][at])),
            ]
            for at in range(len(column["effect"]))
        ]
        blocks.append(
            Table(f"Effect on {name.replace('_', ' ')}", name.replace("_", " "), head, range(len(rows)), rows)
        )
    return blocks


def _runs(attribution: Attribution) -> Table:
    shown = [name for name in NUMBERS if any(math.isfinite(run[name]) for run in attribution.runs)]
    head = [("arm", ""), *((NUMBERS[name][0], NUMBERS[name][1]) for name in shown)]
    rows = [[Cell(run["arm"], run["arm"]), *(_cell(run[name]) for name in shown)] for run in attribution.runs]
    return Table("All runs", "run", head, [Path(run["folder"]).name for run in attribution.runs], rows, in_order=False)


def attribution_markdown(attribution: Attribution) -> str:
    """A Markdown section for a model card: verdict, effects with intervals, correlations, caveats."""
    lines = [f"## Attribution of the alignment footprint (SPINAL): {attribution.verdict}", "", attribution.sentence, ""]
    lines += [
        "| number | aligned | control | effect | 95 % interval | p |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, (title, unit) in NUMBERS.items():
        effect = attribution.effects[name]
        if math.isfinite(effect["effect"]):
            title = f"{title} ({unit})" if unit else title
            title = title.replace("|", "\\|")
            numbers = " | ".join(number(effect[key]) for key in ("mean_aligned", "mean_control", "effect"))
            lines.append(
                f"| {title} | {numbers} | {ends(effect['low'], effect['high'])} | {number(effect['p_value'], 2)} |"
            )
    lines.append("")
    lines += [f"- {line}" for line in _correlations(attribution)]
    lines += [f"- {line}" for line in (*attribution.warnings, *LIMITS)]
    return "\n".join(lines) + "\n"
