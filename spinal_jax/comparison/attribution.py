"""Attribution: aligned runs against control runs of the same base and budget, from their saved files.

One pair of checkpoints cannot tell alignment from training. Several runs of each arm can: the spread between runs holds
that of prompts, of data order and of labels (docs/method.md, "Attribution").
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit

from spinal_jax.comparison.attribution_runs import (
    BY_BOUNDARY,
    AttributedRun,
    check_comparable_runs,
    folders_of,
    read_attributed_run,
)
from spinal_jax.errors import UserError
from spinal_jax.files import load_json_file, malformed, plain, table, undefined, write_whole
from spinal_jax.stats.signflip import holm
from spinal_jax.stats.two_samples import MeanDifference, permutation_p, rank_correlation, welch
from spinal_jax.wording import number, plus_minus

SCHEMA = "spinal-attribution/1"
ATTRIBUTABLE, EQUIVALENT, UNDECIDED = "attributable", "equivalent", "undecided"
MIN_RUNS = 5  # runs of an arm that a verdict needs
MARGIN_QUANTILE = 0.95  # of |x| over the controls
MOST_RUNS = 1000  # of an arm, beyond which it is said that no number of runs would decide
# Changes from the base, of which a single control run has some by itself: these have a margin and a verdict.
CHANGES = ("delta_align", "delta_contraction", "delta_transport")
NUMBERS: Mapping[str, tuple[str, str]] = {  # name: title, unit
    "delta_align": ("Delta_align", ""),
    "delta_contraction": ("change of terminal contraction", ""),
    "delta_transport": ("change of terminal transport", "rad"),
    "output_distance": ("policy distance at the output", "rad"),
    "kl": ("KL from the base at the output", "nats"),
    "spinal_gain": ("gain of the SPINALScore", ""),
    "gradient_share": ("terminal share of the gradient", ""),
    "reward_accuracy": ("implicit-reward accuracy", ""),
    "reward_margin": ("implicit-reward margin", ""),
    "delta_contraction_share": ("terminal share of |change of contraction|", ""),
    "delta_contraction_centroid": ("centroid of |change of contraction|", "relative depth"),
    "delta_transport_share": ("terminal share of |change of transport|", ""),
    "delta_transport_centroid": ("centroid of |change of transport|", "relative depth"),
    "policy_distance_share": ("terminal share of the policy distance", ""),
    "policy_distance_centroid": ("centroid of the policy distance", "relative depth"),
}
GEOMETRY = ("delta_align", "spinal_gain", "output_distance", "kl")  # correlated with behaviour
BEHAVIOUR = "reward_accuracy"


@dataclass(frozen=True, eq=False)
class Attribution:
    """What several runs show against controls.

    Attributes:
        verdict: "attributable", "equivalent" or "undecided", of Delta_align.
        sentence: the same with its evidence and its limits.
        effects: by name of NUMBERS: effect (mean of aligned less mean of control), low, high, error,
            degrees_of_freedom, p_value, means and standard deviations of both arms, d_seed, and for CHANGES margin and
            verdict.
        more_runs: runs of each arm, beside those there are, after which the present effect and spread would decide; 0
            where it is decided; NaN where no number up to 1,000 would.
        boundaries: by name of BY_BOUNDARY: columns effect, low, high, p and p_holm, [D + 1] each.
        correlations: Spearman's, over all runs, between geometry and behaviour, with 95 % intervals.
        runs: one record a run: folder, arm and its numbers.
        settings: base, step, margin, whether all runs share one base, and what all were measured on.
        warnings: sentences that a reader of the numbers must know.
    """

    verdict: str
    sentence: str
    effects: Mapping[str, Mapping[str, Any]]
    more_runs: float
    boundaries: Mapping[str, Mapping[str, np.ndarray]]
    correlations: Mapping[str, Mapping[str, Any]]
    runs: tuple[Mapping[str, Any], ...]
    settings: Mapping[str, Any]
    warnings: tuple[str, ...] = ()

    def arm(self, arm: str, name: str) -> np.ndarray:
        """The defined values of a number over the runs of an arm."""
        values = np.array([run[name] for run in self.runs if run["arm"] == arm], np.float64)
        return values[np.isfinite(values)]

    def to_json(self) -> str:
        """The text of attribution.json: equal attributions give equal bytes; NaN is null."""
        content: dict[str, Any] = {"schema": SCHEMA, "verdict": self.verdict, "sentence": self.sentence}
        content |= {"more_runs": plain(self.more_runs)}
        for name in ("effects", "boundaries", "correlations", "settings"):
            content[name] = plain(getattr(self, name))
        content |= {"runs": plain(list(self.runs)), "warnings": list(self.warnings)}
        return json.dumps(content, indent=1, allow_nan=False) + "\n"

    def __repr__(self) -> str:
        main = self.effects["delta_align"]
        lines = [f"Attribution: {self.verdict}", f"  {self.sentence}"]
        for name, effect in self.effects.items():
            if name != "delta_align" and math.isfinite(effect["effect"]):
                title, unit = NUMBERS[name]
                interval = plus_minus(effect["effect"], effect["high"] - effect["effect"])
                lines.append(f"  {title}: {interval} {unit}".rstrip() + f", p = {number(effect['p_value'], 2)}")
        for found in self.correlations.values():
            if math.isfinite(found["value"]):
                lines.append(f"  {found['sentence']}")
        lines.append(f"  d_seed    {number(main['d_seed'])}: mean over standard deviation of the aligned runs")
        return "\n".join(lines + [f"  warning   {warning}" for warning in self.warnings])


def attribute(
    aligned: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    control: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    base: str | os.PathLike[str] | None = None,
    beside: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    margin: float | None = None,
    step: int | None = None,
    same_base: bool = True,
) -> Attribution:
    """Whether aligned runs differ from control runs by more than a control run moves by itself.

    `effect = mean(A) - mean(C)` of Delta_align, with Welch's interval from the variances between runs and a p-value by
    permutation of runs. The margin m is the 95 % quantile of `|Delta_align|` over the controls unless given. The
    verdict is "attributable" where the effect's interval lies outside [-m, m], "equivalent" where it lies inside, else
    "undecided".

    Args:
        aligned: folders of training runs, comparisons or audits, or patterns such as `runs/dpo-*`; one or several.
        control: the same of the controls, trained from the same base with the same budget, as on shuffled labels.
        base: folder of the base's trace; audits are compared with it, and training runs must begin with its numbers.
        beside: folders of a third arm, shown and not tested.
        margin: of `|Delta_align|`; None takes it from the controls.
        step: of training runs, whose trace is taken; None takes the last.
        same_base: False admits runs that each have a base of their own.

    Raises:
        UserError: runs that do not match, or fewer than two in an arm.
    """
    if margin is not None and not margin > 0:
        raise UserError(f"margin is {margin!r}; it takes null or a number above 0")
    arms = {"aligned": aligned, "control": control, "beside": beside}
    at = None if base is None else os.fspath(base)
    runs = [
        read_attributed_run(folder, arm, at, step)
        for arm, given in arms.items()
        for folder in folders_of([os.fspath(p) for p in ([given] if isinstance(given, (str, os.PathLike)) else given)])
    ]
    for arm in ("aligned", "control"):
        count = sum(run.arm == arm for run in runs)
        if count < 2:
            raise UserError(
                f"{arm} has {count} run{'s' * (count != 1)}; an arm takes 2 or more, and {MIN_RUNS} for a verdict"
            )
    check_comparable_runs(runs, same_base)
    return attributed(runs, margin, {"base": at, "step": step, "same_base": same_base})


def attributed(
    runs: Sequence[AttributedRun], margin: float | None = None, settings: Mapping[str, Any] | None = None
) -> Attribution:
    """The attribution of runs that match; arguments as `attribute` has them."""
    by_arm = {arm: [run for run in runs if run.arm == arm] for arm in ("aligned", "control", "beside")}
    effects = {
        name: _effect(name, _values(by_arm["aligned"], name), _values(by_arm["control"], name), margin)
        for name in NUMBERS
    }
    main = effects["delta_align"]
    fewest = min(len(by_arm["aligned"]), len(by_arm["control"]))
    verdict = main["verdict"] if fewest >= MIN_RUNS else UNDECIDED
    more = 0.0 if verdict != UNDECIDED else more_runs(by_arm, main)
    boundaries = {name: _by_boundary(by_arm, name) for name in BY_BOUNDARY}
    correlations = {name: _correlation(runs, name) for name in GEOMETRY}
    warnings = _warnings(runs, by_arm, fewest)
    return Attribution(
        verdict=verdict,
        sentence=_sentence(verdict, main, by_arm, more, margin),
        effects=effects,
        more_runs=more,
        boundaries=boundaries,
        correlations=correlations,
        runs=tuple(
            {"folder": run.folder, "arm": run.arm, **{n: run.numbers.get(n, math.nan) for n in NUMBERS}} for run in runs
        ),
        settings={**(settings or {}), "margin": margin, "measured": dict(runs[0].measured)},
        warnings=warnings,
    )


def verdict_of(low: float, high: float, margin: float) -> str:
    """The verdict of an effect's 95 % interval against a margin."""
    if math.isnan(low) or math.isnan(high) or math.isnan(margin):
        return UNDECIDED
    if low > margin or high < -margin:
        return ATTRIBUTABLE
    return EQUIVALENT if -margin < low and high < margin else UNDECIDED


