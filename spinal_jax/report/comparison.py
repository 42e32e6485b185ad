"""The report of a comparison: what changed between two checkpoints, where and how sure that is, from saved files."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from markupsafe import Markup

from spinal_jax.comparison.ranking import rank
from spinal_jax.comparison.record import METRICS, UNITS, Comparison, load_comparison
from spinal_jax.files import write_whole
from spinal_jax.metrics import columns
from spinal_jax.report import charts
from spinal_jax.report.cells import (
    by_row,
    cell,
    ends,
    name_boundaries,
    number_cells,
    percent,
    sha256_markup,
    tile,
)
from spinal_jax.report.comparison_figures import comparison_figures, way
from spinal_jax.report.comparison_tables import (
    boundaries,
    localisation_table,
    models,
    moved_prompts,
    moved_tokens,
    parts,
    ranking_table,
    robustness_table,
)
from spinal_jax.report.comparison_words import (
    comparison_caveats,
    facts,
    half,
    missing,
    score_words,
    summary_markdown,
    targets,
)
from spinal_jax.report.figures import axis_label, png_bytes, svg_text
from spinal_jax.report.inline import inline
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
    Tile,
    Tiles,
    render,
)
from spinal_jax.wording import number


def is_comparison(folder: str | os.PathLike[str]) -> bool:
    """Whether a comparison's run folder, or a comparison.json, is there."""
    path = Path(folder)
    return (path / "comparison.json").is_file() or (path.name == "comparison.json" and path.is_file())


def write_comparison_report(folder: str | os.PathLike[str]) -> Path:
    """Draws the figures, summary.md and report.html of a comparison's run folder from its saved files, and returns the
    page's path. Comparisons under `others/` are ranked with the folder's own.

    Raises:
      UserError: no comparison there, or a file of it that cannot be read.
    """
    comparison = load_comparison(folder)
    folder = Path(folder)
    folder = folder if folder.is_dir() else folder.parent
    folders = sorted(
        (path.parent for path in folder.glob("others/*/comparison.json")), key=lambda path: (len(path.name), path.name)
    )
    others = [load_comparison(place) for place in folders]
    target = folder / "figures"
    target.mkdir(parents=True, exist_ok=True)
    for name, figure in comparison_figures(comparison, _ranked(comparison, others)).items():
        write_whole(target / f"{name}.png", png_bytes(figure))
        write_whole(target / f"{name}.svg", svg_text(figure, name).encode())
    page = folder / "report.html"
    write_whole(folder / "summary.md", summary_markdown(comparison, others).encode("utf-8", errors="xmlcharrefreplace"))
    write_whole(page, render_comparison_report(comparison, others).encode("utf-8", errors="xmlcharrefreplace"))
    return page


def render_comparison_report(comparison: Comparison, others: Sequence[Comparison] = ()) -> str:
    """The page as text: equal comparisons give equal text."""
    ranked = _ranked(comparison, others)
    figures = comparison_figures(comparison, ranked)
    drawn = {name: inline(figure, name, targets(figure, name, comparison)) for name, figure in figures.items()}
    names = f"{comparison.aligned['name']} against {comparison.reference['name']}"
    first, last = comparison.terminal
    block = name_boundaries(range(first, last + 1))
    sections = [
        Section("What changed", _changes(comparison, drawn)),
        Section("Where it changed", _where(comparison, drawn)),
        Section("Does it hold under other settings", _robustness(comparison, drawn)),
        Section("Which prompts moved it", _groups(comparison)),
        Section("The score and its parts", [parts(comparison), Text(score_words(comparison), "note")]),
    ]
    if ranked:
        sections.append(Section("More than two checkpoints", _ranking(comparison, ranked, drawn)))
    sections += [
        Section("All boundaries", [Text(_TABLE_NOTE, "note"), boundaries(comparison)]),
        Section("Caveats", [Points(comparison_caveats(comparison))]),
        Section("What was compared, on what", [models(comparison), Facts([*facts(comparison), *_hashes(comparison)])]),
        method_section(
            (
                "contraction",
                "transport",
                "delta_align",
                "policy_distance",
                "gradient_share",
                "coherence",
                "intervals",
                "p_values",
            ),
            ("Terminal block", f"The blocks that end at {block}."),
            ("Verdict", _VERDICT),
        ),
    ]
    return render(
        Page(
            title=f"{names}: {comparison.verdict}",
            kicker=f"Comparison · {names}",
            heading=comparison.verdict[0].upper() + comparison.verdict[1:],
            answer=[
                Text(lead(comparison, block), "lead"),
                Points(_limits(comparison), "limits"),
                _tiles(comparison),
                Text(_how_sure(comparison, block), "note"),
            ],
            glance=[_traces(comparison, drawn["traces"], 140 if ranked else 190), *_beside(ranked, drawn)],
            sections=sections,
            footer=_footer(bool(ranked)),
        )
    )


