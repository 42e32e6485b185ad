"""The tables and the figure of the dynamics study: python experiments/dynamics/analyse.py SWEEP OUT."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from spinal_jax.collect.runs import find_runs
from spinal_jax.files import table, write_whole
from spinal_jax.report.figures import BLUE, GREEN, INK, MUTED, PURPLE, VERMILLION, png_bytes, styled
from spinal_jax.report.figures import svg_text as svg
from spinal_jax.report.training_run import TrainingRun, load_training_run

NOTHING_LEARNT = math.log(2)  # the preference loss of a policy that is its reference
EVALUATED = ("loss", "rewards/margins", "rewards/accuracies", "rewards/chosen")
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
            "step": record["step"],
            **{name: record[name] for name in RECORDED},
            **{f"eval_{name}": values.get(record["step"], math.nan) for name, values in evaluated.items()},
        }
        for record in run.records
    ]


def row_of(run: TrainingRun, records: Sequence[Row]) -> Row:
    """What a run came to: when its footprint began, when it destabilised, when its rewards collapsed, and how many
    steps the first was ahead of the last."""
    steps, losses = [r["step"] for r in records], [r["eval_loss"] for r in records]
    onset, broke = ((run.onset[name] or {}).get("step") for name in ("onset", "destabilisation"))
    collapsed = collapse(steps, losses)
    last, summary = records[-1], run.comparisons[-1].summary
    return {
        "learning_rate": last["learning_rate"],
        "steps": last["step"],
        "onset": onset,
        "destabilisation": broke,
        "collapse": collapsed,
        "onset_ahead": None if onset is None or collapsed is None else collapsed - onset,
        **{name: summary[name] for name in ("delta_align", "delta_align_low", "delta_align_high", "p_value")},
        **{name: last[name] for name in ("distance", "kl", *(f"eval_{name}" for name in EVALUATED))},
    }


PANELS = (
    ("Δ align", (("delta_align", BLUE, "o", ""),), True),
    ("terminal transport\nless that of step 0, rad", (("transport", BLUE, "o", ""),), True),
    ("output's distance\nfrom step 0, rad", (("distance", BLUE, "o", ""),), True),
    ("held-out loss, nats", (("eval_loss", INK, "o", ""),), False),
    (
        "held-out reward",
        (("eval_rewards/margins", GREEN, "s", "margin"), ("eval_rewards/chosen", PURPLE, "^", "chosen")),
        False,
    ),
)


@styled
def courses(runs: Sequence[tuple[Row, Sequence[Row]]]) -> Figure:
    """A column a learning rate: the footprint and the rewards over the same steps, what was detected marked."""
    figure = Figure(figsize=(2.6 * len(runs) + 0.6, 1.7 * len(PANELS)), layout="constrained")
    grid = figure.subplots(len(PANELS), len(runs), sharex=True, squeeze=False)
    for axes, (label, _, _) in zip(grid[:, 0], PANELS, strict=True):
        axes.set_ylabel(label)
    for column, (row, records) in zip(grid.T, runs, strict=True):
        column[0].set_title(f"learning rate {row['learning_rate']:g}")
        for axes, (_, lines, has_band) in zip(column, PANELS, strict=True):
            for name, colour, marker, _ in lines:
                _line(axes, records, name, colour, marker, has_band)
            _marks(axes, row)
            axes.grid(axis="y")
        column[3].axhline(NOTHING_LEARNT, color=MUTED, lw=0.9, ls=(0, (4, 2)))
        for axes in (column[0], column[1], column[4]):
            axes.axhline(0, color=MUTED, lw=0.9)
        column[-1].set_xlabel("step")
    rewards = [
        Line2D([], [], color=colour, marker=marker, ms=3, label=word) for _, colour, marker, word in PANELS[-1][1]
    ]
    marks = [Line2D([], [], label=word, **style) for word, style in MARKS.items()]
    figure.align_ylabels()
    figure.legend(handles=[*rewards, *marks], loc="outside lower center", ncols=5)
    return figure


MARKS: Mapping[str, Mapping[str, Any]] = {
    "onset": {"color": INK, "lw": 1.2, "ls": (0, (1, 1.5))},
    "destabilisation": {"color": VERMILLION, "lw": 1.2, "ls": (0, (4, 2))},
    "collapse": {"color": INK, "lw": 1.4, "ls": "-", "alpha": 0.6},
}


def _line(axes: Axes, records: Sequence[Row], name: str, colour: str, marker: str, has_band: bool) -> None:
    steps = np.array([record["step"] for record in records])
    values = np.array([record[name] for record in records], float)
    known = np.isfinite(values)
    axes.plot(steps[known], values[known], color=colour, marker=marker, markersize=3)
    if has_band:
        half = 2 * np.array([record[f"{name}_se"] for record in records], float)
        axes.fill_between(steps, values - half, values + half, color=colour, alpha=0.2, lw=0)


def _marks(axes: Axes, row: Row) -> None:
    for name, style in MARKS.items():
        if row[name] is not None:
            axes.axvline(row[name], **style)


def analyse(sweep: Path, out: Path) -> None:
    """runs.csv, records.csv and the figure."""
    found = find_runs([sweep])
    if incomplete := [run.folder.name for run in found if not run.complete]:
        sys.exit(f"not complete, so nothing is analysed: {', '.join(incomplete)}; start the sweep again")
    runs = sorted(
        (load_training_run(run.folder) for run in found), key=lambda r: r.config["optimizer"]["learning_rate"]
    )
    told = [(row_of(run, records), records) for run in runs for records in (records_of(run),)]
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "runs.csv", table([row for row, _ in told]).encode())
    write_whole(out / "records.csv", table([record for _, records in told for record in records]).encode())
    figure = courses(told)
    write_whole(out / "courses.png", png_bytes(figure))
    write_whole(out / "courses.svg", svg(figure, "courses").encode())
    for row, _ in told:
        when = ", ".join(f"{name} {'not found' if row[name] is None else row[name]}" for name in MARKS)
        print(f"  learning rate {row['learning_rate']:g}: {when}")
    print(f"  tables and figure in {out}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python experiments/dynamics/analyse.py SWEEP OUT")
    analyse(Path(sys.argv[1]), Path(sys.argv[2]))