def judge_effect(
    aligned: np.ndarray, control: np.ndarray, margin: float | None = None
) -> tuple[MeanDifference, float, str]:
    """(effect, margin, verdict) of a change, from its values over the runs of both arms; a margin of None is the
    MARGIN_QUANTILE of its magnitude over the controls."""
    found = welch(aligned, control)
    if margin is None:
        margin = float(np.quantile(np.abs(control), MARGIN_QUANTILE))
    return found, margin, verdict_of(found.low, found.high, margin)


def _values(runs: Sequence[AttributedRun], name: str) -> np.ndarray:
    return np.array([run.numbers.get(name, math.nan) for run in runs], np.float64)


def _effect(name: str, aligned: np.ndarray, control: np.ndarray, margin: float | None) -> dict[str, Any]:
    """The record of one number; NaN where a run lacks it."""
    found, margin, verdict = judge_effect(aligned, control, margin if name == "delta_align" else None)
    effect: dict[str, Any] = {
        "effect": found.value,
        "low": found.low,
        "high": found.high,
        "error": found.error,
        "degrees_of_freedom": found.freedom,
        "p_value": permutation_p(aligned, control),
        "mean_aligned": float(aligned.mean()),
        "sd_aligned": float(aligned.std(ddof=1)),
        "mean_control": float(control.mean()),
        "sd_control": float(control.std(ddof=1)),
        "d_seed": float(aligned.mean() / aligned.std(ddof=1)) if aligned.std(ddof=1) > 0 else math.nan,
    }
    if name in CHANGES:
        effect |= {"margin": margin, "verdict": verdict}
    return effect