def lead(comparison: Comparison, block: str) -> str:
    """Delta_align with its interval, in one sentence."""
    value, low, high, p = (
        float(comparison.summary[name]) for name in ("delta_align", "delta_align_low", "delta_align_high", "p_value")
    )
    if math.isnan(value):
        return f"Δ align is not defined over {block}."
    interval = "no interval" if math.isnan(low) else f"95\u00a0% interval {ends(low, high)}"
    test = "" if math.isnan(p) else f", p\u00a0=\u00a0{number(p, 2)}"
    return f"Over {block}, Δ align is {number(value)} ({interval}{test})."


def _limits(comparison: Comparison) -> list[str]:
    """What the sentence cannot say, for the first screen."""
    summary = comparison.summary
    said = (summary["because"], summary["driver_sentence"], comparison.robustness["sentence"], summary["limits"])
    return [str(line).replace("Delta_align", "Δ align") for line in said if line]


def _tiles(comparison: Comparison) -> Tiles:
    summary, robustness = comparison.summary, comparison.robustness
    p = float(summary["p_value"])
    items = [
        tile(
            "Δ align",
            summary["delta_align"],
            half(comparison, "delta_align"),
            "",
            "no p-value" if math.isnan(p) else f"p = {number(p, 2)}",
        ),
        Tile("Sign holds", f"{robustness['holds']} of {robustness['of']}", note="settings of the measurement"),
        *(
            tile(label, summary[name], half(comparison, name), unit, note)
            for name, label, unit, note in (
                ("output_distance", "Policy distance", "rad", "between the outputs, 0 to π"),
                ("kl", "KL of the outputs", "nats", "aligned from reference"),
            )
            if math.isfinite(summary[name])
        ),
        tile(
            "Δ contraction α", summary["delta_contraction"], half(comparison, "delta_contraction"), "", "terminal block"
        ),
        tile("Δ transport L", summary["delta_transport"], half(comparison, "delta_transport"), "rad", "terminal block"),
    ]
    return Tiles(items)


def _how_sure(comparison: Comparison, block: str) -> str:
    said = (
        "Δ is aligned minus reference. Δ align (Delta_align in the files) is Δ contraction minus Δ transport, means "
        f"over {block}: positive means toward contraction, negative toward expansion. "
    )
    freedom = comparison.summary["degrees_of_freedom"]
    if freedom < 1:
        return said + "No intervals: they need two groups of prompts or more."
    return said + (
        f"± is half of a 95 % interval: jackknife over {comparison.prompts['groups']} groups of prompts, Student’s t "
        f"with {freedom} degrees of freedom."
    )


def _beside(ranked: Sequence[Comparison], drawn: Mapping[str, Markup]) -> list[Element]:
    """The size of the effect beside that of other checkpoints, such as controls, where there are any."""
    if not ranked:
        return []
    words = Markup(
        "<b>Beside other checkpoints.</b> Δ align of each against its reference, with 95 % intervals, strongest "
        "contraction first. Checkpoints whose intervals overlap are not told apart."
    )
    return [Pictures([Picture("ranking", drawn["ranking"], words)])]


def _traces(comparison: Comparison, still: Markup, height: int) -> Chart:
    """Both depth traces over each other."""
    x, (first, last) = np.arange(comparison.boundaries), comparison.terminal
    panels = []
    for name in ("contraction", "transport"):
        lines = []
        for side, colour, look in (("aligned", columns.column(name).colour, 0), ("reference", "ink", 1)):
            values, low, high = (comparison.columns[f"{side}_{name}{end}"] for end in ("", "_low", "_high"))
            lines.append(charts.Line(side, values, colour, look, low, high))
        panels.append(charts.panel(axis_label(name), x, lines, shaded=(first - 0.5, last + 0.5)))
    data = charts.stacked(f"boundary (0: embeddings, {comparison.depth}: after the last block)", panels, height)
    words = (
        "<b>The two depth traces.</b> Contraction and transport of the aligned model (solid) and the reference "
        "(dashed) on the same tokens. The shaded part is the terminal block."
    )
    return Chart("traces", data, still, Markup(words))


