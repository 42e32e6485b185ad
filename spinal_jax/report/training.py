# ruff: noqa: RUF001 (Greek letters and typographic dashes are meant)
"""The report of a training run: when its footprint began and whether it destabilised, from saved files alone."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spinal_jax.comparison.onset import save_verdict
from spinal_jax.files import write_whole
from spinal_jax.report.figures import png_bytes, svg_text
from spinal_jax.report.page import inline, name_boundaries, template
from spinal_jax.report.training_figures import record_bands, training_figures
from spinal_jax.runs.training_run import ONSET, TrainingRun, load_training_run
from spinal_jax.wording import decimals, number, plus_minus

# What stands beside a record, in the order in which it is shown: name, title, unit.
BESIDE = (
    ("eval_rewards/margins", "held-out margin", ""),
    ("rewards/margins", "batch margin", ""),
    ("eval_rewards/accuracies", "held-out accuracy", ""),
    ("rewards/accuracies", "batch accuracy", ""),
    ("kl", "KL", "nats"),
)
MEASURED = (
    ("delta_align", "Δ align", ""),
    ("delta_contraction", "Δ contraction", ""),
    ("delta_transport", "Δ transport", "rad"),
)


def write_training_report(folder: str | os.PathLike[str]) -> Path:
    """Draws the figures and report.html of a training run's folder from its saved files, and returns the page's path.

    onset.json is written again too, by the rules of today.

    Raises:
      UserError: no training run there, or a file of it that cannot be read.
    """
    run = load_training_run(folder)
    save_verdict(run.onset, Path(folder) / ONSET)
    target = Path(folder) / "figures"
    target.mkdir(parents=True, exist_ok=True)
    for name, figure in training_figures(run).items():
        write_whole(target / f"{name}.png", png_bytes(figure))
        write_whole(target / f"{name}.svg", svg_text(figure, name).encode())
    page = Path(folder) / "report.html"
    write_whole(page, render_training_report(run).encode("utf-8", errors="xmlcharrefreplace"))
    return page


def render_training_report(run: TrainingRun) -> str:
    """The page as text: equal runs give equal text."""
    drawn = training_figures(run)
    targets = [(_read_out(run, at), box) for at, (_, *box) in enumerate(record_bands(drawn["course"], run))]
    strips = {"course": targets}
    marked = [run.onset[name]["step"] for name in ("onset", "destabilisation") if run.onset[name]]
    return template("training.html").render(
        run=run,
        first=run.traces[0],
        title=run.traces[0].model["name"].removesuffix(", step 0"),
        kind=_kind(run),
        headline=headline(run),
        evidence=evidence(run),
        tiles=_tiles(run),
        facts=_facts(run),
        settings=_flat(run.config),
        pictures={name: inline(figure, name, strips.get(name, ())) for name, figure in drawn.items()},
        table=_table(run),
        marked=marked,
        caveats=caveats(run),
        block=name_boundaries(range(run.traces[0].terminal[0], run.traces[0].terminal[1] + 1)),
    )


def headline(run: TrainingRun) -> str:
    """What happened, in one sentence of plain words."""
    began, broke, last = run.onset["onset"], run.onset["destabilisation"], run.steps[-1]
    count = len(run.traces)
    if began is None and broke is not None:
        return (
            f"No footprint that lasts was found, but the run destabilised at step {broke['step']}; the last healthy "
            f"trace is that of step {run.onset['healthy']}."
        )
    if began is None:
        least = run.onset["lasting"] + 1
        if count < least:
            traces = "a single trace" if count == 1 else f"{count} traces"
            return f"Nothing can be said yet: {traces} up to step {last}, and an onset takes {least}."
        return f"Nothing happened that lasts: in {count} traces up to step {last}, no onset of a footprint was found."
    way = "contraction" if began["change"] > 0 else "expansion"
    text = f"A footprint of {way} began at step {began['step']}"
    if broke is None:
        return f"{text}, and up to step {last} nothing destabilised."
    return f"{text}, and it destabilised at step {broke['step']}; the last healthy trace is that of step " + (
        f"{run.onset['healthy']}."
    )


def evidence(run: TrainingRun) -> list[tuple[str, str]]:
    """(what, why it is said and what else was known at that step) of onset and destabilisation, where there are any."""
    found = []
    for name, word in (("onset", "Onset"), ("destabilisation", "Destabilisation")):
        if (told := run.onset[name]) is not None:
            beside = _beside(told)
            text = f"{told['evidence']}."
            found.append((word, f"{text} At that step: {', '.join(beside)}." if beside else text))
    return found


def caveats(run: TrainingRun) -> list[str]:
    """What a reader must know before trusting the verdict: the run's own conditions, then warnings of the first
    and the last trace."""
    band, lasting = run.onset["band"], run.onset["lasting"]
    said = [
        f"A change counts when {lasting} traces in a row are more than {band:g} standard errors out and one of them "
        f"more than {run.onset['sure']:g}. This run has {len(run.traces)} traces, so a change shorter than {lasting} "
        "of them, or one in the last two, cannot be seen.",
        "Destabilisation means that the footprint falls back from a level it had held, or that the output has moved "
        "more than pi/2 from step 0, half of the way to having nothing in common with it. A fall may be surely there "
        "and yet small: its size is in the evidence.",
        "Standard errors say how much the numbers would change with other prompts of the same kind, and nothing about "
        "another seed. With many prompts a small wobble of the optimisation can be well beyond them.",
    ]
    ends = ((run.steps[0], run.traces[0]), (run.steps[-1], run.traces[-1]))
    warnings = dict.fromkeys((step, warning) for step, trace in ends for warning in trace.warnings)
    return said + [f"Warning from the measurement of step {step}: {warning}" for step, warning in warnings]


def _kind(run: TrainingRun) -> str:
    objective = run.config["objective"]
    return f"dpo ({objective['loss']})" if objective["kind"] == "dpo" else objective["kind"]


def _tiles(run: TrainingRun) -> list[dict[str, str]]:
    """The last known value of what matters most."""
    summary = run.comparisons[-1].summary
    value, _, half = plus_minus(summary["delta_align"], _half(summary, "delta_align")).partition(" ± ")
    last = f"step {run.steps[-1]}"
    tiles = [{"label": "Δ align", "value": value, "half": half, "unit": "", "note": f"{last}, against step 0"}]
    for label, names in (
        ("Reward margin", ("eval_rewards/margins", "rewards/margins")),
        ("Preference accuracy", ("eval_rewards/accuracies", "rewards/accuracies")),
        ("Token accuracy", ("eval_mean_token_accuracy", "mean_token_accuracy")),
        ("Loss", ("eval_loss", "loss")),
    ):
        known = next((name for name in names if len(run.series(name)[0])), None)
        if known is not None and len(tiles) < 3:
            steps, values = run.series(known)
            where = "held out" if known.startswith("eval_") else "training batch"
            note = f"step {steps[-1]}, {where}"
            tiles.append({"label": label, "value": number(values[-1]), "half": "", "unit": "", "note": note})
    kl = number(run.recorded("kl")[-1])
    return [
        *tiles,
        {"label": "KL to step 0", "value": kl, "half": "", "unit": "nats", "note": f"{last}, on the prompts"},
    ]


def _facts(run: TrainingRun) -> list[tuple[str, str]]:
    """(term, words) of what was trained, on what and how."""
    config, prompts, first = run.config, run.traces[0].prompts, run.traces[0]
    objective, optimizer, rank = config["objective"], config["optimizer"], config["lora"]["rank"]
    what = f"{objective['kind']}"
    if objective["kind"] == "dpo":
        what += f", {objective['loss']} loss, β {objective['beta']:g}"
    trained = f"LoRA adapters of rank {rank}, α {config['lora']['alpha']:g}" if rank else "all weights"
    data = config["corpus"] if objective["kind"] == "lm" else config["preferences"]
    clip = "no clipping" if optimizer["clip"] is None else f"clipped at {optimizer['clip']:g}"
    return [
        (
            "Model",
            f"{config['model']['source']}, {first.model['family']} family: {first.model['parameters']:,} parameters, "
            f"{first.depth} blocks, width {first.model['width']:,}",
        ),
        ("Objective", f"{what}; {trained}"),
        (
            "Optimiser",
            f"{optimizer['name']}, learning rate {optimizer['learning_rate']:g} ({optimizer['schedule']}), "
            f"{optimizer['warmup_steps']} steps of warm-up, weight decay {optimizer['weight_decay']:g}, {clip}",
        ),
        (
            "Data",
            f"{data['path'] or 'the generated world'} ({data['format']} format), at most {data['max_length']} tokens, "
            f"{data['held_out']:,} held out; {config['batch_size']} a step, seed {config['seed']}",
        ),
        (
            "Traces",
            f"{len(run.traces)}, at steps {_listed(run.steps)}, on {prompts['count']:,} prompts of {prompts['source']} "
            f"in {prompts['groups']} groups: {prompts['rows']:,} rows for contraction, {prompts['positions']:,} "
            "positions for transport",
        ),
    ]


def _listed(steps: np.ndarray) -> str:
    gaps = np.diff(steps)
    if len(steps) > 3 and len(set(gaps.tolist())) == 1:
        return f"{steps[0]}, {steps[1]} … {steps[-1]}"
    return ", ".join(str(step) for step in steps)


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Every setting by its dotted name."""
    found: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", "null" if value is None else str(value)))
    return found


