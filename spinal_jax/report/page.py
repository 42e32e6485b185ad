# ruff: noqa: RUF001 (Greek letters and typographic dashes are meant)
"""The report of a depth trace: one HTML file that loads nothing from anywhere."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from spinal_jax.audit.trace import UNITS, DepthTrace, load_trace
from spinal_jax.files import write_whole
from spinal_jax.report import figures
from spinal_jax.wording import decimals, number, plus_minus

HOVER = {"depth": ("contraction", "transport"), "entropy": ("entropy", "curvature")}
# The figures' colours by role, so that the page can give them other values in the dark.
THEMED = {
    figures.SURFACE: "surface",
    figures.INK: "ink",
    figures.MUTED: "muted",
    figures.GRID: "line",
    figures.SHADE: "shade",
    figures.BLUE: "blue",
    figures.VERMILLION: "vermillion",
    figures.GREEN: "green",
    figures.PURPLE: "purple",
}


def write_report(folder: str | os.PathLike[str]) -> Path:
    """Draws the figures and report.html of a run folder from its saved trace alone, and returns the page's path."""
    trace = load_trace(folder)
    folder = Path(folder)
    folder = folder if folder.is_dir() else folder.parent
    figures.save_figures(trace, folder)
    page = folder / "report.html"
    write_whole(page, render_report(trace).encode("utf-8", errors="xmlcharrefreplace"))
    return page


def render_report(trace: DepthTrace) -> str:
    """The page as text: equal traces give equal text."""
    low, high = trace.settings["window"]
    drawn = figures.figures(trace)
    return template("trace.html").render(
        trace=trace,
        headline=headline(trace),
        tiles=_tiles(trace),
        before=_before(trace),
        per_dimension=trace.prompts["rows"] / trace.model["width"],
        window=f"{100 * low:g} to {100 * high:g} %",
        positions=describe_positions(trace.settings["positions"]),
        pictures={name: inline(figure, name, _strips(figure, name, trace)) for name, figure in drawn.items()},
        table=_table(trace),
        caveats=caveats(trace),
    )


def template(name: str) -> Template:
    """One of the page templates."""
    environment = Environment(
        loader=PackageLoader("spinal_jax.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number)
    return environment.get_template(name)


def describe_positions(selector: str) -> str:
    """A position selector, such as last:4, in words."""
    name, _, count = selector.partition(":")
    words = {
        "last": f"the last {count} tokens of each prompt" if count != "1" else "the last token of each prompt",
        "response": f"the first {count} positions that predict a response token",
        "stride": f"every {count}th token of each prompt",
        "all": "every token of each prompt",
    }
    return words.get(name, selector)


def name_boundaries(boundaries: Iterable[int]) -> str:
    """Boundaries in words, with runs joined: `boundary 3`, or `boundaries 3, 12-18`."""
    runs: list[list[int]] = []
    for at in sorted(boundaries):
        if runs and at == runs[-1][1] + 1:
            runs[-1][1] = at
        else:
            runs.append([at, at])
    several = len(runs) > 1 or runs[0][0] < runs[0][1]
    return ("boundaries " if several else "boundary ") + ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in runs)


def headline(trace: DepthTrace) -> str:
    """What was seen, in one sentence of plain words."""
    first, last = trace.terminal
    clauses = []
    named = False
    for name, words in (
        ("contraction", "the singular values decay with a mean exponent of {}"),
        ("transport", "each block moves the predicted next-token distribution by {} on average"),
        ("coherence", "the two curves have a coherence of {}"),
        ("directness", "the path of the predictions has a directness of {}"),
    ):
        value, (low, high) = trace.summary[name], trace.summary_interval(name)
        text = f"{number(value)} {UNITS.get(name, '')}".rstrip()
        if math.isfinite(value) and math.isfinite(low):
            places = max(decimals(value), decimals(high - low, 2))
            ends = f"{low:.{places}f} to {high:.{places}f}".replace("-", "−")
            text += f" ({ends})" if named else f" (95\u00a0% interval {ends})"
            named = True
        clauses.append(words.format(text) if math.isfinite(value) else f"{name} is not defined")
    where = f"In the last {last - first + 1} of {trace.depth} blocks" if last > first else "In the last block"
    return f"{where}, {clauses[0]} and {clauses[1]}; {clauses[2]}, and {clauses[3]}."


def _tiles(trace: DepthTrace) -> list[dict[str, str]]:
    first, last = trace.terminal
    block = f"mean over {first}–{last}" if last > first else f"boundary {last}"
    tiles = []
    for name, label, note in (
        ("contraction", "Terminal contraction α", block),
        ("transport", "Terminal transport L", block),
        ("coherence", "Coherence", "1 steady trend, 0 zigzag"),
        ("directness", "Directness", "1 straight path, 0 roundabout"),
    ):
        value, (low, high) = trace.summary[name], trace.summary_interval(name)
        text, _, half = plus_minus(value, (high - low) / 2).partition(" ± ")
        tiles.append({"label": label, "value": text, "half": half, "unit": UNITS.get(name, ""), "note": note})
    return tiles


def _before(trace: DepthTrace) -> dict[str, Any] | None:
    """Means over the boundaries 1.. before the terminal block, or None where there are none."""
    names = ("contraction", "transport")
    earlier = {name: trace.columns[name][1 : trace.terminal[0]] for name in names}
    if not all(np.isfinite(values).any() for values in earlier.values()):
        return None
    means = {name: float(np.nanmean(values)) for name, values in earlier.items()}
    return means | {"where": name_boundaries(range(1, trace.terminal[0]))}


def inline(figure: figures.Figure, name: str, strips: Iterable[tuple[str, Sequence[float]]] = ()) -> Markup:
    """The figure as an SVG element of the page: ids of its own, the page's colours, and over it hover targets, each
    (what it says, (x, y, width, height))."""
    text = figures.svg_text(figure, name)
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'\s(?:xmlns(?::xlink)?|version)="[^"]*"', "", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text)
    text = text.replace("xlink:href=", "href=")
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", text)
    for colour, role in THEMED.items():
        text = text.replace(colour, f"var(--{role})")
    # What is left tells depth: lifted in the dark, where the low end would drown.
    text = re.sub(r"(fill|stroke): (#[0-9a-f]{6})", r"\1: color-mix(in srgb, #fff var(--lift), \2)", text)
    text = text.replace("<svg", '<svg role="img" aria-labelledby="caption-' + name + '"', 1)
    strip = Markup('<rect class="hit" x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>\n')
    targets = "".join(strip.format(*(f"{v:.2f}" for v in box), words) for words, box in strips)
    return Markup(text.replace("</svg>", f"{targets}</svg>"))


