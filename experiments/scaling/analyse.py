"""The tables and figures of the scaling study: python experiments/scaling/analyse.py SWEEP OUT.

From the table of runs alone, attribution.csv again: python experiments/scaling/analyse.py OUT.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).parent))
import figures

from spinal_jax.comparison.attribution import MIN_RUNS, UNDECIDED, judge_effect
from spinal_jax.files import table, write_whole
from spinal_jax.runs.find import Run, find_runs
from spinal_jax.stats.signflip import holm
from spinal_jax.stats.two_samples import permutation_p

# What is set against size, and how: on logarithms of both (a power law), or of the parameters alone.
FITTED = {
    "abs_delta_align": "power",
    "gradient_density": "power",
    "coherence": "power",
    "policy_distance_centroid": "power",
    "kl": "power",
    "delta_align": "linear",
}
# What a null arm must not show: the mean over seeds, against 0. And where DPO differs from the null arms, seed by seed.
AGAINST_ZERO = ("delta_align", "delta_contraction_excess", "delta_transport_excess", "policy_distance_excess")
COMPARED = ("abs_delta_align", "gradient_density", *AGAINST_ZERO)
ATTRIBUTED = ("delta_align", "kl", "gradient_share", "accuracy")  # DPO's runs against those of each control
SEEDS_NEEDED, SIZES_NEEDED = 3, 3
Row = dict[str, Any]


def arm_of(run: Run) -> str:
    """base, dpo, sft or shuffled."""
    kind = run.settings["objective.kind"]
    return "base" if kind == "lm" else "shuffled" if run.settings.get("preferences.shuffle_labels") else kind


def row_of(run: Run, bases: Mapping[tuple[str, int], Run]) -> Row:
    """One run of an arm, with the base that it began with."""
    size, seed, found = run.settings["model.name"], run.settings["seed"], run.results
    base = bases[size, seed]
    assert run.trace is not None
    first, last = run.trace.terminal
    even = (last - first + 1) / run.trace.depth
    return {
        "run": run.folder.name,
        "arm": arm_of(run),
        "swept": (*run.folder.name.split("-"), "")[3],  # beta or rate, in a sweep over that at one size
        "size": size,
        "parameters": run.trace.model["parameters"],
        "seed": seed,
        "beta": run.settings["objective.beta"],
        "learning_rate": run.settings["optimizer.learning_rate"],
        "base_steps": base.results["steps"],
        "base_loss": base.results["eval_loss"],
        "matched": float(base.results["eval_loss"]) <= base.settings["until_eval_loss"],
        **{name: found[name] for name in ("delta_align", "delta_align_low", "delta_align_high", "p_value")},
        "abs_delta_align": abs(float(found["delta_align"])),
        "kl": found["kl"],
        "accuracy": found.get("eval_rewards/accuracies", np.nan),
        "gradient_share": found["gradient_share_mean"],
        "gradient_density": float(found["gradient_share_mean"]) / even,  # even grows where 3 does not divide the depth
        "coherence": found["coherence"] if last - first > 1 else np.nan,  # two boundaries have no second difference
        "policy_distance_centroid": found["policy_distance_centroid"],
        "delta_contraction_centroid": found["delta_contraction_centroid"],
        "delta_contraction_excess": float(found["delta_contraction_share"]) - even,
        "delta_transport_excess": float(found["delta_transport_share"]) - even,
        "policy_distance_excess": float(found["policy_distance_share"]) - even,
        "onset": found["onset"],
    }


MEASURED = (
    *("delta_align", "abs_delta_align", "kl", "accuracy", "gradient_share", "gradient_density", "coherence"),
    *("policy_distance_centroid", "policy_distance_excess", "delta_transport_excess"),
    *("delta_contraction_centroid", "delta_contraction_excess", "onset"),
)
GROUP = ("arm", "size", "parameters", "beta", "learning_rate")


def means(rows: Sequence[Row]) -> list[Row]:
    """Mean and standard error over seeds, and how many seeds have the number, for every arm, size and setting."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in GROUP), []).append(row)
    found = []
    for key, some in groups.items():
        line: Row = dict(zip(GROUP, key, strict=True)) | {"seeds": len(some)}
        for name in MEASURED:
            values = _known(some, name)
            line[name] = float(values.mean()) if len(values) else np.nan
            line[f"{name}_se"] = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else np.nan
        line["onsets"] = len(_known(some, "onset"))
        found.append(line)
    return sorted(found, key=lambda line: (line["arm"], line["parameters"], line["beta"], line["learning_rate"]))


def _known(rows: Sequence[Row], name: str) -> np.ndarray:
    values = np.array([row[name] for row in rows], float)
    return values[np.isfinite(values)]


