"""The report of a training run: when its footprint began and whether it destabilised, from saved files alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from spinal_jax.comparison.onset import no_onset_sentence, save_onset
from spinal_jax.files import write_whole
from spinal_jax.report import charts
from spinal_jax.report.cells import by_row, code, environment_facts, name_boundaries, number_cells, sha256_markup, tile
from spinal_jax.report.figures import png_bytes, svg_text
from spinal_jax.report.inline import inline
from spinal_jax.report.method import method_section
from spinal_jax.report.sections import (
    Chart,
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
from spinal_jax.report.training_figures import record_bands, training_figures
from spinal_jax.runs.training_run import ONSET, TrainingRun, load_training_run
from spinal_jax.wording import number, plus_minus

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
    save_onset(run.onset, Path(folder) / ONSET)
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
    figures = training_figures(run)
    targets = [(_read_out(run, at), box) for at, (_, *box) in enumerate(record_bands(figures["course"], run))]
    drawn = {name: inline(figure, name, targets if name == "course" else ()) for name, figure in figures.items()}
    first, title = run.traces[0], run.traces[0].model["name"].removesuffix(", step 0")
    block = name_boundaries(range(first.terminal[0], first.terminal[1] + 1))
    return render(
        Page(
            title=f"Training run of {title}",
            kicker=f"Training run · {title} · {_kind(run)} · {run.last_step} steps",
            heading=_heading(run),
            answer=[
                Text(training_headline(run).replace("Delta_align", "Δ align"), "lead"),
                *(
                    Text(Markup("<b>{}.</b> {}").format(word, text.replace("Delta_align", "Δ align")))
                    for word, text in evidence(run)
                ),
                Tiles(_tiles(run)),
                Text(
                    f"Δ align is contraction gained plus transport saved against {run.origin}, means over {block}. ± "
                    f"is half of a 95 % interval over {first.prompts['groups']} groups of prompts (jackknife).",
                    "note",
                ),
                Points(training_caveats(run)[:1], "limits"),
            ],
            glance=[_first_and_last(run, drawn["over_training"])],
            sections=[
                Section("The course of the run", [Pictures([_course(run, drawn["course"]), *_losses(run, drawn)])]),
                Section(
                    "All traces",
                    [
                        Text(
                            f"Differences to {run.origin}; ± is half of a 95 % interval. A batch’s numbers are those "
                            "of the step before the trace. Shaded rows are the onset and the destabilisation. Select a "
                            "column’s name to sort by it.",
                            "note",
                        ),
                        _table(run),
                    ],
                ),
                Section("Caveats", [Points(training_caveats(run))]),
                Section("What was trained, on what", [Facts(_facts(run))]),
                Section("All settings", [Facts([(code(name), value) for name, value in _flat(run.config)])]),
                method_section(("contraction", "transport", "delta_align", "intervals")),
                Section("Environment", [environment_facts(first.environment)]),
            ],
            footer=Markup(
                "The same numbers are in <code>onset.json</code>, <code>metrics.jsonl</code> and <code>traces/</code> "
                "beside this file. To draw this page again from them, without the model: <code>spinal report "
                "DIR</code>, where DIR is the folder this file is in."
            ),
        )
    )


def _heading(run: TrainingRun) -> str:
    """Onset and destabilisation in a few words."""
    began, broke = (run.onset[name] for name in ("onset", "destabilisation"))
    said = [f"onset at step {began['step']}" if began else "no lasting onset"]
    said.append(f"destabilised at step {broke['step']}" if broke else "not destabilised")
    words = ", ".join(said)
    return words[0].upper() + words[1:]


def _first_and_last(run: TrainingRun, still: Markup) -> Chart:
    """Depth traces of the reference, of the onset and of the last step; the still picture has all steps."""
    steps = run.steps.tolist()
    began = run.onset["onset"]
    chosen = sorted({len(steps) - 1} | ({steps.index(began["step"])} if began else set()))
    start = run.comparisons[0].columns
    first, last = run.traces[0].terminal
    panels = []
    for name, label, colour in (
        ("contraction", "contraction α", "blue"),
        ("transport", "transport L (rad)", "vermillion"),
    ):
        values, low, high = (start[f"reference_{name}{end}"] for end in ("", "_low", "_high"))
        lines = [charts.Line(run.origin, values, "ink", 1, low, high)]
        for at in chosen:
            trace = run.traces[at]
            low, high = trace.interval(name)
            words = f"step {steps[at]}" + (" (onset)" if began and steps[at] == began["step"] else "")
            look, role = (0, colour) if at == chosen[-1] else (2, "purple")
            lines.append(charts.Line(words, trace.columns[name], role, look, low, high))
        panels.append(charts.panel(label, np.arange(run.traces[0].boundaries), lines, (first - 0.5, last + 0.5)))
    words = Markup(
        "<b>The depth trace at the start and at the end.</b> Contraction and transport over depth; {} is dashed. The "
        "shaded part is the terminal block. figures/over_training.png, and this page on paper, have every trace."
    ).format(run.origin)
    return Chart("over_training", charts.stacked("boundary", panels, height=190), still, words)


def _course(run: TrainingRun, svg: Markup) -> Picture:
    marks = "onset and destabilisation where there are any: here, none"
    if run.onset["onset"]:
        marks = "the onset" + (" and the destabilisation" if run.onset["destabilisation"] else "")
    words = (
        "<b>The course of the run.</b> Above, what changed against {} at each boundary and trace: orange is more, "
        "blue and hatched is less, and each map has its own scale. Below, on the same axis of steps, the footprint of "
        "the terminal block and what else was known. Lines mark {}."
    )
    hint = "Point at a trace to read its values."
    return Picture("course", svg, Markup(words).format(run.origin, marks), hint, tall=True)


def _losses(run: TrainingRun, drawn: Mapping[str, Markup]) -> list[Picture]:
    below = ""
    if any(len(run.series(f"{side}mean_token_accuracy")[0]) for side in ("", "eval_")):
        below = " Below, the share of tokens that the model held to be the likeliest."
    elif len(run.series("rewards/chosen")[0]):
        below = " Below, the rewards: β times how much likelier a response has become than under the reference."
    words = {
        "gradients": Markup(
            "<b>Where the gradient is.</b> The norm of the loss’s gradient over each block’s parameters, before "
            "clipping; of many steps, means of neighbours. Below, the terminal block’s share of the sum over blocks."
        ),
        "loss": Markup("<b>Loss.</b> In training and, where examples were held out, on those.{}").format(below),
    }
    return [Picture(name, drawn[name], words[name]) for name in words if name in drawn]


def training_headline(run: TrainingRun) -> str:
    """What happened, in one sentence of plain words."""
    began, broke, last = run.onset["onset"], run.onset["destabilisation"], run.steps[-1]
    healthy = run.onset["healthy"]
    before = "no trace is healthy" if healthy is None else f"the last healthy trace is that of step {healthy}"
    if began is None and broke is not None:
        return f"{no_onset_sentence(run.onset)}. The run destabilised at step {broke['step']}; {before}."
    if began is None:
        return f"{no_onset_sentence(run.onset)}."
    way = "contraction" if began["change"] > 0 else "expansion"
    text = f"A footprint of {way} began at step {began['step']}"
    if broke is None:
        return f"{text}, and up to step {last} nothing destabilised."
    return f"{text}, and it destabilised at step {broke['step']}; {before}."


def evidence(run: TrainingRun) -> list[tuple[str, str]]:
    """(what, why it is said and what else was known at that step) of onset and destabilisation, where there are any."""
    found = []
    for name, word in (("onset", "Onset"), ("destabilisation", "Destabilisation")):
        if (told := run.onset[name]) is not None:
            beside = _beside(told)
            text = f"{told['evidence'][:1].upper()}{told['evidence'][1:]}.".replace("step 0", run.origin)
            found.append((word, f"{text} At that step: {', '.join(beside)}." if beside else text))
    return found


def training_caveats(run: TrainingRun) -> list[str]:
    """What a reader must know before trusting the verdict: the run's own conditions, then warnings of the first
    and the last trace."""
    noise, least, control = run.onset["noise_se"], run.onset["min_records"], run.onset["control"]
    said = [
        f"A change counts when {least} traces in a row are more than {noise:g} standard errors out and one of them "
        f"more than {run.onset['strong_se']:g}. This run has {len(run.traces)} traces, so a change shorter than "
        f"{least} of them, or one in the last two, cannot be seen.",
        "Destabilisation means that the footprint falls back from a level it had held"
        + (", or that the output has moved more than pi/2 from the reference" if run.onset["max_distance"] else "")
        + ". A fall may be significant and yet small: its size is in the evidence.",
        "Standard errors cover other prompts of the same kind, not another seed. The optimiser's wobble is added in "
        "quadrature: the robust standard deviation of differences between traces of "
        f"{'this run' if control is None else 'the control run'}.",
    ]
    ends = ((run.steps[0], run.traces[0]), (run.steps[-1], run.traces[-1]))
    warnings = dict.fromkeys((step, warning) for step, trace in ends for warning in trace.warnings)
    return said + [f"Warning from the measurement of step {step}: {warning}" for step, warning in warnings]


def _kind(run: TrainingRun) -> str:
    if run.is_watched:
        return "watched from outside"
    objective = run.config["objective"]
    return f"dpo ({objective['loss']})" if objective["kind"] == "dpo" else objective["kind"]


def _tiles(run: TrainingRun) -> list[Tile]:
    """The last known value of what matters most."""
    summary, last = run.comparisons[-1].summary, f"step {run.steps[-1]}"
    tiles = [
        tile("Δ align", summary["delta_align"], _half(summary, "delta_align"), "", f"{last}, against {run.origin}")
    ]
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
            tiles.append(tile(label, float(values[-1]), note=f"step {steps[-1]}, {where}"))
    return [
        *tiles,
        tile(f"KL to {run.origin}", float(run.recorded("kl")[-1]), unit="nats", note=f"{last}, on the prompts"),
    ]


def _facts(run: TrainingRun) -> list[tuple[str, str | Markup]]:
    """(term, words) of what was trained, on what and how."""
    config, prompts, first = run.config, run.traces[0].prompts, run.traces[0]
    traces = (
        "Traces",
        f"{len(run.traces)}, at steps {_listed(run.steps)}, on {prompts['count']:,} prompts of {prompts['source']} "
        f"in {prompts['groups']} groups: {prompts['rows']:,} rows for contraction, {prompts['positions']:,} "
        "positions for transport",
    )
    shape = (
        f"{first.model['family']} family: {first.model['parameters']:,} parameters, {first.depth} blocks, width "
        f"{first.model['width']:,}"
    )
    if run.is_watched:
        return [("Model", f"{first.model['name']}, {shape}"), ("Checkpoints", config["source"]), traces]
    objective, optimizer, rank = config["objective"], config["optimizer"], config["lora"]["rank"]
    what = f"{objective['kind']}"
    if objective["kind"] == "dpo":
        what += f", {objective['loss']} loss, β {objective['beta']:g}"
    trained = f"LoRA adapters of rank {rank}, α {config['lora']['alpha']:g}" if rank else "all weights"
    data = config["corpus"] if objective["kind"] == "lm" else config["preferences"]
    clip = "no clipping" if optimizer["clip"] is None else f"clipped at {optimizer['clip']:g}"
    return [
        ("Model", f"{config['model']['source']}, {shape}"),
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
        traces,
        ("Weights", sha256_markup(run.settings["weights"], "new")),
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


def _table(run: TrainingRun) -> Table:
    """All traces: what was measured, and what was known beside it."""
    head, columns = [], []
    for name, title, unit in MEASURED:
        head.append((title, unit))
        values = np.array([comparison.summary[name] for comparison in run.comparisons])
        columns.append(
            number_cells(values, np.array([_half(comparison.summary, name) for comparison in run.comparisons]))
        )
    for name, title, unit in BESIDE:
        values = run.recorded(name)
        if np.isfinite(values).any():
            head.append((title, unit))
            columns.append(number_cells(values))
    marked = [run.onset[name]["step"] for name in ("onset", "destabilisation") if run.onset[name]]
    return Table("Every trace of the run", "step", head, run.steps.tolist(), by_row(columns), marked=marked)


def _half(summary: Mapping[str, Any], name: str) -> float:
    return float(summary[f"{name}_high"] - summary[f"{name}_low"]) / 2


def _beside(record: Mapping[str, Any]) -> list[str]:
    """What is known beside a record, each with its title and unit."""
    known = [entry for entry in BESIDE if isinstance(record.get(entry[0]), int | float)]
    return [f"{title} {number(record[name])} {unit}".rstrip() for name, title, unit in known]
