"""Attribution: aligned runs against control runs of the same base and budget, from their saved files.

One pair of checkpoints cannot separate alignment from training in general. Several runs of each arm can: the variance
between runs includes that of prompts, data order and labels (docs/method.md, "Attribution").
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

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
from spinal_jax.jsontypes import Json, ReadJson
from spinal_jax.stats.signflip import holm
from spinal_jax.stats.two_samples import MeanDifference, permutation_p, rank_correlation, welch
from spinal_jax.wording import number, plus_minus

SCHEMA = "spinal-attribution/1"
ATTRIBUTABLE, EQUIVALENT, UNDECIDED = "attributable", "equivalent", "undecided"
MIN_RUNS = 5  # runs in each arm that a verdict needs
MARGIN_QUANTILE = 0.95  # of |x| over the controls
MOST_RUNS = 1000  # largest number of runs in an arm that `more_runs` considers
# Changes from the base. Control runs change too, so these have a margin and a verdict.
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
    """Result of several runs against controls.

    Attributes:
        verdict: "attributable", "equivalent" or "undecided", for Delta_align.
        sentence: the verdict with its evidence and limits.
        effects: by name of NUMBERS: effect (mean of aligned less mean of control), low, high, error,
            degrees_of_freedom, p_value, means and standard deviations of both arms, d_seed, and for CHANGES margin and
            verdict.
        more_runs: additional runs in each arm with which the present effect and variance would be decisive; 0 for a
            verdict; NaN above 1,000.
        boundaries: by name of BY_BOUNDARY: columns effect, low, high, p and p_holm, [D + 1] each.
        correlations: Spearman's, over all runs, between geometry and behaviour, with 95 % intervals.
        runs: a record for each run: folder, arm and numbers.
        settings: base, step, margin, whether all runs share one base, and the common inputs of the measurements.
        warnings: one sentence each.
    """

    verdict: str
    sentence: str
    effects: Mapping[str, ReadJson]
    more_runs: float
    boundaries: Mapping[str, Mapping[str, np.ndarray]]
    correlations: Mapping[str, ReadJson]
    runs: tuple[ReadJson, ...]
    settings: ReadJson
    warnings: tuple[str, ...] = ()

    def arm(self, arm: str, name: str) -> np.ndarray:
        """The defined values of a number over the runs of an arm."""
        values = np.array([run[name] for run in self.runs if run["arm"] == arm], np.float64)
        return values[np.isfinite(values)]

    def to_json(self) -> str:
        """The text of attribution.json: equal attributions give equal bytes; NaN is null."""
        content: Json = {"schema": SCHEMA, "verdict": self.verdict, "sentence": self.sentence}
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
    """Tests whether aligned runs differ from control runs by more than control runs change.

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
        UserError: the runs do not match, or an arm has fewer than two.
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
    runs: Sequence[AttributedRun], margin: float | None = None, settings: ReadJson | None = None
) -> Attribution:
    """The attribution of matching runs; arguments as in `attribute`."""
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
    """The verdict from the 95 % interval of an effect and the margin."""
    if math.isnan(low) or math.isnan(high) or math.isnan(margin):
        return UNDECIDED
    if low > margin or high < -margin:
        return ATTRIBUTABLE
    return EQUIVALENT if -margin < low and high < margin else UNDECIDED


def judge_effect(
    aligned: np.ndarray, control: np.ndarray, margin: float | None = None
) -> tuple[MeanDifference, float, str]:
    """(effect, margin, verdict) from the values of a change over the runs of both arms. The default margin is the
    MARGIN_QUANTILE of its magnitude over the controls."""
    effect = welch(aligned, control)
    if margin is None:
        margin = float(np.quantile(np.abs(control), MARGIN_QUANTILE))
    return effect, margin, verdict_of(effect.low, effect.high, margin)


def _values(runs: Sequence[AttributedRun], name: str) -> np.ndarray:
    return np.array([run.numbers.get(name, math.nan) for run in runs], np.float64)


def _effect(name: str, aligned: np.ndarray, control: np.ndarray, margin: float | None) -> Json:
    """The record of one number; NaN if a run lacks it."""
    difference, margin, verdict = judge_effect(aligned, control, margin if name == "delta_align" else None)
    effect: Json = {
        "effect": difference.value,
        "low": difference.low,
        "high": difference.high,
        "error": difference.error,
        "degrees_of_freedom": difference.freedom,
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


def more_runs(by_arm: Mapping[str, Sequence[AttributedRun]], main: ReadJson) -> float:
    """Runs in each arm, in addition to those of the larger arm, with which the present effect, variance and margin
    would be decisive; NaN above MOST_RUNS."""
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
    differences = [welch(one[:, at], other[:, at]) for at in range(one.shape[1])]
    p = np.array([permutation_p(one[:, at], other[:, at]) for at in range(one.shape[1])])
    return {
        "effect": np.array([each.value for each in differences]),
        "low": np.array([each.low for each in differences]),
        "high": np.array([each.high for each in differences]),
        "p": p,
        "p_holm": holm(p),
    }


def _correlation(runs: Sequence[AttributedRun], name: str) -> Json:
    correlation = rank_correlation(_values(runs, name), _values(runs, BEHAVIOUR))
    interval = (
        ""
        if math.isnan(correlation.low)
        else f" (95 % interval {number(correlation.low)} to {number(correlation.high)})"
    )
    sentence = (
        f"Over these {correlation.count} runs {NUMBERS[name][0]} and {NUMBERS[BEHAVIOUR][0]} on held-out pairs have a "
        f"rank correlation of {number(correlation.value)}{interval}: a correlation over these runs and no more."
    )
    return {
        "value": correlation.value,
        "low": correlation.low,
        "high": correlation.high,
        "runs": correlation.count,
        "sentence": sentence,
    }


def _sentence(
    verdict: str,
    main: ReadJson,
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


def save_attribution(attribution: Attribution, folder: str | os.PathLike[str]) -> None:
    """Writes attribution.csv (a row a run), effects.csv (a row a number) and, last, attribution.json; each whole."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "attribution.csv", table([dict(run) for run in attribution.runs]).encode())
    rows = [
        {"number": name, "margin": math.nan, "verdict": "", **effect} for name, effect in attribution.effects.items()
    ]
    write_whole(folder / "effects.csv", table(rows).encode())
    write_whole(folder / "attribution.json", attribution.to_json().encode())


def load_attribution(path: str | os.PathLike[str]) -> Attribution:
    """The attribution of a run folder, or of an attribution.json.

    Raises:
        UserError: nothing there, another schema, or a file that cannot be read.
    """
    file = Path(path)
    file = file / "attribution.json" if file.is_dir() else file
    content = load_json_file(file, finite=True)
    if (said := content.get("schema")) != SCHEMA:
        raise UserError(f"{file} says schema {said!r}; this version of spinal_jax reads {SCHEMA!r}")
    with malformed(file):
        return _of_content(content)


def _of_content(content: ReadJson) -> Attribution:
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


def attribution_shortfalls(attribution: Attribution, *, verdict: str | None = None) -> list[str]:
    """Where the evidence falls short of what was asked for, a phrase each."""
    if verdict is not None and attribution.verdict != verdict:
        return [f"the verdict is {attribution.verdict!r}, not {verdict!r}"]
    return []