def more_runs(by_arm: Mapping[str, Sequence[AttributedRun]], main: Mapping[str, Any]) -> float:
    """Runs of each arm, beside the larger arm's, after which the present effect, spread and margin would decide; NaN
    where no number up to MOST_RUNS would."""
    present = max(len(by_arm["aligned"]), len(by_arm["control"]))
    clear = abs(abs(main["effect"]) - main["margin"])
    variances = np.array([main["sd_aligned"], main["sd_control"]]) ** 2
    for count in range(max(MIN_RUNS, min(len(by_arm["aligned"]), len(by_arm["control"]))), MOST_RUNS + 1):
        square = variances.sum() / count
        freedom = square**2 / np.sum((variances / count) ** 2 / (count - 1)) if square > 0 else math.inf
        if float(stdtrit(freedom, 0.975)) * math.sqrt(square) < clear:
            return float(max(1, count - present))
    return math.nan


def _by_boundary(by_arm: Mapping[str, Sequence[AttributedRun]], name: str) -> dict[str, np.ndarray]:
    one, other = (np.array([run.columns[name] for run in by_arm[arm]]) for arm in ("aligned", "control"))
    found = [welch(one[:, at], other[:, at]) for at in range(one.shape[1])]
    p = np.array([permutation_p(one[:, at], other[:, at]) for at in range(one.shape[1])])
    return {
        "effect": np.array([each.value for each in found]),
        "low": np.array([each.low for each in found]),
        "high": np.array([each.high for each in found]),
        "p": p,
        "p_holm": holm(p),
    }


def _correlation(runs: Sequence[AttributedRun], name: str) -> dict[str, Any]:
    found = rank_correlation(_values(runs, name), _values(runs, BEHAVIOUR))
    interval = "" if math.isnan(found.low) else f" (95 % interval {number(found.low)} to {number(found.high)})"
    sentence = (
        f"Over these {found.count} runs {NUMBERS[name][0]} and {NUMBERS[BEHAVIOUR][0]} on held-out pairs have a rank "
        f"correlation of {number(found.value)}{interval}: a correlation over these runs and no more."
    )
    return {"value": found.value, "low": found.low, "high": found.high, "runs": found.count, "sentence": sentence}