def _read_out(run: TrainingRun, at: int) -> str:
    summary, record = run.comparisons[at].summary, run.records[at]
    parts = [f"{title} {plus_minus(summary[n], _half(summary, n))} {unit}".rstrip() for n, title, unit in MEASURED]
    return f"step {record['step']}: {', '.join(parts + _beside(record))}"


def _table(run: TrainingRun) -> dict[str, Any]:
    """All traces: what was measured, and what was known beside it."""
    rows: list[list[dict[str, str]]] = [[] for _ in run.records]
    head = []
    for name, title, unit in MEASURED:
        values = np.array([comparison.summary[name] for comparison in run.comparisons])
        halves = np.array([_half(comparison.summary, name) for comparison in run.comparisons])
        head.append((title, unit))
        _fill(rows, values, halves)
    for name, title, unit in BESIDE:
        values = run.recorded(name)
        if np.isfinite(values).any():
            head.append((title, unit))
            _fill(rows, values, np.full(len(values), math.nan))
    return {"corner": "step", "head": head, "keys": run.steps.tolist(), "rows": rows}


def _fill(rows: Sequence[list[dict[str, str]]], values: np.ndarray, halves: np.ndarray) -> None:
    """Adds a column with the decimals that suit its median."""

    def typical(numbers: np.ndarray, digits: int) -> int:
        seen = np.abs(numbers[np.isfinite(numbers) & (np.abs(numbers) > 1e-6)])
        return decimals(float(np.median(seen)), digits) if len(seen) else 2

    places = min(max(typical(values, 3), typical(halves, 1) if np.isfinite(halves).any() else 0), 5)
    for row, value, half in zip(rows, values, halves, strict=True):
        text = f"{value:,.{places}f}".replace("-", "−") if math.isfinite(value) else "–"
        key = repr(float(value)) if math.isfinite(value) else ""
        row.append({"text": text, "half": f"{half:.{places}f}" if math.isfinite(half) else "", "key": key})


def _half(summary: Mapping[str, Any], name: str) -> float:
    return float(summary[f"{name}_high"] - summary[f"{name}_low"]) / 2


def _beside(record: Mapping[str, Any]) -> list[str]:
    """What is known beside a record, each with its title and unit."""
    known = [entry for entry in BESIDE if isinstance(record.get(entry[0]), int | float)]
    return [f"{title} {number(record[name])} {unit}".rstrip() for name, title, unit in known]