def _changes(comparison: Comparison, drawn: Mapping[str, Markup]) -> list[Element]:
    x, (first, last) = np.arange(comparison.boundaries), comparison.terminal
    panels = []
    for name in METRICS:
        values, low, high = (comparison.columns[f"delta_{name}{end}"] for end in ("", "_low", "_high"))
        line = charts.Line(f"Δ {name.replace('_', ' ')}", values, columns.column(name).colour, 0, low, high)
        panels.append(charts.panel(f"Δ {axis_label(name)}", x, [line], (first - 0.5, last + 0.5), zero=True))
    words = Markup(
        "<b>What changed.</b> Aligned minus reference at each boundary, with 95 % intervals. The table of all "
        "boundaries marks significant changes with an asterisk; figures/deltas.png, and this page on paper, with "
        "filled points (p below 0.05 by sign flips, after Holm’s correction over boundaries)."
    )
    chart = Chart("deltas", charts.stacked("boundary", panels, height=132), drawn["deltas"], words)
    pictures = []
    if "policy" in drawn:
        words = Markup(
            "<b>Policy distance.</b> How far apart the two models’ next-token distributions are at each boundary, from "
            "0 (equal) to π (disjoint)."
        )
        pictures.append(Picture("policy", drawn["policy"], words, "Point at a boundary to read its value."))
    if "gradient" in drawn:
        apart = comparison.summary["gradient_apart"]
        said = ", ".join(f"{name.replace('_', ' ')} {number(apart[name])}" for name in sorted(apart))
        words = Markup(
            "<b>Preference gradient.</b> The norm of the preference loss’s gradient over each block’s parameters.{}"
        )
        words = words.format(f" Apart from the blocks: {said}." if said else "")
        pictures.append(Picture("gradient", drawn["gradient"], words, "Point at a block to read its value."))
    lost = [Text(Markup("{} <code>{}</code>").format(said, command), "note") for said, command in missing(comparison)]
    return [chart, *([Pictures(pictures)] if pictures else []), *lost]


def _where(comparison: Comparison, drawn: Mapping[str, Markup]) -> list[Element]:
    words = Markup(
        "<b>Where it changed.</b> Each block’s share of the whole change, for each measure. The thick bar above is the "
        "shortest run of blocks that holds 80 %."
    )
    picture = Picture("where", drawn["where"], words, "Point at a block to read its shares.")
    note = Text(
        "Relative depth runs from 0 (embeddings) to 1 (after the last block). The shortest run is that of blocks which "
        "hold 80 % of the change; beside it how many of the groups agree when each is left out.",
        "note",
    )
    return [Pictures([picture]), localisation_table(comparison), note]


def _robustness(comparison: Comparison, drawn: Mapping[str, Markup]) -> list[Element]:
    tall = len({way(setting) for setting in comparison.robustness["settings"]}) > 3
    words = Markup(
        "<b>Does it hold?</b> Δ align under other settings of the measurement. {} Names are those of the settings; "
        "“center” is the other choice of centring."
    ).format(comparison.robustness["sentence"])
    picture = Picture("robustness", drawn["robustness"], words, "Point at a setting to read its values.", tall)
    return [Pictures([picture]), robustness_table(comparison)]


