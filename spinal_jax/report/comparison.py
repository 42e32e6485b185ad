# ruff: noqa: RUF001 (Greek letters and typographic dashes are meant)
"""The report of a comparison: what alignment changed, where and how sure that is, from saved files alone."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spinal_jax.comparison.ranking import rank
from spinal_jax.comparison.record import BOTH, LOCALISED, METRICS, UNITS, Comparison, load_comparison
from spinal_jax.files import write_whole
from spinal_jax.report.comparison_figures import MASSES, SURE, comparison_figures, mass_shares, setting_bands, way
from spinal_jax.report.figures import Figure, hover_bands, png_bytes, svg_text
from spinal_jax.report.page import describe_positions, inline, name_boundaries, template
from spinal_jax.wording import decimals, number, plus_minus

Table = dict[str, Any]
Cell = dict[str, str]
# The numbers of the terminal block: name, title, unit, which weight of the score it has.
PARTS = (
    ("delta_align", "Δ align", "", "delta"),
    ("delta_contraction", "Δ contraction α", "", ""),
    ("delta_transport", "Δ transport L", "rad", ""),
    ("coherence", "coherence of the aligned", "", "coherence"),
    ("coherence_reference", "coherence of the reference", "", ""),
    ("gradient_concentration", "gradient share", "", "gradient"),
    ("spinal_score", "SPINALScore", "", ""),
)
P_VALUES = {
    "delta_align": "p_value",
    "delta_contraction": "delta_contraction_p",
    "delta_transport": "delta_transport_p",
}
TITLES = {"effective_rank": "effective rank"}
SOURCES = "spinal compare model.source=ALIGNED reference.source=BASE"


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
    found = load_comparison(folder)
    folder = Path(folder)
    folder = folder if folder.is_dir() else folder.parent
    places = sorted(
        (path.parent for path in folder.glob("others/*/comparison.json")), key=lambda path: (len(path.name), path.name)
    )
    others = [load_comparison(place) for place in places]
    target = folder / "figures"
    target.mkdir(parents=True, exist_ok=True)
    for name, figure in comparison_figures(found, _ranked(found, others)).items():
        write_whole(target / f"{name}.png", png_bytes(figure))
        write_whole(target / f"{name}.svg", svg_text(figure, name).encode())
    page = folder / "report.html"
    write_whole(folder / "summary.md", summary_markdown(found, others).encode("utf-8", errors="xmlcharrefreplace"))
    write_whole(page, render_comparison_report(found, others).encode("utf-8", errors="xmlcharrefreplace"))
    return page


def render_comparison_report(found: Comparison, others: Sequence[Comparison] = ()) -> str:
    """The page as text: equal comparisons give equal text."""
    ranked = _ranked(found, others)
    drawn = comparison_figures(found, ranked)
    first, last = found.terminal
    return template("comparison.html").render(
        found=found,
        tiles=_tiles(found),
        has_intervals=found.summary["degrees_of_freedom"] >= 1,
        block=name_boundaries(range(first, last + 1)),
        parts=_parts(found),
        score_words=_score_words(found),
        ranking=_ranking_table(ranked) if ranked else None,
        headline_places=[place for place, each in enumerate(ranked, 1) if each is found],
        pictures={name: inline(figure, name, _strips(figure, name, found)) for name, figure in drawn.items()},
        missing=missing(found),
        places=_places(found),
        table=_boundary_table(found),
        grid=_grid(found),
        many_ways=len({way(setting) for setting in found.robustness["settings"]}) > 3,
        caveats=caveats(found),
        facts=facts(found),
    )


def summary_markdown(found: Comparison, others: Sequence[Comparison] = ()) -> str:
    """A Markdown section for a model card: verdict, numbers with intervals, where, settings, caveats."""
    shown = [row for row in _parts(found)["rows"] if row[0]["text"] != "–"]
    titles = [key for key, row in zip(_parts(found)["keys"], _parts(found)["rows"], strict=True) if row in shown]
    lines = [
        f"## Alignment footprint (SPINAL): {_md(found.verdict)}",
        "",
        f"{_md(found.summary['sentence'])} {_md(found.robustness['sentence'])}",
        "",
        "| quantity | value | 95 % interval | p |",
        "| --- | ---: | ---: | ---: |",
        *(
            f"| {_md(title)} | {row[0]['text']} | {row[1]['text']} | {row[2]['text']} |"
            for title, row in zip(titles, shown, strict=True)
        ),
        "",
        *(f"- {_md(words)} `{command}`" for words, command in missing(found)),
        "",
    ]
    where = [
        f"- {_md(MASSES[name])}: {_percent(place['share'])} in the terminal block (evenly spread: "
        f"{_percent(place['share_even'])}), 80 % of it in blocks {place['run'][0]}–{place['run'][1]}"
        for name, place in found.summary["localisation"].items()
        if place["run"]
    ]
    if where:
        lines += ["### Where", "", *where, ""]
    if others:
        lines += ["### Ranking", "", "| | aligned | reference | Δ align | 95 % interval | verdict |"]
        lines += ["| ---: | --- | --- | ---: | ---: | --- |"]
        for row in rank([found, *others]).rows():
            ends = _ends(row["delta_align_low"], row["delta_align_high"])
            names = f"{_md(row['aligned'])} | {_md(row['reference'])}"
            lines.append(f"| {row['place']} | {names} | {number(row['delta_align'])} | {ends} | {row['verdict']} |")
        lines.append("")
    lines += ["### Settings", "", *(f"- {_md(term)}: {_md(words)}" for term, words in facts(found)), ""]
    lines += ["### Caveats", "", *(f"- {_md(caveat)}" for caveat in caveats(found))]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n"


def missing(found: Comparison) -> list[tuple[str, str]]:
    """(what this comparison could not tell, the command that can)."""
    lines = []
    if np.isnan(found.columns["policy_distance"]).all():
        lines.append(("Policy distance was not measured. It needs both models:", SOURCES))
    if np.isnan(found.columns["gradient_norm"]).all():
        words = "Gradient share and SPINALScore were not measured. They need both models and preference pairs:"
        lines.append((words, f"{SOURCES} preferences=jsonl preferences.path=FILE"))
    return lines


def caveats(found: Comparison) -> list[str]:
    """What a reader must know before trusting the verdict: this comparison's warnings, then what holds for all."""
    groups, tests = found.prompts["groups"], int(np.isfinite(found.columns["delta_contraction_p"]).sum())
    said = list(found.warnings)
    least = 2.0 ** (1 - groups)
    if groups > 1 and tests and least * tests >= SURE:
        said.append(
            f"With {groups} groups of prompts no p-value can be below {number(least, 2)}, and after Holm’s correction "
            f"over {tests} boundaries none below {number(min(1.0, least * tests), 2)} unless others are as small: few "
            "boundaries, or none, can be marked significant. More groups can."
        )
    if not found.settings["same_prompts"]:
        said.append("The two models saw different prompts: this is a control, not a comparison of the models.")
    if found.settings["align"] == "relative":
        said.append("The reference was read at the relative depths of the aligned model’s boundaries.")
    return [
        *said,
        "A change is what the two checkpoints differ by. That preferences caused it takes controls: a run on shuffled "
        "labels, or on the chosen responses alone, compared with the same reference.",
        "Intervals say how much the numbers would change with other prompts of the same kind. They say nothing about "
        "other kinds of prompts, or another seed of the training.",
        "The verdict is that of Δ align’s interval under one setting of the measurement. The other settings are no "
        "independent evidence, as they read the same prompts.",
        "At every boundary, predictions are read through the final norm and the unembedding (the “logit lens”), which "
        "were trained for the last boundary alone.",
    ]


