"""The runs of an attribution: their numbers and what they were trained and measured on, from saved files alone."""

from __future__ import annotations

import glob
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spinal_jax.audit.trace import load_trace
from spinal_jax.comparison.compare import compare_traces
from spinal_jax.comparison.record import Comparison, load_comparison
from spinal_jax.comparison.sources import saved_trace, steps_of
from spinal_jax.errors import UserError
from spinal_jax.files import flat, load_json_file, load_json_lines, malformed
from spinal_jax.jsontypes import Json, ReadJson

SETTINGS, METRICS = "settings.json", "metrics.jsonl"  # of a training run
BY_BOUNDARY = ("delta_contraction", "delta_transport", "policy_distance")
FROM_SUMMARY = (
    *("delta_align", "delta_contraction", "delta_transport", "output_distance", "kl", "spinal_gain"),
    *("reward_accuracy", "reward_margin"),
)
# Settings in which the arms of one study may differ: what is trained towards, on which labels, in which order.
OF_THE_ARM = ("objective.", "seed", "preferences.seed", "preferences.shuffle_labels", "preferences.label_noise")
# Settings that change nothing but where and how fast a run computes, or what it writes beside its last trace.
FREE_SETTINGS = (
    *("parallel.", "overwrite", "cache", "hydra.", "log_every", "eval_every", "eval_examples", "trace_every"),
    *("save_every", "max_to_keep", "micro_tokens", "remat"),
)


@dataclass(frozen=True, eq=False)
class AttributedRun:
    """One run of an arm.

    Attributes:
        folder: where it lies.
        arm: "aligned", "control" or "beside".
        numbers: by name; NaN where a run has none.
        columns: [D + 1] by name, of BY_BOUNDARY.
        reference: sha256 of the weights it is compared with.
        measured: what it was measured on and how, which all runs share.
        trained: settings of a training run, of which arms may differ in OF_THE_ARM; empty where they are not known.
    """

    folder: str
    arm: str
    numbers: Mapping[str, float]
    columns: Mapping[str, np.ndarray]
    reference: str
    measured: ReadJson
    trained: ReadJson

    @property
    def name(self) -> str:
        return Path(self.folder).name


def folders_of(patterns: Sequence[str]) -> list[str]:
    """The folders that paths and patterns such as runs/dpo-* name, each once. UserError where one names nothing."""
    folders: dict[str, None] = {}
    for pattern in patterns:
        places = sorted(glob.glob(pattern), key=_natural) if glob.has_magic(pattern) else [pattern]
        if not places or not all(os.path.exists(place) for place in places):
            raise UserError(f"{pattern} names no folder; give folders of runs, or a pattern such as runs/dpo-*")
        folders |= dict.fromkeys(places)
    return list(folders)


def _natural(path: str) -> tuple[int, str]:
    return len(path), path


def read_attributed_run(folder: str, arm: str, base: str | None, step: int | None) -> AttributedRun:
    """The numbers of one run.

    Args:
        folder: of a training run, of a comparison, or of an audit (which is then compared with `base`).
        arm: to which it belongs.
        base: folder of the trace that an audit is compared with.
        step: of training runs, whose trace is taken; None takes the last.

    Raises:
        UserError: nothing there, or nothing that can be compared.
    """
    place = Path(folder)
    steps = steps_of(place)
    trained: Json = {}
    if steps:
        if not (place / "manifest.json").is_file() and step is None:
            raise UserError(f"{folder} is a training run that has not ended; run its command again, or give step=N")
        if (at := max(steps) if step is None else step) not in steps:
            raise UserError(f"{folder} has no trace of step {at}; there are {', '.join(map(str, steps))}")
        comparison = load_comparison(steps[at])
        trained = _settings(place) | {"steps": at}
        numbers = _numbers(comparison) | _logged(place, at, comparison.terminal)
    elif (place / "comparison.json").is_file():
        comparison = load_comparison(place)
        numbers = _numbers(comparison)
    else:
        if base is None:
            raise UserError(f"{folder} holds a trace and no comparison; give base=DIR, the trace of the base")
        comparison = compare_traces(load_trace(place), saved_trace(base))
        numbers = _numbers(comparison)
    if base is not None:
        _check_base(folder, comparison, base)
    return AttributedRun(
        folder=folder,
        arm=arm,
        numbers=numbers,
        columns={name: comparison.columns[name] for name in BY_BOUNDARY},
        reference=str(comparison.reference["sha256"]),
        measured=_measured(comparison),
        trained=trained,
    )


