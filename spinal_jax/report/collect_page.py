# ruff: noqa: RUF001 (Greek letters and typographic dashes are meant)
"""The page of many runs: a table that sorts and links to their reports, and their depth traces over each other."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from spinal_jax.report.figures import BLUE, GREEN, HEIGHT, PURPLE, VERMILLION, WIDTH, styled
from spinal_jax.report.page import inline, template
from spinal_jax.runs.find import Run
from spinal_jax.runs.table import swept
from spinal_jax.wording import number, plus_minus

PANELS = (("contraction", "contraction α"), ("transport", "transport L (rad)"))
COLOURS, DASHES = (BLUE, VERMILLION, GREEN, PURPLE), ("-", (0, (4, 2)), (0, (1, 1.2)))
NAMED = len(COLOURS) * len(DASHES)  # more lines than that are not told apart by colour and dash
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
    """The page as text, to be put into the folder `out`: equal runs give equal text."""
    traced = [run for run in runs if run.trace is not None]
    picture = _with_hover(overlay_figure(traced, names), traced, names) if traced else None
    return template("index.html").render(
        complete=sum(run.complete for run in runs),
        incomplete=[names[run.folder] for run in runs if not run.complete],
        commands=", ".join(sorted({run.command for run in runs if run.command})),
        traced=len(traced),
        named=len(traced) <= NAMED,
        picture=picture,
        table=_table(runs, names, out),
    )


@styled
def overlay_figure(runs: Sequence[Run], names: Mapping[Path, str]) -> Figure:
    """Contraction and transport over relative depth, one line a run."""
    told = len(runs) <= NAMED
    figure = Figure(figsize=(WIDTH * 1.4, HEIGHT + (0.1 * len(runs) if told else 0)), layout="constrained")
    panels: Any = figure.subplots(2, 1, sharex=True)
    looks = [(colour, dash) for dash in DASHES for colour in COLOURS]
    for axes, (column, label) in zip(panels, PANELS, strict=True):
        axes.set_ylabel(label)
        axes.grid(axis="y")
        axes.set_xlim(-0.02, 1.02)
        for run, (colour, dash) in zip(runs, itertools.cycle(looks), strict=False):
            x, y = _line(run, column)
            line = {"color": colour, "ls": dash} if told else {"color": BLUE, "alpha": 0.45}
            axes.plot(x, y, **line, lw=1.4 if told else 0.9, label=names[run.folder])
    panels[1].set_xlabel("relative depth (0: embeddings, 1: after the last block)")
    if told:
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, columnspacing=1.2, handlelength=2.4)
    return figure


def _line(run: Run, column: str) -> tuple[np.ndarray, np.ndarray]:
    assert run.trace is not None
    return np.arange(run.trace.boundaries) / run.trace.depth, run.trace.columns[column]


@styled
def _with_hover(figure: Figure, runs: Sequence[Run], names: Mapping[Path, str]) -> Markup:
    """The figure for the page; over each line its run's name, over each point its values too."""
    figure.draw_without_rendering()
    height = 72 * figure.get_figheight()
    drawn = []
    for axes, (column, _) in zip(figure.axes, PANELS, strict=True):
        for run in runs:
            x, y = _line(run, column)
            at = np.flatnonzero(np.isfinite(y))
            if not len(at):
                continue
            spots = axes.transData.transform(np.stack([x[at], y[at]], -1)) * 72 / figure.dpi
            points = [(f"{px:.1f}", f"{height - py:.1f}") for px, py in spots]
            path = Markup('<polyline class="hit line" points="{}"><title>{}</title></polyline>').format(
                " ".join(",".join(point) for point in points), names[run.folder]
            )
            dots = [
                Markup('<circle class="hit" cx="{}" cy="{}" r="4"><title>{}</title></circle>').format(
                    *point, _read_out(run, names[run.folder], int(boundary))
                )
                for boundary, point in zip(at, points, strict=True)
            ]
            drawn.append(Markup("<g>{}</g>\n").format(Markup("").join([path, *dots])))
    text = inline(figure, "overlay")
    return Markup(str(text).replace("</svg>", str(Markup("").join(drawn)) + "</svg>"))


def _read_out(run: Run, name: str, boundary: int) -> str:
    assert run.trace is not None
    columns = run.trace.columns
    values = ", ".join(f"{column} {number(columns[column][boundary])}" for column, _ in PANELS)
    return f"{name}, boundary {boundary}: {values}"


def _table(runs: Sequence[Run], names: Mapping[Path, str], out: Path) -> dict[str, Any]:
    """Head and rows: command and state, what was found, the settings that differ."""
    settings = swept(runs)
    shown = [entry for entry in COLUMNS if any(_is_number(run.found.get(entry[0])) for run in runs)]
    cells = []
    for run in runs:
        row = [_word(run.command), _word("complete" if run.complete else "incomplete")]
        row += [_number(run, name) for name, _, _ in shown]
        row += [_word(run.settings.get(name)) for name in settings]
        cells.append(row)
    links = []
    for run in runs:
        report = run.folder / "report.html"
        links.append(Path(os.path.relpath(report, out)).as_posix() if run.complete and report.exists() else "")
    head = [("command", ""), ("state", ""), *((title, unit) for _, title, unit in shown)]
    head += [(name, "") for name in settings]
    return {
        "corner": "run",
        "head": head,
        "keys": [names[run.folder] for run in runs],
        "links": links,
        "rows": cells,
        "incomplete": [names[run.folder] for run in runs if not run.complete],
    }


def _word(value: Any) -> dict[str, str]:
    text = "–" if value is None else str(value)
    return {"text": text, "half": "", "key": "" if value is None else text}


def _number(run: Run, name: str) -> dict[str, str]:
    value, low, high = (float(run.found.get(f"{name}{end}", math.nan)) for end in ("", "_low", "_high"))
    if not math.isfinite(value):
        return {"text": "–", "half": "", "key": ""}
    text, _, half = plus_minus(value, (high - low) / 2).partition(" ± ")
    return {"text": text, "half": half, "key": repr(value)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
