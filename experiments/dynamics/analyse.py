"""The tables and the figure of the dynamics study: python experiments/dynamics/analyse.py SWEEP OUT."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from spinal_jax.files import table, write_whole
from spinal_jax.report.figures import BLUE, GREEN, INK, MUTED, PURPLE, VERMILLION, png_bytes, styled
from spinal_jax.runs.find import find_runs
from spinal_jax.runs.training_run import TrainingRun, load_training_run

NOTHING_LEARNT = math.log(2)  # the preference loss of a policy that is its reference
RANKED, PER_TOKEN, SHORTER = "rewards/accuracies", "rewards/accuracies_per_token", "chosen_shorter"
EVALUATED = ("loss", "rewards/margins", "rewards/chosen", RANKED, PER_TOKEN, SHORTER)
RECORDED = ("delta_align", "delta_align_se", "transport", "transport_se", "distance", "distance_se", "kl")
Row = dict[str, Any]


def collapse(steps: Sequence[int], losses: Sequence[float]) -> int | None:
    """The first step from which the held-out loss stays above that of a policy that has learnt nothing, or is not
    known any more; None where the last is not above it. Step 0, where it is ln 2 to rounding, never counts."""
    bad = [step > 0 and not loss <= NOTHING_LEARNT for step, loss in zip(steps, losses, strict=True)]
    if not bad or not bad[-1]:
        return None
    last_good = max((at for at, is_bad in enumerate(bad) if not is_bad), default=-1)
    return int(steps[last_good + 1])


def records_of(run: TrainingRun) -> list[Row]:
    """One row a trace, with what was evaluated at its step."""
    evaluated = {
        name: dict(zip(*map(np.ndarray.tolist, run.series(f"eval_{name}")), strict=True)) for name in EVALUATED
    }
    return [
        {
            "learning_rate": run.config["optimizer"]["learning_rate"],
            "seed": run.config["seed"],
            "step": record["step"],
            **{name: record[name] for name in RECORDED},
            **{f"eval_{name}": values.get(record["step"], math.nan) for name, values in evaluated.items()},
        }
        for record in run.records
    ]


def row_of(run: TrainingRun, records: Sequence[Row]) -> Row:
    """What a run came to: when its footprint began, when it destabilised, when its rewards collapsed, and how many
    steps the first two were ahead of that."""
    found = {name: (run.onset[name] or {}).get("step") for name in ("onset", "destabilisation")}
    broke = run.onset["destabilisation"]
    collapsed = collapse([record["step"] for record in records], [record["eval_loss"] for record in records])
    last, summary = records[-1], run.comparisons[-1].summary
    return {
        "learning_rate": last["learning_rate"],
        "seed": last["seed"],
        "steps": last["step"],
        **found,
        "destabilised_by": broke and broke["series"],
        "collapse": collapsed,
        **{f"{name}_ahead": _difference(collapsed, found[name]) for name in ("onset", "destabilisation")},
        **{name: summary[name] for name in ("delta_align", "delta_align_low", "delta_align_high", "p_value")},
        **{name: last[name] for name in ("distance", "kl", *(f"eval_{name}" for name in EVALUATED))},
    }


def _difference(later: int | None, earlier: int | None) -> int | None:
    return None if later is None or earlier is None else later - earlier


class Panel(NamedTuple):
    """One row of the figure."""

    label: str
    lines: tuple[tuple[str, str, str], ...]  # what, in which colour, with which marker
    level: float | None = None  # a line to compare with
    logarithmic: bool = False


PANELS = (
    Panel("Δ align", (("delta_align", BLUE, "o"),), 0),
    Panel("terminal transport\nless that of step 0, rad", (("transport", BLUE, "o"),), 0),
    Panel("output's distance\nfrom step 0, rad", (("distance", BLUE, "o"),), math.pi / 2),
    Panel("held-out loss, nats", (("eval_loss", INK, "o"),), NOTHING_LEARNT, logarithmic=True),
    Panel("held-out reward", (("eval_rewards/margins", GREEN, "s"), ("eval_rewards/chosen", PURPLE, "^")), 0),
    Panel(
        "share of held-out pairs",
        ((f"eval_{RANKED}", BLUE, "o"), (f"eval_{PER_TOKEN}", VERMILLION, "D"), (f"eval_{SHORTER}", MUTED, "")),
        0.5,
    ),
)
SEEDS = ("-", (0, (3, 1.5)), (0, (1, 1)))  # how the lines of the first, second and third seed look
RING = {"marker": "o", "ls": "", "ms": 11, "mfc": "none", "mec": VERMILLION, "mew": 1.6}
BOX = {**RING, "marker": "s"}
WORDS = {
    "eval_rewards/margins": "margin",
    "eval_rewards/chosen": "chosen",
    f"eval_{RANKED}": "ranked rightly by reward",
    f"eval_{PER_TOKEN}": "by reward per token",
    f"eval_{SHORTER}": "chosen response shorter",
}


@styled
def courses(runs: Sequence[tuple[Row, Sequence[Row]]]) -> Figure:
    """A column a learning rate, a line a seed: the footprint and the rewards over the same steps, and the first
    point of what was detected marked on the series in which it was."""
    rates = sorted({row["learning_rate"] for row, _ in runs})
    seeds = sorted({row["seed"] for row, _ in runs})
    figure = Figure(figsize=(2.3 * len(rates) + 0.8, 1.55 * len(PANELS) + 0.6), layout="constrained")
    grid = figure.subplots(len(PANELS), len(rates), sharex=True, sharey="row", squeeze=False)
    for panel, line in zip(PANELS, grid, strict=True):
        line[0].set_ylabel(panel.label)
        for rate, axes in zip(rates, line, strict=True):
            if panel.logarithmic:
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_major_formatter("{x:g}")
                axes.yaxis.set_minor_formatter(NullFormatter())
            axes.axhline(panel.level, color=MUTED, lw=0.9, ls=(0, (4, 2)) if panel.level else "-")
            axes.grid(axis="y")
            for row, records in runs:
                if row["learning_rate"] == rate:
                    _draw(axes, panel, row, records, SEEDS[seeds.index(row["seed"])])
    for rate, top, bottom in zip(rates, grid[0], grid[-1], strict=True):
        top.set_title(f"learning rate {rate:g}")
        bottom.set_xlabel("step")
    figure.align_ylabels()
    figure.legend(handles=_legend(seeds), loc="outside lower center", ncols=4)
    return figure


def _draw(axes: Axes, panel: Panel, row: Row, records: Sequence[Row], style: Any) -> None:
    steps = np.array([record["step"] for record in records])
    for name, colour, marker in panel.lines:
        values = np.array([record[name] for record in records], float)
        if name in (f"eval_{RANKED}", f"eval_{PER_TOKEN}"):
            values[steps == 0] = np.nan  # all rewards are ties there
        axes.plot(steps, values, color=colour, marker=marker, ms=3, ls=style)
        if f"{name}_se" in records[0]:
            half = 2 * np.array([record[f"{name}_se"] for record in records], float)
            axes.fill_between(steps, values - half, values + half, color=colour, alpha=0.15, lw=0)
    detected = {"onset": "delta_align", "destabilisation": row["destabilised_by"], "collapse": "eval_loss"}
    for what, name in detected.items():
        if name == panel.lines[0][0] and row[what] is not None:
            record = next(record for record in records if record["step"] == row[what])
            axes.plot(record["step"], record[name], **(BOX if what == "destabilisation" else RING), zorder=3)


def _legend(seeds: Sequence[int]) -> list[Line2D]:
    lines = [line for panel in PANELS for line in panel.lines if line[0] in WORDS]
    return [
        *(Line2D([], [], color=INK, ls=style, label=f"seed {seed}") for seed, style in zip(seeds, SEEDS, strict=False)),
        *(Line2D([], [], color=colour, marker=marker, ms=3, label=WORDS[name]) for name, colour, marker in lines),
        Line2D([], [], **RING, label="onset (Δ align), collapse (loss)"),
        Line2D([], [], **BOX, label="destabilisation"),
    ]


def analyse(sweep: Path, out: Path) -> None:
    """runs.csv, records.csv and the figure."""
    found = find_runs([sweep])
    if incomplete := [run.folder.name for run in found if not run.complete]:
        sys.exit(f"not complete, so nothing is analysed: {', '.join(incomplete)}; start the sweep again")
    runs = [load_training_run(run.folder) for run in found]
    told = [(row_of(run, records), records) for run in runs for records in (records_of(run),)]
    told.sort(key=lambda one: (one[0]["learning_rate"], one[0]["seed"]))
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "runs.csv", table([row for row, _ in told]).encode())
    write_whole(out / "records.csv", table([record for _, records in told for record in records]).encode())
    figure = courses(told)
    write_whole(out / "courses.png", png_bytes(figure))
    for row, _ in told:
        detected = ("onset", "destabilisation", "collapse")
        when = ", ".join(f"{name} {'none' if row[name] is None else row[name]}" for name in detected)
        print(f"  learning rate {row['learning_rate']:g}, seed {row['seed']}: {when}")
    print(f"  tables and figure in {out}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python experiments/dynamics/analyse.py SWEEP OUT")
    analyse(Path(sys.argv[1]), Path(sys.argv[2]))