def fits(rows: Sequence[Row]) -> list[Row]:
    """For each arm and quantity its exponent (or slope a decade) in parameters, fitted on means over seeds, with a 95 %
    interval over seeds, and a prediction test: the law of all sizes but the largest, against the largest."""
    found = []
    for arm in sorted({row["arm"] for row in rows}):
        some = [row for row in rows if row["arm"] == arm]
        seeds = sorted({row["seed"] for row in some})
        sizes = sorted({row["parameters"] for row in some})
        for name, kind in FITTED.items():
            known = [size for size in sizes if all(np.isfinite(_at(some, size, s, name)) for s in seeds)]
            values = np.array([[_at(some, size, s, name) for s in seeds] for size in known])
            if len(known) < SIZES_NEEDED or (kind == "power" and (values <= 0).any()):
                continue
            law = _law(np.array(known, float), kind)
            slope, beyond = law(values)
            half, beyond_half = _halves(law, values) if len(seeds) >= SEEDS_NEEDED else (np.nan, np.nan)
            found.append(
                {
                    "arm": arm,
                    "quantity": name,
                    "kind": kind,
                    "sizes": len(known),
                    "seeds": len(seeds),
                    "slope": slope,
                    "slope_low": slope - half,
                    "slope_high": slope + half,
                    "largest_off": beyond,
                    "largest_off_low": beyond - beyond_half,
                    "largest_off_high": beyond + beyond_half,
                    "largest_predicted": "" if np.isnan(beyond_half) else bool(abs(beyond) <= beyond_half),
                }
            )
    return found


def _at(rows: Sequence[Row], parameters: int, seed: int, name: str) -> float:
    found = [row[name] for row in rows if row["parameters"] == parameters and row["seed"] == seed]
    return float(found[0]) if found else np.nan


def _halves(law: Callable[[np.ndarray], tuple[float, float]], values: np.ndarray) -> np.ndarray:
    """Half of the 95 % intervals of what a law gives, by the jackknife over seeds and Student's t."""
    count = values.shape[1]
    without = np.array([law(np.delete(values, at, axis=1)) for at in range(count)])
    error = np.sqrt((count - 1) / count * ((without - without.mean(axis=0)) ** 2).sum(axis=0))
    return stats.t.ppf(0.975, count - 1) * error


def _law(sizes: np.ndarray, kind: str) -> Callable[[np.ndarray], tuple[float, float]]:
    """From values [sizes, seeds]: the least-squares slope of their means over all sizes, and how far the largest size
    is above what the others predict: in natural logarithms for a power law, else as it is."""
    x = np.log10(sizes)

    def found(values: np.ndarray) -> tuple[float, float]:
        y = values.mean(axis=1)
        y = np.log10(y) if kind == "power" else y
        below = np.polyfit(x[:-1], y[:-1], 1)
        off = y[-1] - np.polyval(below, x[-1])
        return float(np.polyfit(x, y, 1)[0]), float(off * np.log(10)) if kind == "power" else float(off)

    return found


def less_null(rows: Sequence[Row]) -> list[Row]:
    """What DPO of each base shows beyond SFT and beyond shuffled labels of the same base, as arms of their own."""
    arms = {(row["arm"], row["parameters"], row["seed"]): row for row in rows}
    found = []
    for (arm, parameters, seed), row in arms.items():
        dpo = arms.get(("dpo", parameters, seed))
        if arm != "dpo" and dpo is not None:
            less = {name: dpo[name] - row[name] for name in COMPARED}
            found.append({"arm": f"dpo less {arm}", "parameters": parameters, "seed": seed, **less})
    return found


def against_zero(rows: Sequence[Row], names: Sequence[str] = AGAINST_ZERO) -> list[Row]:
    """Student's t over seeds of what alignment alone should show, for each arm and size; p after Holm's correction over
    the sizes of an arm beside it."""
    found = []
    for arm in sorted({row["arm"] for row in rows}):
        for name in names:
            lines = []
            for size in sorted({row["parameters"] for row in rows}):
                values = _known([row for row in rows if row["arm"] == arm and row["parameters"] == size], name)
                if len(values) < SEEDS_NEEDED:
                    continue
                p = float(stats.ttest_1samp(values, 0.0).pvalue)
                line = {"arm": arm, "quantity": name, "parameters": size, "seeds": len(values)}
                lines.append({**line, "mean": float(values.mean()), "p": p})
            for line, p in zip(lines, holm(np.array([line["p"] for line in lines])), strict=True):
                line["p_holm"] = float(p)
            found += lines
    return found


def pooled(rows: Sequence[Row], names: Sequence[str] = AGAINST_ZERO) -> list[Row]:
    """The same of the mean over all sizes that each seed has, for what a size alone has too few seeds to show; p after
    Holm's correction over the quantities of an arm beside it."""
    found = []
    for arm in sorted({row["arm"] for row in rows}):
        some = [row for row in rows if row["arm"] == arm]
        sizes, seeds = ({row[name] for row in some} for name in ("parameters", "seed"))
        whole = [seed for seed in sorted(seeds) if {row["parameters"] for row in some if row["seed"] == seed} == sizes]
        if len(whole) < SEEDS_NEEDED:
            continue
        lines = []
        for name in names:
            values = np.array([_known([row for row in some if row["seed"] == seed], name).mean() for seed in whole])
            half = stats.sem(values) * stats.t.ppf(0.975, len(whole) - 1)
            mean, p = float(values.mean()), float(stats.ttest_1samp(values, 0.0).pvalue)
            line = {"arm": arm, "quantity": name, "sizes": len(sizes), "seeds": len(whole)}
            lines.append({**line, "mean": mean, "low": mean - half, "high": mean + half, "p": p})
        for line, p in zip(lines, holm(np.array([line["p"] for line in lines])), strict=True):
            line["p_holm"] = float(p)
        found += lines
    return found