def _sentence(
    verdict: str,
    main: Mapping[str, Any],
    by_arm: Mapping[str, Sequence[AttributedRun]],
    more: float,
    given: float | None,
) -> str:
    counts = f"{len(by_arm['aligned'])} aligned and {len(by_arm['control'])} control runs"
    whose = "given" if given is not None else "the 95 % quantile of |Delta_align| over the controls"
    lines = [
        f"{verdict.capitalize()}: over {counts} the effect on Delta_align is {number(main['effect'])} (95 % interval "
        f"{number(main['low'])} to {number(main['high'])}, permutation p = {number(main['p_value'], 2)}), against a "
        f"margin of {number(main['margin'])} ({whose})."
    ]
    if verdict == ATTRIBUTABLE:
        lines.append("The arms differ by more than a control run moves by itself.")
    elif verdict == EQUIVALENT:
        lines.append("The arms differ by less than a control run moves by itself.")
    else:
        if main["p_value"] < 0.05:
            lines.append("The arms differ, but not by clearly more than a control run moves by itself.")
        if math.isnan(more):
            lines.append(f"At the present effect and spread no number of runs up to {MOST_RUNS:,} an arm would decide.")
        else:
            lines.append(f"At the present effect and spread about {more:.0f} more runs an arm would decide.")
    lines.append("It holds for runs of this base, these prompts and this budget.")
    return " ".join(lines)


def _warnings(
    runs: Sequence[AttributedRun], by_arm: Mapping[str, Sequence[AttributedRun]], fewest: int
) -> tuple[str, ...]:
    lines = []
    if fewest < MIN_RUNS:
        lines.append(
            f"An arm has {fewest} runs: a verdict needs {MIN_RUNS}, so that it is undecided whatever the numbers."
        )
    if len({run.reference for run in runs}) > 1:
        lines.append("Runs have bases of their own: the spread between runs holds that of bases too.")
    if any(bool(run.trained) != bool(runs[0].trained) for run in runs):
        lines.append("Some runs are comparisons without training settings: that their budget is equal was not checked.")
    elif not runs[0].trained:
        lines.append("The runs hold no training settings: that their budget is equal was not checked.")
    lost = [run.name for run in runs if math.isnan(run.numbers["delta_align"])]
    if lost:
        lines.append(f"Delta_align is undefined in {', '.join(lost)}, so that there is no effect.")
    return tuple(lines)


def save_attribution(found: Attribution, folder: str | os.PathLike[str]) -> None:
    """Writes attribution.csv (a row a run), effects.csv (a row a number) and, last, attribution.json; each whole."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "attribution.csv", table([dict(run) for run in found.runs]).encode())
    rows = [{"number": name, "margin": math.nan, "verdict": "", **effect} for name, effect in found.effects.items()]
    write_whole(folder / "effects.csv", table(rows).encode())
    write_whole(folder / "attribution.json", found.to_json().encode())


def load_attribution(path: str | os.PathLike[str]) -> Attribution:
    """The attribution of a run folder, or of an attribution.json.

    Raises:
        UserError: nothing there, another schema, or a file that cannot be read.
    """
    file = Path(path)
    file = file / "attribution.json" if file.is_dir() else file
    content = load_json_file(file)
    if (said := content.get("schema")) != SCHEMA:
        raise UserError(f"{file} says schema {said!r}; this version of spinal_jax reads {SCHEMA!r}")
    with malformed(file):
        return _of_content(content)


def _of_content(content: Mapping[str, Any]) -> Attribution:
    columns = {
        name: {key: np.array([math.nan if v is None else v for v in values]) for key, values in column.items()}
        for name, column in content["boundaries"].items()
    }
    return Attribution(
        verdict=content["verdict"],
        sentence=content["sentence"],
        effects=undefined(content["effects"]),
        more_runs=math.nan if content["more_runs"] is None else content["more_runs"],
        boundaries=columns,
        correlations=undefined(content["correlations"]),
        runs=tuple(undefined(run) for run in content["runs"]),
        settings=content["settings"],
        warnings=tuple(content["warnings"]),
    )


def attribution_shortfalls(found: Attribution, *, verdict: str | None = None) -> list[str]:
    """Where the evidence falls short of what was asked for, a phrase each."""
    if verdict is not None and found.verdict != verdict:
        return [f"the verdict is {found.verdict!r}, not {verdict!r}"]
    return []