def _check_base(folder: str, comparison: Comparison, base: str) -> None:
    """UserError where a run was compared with another model than the trace of `base`, by the numbers of both."""
    trace = saved_trace(base)
    if trace.prompts["sha256"] != comparison.prompts["sha256"]:
        raise UserError(f"base={base} was measured on other prompts than {folder}; audit the base on the same prompts")
    same = trace.model["sha256"] == comparison.reference["sha256"] or (
        trace.depth == comparison.depth
        and np.allclose(trace.columns["contraction"], comparison.columns["reference_contraction"], 1e-4, equal_nan=True)
        and np.allclose(trace.columns["transport"], comparison.columns["reference_transport"], 1e-3, equal_nan=True)
    )
    if not same:
        raise UserError(f"{folder} was compared with another model than base={base}; give runs of this base")


def _numbers(comparison: Comparison) -> dict[str, float]:
    numbers = {name: float(comparison.summary[name]) for name in FROM_SUMMARY}
    numbers["gradient_share"] = float(comparison.summary["gradient_concentration"])
    for place in BY_BOUNDARY:
        where = comparison.summary["localisation"][place]
        numbers |= {f"{place}_{what}": float(where[what]) for what in ("share", "centroid")}
    return numbers


def _logged(folder: Path, at: int, terminal: tuple[int, int]) -> dict[str, float]:
    """What a training run has logged: reward accuracy and margin on held-out pairs at its step or the last before, and
    the terminal block's share of the gradient, mean over its steps."""
    shares, rewards = [], {}
    first, last = terminal
    with malformed(folder / METRICS):
        for values in load_json_lines(folder / METRICS):
            if values["step"] > at:
                break
            norms = values.get("block_grad_norms")
            if norms and sum(norms) > 0:
                shares.append(sum(norms[first - 1 : last]) / sum(norms))
            for name, key in (
                ("reward_accuracy", "eval_rewards/accuracies"),
                ("reward_margin", "eval_rewards/margins"),
            ):
                if isinstance(values.get(key), float):
                    rewards[name] = values[key]
    return rewards | {"gradient_share": float(np.mean(shares)) if shares else math.nan}


def _settings(folder: Path) -> Json:
    with malformed(folder / SETTINGS):
        config = load_json_file(folder / SETTINGS)["config"]
        free = (*FREE_SETTINGS, "model.name")
        return {name: value for name, value in flat(config).items() if not name.startswith(free)}


def _measured(comparison: Comparison) -> Json:
    """What all runs must share: prompts, settings of the measurement, shape of the model."""
    return {
        **{f"prompts' {name}": comparison.prompts[name] for name in ("sha256", "count", "rows", "positions")},
        **{name: comparison.settings[name] for name in sorted(comparison.settings) if name != "weights"},
        "terminal": list(comparison.terminal),
        "blocks": comparison.depth,
        "width": comparison.reference["width"],
    }


def check_comparable_runs(runs: Sequence[AttributedRun], same_base: bool) -> None:
    """UserError that names the first run which does not match the first one, and in what: base, prompts, settings of
    the measurement, or training budget."""
    first = runs[0]
    seen: dict[str, str] = {}
    for run in runs:
        real = os.path.realpath(run.folder)
        if real in seen:
            raise UserError(f"{run.folder} is given twice, as {seen[real]} and as {run.arm}; a run belongs to one arm")
        seen[real] = run.arm
        for name, value in first.measured.items():
            if run.measured.get(name) != value:
                _refuse(run, first, name, run.measured.get(name), value)
        if same_base and run.reference != first.reference:
            raise UserError(
                f"{run.folder} starts from other weights ({run.reference[:12]}) than {first.folder} "
                f"({first.reference[:12]}); give runs of one base, or same_base=false where every run has its own"
            )
        for name in sorted(run.trained.keys() | first.trained.keys()):
            one, other = run.trained.get(name), first.trained.get(name)
            both = bool(run.trained) and bool(first.trained)
            own = name.startswith(OF_THE_ARM) or (not same_base and name.startswith("model."))
            if both and one != other and not own:
                _refuse(run, first, name, one, other)


def _refuse(run: AttributedRun, first: AttributedRun, name: str, one: object, other: object) -> None:
    raise UserError(
        f"{run.folder} does not match {first.folder}: {name} is {one!r} there and {other!r} here; runs of an "
        "attribution share base, prompts, settings and budget"
    )
