"""The tables of a comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from spinal_jax.comparison.ranking import rank
from spinal_jax.comparison.record import BOTH, LOCALISED, METRICS, Comparison
from spinal_jax.metrics.columns import column as column_of
from spinal_jax.report.cells import by_row, cell, ends, measured, number_cells, percent, word
from spinal_jax.report.comparison_figures import MASSES, SURE, way
from spinal_jax.report.sections import Cell, Table
from spinal_jax.wording import number

# The numbers of the terminal block: name, title, unit, which weight of the score it has.
PARTS = (
    ("delta_align", "Δ align", "", "delta"),
    ("delta_contraction", "Δ contraction α", "", ""),
    ("delta_transport", "Δ transport L", "rad", ""),
    ("coherence", "coherence of the aligned", "", "coherence"),
    ("coherence_reference", "coherence of the reference", "", ""),
    ("gradient_concentration", "gradient share", "", "gradient"),
    ("spinal_gain", "SPINALScore gained", "", ""),
    ("spinal_score", "SPINALScore, level", "", ""),
    ("output_distance", "policy distance at the output", "rad", ""),
    ("kl", "KL(aligned ‖ reference) of the output", "nats", ""),
    ("reward_accuracy", "implicit-reward accuracy", "", ""),
    ("reward_margin", "implicit-reward margin", "", ""),
)
P_VALUES = {
    "delta_align": "p_value",
    "delta_contraction": "delta_contraction_p",
    "delta_transport": "delta_transport_p",
}


def parts(comparison: Comparison) -> Table:
    """The numbers of the terminal block with interval, p-value and weight in the score."""
    weights = comparison.settings["weights"]
    rows = []
    for name, _, unit, weight in PARTS:
        value, low, high = (float(comparison.summary[f"{name}{end}"]) for end in ("", "_low", "_high"))
        p = float(comparison.summary[P_VALUES[name]]) if name in P_VALUES else math.nan
        rows.append(
            [
                measured(value, unit=unit),
                cell(ends(low, high), low),
                cell(number(p, 2), p),
                cell(number(weights[weight]), weights[weight]) if weight else cell(""),
            ]
        )
    head = [("value", ""), ("95 % interval", ""), ("p", ""), ("weight in the score", "")]
    titles = [title for _, title, *_ in PARTS]
    return Table("The numbers of the terminal block", "quantity", head, titles, rows, in_order=False)


def localisation_table(comparison: Comparison) -> Table:
    """Localisation of each measure."""
    rows = []
    for name in LOCALISED:
        place = comparison.summary["localisation"][name]
        row = []
        for key in ("share", "centroid"):
            scale, form = (100, "{:.0f}") if key == "share" else (1, "{:.2f}")
            value, width = place[key], (place[f"{key}_high"] - place[f"{key}_low"]) / 2
            unit = " %" if key == "share" else ""
            text = form.format(scale * value) + unit if math.isfinite(value) else "–"
            beside = form.format(scale * width) if math.isfinite(width) else ""
            row += [
                cell(text, value, beside),
                cell(form.format(scale * place[f"{key}_even"]) + unit, place[f"{key}_even"]),
            ]
        run = place["run"]
        row.append(cell(f"{run[0]}–{run[1]}" if run else "–", run[0] if run else math.nan))
        row.append(cell(place["run_agreement"] if run else "–"))
        rows.append(row)
    head = [
        ("in the terminal block", ""),
        ("if spread evenly", ""),
        ("centroid", "relative depth"),
        ("if spread evenly", ""),
    ]
    head += [("shortest run", "blocks"), ("groups that agree", "")]
    keys = [MASSES[name] for name in LOCALISED]
    return Table("Where each measure changed", "measure", head, keys, rows, in_order=False)


def boundaries(comparison: Comparison) -> Table:
    """All deltas by boundary, then the measured quantities of both models."""
    known = [name for name in BOTH if np.isfinite(comparison.columns[name]).any()]
    head, columns = [], []
    for name in (*(f"delta_{metric}" for metric in METRICS), *known):
        metric = name.removeprefix("delta_")
        about = column_of(metric)
        head.append((f"{'Δ ' if name != metric else ''}{about.label}", about.unit))
        values, low, high = (comparison.columns[f"{name}{end}"] for end in ("", "_low", "_high"))
        p = comparison.columns.get(f"{name}_p_holm", np.full(comparison.boundaries, np.nan))
        columns.append(number_cells(values, (high - low) / 2, marked=p < SURE))
    first, last = comparison.terminal
    keys = list(range(comparison.boundaries))
    return Table(
        "Every change at every boundary", "boundary", head, keys, by_row(columns), marked=range(first, last + 1)
    )


def robustness_table(comparison: Comparison) -> Table:
    """Delta_align under all settings of the robustness grid."""
    rows: list[list[Cell]] = []
    for setting in comparison.robustness["settings"]:
        low, high = setting["window"]
        rows.append(
            [
                word(way(setting)),
                cell(f"{100 * low:g}–{100 * high:g} %", low + high / 100),
                cell(number(setting["delta_align"]), setting["delta_align"]),
                cell(ends(setting["low"], setting["high"]), setting["low"]),
                cell(number(setting["p_value"], 2), setting["p_value"]),
                cell(number(setting["delta_contraction"]), setting["delta_contraction"]),
                cell(number(setting["delta_transport"]), setting["delta_transport"]),
            ]
        )
    head = [("measured", ""), ("window", "ranks"), ("Δ align", ""), ("95 % interval", ""), ("p", "")]
    head += [("Δ contraction", ""), ("Δ transport", "rad")]
    return Table("Δ align under every setting", "setting", head, list(range(1, len(rows) + 1)), rows, marked=(1,))


def models(comparison: Comparison) -> Table:
    """Properties of the two models, with differing lines first and shaded."""
    keys = ("name", "source", "revision", "family", "layers", "width", "vocabulary", "dtype")
    differing = [key for key in keys if comparison.aligned[key] != comparison.reference[key]]
    order = [*differing, *(key for key in keys if key not in differing)]
    rows = [[word(side[key]) for side in (comparison.aligned, comparison.reference)] for key in order]
    head = [("aligned", ""), ("reference", "")]
    return Table("The two models, what differs first", "", head, order, rows, marked=differing, in_order=False)


def ranking_table(ranked: Sequence[Comparison], marked: Sequence[int]) -> Table:
    """Comparisons in order of rank; `marked` ranks are shaded."""
    rows = []
    for row in rank(ranked).rows():
        cells = [
            word(row["aligned"]),
            word(row["reference"]),
            word(row["verdict"]),
            cell(str(row["blocks"]), row["blocks"]),
        ]
        cells.append(measured(row["delta_align"], (row["delta_align_high"] - row["delta_align_low"]) / 2))
        for name in ("p_value", "delta_contraction", "delta_transport", "spinal_score", "contraction_centroid"):
            cells.append(cell(number(row[name], 2 if name == "p_value" else 3), row[name]))
        rows.append([*cells, cell(f"{row['holds']} of {row['settings']}", row["holds"] / row["settings"])])
    head = [("aligned", ""), ("reference", ""), ("verdict", ""), ("blocks", ""), ("Δ align", ""), ("p", "")]
    head += [("Δ contraction", ""), ("Δ transport", "rad"), ("SPINALScore", ""), ("centroid of |Δα|", "relative depth")]
    head += [("sign holds", "settings")]
    return Table("The ranking", "place", head, list(range(1, len(rows) + 1)), rows, marked=marked)


def moved_prompts(comparison: Comparison) -> Table:
    """The prompts that changed most, of the groups farthest from the mean."""
    rows, keys = [], []
    for group in comparison.moved:
        for prompt in group["prompts"]:
            keys.append(prompt["number"])
            rows.append(
                [
                    cell(str(group["group"]), group["group"]),
                    measured(prompt["delta_transport"], unit="rad"),
                    cell(percent(prompt["share"]), prompt["share"]),
                    cell(str(prompt["tokens"]), prompt["tokens"]),
                    word(_on_one_line(prompt["text"])),
                ]
            )
    head = [("group", ""), ("Δ transport", ""), ("share", ""), ("tokens", ""), ("begins", "")]
    return Table("Prompts that changed most", "prompt", head, keys, rows, in_order=False)


def moved_tokens(comparison: Comparison) -> Table:
    """The tokens at which the steps of the two models differ most."""
    rows, keys = [], []
    for prompt in (prompt for group in comparison.moved for prompt in group["prompts"]):
        for place in prompt["places"]:
            keys.append(prompt["number"])
            change = place["aligned"] - place["reference"]
            rows.append(
                [
                    cell(str(place["position"]), place["position"]),
                    cell(str(place["boundary"]), place["boundary"]),
                    measured(place["aligned"]),
                    measured(place["reference"]),
                    measured(change),
                    word(_on_one_line(f"{place['before']}[{place['token']}]{place['after']}")),
                ]
            )
    head = [("position", "token"), ("boundary", ""), ("aligned", "rad"), ("reference", "rad"), ("change", "rad")]
    return Table("Tokens that changed most", "prompt", [*head, ("text", "")], keys, rows, in_order=False)


def _on_one_line(text: str) -> str:
    return " ".join(text.split())