def _strips(figure: figures.Figure, name: str, trace: DepthTrace) -> list[tuple[str, Sequence[float]]]:
    if name not in HOVER:
        return []
    bands = figures.hover_bands(figure, trace)
    return [(f"boundary {at}: {_read_out(trace, HOVER[name], at)}", box) for at, *box in bands]


def _read_out(trace: DepthTrace, names: tuple[str, ...], at: int) -> str:
    parts = []
    for name in names:
        low, high = trace.interval(name)
        value = trace.columns[name][at]
        unit = UNITS.get(name, "") if math.isfinite(value) else ""
        parts.append(f"{name} {plus_minus(value, (high[at] - low[at]) / 2)} {unit}".rstrip())
    return ", ".join(parts)


def _table(trace: DepthTrace) -> dict[str, Any]:
    """Head and rows of the table of all boundaries; each column with the decimals that suit its median."""
    titles = {
        "contraction": "contraction α",
        "fit_r2": "R² of fit",
        "fit_quadratic": "quadratic",
        "rank": "rank r",
        "effective_rank": "effective rank",
        "transport": "transport L",
        "entropy": "entropy",
        "curvature": "curvature",
    }
    cells: list[list[dict[str, str]]] = [[] for _ in range(trace.boundaries)]
    for name in titles:
        values = trace.columns[name]
        seen = np.abs(values[np.isfinite(values)])
        places = 0 if name == "rank" else min(decimals(float(np.median(seen))), 4) if len(seen) else 0
        half = np.full(len(values), np.nan)
        if f"{name}_se" in trace.columns:
            low, high = trace.interval(name)
            half = (high - low) / 2
            seen = half[np.isfinite(half) & (half > 0)]
            places = min(max(places, decimals(float(np.median(seen)), 1)), 4) if len(seen) else places
        for row, value, width in zip(cells, values, half, strict=True):
            text = f"{value:,.{places}f}".replace("-", "−") if math.isfinite(value) else "–"
            key = repr(float(value)) if math.isfinite(value) else ""
            row.append({"text": text, "half": f"{width:.{places}f}" if math.isfinite(width) else "", "key": key})
    head = [(title, UNITS.get(name, "")) for name, title in titles.items()]
    return {"corner": "boundary", "head": head, "keys": list(range(trace.boundaries)), "rows": cells}


def caveats(trace: DepthTrace) -> list[str]:
    """What a reader must know before trusting the numbers: the trace's own conditions first, then its warnings."""
    columns, rows, width = trace.columns, trace.prompts["rows"], trace.model["width"]
    equal_n = "compare it only with a trace of equal N on the same tokens."
    if rows < 4 * width:
        said = [
            f"Few rows for this width: N = {rows:,} is {rows / width:.1f} per dimension, and 4 (N = {4 * width:,}) are "
            f"wanted. The sampled tail is then steeper than the true one, so contraction is biased upwards; {equal_n}"
        ]
    else:
        said = [
            f"N = {rows:,} rows are {rows / width:.1f} per dimension of the residual stream; at least 4 are wanted. "
            f"Contraction still depends on N: {equal_n}"
        ]
    missing = np.flatnonzero(np.isnan(columns["contraction"]))
    if len(missing):
        said.append(f"Contraction is not defined at {name_boundaries(missing)}: too few ranks in the fit window.")
    if np.isfinite(columns["fit_r2"]).any():
        worst = int(np.nanargmin(columns["fit_r2"]))
        text = f"The straight line fits worst at boundary {worst}, with R² {number(columns['fit_r2'][worst])}"
        if np.isfinite(columns["fit_quadratic"]).any():
            bent = int(np.nanargmax(np.abs(columns["fit_quadratic"])))
            quadratic = number(columns["fit_quadratic"][bent])
            text += (
                f"; the spectrum bends most at boundary {bent}, with a quadratic term of {quadratic} (0 is straight)"
            )
        said.append(f"{text}. Where a spectrum bends, α is a mean slope, and another window gives another.")
    short = np.flatnonzero(columns["rank"] < min(rows, width))
    if len(short):
        least = int(short[np.argmin(columns["rank"][short])])
        said.append(
            f"At {name_boundaries(short)} the smallest singular values are below the resolution of float32 and were "
            f"dropped: r is {columns['rank'][least]:,.0f} of {min(rows, width):,} at boundary {least}. The window is "
            "a share of r, so it covers lower ranks there than elsewhere."
        )
    return said + [f"Warning from the measurement: {warning}" for warning in trace.warnings]