def attribution(rows: Sequence[Row]) -> list[Row]:
    """DPO against either control at each size, as `spinal attribute same_base=false` has it: Welch's interval,
    permutation p, with Holm's correction over sizes beside it, d_seed, and of Delta_align margin and verdict."""
    found = []
    for control in ("shuffled", "sft"):
        for name in ATTRIBUTED:
            lines = []
            for size in sorted({row["parameters"] for row in rows}):
                some = [row for row in rows if row["parameters"] == size]
                one, other = (_known([row for row in some if row["arm"] == arm], name) for arm in ("dpo", control))
                if min(len(one), len(other)) < 2:
                    continue
                effect, margin, verdict = judge_effect(one, other)
                line: Row = {"control": control, "quantity": name, "size": some[0]["size"], "parameters": size}
                line |= {"runs_dpo": len(one), "runs_control": len(other)}
                line |= {"mean_dpo": float(one.mean()), "sd_dpo": float(one.std(ddof=1))}
                line |= {"mean_control": float(other.mean()), "sd_control": float(other.std(ddof=1))}
                line |= {"effect": effect.value, "low": effect.low, "high": effect.high, "p": permutation_p(one, other)}
                changes = name == "delta_align"
                d_seed = line["mean_dpo"] / line["sd_dpo"] if changes and line["sd_dpo"] > 0 else np.nan
                verdict = verdict if min(len(one), len(other)) >= MIN_RUNS else UNDECIDED
                line |= {"d_seed": d_seed, "margin": margin if changes else np.nan}
                lines.append({**line, "verdict": verdict if changes else ""})
            for line, p in zip(lines, holm(np.array([line["p"] for line in lines])), strict=True):
                line["p_holm"] = float(p)
            found += lines
    return found


def attribute_again(out: Path) -> None:
    """attribution.csv from the runs.csv of the same folder."""
    with (out / "runs.csv").open(encoding="utf-8", newline="") as file:
        rows: list[Row] = list(csv.DictReader(file))
    for row in rows:
        row |= {name: float(row[name] or "nan") for name in (*ATTRIBUTED, "parameters")}
    lines = attribution([row for row in rows if not row["swept"] and row["matched"] == "True"])
    write_whole(out / "attribution.csv", table(lines).encode())
    print(f"{out / 'attribution.csv'}: {len(lines)} rows")


def analyse(sweep: Path, out: Path) -> None:
    """runs.csv, means.csv, fits.csv, against_zero.csv, pooled.csv, attribution.csv and the figures."""
    runs = [run for run in find_runs([sweep]) if run.command == "train"]
    if incomplete := [run.folder.name for run in runs if not run.complete]:
        sys.exit(f"not complete, so nothing is analysed: {', '.join(incomplete)}; start the sweep again")
    bases = {(run.settings["model.name"], run.settings["seed"]): run for run in runs if arm_of(run) == "base"}
    pairs = [(run, row_of(run, bases)) for run in runs if arm_of(run) != "base"]
    pairs.sort(key=lambda pair: (pair[1]["arm"], pair[1]["parameters"], pair[1]["run"]))
    rows = [row for _, row in pairs]
    main = [row for row in rows if not row["swept"] and row["matched"]]
    out.mkdir(parents=True, exist_ok=True)
    tables = {"runs": rows, "means": means([row for row in rows if row["matched"]]), "fits": fits(main)}
    tables["against_zero"] = [*against_zero(main), *against_zero(less_null(main), COMPARED)]
    tables["pooled"] = [*pooled(main), *pooled(less_null(main), COMPARED)]
    tables["attribution"] = attribution(main)
    for name, lines in tables.items():
        if lines:
            write_whole(out / f"{name}.csv", table(lines).encode())
        else:
            (out / f"{name}.csv").unlink(missing_ok=True)
    where = [(run, row) for run, row in pairs if row in main]
    figures.draw(main, rows, tables["fits"], where, out)
    unmatched = sorted({row["run"] for row in rows if not row["matched"]})
    print(f"{len(rows)} runs, {len(unmatched)} on a base that was not matched: {', '.join(unmatched) or 'none'}")
    for line in tables["fits"]:
        print(f"  {line['arm']:<9} {line['quantity']:<25} {line['kind']:<6} slope {line['slope']:.3g}")
    print(f"  tables and figures in {out}")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python experiments/scaling/analyse.py [SWEEP] OUT")
    (analyse if len(sys.argv) == 3 else attribute_again)(*map(Path, sys.argv[1:]))
