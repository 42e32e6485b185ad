"""The page of several runs: results, a sortable table, and depth traces."""

from __future__ import annotations

import itertools
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from spinal_jax.report import charts
from spinal_jax.report.cells import by_row, cell, ends, measured, word
from spinal_jax.report.figures import BLUE, GREEN, HEIGHT, MARKERS, PURPLE, VERMILLION, WIDTH, styled
from spinal_jax.report.inline import inline
from spinal_jax.report.sections import Cell, Chart, Element, Page, Points, Section, Table, Text, render
from spinal_jax.runs.find import Run
from spinal_jax.runs.table import swept
from spinal_jax.wording import number

PANELS = (("contraction", "contraction α"), ("transport", "transport L (rad)"))
COLOURS, DASHES = (BLUE, VERMILLION, GREEN, PURPLE), ("-", (0, (4, 2)), (0, (1, 1.2)))
ROLES = ("blue", "vermillion", "green", "purple")
NAMED = len(COLOURS) * len(DASHES)  # maximum number of lines with distinct colour and dash
# Columns after the settings: what it is called among what was found, title, unit.
COLUMNS = (
    ("delta_align", "Δ align", ""),
    ("contraction", "contraction", ""),
    ("transport", "transport", "rad"),
    ("coherence", "coherence", ""),
    ("kl", "KL", "nats"),
    ("eval_rewards/accuracies", "held-out accuracy", ""),
    ("eval_loss", "held-out loss", ""),
    ("onset", "onset", "step"),
    ("destabilisation", "destabilised", "step"),
)


def render_index(runs: Sequence[Run], names: Mapping[Path, str], out: Path) -> str:
    """The page as text for the folder `out`, deterministic."""
    traced = [run for run in runs if run.trace is not None]
    lost = [names[run.folder] for run in runs if not run.complete]
    said = f"{len(runs) - len(lost)} complete, {len(lost)} incomplete" if lost else "all complete"
    table: list[Element] = [
        Text(
            "A run’s name leads to its report. The settings in which these runs differ come first. ± is half of a 95 % "
            "interval over groups of prompts. Shaded rows are incomplete: nothing but their settings is shown. Select "
            "a column’s name to sort by it.",
            "note",
        ),
        _table(runs, names, out, lost),
    ]
    return render(
        Page(
            title=f"{len(runs)} runs",
            kicker=f"Runs · {', '.join(sorted({run.command for run in runs if run.command}))}",
            heading=f"{len(runs)} run{'s' if len(runs) != 1 else ''}: {said}",
            answer=[Points(findings(runs, names))],
            glance=[_overlay(traced, names)] if traced else [],
            sections=[Section("All runs", table, unfolded=True)],
            footer=Markup(
                "The same numbers, and more, are in <code>runs.csv</code> beside this file. To make both again: "
                "<code>spinal collect DIR</code>, where DIR holds the runs."
            ),
        )
    )


def findings(runs: Sequence[Run], names: Mapping[Path, str]) -> list[str]:
    """Results of the complete runs in a few sentences."""
    said = []
    verdicts = Counter(str(run.results["verdict"]) for run in runs if run.results.get("verdict"))
    if verdicts:
        said.append("Verdicts: " + "; ".join(f"{verdict} ({count})" for verdict, count in verdicts.most_common()) + ".")
    measured = [run for run in runs if _is_number(run.results.get("delta_align"))]
    if measured:
        low, high = (
            np.array([float(run.results.get(f"delta_align_{e}", math.nan)) for run in measured])
            for e in ("low", "high")
        )
        values = np.array([float(run.results["delta_align"]) for run in measured])
        said.append(
            f"Δ align, {len(measured)} runs: its interval lies above 0 in {int((low > 0).sum())}, below 0 in "
            f"{int((high < 0).sum())}; it runs from {number(values.min())} ({names[measured[values.argmin()].folder]}) "
            f"to {number(values.max())} ({names[measured[values.argmax()].folder]}). Runs of one study are told apart "
            "by controls (spinal attribute), not by counting intervals."
        )
    trained = [run for run in runs if run.complete and run.command in ("train", "watch")]
    if trained:
        parts = []
        for name, title in (("onset", "an onset"), ("destabilisation", "a destabilisation")):
            steps = [float(run.results[name]) for run in trained if _is_number(run.results.get(name))]
            where = (
                ""
                if not steps
                else f" (step {min(steps):g})"
                if len(steps) == 1
                else f" (steps {min(steps):g} to {max(steps):g})"
            )
            parts.append(f"{title} in {len(steps)}{where}")
        said.append(f"{len(trained)} training run{'s' if len(trained) != 1 else ''}: {' and '.join(parts)}.")
    for name, title, unit in COLUMNS[1:3]:
        values = np.array([float(run.results[name]) for run in runs if _is_number(run.results.get(name))])
        if len(values) > 1:
            said.append(
                f"Terminal {title}: {ends(float(values.min()), float(values.max()))} {unit}".rstrip()
                + f" over {len(values)} runs."
            )
    return said or ["No complete run: nothing but settings is known."]


