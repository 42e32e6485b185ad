"""The page of a depth trace, a self-contained HTML file."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from markupsafe import Markup

from spinal_jax.audit.trace import UNITS, DepthTrace, load_trace
from spinal_jax.files import write_whole
from spinal_jax.metrics import columns
from spinal_jax.metrics.columns import TRACE
from spinal_jax.report import charts, figures
from spinal_jax.report.cells import (
    by_row,
    code,
    describe_positions,
    environment_facts,
    name_boundaries,
    number_cells,
    sha256_markup,
    tile,
)
from spinal_jax.report.inline import Target, inline
from spinal_jax.report.method import method_section
from spinal_jax.report.sections import (
    Chart,
    Element,
    Facts,
    Page,
    Picture,
    Pictures,
    Points,
    Section,
    Table,
    Text,
    Tiles,
    render,
)
from spinal_jax.wording import decimals, number, plus_minus

MODEST = (
    "One checkpoint’s trace is a description. By itself it is no evidence of alignment, or of its absence: that takes "
    "a comparison with a reference checkpoint on the same tokens (spinal compare)."
)
GENERAL = (
    "Intervals say how much the numbers would change with other prompts of the same kind. They say nothing about other "
    "kinds of prompts, another fit window or other positions.",
    "At every boundary, predictions are read through the final norm and the unembedding (the “logit lens”), which were "
    "trained for the last boundary alone. Earlier predictions are a way of looking at the residual stream, not "
    "something that the model says.",
    "α is a slope of singular values of activations. α-ReQ fits eigenvalues of their covariance, the squares: with the "
    "same window and centring its exponent is 2α. The α of tools that look at weight matrices is another quantity.",
)


def write_report(folder: str | os.PathLike[str]) -> Path:
    """Draws the figures and report.html of a run folder from its saved trace, and returns the path of the page."""
    trace = load_trace(folder)
    folder = Path(folder)
    folder = folder if folder.is_dir() else folder.parent
    figures.save_figures(trace, folder)
    page = folder / "report.html"
    write_whole(page, render_report(trace).encode("utf-8", errors="xmlcharrefreplace"))
    return page


def render_report(trace: DepthTrace) -> str:
    """The page as text, deterministic."""
    first, last = trace.terminal
    drawn = {
        name: inline(figure, name, _targets(figure, name, trace)) for name, figure in figures.figures(trace).items()
    }
    return render(
        Page(
            title=f"Depth trace of {trace.model['name']}",
            kicker="Depth trace · one checkpoint",
            heading=trace.model["name"],
            answer=[
                Text(trace_headline(trace), "lead"),
                _tiles(trace),
                Text(_how_sure(trace), "note"),
                Points([MODEST, *trace_caveats(trace)[:1], *trace.warnings], "limits"),
            ],
            glance=[
                Chart(
                    "depth",
                    charts.stacked(
                        f"boundary (0: embeddings, {trace.depth}: after the last block)",
                        [
                            _panel(trace, "contraction"),
                            _panel(trace, "transport"),
                        ],
                    ),
                    drawn["depth"],
                    Markup(
                        "<b>Contraction and transport over depth.</b> Above, how fast the tail of the singular values "
                        "decays; below, how far the block that ends there moved the predicted next-token distribution. "
                        "The shaded part is the terminal block."
                    ),
                )
            ],
            sections=[
                Section("The depth curve", [_curve(trace, drawn["curve"])]),
                Section("Spectra, entropy and curvature", _pictures(drawn)),
                Section(
                    "All boundaries",
                    [
                        Text(
                            f"Boundary 0 is the residual stream that enters the first block, boundary {last} the one "
                            "that leaves the last, before the final norm. Shaded rows are the terminal block. Select a "
                            "column’s name to sort by it.",
                            "note",
                        ),
                        _table(trace),
                    ],
                ),
                Section("Caveats", [Points([*trace_caveats(trace), *GENERAL])]),
                Section("What was measured, on what", [_facts(trace)]),
                method_section(
                    (
                        "contraction",
                        "effective_rank",
                        "transport",
                        "entropy",
                        "curvature",
                        "coherence",
                        "directness",
                        "intervals",
                    ),
                    ("Terminal block", f"The blocks that end at {name_boundaries(range(first, last + 1))}."),
                ),
                Section("Environment", [environment_facts(trace.environment)]),
            ],
            footer=Markup(
                "The same numbers are in <code>trace.json</code> and <code>trace.csv</code> beside this file, the "
                "singular values in <code>spectra.safetensors</code>. To draw this page again from them, without the "
                "model: <code>spinal report DIR</code>, where DIR is the folder this file is in."
            ),
        )
    )


def trace_headline(trace: DepthTrace) -> str:
    """The result in one sentence."""
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


def _tiles(trace: DepthTrace) -> Tiles:
    first, last = trace.terminal
    block = f"mean over {first}–{last}" if last > first else f"boundary {last}"
    found = []
    for name, label, note in (
        ("contraction", "Terminal contraction α", block),
        ("transport", "Terminal transport L", block),
        ("coherence", "Coherence", "1 steady trend, 0 zigzag"),
        ("directness", "Directness", "1 straight path, 0 roundabout"),
    ):
        low, high = trace.summary_interval(name)
        found.append(tile(label, trace.summary[name], (high - low) / 2, UNITS.get(name, ""), note))
    return Tiles(found)


def _how_sure(trace: DepthTrace) -> str:
    said = "No intervals: they need two groups of prompts or more."
    freedom = trace.summary["degrees_of_freedom"]
    if freedom >= 1:
        said = (
            f"± is half of a 95 % interval: jackknife over {trace.prompts['groups']} groups of prompts, Student’s t "
            f"with {freedom} degrees of freedom."
        )
    names = ("contraction", "transport")
    earlier = {name: trace.columns[name][1 : trace.terminal[0]] for name in names}
    if all(np.isfinite(values).any() for values in earlier.values()):
        alpha, length = (number(float(np.nanmean(earlier[name]))) for name in names)
        where = name_boundaries(range(1, trace.terminal[0]))
        said += f" Before the terminal block, over {where}, the means are α = {alpha} and L = {length} rad."
    return f"{said} The whole path is {number(trace.summary['path_length'])} rad long."


def _panel(trace: DepthTrace, name: str) -> dict[str, object]:
    first, last = trace.terminal
    low, high = trace.interval(name)
    line = charts.Line(name, trace.columns[name], columns.column(name).colour, low=low, high=high)
    return charts.panel(figures.axis_label(name), np.arange(trace.boundaries), [line], shaded=(first - 0.5, last + 0.5))


def _curve(trace: DepthTrace, still: Markup) -> Chart:
    points = np.stack([np.arange(trace.boundaries), trace.columns["contraction"], trace.columns["transport"]], -1)
    data = charts.rotated(
        ("boundary", "contraction α", "transport L"), [(str(trace.model["name"]), "blue", points)], trace.terminal[0]
    )
    words = Markup(
        "<b>The depth curve.</b> One point per boundary, with depth, contraction and transport as its coordinates; the "
        "outlined points are the terminal block."
    )
    return Chart("curve", data, still, words)


def _pictures(drawn: dict[str, Markup]) -> list[Element]:
    words = {
        "spectra": Markup(
            "<b>Spectra behind the contraction.</b> Singular values of some boundaries against their rank. A dashed "
            "line is the fit over its window, and its slope is −α: trust α where the two lie on each other."
        ),
        "entropy": Markup(
            "<b>Entropy and curvature.</b> Above, how uncertain the prediction at each boundary is; below, how sharply "
            "the path of predictions turns there, between 0 (straight on) and π (back the way it came)."
        ),
    }
    hint = "Point at a boundary to read its values."
    found: list[Element] = [
        Pictures(
            [
                Picture(name, drawn[name], words[name], hint if name == "entropy" else "")
                for name in words
                if name in drawn
            ]
        )
    ]
    if "spectra" not in drawn:
        found.append(Text("The singular values were not saved beside this trace, so their picture is missing.", "note"))
    return found


def _targets(figure: figures.Figure, name: str, trace: DepthTrace) -> Sequence[Target]:
    if name != "entropy":
        return []
    bands = figures.hover_bands(figure, trace)
    return [(f"boundary {at}: {_read_out(trace, ('entropy', 'curvature'), at)}", box) for at, *box in bands]


def _read_out(trace: DepthTrace, names: tuple[str, ...], at: int) -> str:
    parts = []
    for name in names:
        low, high = trace.interval(name)
        value = trace.columns[name][at]
        unit = UNITS.get(name, "") if math.isfinite(value) else ""
        parts.append(f"{name} {plus_minus(value, (high[at] - low[at]) / 2)} {unit}".rstrip())
    return ", ".join(parts)


def _table(trace: DepthTrace) -> Table:
    """All columns by boundary."""
    cells = []
    for about in TRACE:
        half = None
        if about.error:
            low, high = trace.interval(about.name)
            half = (high - low) / 2
        cells.append(
            number_cells(trace.columns[about.name], half, most=4 if about.decimals is None else about.decimals)
        )
    first, last = trace.terminal
    return Table(
        "Every quantity at every boundary",
        "boundary",
        [(about.label, about.unit) for about in TRACE],
        list(range(trace.boundaries)),
        by_row(cells),
        marked=range(first, last + 1),
    )


def _facts(trace: DepthTrace) -> Facts:
    model, prompts, settings = trace.model, trace.prompts, trace.settings
    low, high = settings["window"]
    source = Markup("{}{}<br>{}").format(
        code(model["source"]),
        f", revision {model['revision']}" if model["revision"] else "",
        sha256_markup(model["sha256"]),
    )
    said = Markup("{:,} from {} ({} format, {}), at most {:,} tokens each, {:,} tokens together{}<br>{}").format(
        prompts["count"],
        code(prompts["source"]),
        prompts["format"],
        "chat template applied" if prompts["chat_template"] else "no chat template",
        prompts["max_length"],
        prompts["tokens"],
        f"; {prompts['skipped_empty']} empty skipped" if prompts["skipped_empty"] else "",
        sha256_markup(prompts["sha256"]),
    )
    skip = {0: "Every token", 1: "Every token but the first"}.get(
        settings["skip"], f"Every token but the first {settings['skip']}"
    )
    lens = "full vocabulary"
    if settings["top_k"] is not None:
        lens = (
            f"the {settings['top_k']} likeliest tokens of each of the two distributions and one bucket for the rest, "
            "so transport is a lower bound"
        )
    return Facts(
        [
            (
                "Model",
                f"{model['name']}, {model['family']} family: {model['parameters']:,} parameters, {model['layers']} "
                f"blocks, width d = {model['width']:,}, vocabulary {model['vocabulary']:,}, computed in "
                f"{model['dtype']}",
            ),
            ("Source", source),
            ("Prompts", said),
            (
                "Contraction rows",
                f"N = {prompts['rows']:,} against 4d = {4 * model['width']:,} required: "
                f"{number(prompts['rows'] / model['width'], 2)} rows per dimension. {skip} of each prompt, "
                f"{'centred' if settings['center'] else 'not centred'}",
            ),
            ("Fit window", f"{100 * low:g} to {100 * high:g} % of the ranks"),
            (
                "Transport positions",
                Markup("{:,}: {} ({})").format(
                    prompts["positions"], describe_positions(settings["positions"]), code(settings["positions"])
                ),
            ),
            ("Predictions", f"{lens}, temperature {settings['temperature']}"),
            ("Groups", f"{prompts['groups']} groups of prompts"),
        ]
    )


def trace_caveats(trace: DepthTrace) -> list[str]:
    """Caveats of a trace: its conditions, then its warnings."""
    columns, rows, width = trace.columns, trace.prompts["rows"], trace.model["width"]
    equal_n = "compare it only with a trace of equal N on the same tokens."
    if rows < 4 * width:
        said = [
            f"Few rows for this width: N = {rows:,} is {rows / width:.1f} per dimension, and 4 (N = {4 * width:,}) are "
            f"required. The sampled tail is then steeper than the true one, so contraction is biased upwards; {equal_n}"
        ]
    else:
        said = [
            f"N = {rows:,} rows are {rows / width:.1f} per dimension of the residual stream; 4 are required. "
            f"Contraction still depends on N: {equal_n}"
        ]
    if any(warning.startswith("Contraction still depends on N") for warning in trace.warnings):
        said = [words.removesuffix(f" Contraction still depends on N: {equal_n}") for words in said]
    missing = np.flatnonzero(np.isnan(columns["contraction"]))
    if len(missing):
        said.append(f"Contraction is not defined at {name_boundaries(missing)}: the warnings below say why.")
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
    return said + [f"Warning from the measurement: {warning}" for warning in trace.warnings]