def _groups(comparison: Comparison) -> list[Element]:
    """The pseudo-value of each group of prompts, largest deviation first."""
    values = comparison.arrays.get("groups/delta_align")
    if values is None or len(values) < 2 or not np.isfinite(values).any():
        return [Text("The comparison has no pseudo-values of groups, so contributions are not known.", "note")]
    mean = float(np.nanmean(values))
    first, last = comparison.terminal
    parts = {
        name: np.nanmean(comparison.arrays[f"groups/delta_{name}"][:, first : last + 1], axis=1)
        for name in ("contraction", "transport")
        if f"groups/delta_{name}" in comparison.arrays
    }
    order = np.argsort(-np.abs(values - mean), kind="stable")
    total = float(np.nansum((values - mean) ** 2)) or math.nan
    columns = [number_cells(values[order]), number_cells((values - mean)[order])]
    columns.append(
        [
            cell(percent(share) if math.isfinite(share) else "–", share)
            for share in ((values - mean)[order] ** 2 / total).tolist()
        ]
    )
    columns += [number_cells(numbers[order]) for numbers in parts.values()]
    head = [("Δ align of the group", ""), ("minus the mean", ""), ("share of the variance", "")]
    head += [(f"Δ {name}", UNITS.get(name, "")) for name in parts]
    opposite = int(np.sum(np.sign(values) == -np.sign(mean)))
    table = Table(
        "Contribution of each group of prompts", "group", head, order.tolist(), by_row(columns), in_order=False
    )
    words = (
        f"The jackknife’s pseudo-values: the estimate from each of the {len(values)} groups of prompts alone; their "
        f"mean is {number(mean)}. {opposite} of them have the opposite sign. A group far from the others moved the "
        "result, or widened its interval, more than the rest."
    )
    bars = charts.Line("Δ align of the group", values, "purple", look=3)
    data = charts.stacked("group", [charts.panel("Δ align", np.arange(len(values)), [bars], zero=True)], height=170)
    blocks: list[Element] = [Text(words), Chart("groups", data, Markup(""), "Each point is a group of prompts."), table]
    if comparison.moved:
        return [*blocks, Text(_PROMPTS_NOTE), moved_prompts(comparison), Text(_TOKENS_NOTE), moved_tokens(comparison)]
    return [*blocks, Text(_NO_PROMPTS, "note")]


_PROMPTS_NOTE = (
    "Prompts of the groups farthest from the mean, those whose transport in the terminal block changed most first. The "
    "share of a prompt is its part of the sum of all prompts’ absolute changes of transport. Contraction has no such "
    "parts: it is a property of all rows together."
)
_TOKENS_NOTE = "The measured tokens of these prompts at which the steps of the two models differ most, in brackets."
_NO_PROMPTS = (
    "This run kept no prompts. With keep_prompts=3, spinal compare keeps three prompts of each of these groups and the "
    "tokens at which the two models differ most."
)


def _ranking(comparison: Comparison, ranked: Sequence[Comparison], drawn: Mapping[str, Markup]) -> list[Element]:
    words = Markup(
        "<b>Where each changed.</b> Changes of contraction and transport over relative depth, numbered as ranked."
    )
    shaded = [place for place, each in enumerate(ranked, 1) if each is comparison]
    return [
        Pictures([Picture("overlay", drawn["overlay"], words)]),
        ranking_table(ranked, shaded),
        Text("The shaded row is the comparison that this page is about. Select a column’s name to sort by it.", "note"),
    ]


def _hashes(comparison: Comparison) -> list[tuple[str, str | Markup]]:
    return [
        ("Weights, aligned", sha256_markup(comparison.aligned["sha256"])),
        ("Weights, reference", sha256_markup(comparison.reference["sha256"])),
        ("Prompts", sha256_markup(comparison.prompts["sha256"])),
    ]


def _ranked(comparison: Comparison, others: Sequence[Comparison]) -> tuple[Comparison, ...]:
    """Strongest first; empty where there is nothing to rank against."""
    return rank([comparison, *others]).comparisons if others else ()


def _footer(ranked: bool) -> Markup:
    return Markup(
        "The same numbers are in <code>comparison.json</code> and <code>comparison.csv</code> beside this file{}, a "
        "summary for a model card in <code>summary.md</code>. To draw this page again from them, without the models: "
        "<code>spinal report DIR</code>, where DIR is the folder this file is in."
    ).format(Markup(", the ranking in <code>ranking.csv</code>") if ranked else "")


_TABLE_NOTE = (
    "Aligned minus reference. * p below 0.05 after Holm’s correction over boundaries. Shaded rows are the "
    "terminal block. Select a column’s name to sort by it."
)
_VERDICT = (
    "“Toward contraction” (“toward expansion”) when the 95 % interval of Δ align lies above (below) 0 and its sign "
    "holds in at least 80 % of the settings of the measurement; “differs, direction not robust” when only the first "
    "is so; else “no detectable change”. "
    "“Undetermined” where there is no interval, or fewer rows than four times the width."
)
