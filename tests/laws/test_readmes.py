"""What the studies' pages say in numbers is what their committed tables hold."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def page(study: str) -> str:
    """A README with its lines joined, so that a sentence may break anywhere."""
    return " ".join((EXPERIMENTS / study / "README.md").read_text(encoding="utf-8").split())


def table(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened))


def cell(text: str, places: int) -> str:
    """A number of a table as the pages round it; 0 without decimals where it is exactly that, nothing where unknown."""
    return "" if not text else f"{float(text):.{places}f}"


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_course_of_smollm2(kind: str) -> None:
    text = page("smollm2_hh")
    for record in table(EXPERIMENTS / "smollm2_hh" / kind / "records.csv"):
        if record["step"] == "0":
            continue
        cells = [record["step"], *(cell(record[name], 4) for name in ("delta_align", "delta_align_se"))]
        cells += [cell(record[f"eval_rewards/{name}"], 3) for name in ("margins", "accuracies")]
        row = " ".join(f"| {value}".rstrip() for value in [*cells, cell(record["kl"], 4)])
        assert f"{row} |" in text, row


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("file", ["comparison.json", "against_base.json"])
def test_the_verdicts_of_smollm2(kind: str, file: str) -> None:
    found = json.loads((EXPERIMENTS / "smollm2_hh" / kind / file).read_text(encoding="utf-8"))
    summary: dict[str, Any] = found["summary"]
    value, low, high = (f"{summary[f'delta_align{end}']:.4f}" for end in ("", "_low", "_high"))
    text, p = page("smollm2_hh"), summary["p_value"]
    assert re.search(rf"`Delta_align` (is )?{value}, (95 % )?interval {low} to {high}, p = {p:.2g}\b", text), value
    assert f"in {found['robustness']['holds']} of {found['robustness']['of']} settings" in text
    told = found["columns"]["delta_contraction_p_holm"]
    changed = sum(value is not None and value < 0.05 for value in told)
    assert f"at {changed} of {len(told)} boundaries" in text
    shares = {name: place["share"] for name, place in summary["localisation"].items()}
    assert f"{shares['policy_distance']:.0%}".replace("%", " %") in text
    if file == "against_base.json":
        assert f"{shares['gradient_norm']:.0%}".replace("%", " %") in text


def test_the_arms_of_the_controlled_world() -> None:
    lines = (EXPERIMENTS / "controlled" / "README.md").read_text(encoding="utf-8").splitlines()
    runs = table(EXPERIMENTS / "controlled" / "runs.csv")
    for arm in ("dpo", "shuffled", "sft", "hot"):
        some = [run for run in runs if run["arm"] == arm]
        row = next(line for line in lines if line.startswith(f"| `{arm}` |"))
        accuracy, deltas, kl, *counts = (part.strip() for part in row.strip("|").split("|")[1:])
        known = sorted(float(run["accuracy_last"]) for run in some if run["accuracy_last"])
        assert_ends(accuracy, known)
        assert deltas == ", ".join(f"{float(run['delta_align']):.3f}" for run in some)
        moved = sorted(float(run["kl_last"]) for run in some)
        if kl.startswith("below"):
            assert moved[-1] < float(kl.removeprefix("below"))
        else:
            assert_ends(kl, moved)
        significant = sum(float(run["p_value"]) < 0.05 for run in some)
        told = [significant, *(sum(run[name] != "" for run in some) for name in ("onset", "destabilisation"))]
        assert counts == [f"{count} of {len(some)}" for count in told]


def test_the_stand_ins_of_the_families() -> None:
    text = page("families")
    for row in table(EXPERIMENTS / "families" / "standin" / "families.csv"):
        value, low, high = (cell(row[f"delta_align{end}"], 4) for end in ("", "_low", "_high"))
        share, even = (f"{float(row[name]):.0%}".replace("%", " %") for name in ("policy_distance_share", "share_even"))
        words = " | ".join((f"`{row['pair']}`", value, f"{low} to {high}", row["verdict"], share, even))
        assert f"| {words} |" in text, row["pair"]


def assert_ends(text: str, values: list[float]) -> None:
    """`LOW to HIGH`, or the one number that all values are, rounded as the text has them; nothing of no values."""
    said = text.split(" to ") if text else []
    ends = [values[0], values[-1]][2 - len(said) :] if values else []
    assert [f"{end:.{len(number.partition('.')[2])}f}" for end, number in zip(ends, said, strict=True)] == said


SCALING = EXPERIMENTS / "scaling" / "full"


def test_the_arms_of_the_scaling_study() -> None:
    text = page("scaling")
    shown = {"delta_align_se": 3, "abs_delta_align": 3, "kl": 4, "accuracy": 2, "gradient_density": 2}
    shown |= {"policy_distance_excess": 2, "onset": 0}
    rows = [row for row in table(SCALING / "means.csv") if (row["beta"], row["learning_rate"]) == ("0.1", "0.0001")]
    assert len(rows) == 18
    for row in rows:
        mean, *cells = (cell(row[name], places) for name, places in {"delta_align": 3, **shown}.items())
        line = " | ".join([f"| `{row['arm']}`", row["size"], f"{mean} ± {cells[0]}", *cells[1:]])
        assert f"{line} |".replace("|  |", "| |") in text, line


def test_the_small_edition_of_the_scaling_study_is_part_of_the_full_one() -> None:
    full = {row["run"]: row for row in table(SCALING / "runs.csv")}
    small = table(EXPERIMENTS / "scaling" / "small" / "runs.csv")
    assert all(row == full[row["run"]] for row in small)
    assert f"the same numbers to the last digit in all {len(small)} runs" in page("scaling")


def ends(row: dict[str, str], name: str, places: int) -> str:
    value, low, high = (cell(row[f"{name}{end}"], places) for end in ("", "_low", "_high"))
    return f"{value}, interval {low} to {high}"


def test_the_laws_of_the_scaling_study() -> None:
    text = page("scaling")
    laws = {(row["arm"], row["quantity"]): row for row in table(SCALING / "fits.csv")}
    power, kl = laws["dpo", "abs_delta_align"], laws["dpo", "kl"]
    assert f"Over all six sizes the exponent is {ends(power, 'slope', 2)}" in text
    assert float(power["slope_low"]) < 0 < float(power["slope_high"])
    assert f"larger than it said by {ends(power, 'largest_off', 2).replace(',', ' in natural logarithm,')}" in text
    assert power["largest_predicted"] == "False"
    assert f"with an exponent of {ends(kl, 'slope', 2)}" in text
    spent = [float(row["kl"]) for row in table(SCALING / "runs.csv") if (row["arm"], row["size"]) == ("dpo", "10m")]
    assert f"from {min(spent):.4f} to {max(spent):.1f} nats" in text


def test_the_sizes_of_the_scaling_study_together() -> None:
    lines = (EXPERIMENTS / "scaling" / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [row for row in table(SCALING / "pooled.csv") if row["arm"].startswith("dpo less")]
    assert len(rows) == 12
    for row in rows:
        numbers = f"{cell(row['mean'], 3)}, {cell(row['low'], 3)} to {cell(row['high'], 3)}"
        tail = f" | {numbers} | {float(row['p']):.2g} | {float(row['p_holm']):.2g} |"
        (line,) = (line for line in lines if line.endswith(tail))
        assert line.startswith(f"| `{row['arm'].removeprefix('dpo less ')}` |")
    alone = {row["arm"]: row for row in table(SCALING / "pooled.csv") if row["quantity"] == "delta_align"}
    assert float(alone["dpo"]["p_holm"]) < 0.05 < float(alone["sft"]["p"])
    interval = {
        arm: "{}, {} to {}".format(*(cell(row[name], 3) for name in ("mean", "low", "high")))
        for arm, row in alone.items()
    }
    p = f"{float(alone['dpo']['p_holm']):.2g} after Holm over four quantities"
    said = f"DPO itself expands ({interval['dpo']}, p = {p}); SFT is not told from 0 ({interval['sft']})"
    assert said in page("scaling")
    told = {(row["arm"], row["quantity"]) for row in rows if float(row["p_holm"]) < 0.05}
    against_sft = {("dpo less sft", name) for name in ("gradient_density", "delta_align", "policy_distance_excess")}
    assert told == {*against_sft, ("dpo less shuffled", "abs_delta_align")}


def test_the_control_of_the_scaling_study() -> None:
    text = page("scaling")
    slow, full = (table(EXPERIMENTS / "scaling" / edition / "runs.csv") for edition in ("slow", "full"))
    found: dict[tuple[str, str], list[float]] = {}
    for edition, rows in (("slow", slow), ("full", full)):
        for row in rows:
            if (row["arm"], row["swept"]) == ("dpo", ""):
                found.setdefault((edition, row["size"]), []).append(float(row["abs_delta_align"]))
    for row in table(EXPERIMENTS / "scaling" / "slow" / "means.csv"):
        shown = {"delta_align_se": 3, "abs_delta_align": 3, "kl": 4, "gradient_density": 2}
        error, *cells = (cell(row[name], places) for name, places in shown.items())
        other = "" if row["size"] == "10m" else f"{np.mean(found['full', row['size']]):.3f}"
        line = " | ".join([f"| {row['size']}", f"{cell(row['delta_align'], 3)} ± {error}", *cells, other])
        assert f"{line} |".replace("|  |", "| |") in text, line
    laws = {row["quantity"]: row for row in table(EXPERIMENTS / "scaling" / "slow" / "fits.csv")}
    power_law = laws["abs_delta_align"]
    power, kl = (ends(law, "slope", 2) for law in (power_law, laws["kl"]))
    assert f"there is no trend either: the exponent is {power} (of the KL {kl})" in text
    assert power_law["largest_predicted"] == "True"
    pooled = {row["quantity"]: row for row in table(EXPERIMENTS / "scaling" / "slow" / "pooled.csv")}["delta_align"]
    mean, low, high = (cell(pooled[name], 3) for name in ("mean", "low", "high"))
    assert f"the mean is {mean}, {low} to {high}, p = {float(pooled['p_holm']):.2g} after Holm" in text
    shared = ("0.3m", "1m", "3m")
    more = np.mean([np.subtract(found["slow", size], found["full", size]) for size in shared], axis=0)  # by seed
    assert f"(p = {stats.ttest_1samp(more, 0).pvalue:.2g} for the mean over sizes)" in text
    assert all(np.mean(found["slow", size]) > np.mean(found["full", size]) for size in shared)


def test_what_the_scaling_study_tells_from_nothing() -> None:
    text = page("scaling")
    runs = [row for row in table(SCALING / "runs.csv") if not row["swept"]]
    some = {arm: [row for row in runs if row["arm"] == arm] for arm in ("dpo", "sft", "shuffled")}
    sure = {arm: sum(float(row["p_value"]) < 0.05 for row in rows) for arm, rows in some.items()}
    assert f"{sure['shuffled']} of 30 are significant over prompts" in text
    assert f"as are {sure['dpo']} of 30 of `dpo` and {sure['sft']} of 30 of `sft`" in text
    assert f"{sum(row['onset'] == '' for row in runs)} of {len(runs)} runs have no onset" in text
    assert f"{sum(row['onset'] == '5.0' for row in runs)} of {len(runs)} runs have theirs at step 5" in text
    least, most = (cell(str(end(float(row["base_loss"]) for row in runs)), 2) for end in (min, max))
    assert f"({least} to {most} nats" in text
    one_sign = {
        (arm, size)
        for arm, rows in some.items()
        for size in {row["size"] for row in rows}
        if len({float(row["delta_align"]) > 0 for row in rows if row["size"] == size}) == 1
    }
    assert one_sign == {("dpo", "2m"), ("dpo", "10m")}

    tests = table(SCALING / "against_zero.csv")
    told = [row for row in tests if row["arm"] == "shuffled" and float(row["p_holm"]) < 0.05]
    assert [row["quantity"] for row in told] == ["delta_transport_excess", *["policy_distance_excess"] * 5]
    for row in told:
        assert f"{float(row['p_holm']):.2g}" in text
    means = [row for row in table(SCALING / "means.csv") if (row["beta"], row["learning_rate"]) == ("0.1", "0.0001")]
    assert all(float(row["policy_distance_excess"]) < 0 for row in means)
    size_of = {row["parameters"]: row["size"] for row in means}
    gradients = [row for row in tests if (row["arm"], row["quantity"]) == ("dpo less sft", "gradient_density")]
    assert all(float(row["mean"]) < 0 for row in gradients)
    sure_sizes = [size_of[row["parameters"]] for row in gradients if float(row["p_holm"]) < 0.05]
    assert sure_sizes == ["0.3m", "0.6m", "1m"]
    magnitudes = [row for row in tests if row["quantity"] == "abs_delta_align"]
    assert f"p at least {min(float(row['p_holm']) for row in magnitudes):.2g}" in text
    mean = {(row["arm"], row["size"]): float(row["abs_delta_align"]) for row in means}
    largest = [size for size in size_of.values() if max(mean[arm, size] for arm in some) == mean["dpo", size]]
    assert len(largest) == 5
    others = [row for row in tests if row["arm"] == "dpo less shuffled"]  # nothing tells DPO from shuffled labels
    assert f"at any single size (p at least {min(float(row['p_holm']) for row in others):.2g})" in text


def test_the_sweeps_of_the_scaling_study() -> None:
    text = page("scaling")
    rows = [row for row in table(SCALING / "means.csv") if (row["arm"], row["size"]) == ("dpo", "0.3m")]
    for fixed, value, swept in (("beta", "0.1", "learning_rate"), ("learning_rate", "0.0001", "beta")):
        some = sorted((row for row in rows if row[fixed] == value), key=lambda row: float(row[swept]))
        *first, last = (cell(row["abs_delta_align"], 3) for row in some)
        assert f"{', '.join(first)} and {last}" in text
        assert len({float(row["delta_align"]) > 0 for row in some}) == 2  # of either sign


def test_the_attribution_of_the_scaling_study() -> None:
    text, rows = page("scaling"), table(SCALING / "attribution.csv")
    main = [row for row in rows if row["quantity"] == "delta_align"]
    assert len(main) == 12
    for row in main:
        dpo, control = (f"{cell(row[f'mean_{arm}'], 3)} ± {cell(row[f'sd_{arm}'], 3)}" for arm in ("dpo", "control"))
        effect = f"{cell(row['effect'], 3)}, {cell(row['low'], 3)} to {cell(row['high'], 3)}"
        numbers = (cell(row["margin"], 3), *(f"{float(row[name]):.2g}" for name in ("p", "p_holm")))
        cells = (row["size"], f"`{row['control']}`", dpo, control, effect, *numbers, cell(row["d_seed"], 1))
        assert f"| {' | '.join(cells)} | {row['verdict']} |" in text, row
    verdicts = {
        control: [row["verdict"] for row in main if row["control"] == control] for control in ("shuffled", "sft")
    }
    assert verdicts["shuffled"] == ["undecided", "equivalent", *["undecided"] * 4]
    assert verdicts["sft"] == [*["undecided"] * 5, "attributable"]
    (told,) = (row for row in main if float(row["p_holm"]) < 0.05)
    assert (told["control"], told["size"]) == ("sft", "10m")
    assert f"attributable against SFT (p = {float(told['p_holm']):.2g} after Holm's correction)" in text
    kl, accuracy = (
        [row for row in rows if (row["quantity"], row["control"]) == (name, "shuffled")] for name in ("kl", "accuracy")
    )
    assert f"(p at least {min(float(row['p']) for row in kl):.2g} before it)" in text
    assert min(float(row["p_holm"]) for row in kl) > 0.05
    assert {f"{float(row['p']):.2g}" for row in accuracy} == {"0.0079"}


def test_the_courses_of_the_dynamics_study() -> None:
    text = page("dynamics")
    rows = table(EXPERIMENTS / "dynamics" / "runs.csv")
    assert len(rows) == 6
    rewards = ("rewards/chosen", "rewards/margins", "rewards/accuracies", "rewards/accuracies_per_token")
    for row in rows:
        value, low, high = (cell(row[f"delta_align{end}"], 3) for end in ("", "_low", "_high"))
        steps = [row[name] or "none" for name in ("onset", "destabilisation", "collapse")]
        evaluated = [cell(row[f"eval_{name}"], 2) for name in ("loss", *rewards)]
        cells = [f"{float(row['learning_rate']):g}", row["seed"], *steps, f"{value}, {low} to {high}"]
        line = " | ".join([*cells, cell(row["distance"], 2), cell(row["kl"], 3), *evaluated])
        assert f"| {line} |" in text, line
        assert f"has fewer tokens in {float(row['eval_chosen_shorter']):.0%}".replace("%", " %") in text


def test_what_the_dynamics_study_says_of_its_courses() -> None:
    text = page("dynamics")
    runs = {(row["learning_rate"], row["seed"]): row for row in table(EXPERIMENTS / "dynamics" / "runs.csv")}
    behind = sorted(-int(row["onset_ahead"]) for row in runs.values() if row["onset_ahead"])
    assert f"but {behind[0]} to {behind[-1]} steps after it" in text
    assert all(float(row["delta_align_low"]) > 0 for row in runs.values())  # above 0 in all six
    best = runs["0.0003", "1"]
    assert best["destabilised_by"] == "delta_align"
    assert best["onset"] == runs["0.001", "1"]["onset"] == runs["0.0001", "1"]["onset"] == "2"
    assert sum(row["onset"] != "" for row in runs.values()) == 5
    assert f"the loss falls to {cell(best['eval_loss'], 2)}" in text
    assert f"{float(best['eval_rewards/accuracies_per_token']):.0%}".replace("%", " % of pairs") in text
    sound, hot = ([runs[rate, seed] for seed in "01"] for rate in ("0.0001", "0.001"))
    assert "the loss falls to {} and {}".format(*(cell(row["eval_loss"], 2) for row in sound)) in text
    lost = sorted(-float(row["eval_rewards/chosen"]) / 0.1 for row in hot)
    assert f"have lost {lost[0]:.0f} to {lost[1]:.0f} nats" in text
    by_reward, by_token = ([cell(row[f"eval_{name}"], 2) for row in hot] for name in ACCURACIES)
    assert "{} and {} by reward, {} and {} per token".format(*by_reward, *by_token) in text
    records = table(EXPERIMENTS / "dynamics" / "records.csv")
    middle = [r for r in records if (r["learning_rate"], r["seed"]) == ("0.001", "0") and r["step"] in ("4", "5", "6")]
    by_reward, by_token = (sorted(float(row[f"eval_{name}"]) for row in middle) for name in ACCURACIES)
    per_token = f"{by_token[0]:.2f} to {by_token[-1]:.2f} by reward per token"
    assert f"{per_token} while {by_reward[0]:.2f} to {by_reward[-1]:.2f} by reward" in text


ACCURACIES = ("rewards/accuracies", "rewards/accuracies_per_token")


@pytest.mark.parametrize("size", ["0.3m", "1m"])
def test_the_effects_of_the_attribution_study(size: str) -> None:
    text, place = page("attribution"), EXPERIMENTS / "attribution" / size
    for control in ("shuffled", "sft"):
        effects = {row["number"]: row for row in table(place / f"effects_{control}.csv")}
        main = effects["delta_align"]
        arms = [f"{cell(main[f'mean_{a}'], 4)} ± {cell(main[f'sd_{a}'], 4)}" for a in ("aligned", "control")]
        low, high = (cell(main[end], 4) for end in ("low", "high"))
        cells = [*arms, f"{cell(main['effect'], 4)}, {low} to {high}", cell(main["margin"], 4)]
        line = " | ".join([size, f"`{control}`", *cells, f"{float(main['p_value']):.2g}", main["verdict"]])
        assert f"| {line} |" in text, line
    for name in ("delta_contraction", "delta_transport", "output_distance", "kl", "gradient_share", "reward_accuracy"):
        row = table_row(place / "effects_shuffled.csv", name)
        one, other, effect, low, high = (
            f"{float(row[key]):.3g}" for key in ("mean_aligned", "mean_control", "effect", "low", "high")
        )
        line = f"| {one} | {other} | {effect}, {low} to {high} | {float(row['p_value']):.2g} |"
        assert line in text, line


@pytest.mark.parametrize("at", [0, 1])
def test_what_the_attribution_study_says_of_single_runs(at: int) -> None:
    text, place = page("attribution"), EXPERIMENTS / "attribution" / ("0.3m", "1m")[at]
    alone = table(place / "alone.csv")
    told = {arm: [row for row in alone if row["run"].startswith(arm)] for arm in ("dpo", "shuffled", "sft")}
    sure = {arm: [float(r["delta_align"]) for r in rows if float(r["p_value"]) < 0.05] for arm, rows in told.items()}
    counts = [len(values) for values in sure.values()]
    said = ("in {} of 10 runs of `dpo`, {} of 10 of `shuffled` and {} of 10 of `sft` at 0.3M", "in {}, {} and {} of 10")
    assert said[at].format(*counts) in text
    up = {arm: f"{sum(value > 0 for value in values)} of {len(values)}" for arm, values in sure.items()}
    for arm in ("dpo", "shuffled"):
        assert re.search((rf"of `{arm}` {up[arm]} and", rf"of `{arm}` \d of \d and {up[arm]}\b")[at], text), arm
    assert all(float(row["delta_align"]) > 0 for row in told["sft"])
    halves = [row["verdict"] for row in table(place / "halves.csv")]
    assert (len(halves), halves.count("attributable")) == (252, 0)
    same = halves.count("equivalent")
    assert (f"`equivalent` in {same} and", f"and {same}, else")[at] in text
    for name in ("delta_align", "kl"):
        row = table_row(place / "correlations.csv", name)
        low, high = (cell(row[end], 2) for end in ("low", "high"))
        assert re.search(rf"{cell(row['value'], 2)} \((interval )?{low} to {high}\)", text), row


def table_row(file: Path, number: str) -> dict[str, str]:
    return next(row for row in table(file) if row["number"] == number)
