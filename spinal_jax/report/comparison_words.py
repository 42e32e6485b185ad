"""Texts of a comparison: caveats, missing quantities, hover texts, and the summary for a model card."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

from spinal_jax.comparison.ranking import rank
from spinal_jax.comparison.record import LOCALISED, METRICS, UNITS, Comparison
from spinal_jax.report.cells import describe_positions, ends, name_boundaries, percent
from spinal_jax.report.comparison_figures import MASSES, SURE, mass_shares, setting_bands, way
from spinal_jax.report.comparison_tables import PARTS, parts
from spinal_jax.report.figures import Figure, hover_bands
from spinal_jax.report.inline import Target
from spinal_jax.wording import number, plus_minus

SOURCES = "spinal compare model.source=ALIGNED reference.source=BASE"


def summary_markdown(comparison: Comparison, others: Sequence[Comparison] = ()) -> str:
    """A Markdown section for a model card: verdict, numbers with intervals, where, settings, caveats."""
    table = parts(comparison)
    shown = [(title, row) for title, row in zip(table.keys, table.rows, strict=True) if row[0].text != "–"]
    lines = [
        f"## Alignment footprint (SPINAL): {_md(comparison.verdict)}",
        "",
        _md(comparison.summary["sentence"]),
        "",
        "| quantity | value | 95 % interval | p |",
        "| --- | ---: | ---: | ---: |",
        *(f"| {_md(title)} | {row[0].text} | {row[1].text} | {row[2].text} |" for title, row in shown),
        "",
        *(f"- {_md(words)} `{command}`" for words, command in missing(comparison)),
        "",
    ]
    where = [
        f"- {_md(MASSES[name])}: {percent(place['share'])} in the terminal block (evenly spread: "
        f"{percent(place['share_even'])}), 80 % of it in blocks {place['run'][0]}–{place['run'][1]}"
        for name, place in comparison.summary["localisation"].items()
        if place["run"]
    ]
    if where:
        lines += ["### Where", "", *where, ""]
    if others:
        lines += ["### Ranking", "", "| | aligned | reference | Δ align | 95 % interval | verdict |"]
        lines += ["| ---: | --- | --- | ---: | ---: | --- |"]
        for row in rank([comparison, *others]).rows():
            interval = ends(row["delta_align_low"], row["delta_align_high"])
            names = f"{_md(row['aligned'])} | {_md(row['reference'])}"
            lines.append(f"| {row['place']} | {names} | {number(row['delta_align'])} | {interval} | {row['verdict']} |")
        lines.append("")
    lines += [
        "### Settings",
        "",
        f"- Aligned: {_md(comparison.aligned['name'])}, from {_md(comparison.aligned['source'])}",
        f"- Reference: {_md(comparison.reference['name'])}, from {_md(comparison.reference['source'])}",
        *(f"- {_md(term)}: {_md(words)}" for term, words in facts(comparison)),
        "",
    ]
    lines += ["### Caveats", "", *(f"- {_md(caveat)}" for caveat in comparison_caveats(comparison))]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n"


def facts(comparison: Comparison) -> list[tuple[str, str]]:
    """(term, value) of the prompts and the settings."""
    prompts, settings = comparison.prompts, comparison.settings
    low, high = settings["window"]
    skip = {0: "every token", 1: "every token but the first"}.get(
        settings["skip"], f"every token but the first {settings['skip']}"
    )
    predictions = "full vocabulary" if settings["top_k"] is None else f"the {settings['top_k']} likeliest tokens"
    weights = ", ".join(f"{name} {number(value)}" for name, value in settings["weights"].items())
    return [
        (
            "Prompts",
            f"{prompts['count']:,} from {prompts['source']}, in {prompts['groups']} groups"
            + ("" if settings["same_prompts"] else "; the reference saw others"),
        ),
        (
            "Contraction",
            f"N = {prompts['rows']:,} rows, {skip} of each prompt, "
            f"{'centred' if settings['center'] else 'not centred'}; fit window {100 * low:g} to {100 * high:g} % of "
            "the ranks",
        ),
        (
            "Transport",
            f"{prompts['positions']:,} positions, {describe_positions(settings['positions'])}; {predictions}, "
            f"temperature {settings['temperature']:g}",
        ),
        ("Terminal block", name_boundaries(range(comparison.terminal[0], comparison.terminal[1] + 1))),
        ("Depth", "boundary by boundary" if settings["align"] == "equal" else "by relative depth"),
        ("Weights of the score", weights),
    ]


def missing(comparison: Comparison) -> list[tuple[str, str]]:
    """(missing quantity, command that measures it)."""
    lines = []
    if np.isnan(comparison.columns["policy_distance"]).all():
        lines.append(("Policy distance was not measured. It needs both models:", SOURCES))
    if np.isnan(comparison.columns["gradient_norm"]).all():
        words = "Gradient share and SPINALScore were not measured. They need both models and preference pairs:"
        lines.append((words, f"{SOURCES} preferences=jsonl preferences.path=FILE"))
    return lines


def comparison_caveats(comparison: Comparison) -> list[str]:
    """Caveats of a comparison: its warnings, then general ones."""
    groups, tests = comparison.prompts["groups"], int(np.isfinite(comparison.columns["delta_contraction_p"]).sum())
    said = list(comparison.warnings)
    least = 2.0 ** (1 - groups)
    if groups > 1 and tests and least * tests >= SURE:
        said.append(
            f"With {groups} groups of prompts no p-value can be below {number(least, 2)}, and after Holm’s correction "
            f"over {tests} boundaries none below {number(min(1.0, least * tests), 2)} unless others are as small: few "
            "boundaries, or none, can be marked significant. More groups can."
        )
    if not comparison.settings["same_prompts"]:
        said.append("The two models saw different prompts: this is a control, not a comparison of the models.")
    if comparison.settings["align"] == "relative":
        said.append("The reference was read at the relative depths of the aligned model’s boundaries.")
    return [
        *said,
        "A change is what the two checkpoints differ by. That preferences caused it takes controls: several runs on "
        "shuffled labels, or on the chosen responses alone, from the same base. spinal attribute compares them.",
        "Intervals say how much the numbers would change with other prompts of the same kind. They say nothing about "
        "other kinds of prompts, or another seed of the training.",
        "The other settings of the measurement are no independent evidence, as they read the same prompts.",
        comparison.summary["family_wise"]["sentence"],
        "At every boundary, predictions are read through the final norm and the unembedding (the “logit lens”), which "
        "were trained for the last boundary alone.",
    ]


def half(comparison: Comparison, name: str) -> float:
    """Half-width of the 95 % interval of a number of the summary; the longer side if it is clipped."""
    value, low, high = (float(comparison.summary[f"{name}{end}"]) for end in ("", "_low", "_high"))
    return max(value - low, high - value)


def score_words(comparison: Comparison) -> str:
    """The score as a sum of its parts, or the reason why it is undefined."""
    known = [(title, comparison.summary[name], comparison.settings["weights"][w]) for name, title, _, w in PARTS if w]
    if math.isnan(comparison.summary["spinal_score"]):
        reason = comparison.summary["undefined"]["spinal_score"]
        return f"The SPINALScore is the weighted sum of its parts; it is undefined here: {reason}."
    sums = " + ".join(f"{number(weight)} · {number(value)}" for _, value, weight in known)
    named = ", ".join(title for title, *_ in known)
    return f"SPINALScore = {sums} = {number(comparison.summary['spinal_score'])}: each weight times its part, {named}."


def targets(figure: Figure, name: str, comparison: Comparison) -> list[Target]:
    """Hover texts of a figure."""
    if name == "robustness":
        return [(_setting_words(comparison, at), box) for at, box in setting_bands(figure, comparison)]
    words = {"traces": _trace_words, "deltas": _delta_words, "where": _where_words, "policy": _policy_words}
    words |= {"gradient": _gradient_words}
    if name not in words:
        return []
    begin = 1 if name in ("where", "gradient") else 0
    return [(words[name](comparison, at), box) for at, *box in hover_bands(figure, comparison) if at >= begin]


def _trace_words(comparison: Comparison, at: int) -> str:
    parts = []
    for metric in ("contraction", "transport"):
        here, there = (_value(comparison, f"{side}_{metric}", at) for side in ("aligned", "reference"))
        parts.append(f"{metric} {here} against {there} {UNITS.get(metric, '')}".rstrip())
    return f"boundary {at}: {'; '.join(parts)}"


def _delta_words(comparison: Comparison, at: int) -> str:
    parts = []
    for metric in METRICS:
        p = comparison.columns[f"delta_{metric}_p_holm"][at]
        value = (
            f"Δ {metric.replace('_', ' ')} {_value(comparison, f'delta_{metric}', at)} {UNITS.get(metric, '')}".rstrip()
        )
        parts.append(f"{value}{f' (p {number(p, 2)})' if math.isfinite(p) else ''}")
    return f"boundary {at}: {', '.join(parts)}"


def _where_words(comparison: Comparison, at: int) -> str:
    shares = {name: mass_shares(comparison, name) for name in LOCALISED}
    parts = [f"{MASSES[name]} {100 * share[at - 1]:.1f} %" for name, share in shares.items() if share is not None]
    return f"block {at}: {', '.join(parts) or 'nothing changed'}"


def _policy_words(comparison: Comparison, at: int) -> str:
    return f"boundary {at}: policy distance {_value(comparison, 'policy_distance', at)} rad"


def _gradient_words(comparison: Comparison, at: int) -> str:
    share = mass_shares(comparison, "gradient_norm")
    said = f", {100 * share[at - 1]:.1f} % of all blocks" if share is not None else ""
    return f"block {at}: norm of the gradient {_value(comparison, 'gradient_norm', at)}{said}"


def _setting_words(comparison: Comparison, at: int) -> str:
    setting = comparison.robustness["settings"][at]
    low, high = setting["window"]
    interval = "no interval"
    if not math.isnan(setting["low"]):
        interval = f"95 % interval {ends(setting['low'], setting['high'])}"
    which = f"{way(setting)}, window {100 * low:g}–{100 * high:g} %{', the headline' if at == 0 else ''}"
    return f"{which}: Δ align {number(setting['delta_align'])}, {interval}"


def _value(comparison: Comparison, name: str, at: int) -> str:
    value, low, high = (comparison.columns[f"{name}{end}"][at] for end in ("", "_low", "_high"))
    return plus_minus(float(value), float(high - low) / 2)


def _md(text: object) -> str:
    """Text escaped for Markdown, on one line."""
    return re.sub(r"([\\`|<>*_\[\]])", r"\\\1", " ".join(str(text).split()))