@styled
def collected_figure(runs: Sequence[Run], names: Mapping[Path, str]) -> Figure:
    """Contraction and transport over relative depth, one line a run."""
    told = len(runs) <= NAMED
    figure = Figure(figsize=(WIDTH * 1.4, HEIGHT + (0.1 * len(runs) if told else 0)), layout="constrained")
    panels: Any = figure.subplots(2, 1, sharex=True)
    looks = [(colour, dash) for dash in DASHES for colour in COLOURS]
    for axes, (column, label) in zip(panels, PANELS, strict=True):
        axes.set_ylabel(label)
        axes.grid(axis="y")
        axes.set_xlim(-0.02, 1.02)
        for at, (run, (colour, dash)) in enumerate(zip(runs, itertools.cycle(looks), strict=False)):
            x, y = _line(run, column)
            line: dict[str, Any] = {"color": BLUE, "alpha": 0.45}
            if told:
                # Markers are shifted, so that coinciding lines are visible.
                every = (at % 5, 5)
                line = {"color": colour, "ls": dash, "marker": MARKERS[at % len(MARKERS)], "markersize": 4}
                line |= {"markevery": every}
            axes.plot(x, y, **line, lw=1.4 if told else 0.9, label=names[run.folder])
    panels[1].set_xlabel("relative depth (0: embeddings, 1: after the last block)")
    if told:
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, columnspacing=1.2, handlelength=2.4)
    return figure


def _line(run: Run, column: str) -> tuple[np.ndarray, np.ndarray]:
    assert run.trace is not None
    return np.arange(run.trace.boundaries) / run.trace.depth, run.trace.columns[column]


def _overlay(runs: Sequence[Run], names: Mapping[Path, str]) -> Chart:
    """The depth traces over each other; runs of other depths share the axis of relative depth."""
    x = np.unique(np.concatenate([_line(run, "contraction")[0] for run in runs]).round(6))
    panels = []
    for column, label in PANELS:
        lines = []
        for at, run in enumerate(runs):
            values = np.full(len(x), np.nan)
            own, y = _line(run, column)
            values[np.searchsorted(x, own.round(6))] = y
            lines.append(charts.Line(names[run.folder], values, ROLES[at % 4], at // 4 % 3))
        panels.append(charts.panel(label, x, lines))
    words = Markup(
        "<b>The last depth trace of each run.</b> Contraction and transport over relative depth. Runs on other "
        "prompts, or with other settings of the measurement, are drawn all the same: look at the table before "
        "comparing two lines."
    )
    data = charts.stacked("relative depth (0: embeddings, 1: after the last block)", panels, height=200, joined=True)
    return Chart("overlay", data, inline(collected_figure(runs, names), "overlay"), words)


def _table(runs: Sequence[Run], names: Mapping[Path, str], out: Path, lost: Sequence[str]) -> Table:
    """The settings that differ, command and state, what was found."""
    settings = swept(runs)
    shown = [entry for entry in COLUMNS if any(_is_number(run.results.get(entry[0])) for run in runs)]
    columns = [[word(run.settings.get(name)) for run in runs] for name in settings]
    columns += [[_number(run, name) for run in runs] for name, *_ in shown[:1]]
    columns += [[word(run.results.get("verdict")) for run in runs]]
    columns += [[_number(run, name) for run in runs] for name, *_ in shown[1:]]
    columns += [
        [word(run.command) for run in runs],
        [word("complete" if run.complete else "incomplete") for run in runs],
    ]
    head = [(name, "") for name in settings]
    head += [*((title, unit) for _, title, unit in shown[:1]), ("verdict", "")]
    head += [*((title, unit) for _, title, unit in shown[1:]), ("command", ""), ("state", "")]
    keys = [names[run.folder] for run in runs]
    return Table(
        "All runs", "run", head, keys, by_row(columns), lost, [_address(run, out) for run in runs], filtered=True
    )


def _address(run: Run, out: Path) -> str:
    """Where the report of a run is, from the folder `out`: relative, and quoted so that no name is read as a scheme."""
    report = run.folder / "report.html"
    if not (run.complete and report.exists()):
        return ""
    path = quote(os.fsencode(Path(os.path.relpath(report, out)).as_posix()))
    return path if path.startswith("../") else f"./{path}"


def _number(run: Run, name: str) -> Cell:
    value, low, high = (float(run.results.get(f"{name}{end}", math.nan)) for end in ("", "_low", "_high"))
    if name in ("onset", "destabilisation"):
        return cell(f"{value:.0f}" if math.isfinite(value) else "–", value)
    return measured(value, (high - low) / 2)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