def facts(found: Comparison) -> list[tuple[str, str]]:
    """(term, words) of the models, the prompts and the settings."""
    prompts, settings = found.prompts, found.settings
    low, high = settings["window"]
    skip = {0: "every token", 1: "every token but the first"}.get(
        settings["skip"], f"every token but the first {settings['skip']}"
    )
    predictions = "full vocabulary" if settings["top_k"] is None else f"the {settings['top_k']} likeliest tokens"
    weights = ", ".join(f"{name} {number(value)}" for name, value in settings["weights"].items())
    return [
        ("Aligned", _model(found.aligned)),
        ("Reference", _model(found.reference)),
        (
            "Prompts",
            f"{prompts['count']:,} from {prompts['source']}, in {prompts['groups']} groups by a hash of their text"
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
        ("Terminal block", name_boundaries(range(found.terminal[0], found.terminal[1] + 1))),
        ("Depth", "boundary by boundary" if settings["align"] == "equal" else "by relative depth"),
        ("Weights of the score", weights),
    ]


def _model(model: Mapping[str, Any]) -> str:
    revision = f", revision {model['revision']}" if model["revision"] else ""
    return (
        f"{model['name']}, from {model['source']}{revision}: {model['family']} family, {model['layers']} blocks, width "
        f"{model['width']:,}, vocabulary {model['vocabulary']:,}, computed in {model['dtype']}"
    )


def _ranked(found: Comparison, others: Sequence[Comparison]) -> tuple[Comparison, ...]:
    """Strongest first; empty where there is nothing to rank against."""
    return rank([found, *others]).comparisons if others else ()


def _half(found: Comparison, name: str) -> float:
    return float(found.summary[f"{name}_high"] - found.summary[f"{name}_low"]) / 2


def _tiles(found: Comparison) -> list[dict[str, str]]:
    first, last = found.terminal
    block = f"mean over {first}–{last}" if last > first else f"boundary {last}"
    p = found.summary["p_value"]
    tiles = []
    for name, label, unit, note in (
        ("delta_align", "Δ align", "", "no p-value" if math.isnan(p) else f"p = {number(p, 2)}"),
        ("delta_contraction", "Δ contraction α", "", block),
        ("delta_transport", "Δ transport L", "rad", block),
        ("spinal_score", "SPINALScore", "", "weighted sum, see below"),
    ):
        value, _, half = plus_minus(float(found.summary[name]), _half(found, name)).partition(" ± ")
        note = "not measured" if value == "–" else note
        tiles.append({"label": label, "value": value, "half": half, "unit": unit, "note": note})
    return tiles


def _parts(found: Comparison) -> Table:
    weights = found.settings["weights"]
    rows = []
    for name, _, unit, weight in PARTS:
        value, low, high = (float(found.summary[f"{name}{end}"]) for end in ("", "_low", "_high"))
        p = float(found.summary[P_VALUES[name]]) if name in P_VALUES else math.nan
        rows.append(
            [
                _cell(f"{number(value)} {unit}".rstrip() if math.isfinite(value) else "–", value),
                _cell(_ends(low, high), low),
                _cell(number(p, 2), p),
                _cell(number(weights[weight]), weights[weight]) if weight else _cell("", math.nan),
            ]
        )
    head = [("value", ""), ("95 % interval", ""), ("p", ""), ("weight in the score", "")]
    return {"corner": "quantity", "head": head, "keys": [title for _, title, *_ in PARTS], "rows": rows}


def _score_words(found: Comparison) -> str:
    known = [(title, found.summary[name], found.settings["weights"][w]) for name, title, _, w in PARTS if w]
    if math.isnan(found.summary["spinal_score"]):
        lost = ", ".join(title for title, value, _ in known if math.isnan(value))
        return f"The SPINALScore is the weighted sum of its parts; it is not defined here without {lost}."
    sums = " + ".join(f"{number(weight)} · {number(value)}" for _, value, weight in known)
    named = ", ".join(title for title, *_ in known)
    return f"SPINALScore = {sums} = {number(found.summary['spinal_score'])}: each weight times its part, {named}."


def _places(found: Comparison) -> Table:
    rows = []
    for name in LOCALISED:
        place = found.summary["localisation"][name]
        row = []
        for key in ("share", "centroid"):
            scale, form = (100, "{:.0f}") if key == "share" else (1, "{:.2f}")
            value, half = place[key], (place[f"{key}_high"] - place[f"{key}_low"]) / 2
            unit = " %" if key == "share" else ""
            text = form.format(scale * value) + unit if math.isfinite(value) else "–"
            half = form.format(scale * half) if math.isfinite(half) else ""
            even = form.format(scale * place[f"{key}_even"]) + unit
            row += [_cell(text, value, half), _cell(even, place[f"{key}_even"])]
        run = place["run"]
        row.append(_cell(f"{run[0]}–{run[1]}" if run else "–", run[0] if run else math.nan))
        row.append(_cell(place["run_agreement"] if run else "–", math.nan))
        rows.append(row)
    head = [("in the terminal block", ""), ("even", ""), ("centroid", "relative depth"), ("even", "")]
    head += [("shortest run", "blocks"), ("groups that agree", "")]
    return {"corner": "measure", "head": head, "keys": [MASSES[name] for name in LOCALISED], "rows": rows}


def _ranking_table(ranked: Sequence[Comparison]) -> Table:
    rows = []
    for row in rank(ranked).rows():
        cells = [{"text": row[name], "half": "", "key": row[name]} for name in ("aligned", "reference", "verdict")]
        half = (row["delta_align_high"] - row["delta_align_low"]) / 2
        value, _, width = plus_minus(row["delta_align"], half).partition(" ± ")
        cells.append(_cell(value, row["delta_align"], width))
        for name in ("p_value", "delta_contraction", "delta_transport", "spinal_score", "contraction_centroid"):
            cells.append(_cell(number(row[name], 2 if name == "p_value" else 3), row[name]))
        cells.append(_cell(f"{row['holds']} of {row['settings']}", row["holds"] / row["settings"]))
        rows.append([*cells[:3], _cell(str(row["blocks"]), row["blocks"]), *cells[3:]])
    head = [("aligned", ""), ("reference", ""), ("verdict", ""), ("blocks", ""), ("Δ align", ""), ("p", "")]
    head += [("Δ contraction", ""), ("Δ transport", "rad"), ("SPINALScore", ""), ("centroid of |Δα|", "relative depth")]
    head += [("sign holds", "settings")]
    return {"corner": "place", "head": head, "keys": list(range(1, len(rows) + 1)), "rows": rows}


def _boundary_table(found: Comparison) -> Table:
    """Every delta, then what only both models give, where it was measured."""
    rows: list[list[Cell]] = [[] for _ in range(found.boundaries)]
    head = []
    measured = [name for name in BOTH if np.isfinite(found.columns[name]).any()]
    for name in (*(f"delta_{metric}" for metric in METRICS), *measured):
        metric = name.removeprefix("delta_")
        head.append((f"{'Δ ' if name != metric else ''}{metric.replace('_', ' ')}", UNITS.get(metric, "")))
        values, low, high = (found.columns[f"{name}{end}"] for end in ("", "_low", "_high"))
        half, sure = (high - low) / 2, found.columns.get(f"{name}_p_holm", np.full(found.boundaries, np.nan)) < SURE
        places = min(max(_places_of(values, 3), _places_of(half, 1)), 5)
        for row, value, width, marked in zip(rows, values, half, sure, strict=True):
            text = f"{value:,.{places}f}".replace("-", "−") + ("*" if marked else "") if math.isfinite(value) else "–"
            row.append(_cell(text, value, f"{width:.{places}f}" if math.isfinite(width) else ""))
    return {"corner": "boundary", "head": head, "keys": list(range(found.boundaries)), "rows": rows}


def _grid(found: Comparison) -> Table:
    rows = []
    for setting in found.robustness["settings"]:
        low, high = setting["window"]
        how = way(setting)
        rows.append(
            [
                {"text": how, "half": "", "key": how},
                _cell(f"{100 * low:g}–{100 * high:g} %", low + high / 100),
                _cell(number(setting["delta_align"]), setting["delta_align"]),
                _cell(_ends(setting["low"], setting["high"]), setting["low"]),
                _cell(number(setting["p_value"], 2), setting["p_value"]),
                _cell(number(setting["delta_contraction"]), setting["delta_contraction"]),
                _cell(number(setting["delta_transport"]), setting["delta_transport"]),
            ]
        )
    head = [("measured", ""), ("window", "ranks"), ("Δ align", ""), ("95 % interval", ""), ("p", "")]
    head += [("Δ contraction", ""), ("Δ transport", "rad")]
    return {"corner": "setting", "head": head, "keys": list(range(1, len(rows) + 1)), "rows": rows}


def _strips(figure: Figure, name: str, found: Comparison) -> Iterable[tuple[str, Sequence[float]]]:
    """What a figure says where it is pointed at."""
    if name == "robustness":
        return [(_setting_words(found, at), box) for at, box in setting_bands(figure, found)]
    words = {"traces": _trace_words, "deltas": _delta_words, "where": _where_words, "policy": _policy_words}
    words |= {"gradient": _gradient_words}
    if name not in words:
        return []
    begin = 1 if name in ("where", "gradient") else 0
    return [(words[name](found, at), box) for at, *box in hover_bands(figure, found) if at >= begin]


def _trace_words(found: Comparison, at: int) -> str:
    parts = []
    for metric in ("contraction", "transport"):
        here, there = (_value(found, f"{side}_{metric}", at) for side in ("aligned", "reference"))
        parts.append(f"{metric} {here} against {there} {UNITS.get(metric, '')}".rstrip())
    return f"boundary {at}: {'; '.join(parts)}"


def _delta_words(found: Comparison, at: int) -> str:
    parts = []
    for metric in METRICS:
        p = found.columns[f"delta_{metric}_p_holm"][at]
        value = f"Δ {metric.replace('_', ' ')} {_value(found, f'delta_{metric}', at)} {UNITS.get(metric, '')}".rstrip()
        parts.append(f"{value}{f' (p {number(p, 2)})' if math.isfinite(p) else ''}")
    return f"boundary {at}: {', '.join(parts)}"


def _where_words(found: Comparison, at: int) -> str:
    shares = {name: mass_shares(found, name) for name in LOCALISED}
    parts = [f"{MASSES[name]} {100 * share[at - 1]:.1f} %" for name, share in shares.items() if share is not None]
    return f"block {at}: {', '.join(parts) or 'nothing changed'}"


def _policy_words(found: Comparison, at: int) -> str:
    return f"boundary {at}: policy distance {_value(found, 'policy_distance', at)} rad"


def _gradient_words(found: Comparison, at: int) -> str:
    share = mass_shares(found, "gradient_norm")
    said = f", {100 * share[at - 1]:.1f} % of all blocks" if share is not None else ""
    return f"block {at}: norm of the gradient {_value(found, 'gradient_norm', at)}{said}"


def _setting_words(found: Comparison, at: int) -> str:
    setting = found.robustness["settings"][at]
    low, high = setting["window"]
    ends = "no interval" if math.isnan(setting["low"]) else f"95 % interval {_ends(setting['low'], setting['high'])}"
    which = f"{way(setting)}, window {100 * low:g}–{100 * high:g} %{', the headline' if at == 0 else ''}"
    return f"{which}: Δ align {number(setting['delta_align'])}, {ends}"


def _value(found: Comparison, name: str, at: int) -> str:
    value, low, high = (found.columns[f"{name}{end}"][at] for end in ("", "_low", "_high"))
    return plus_minus(float(value), float(high - low) / 2)


def _cell(text: str, key: float, half: str = "") -> Cell:
    return {"text": text, "half": half, "key": repr(float(key)) if math.isfinite(key) else ""}


def _places_of(values: np.ndarray, digits: int) -> int:
    """Decimals that show the median to so many significant digits."""
    seen = np.abs(values[np.isfinite(values) & (np.abs(values) > 1e-9)])
    return decimals(float(np.median(seen)), digits) if len(seen) else 0


def _ends(low: float, high: float) -> str:
    """An interval in words with equal decimals; an en dash where there is none."""
    if not math.isfinite(low) or not math.isfinite(high):
        return "–"
    places = min(max(decimals(low), decimals(high), decimals(high - low, 2) if high > low else 0), 5)
    return f"{low:.{places}f} to {high:.{places}f}".replace("-", "−")


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _md(text: str) -> str:
    """Text that Markdown leaves alone, on one line."""
    return re.sub(r"([\\`|<>*_\[\]])", r"\\\1", " ".join(str(text).split()))
