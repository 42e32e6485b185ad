"""Attribution: what the verdict's rates are, which runs are refused, and that files tell the same."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from spinal_jax.comparison.attribution import (
    ATTRIBUTABLE,
    EQUIVALENT,
    UNDECIDED,
    Attribution,
    attributed,
    attribution_shortfalls,
    judge_effect,
    load_attribution,
    save_attribution,
)
from spinal_jax.comparison.attribution_runs import BY_BOUNDARY, AttributedRun, check_comparable_runs
from spinal_jax.errors import UserError
from spinal_jax.stats.two_samples import permutation_p, rank_correlation, welch

RUNS = 10  # of each arm


def arms(rng: np.random.Generator, effect: float, runs: int = RUNS, drift: float = 0.0) -> list[AttributedRun]:
    """Runs whose Delta_align has a standard deviation of 1 between runs, in tails of Student's t with 5 degrees of
    freedom; the arms differ by `effect`, and both drift."""
    scale = math.sqrt(3 / 5)
    found = []
    for arm, mean in (("aligned", effect + drift), ("control", drift)):
        for number, value in enumerate(mean + scale * rng.standard_t(5, runs)):
            found.append(run(arm, number, float(value), rng))
    return found


def run(arm: str, number: int, value: float, rng: np.random.Generator, **more: Any) -> AttributedRun:
    fields: dict[str, Any] = {
        "folder": f"runs/{arm}-{number}",
        "arm": arm,
        "numbers": {"delta_align": value, "reward_accuracy": 0.5 + 0.1 * value, "output_distance": 0.3},
        "columns": {name: np.r_[np.nan, value * np.ones(3)] + 0.1 * rng.normal(size=4) for name in BY_BOUNDARY},
        "reference": "ab" * 32,
        "measured": {"prompts' sha256": "cd", "window": [0.1, 0.5]},
        "trained": {"steps": 40, "optimizer.learning_rate": 1e-4, "objective.kind": "dpo", "seed": number},
    }
    return AttributedRun(**(fields | more))


def verdicts(effect: float, trials: int, seed: int, **how: Any) -> np.ndarray:
    rng = np.random.default_rng(seed)
    margin = how.pop("margin", None)
    return np.array([judge_effect(*halves(arms(rng, effect, **how)), margin)[2] for _ in range(trials)])


def test_equal_arms_are_rarely_attributable() -> None:
    for how in ({}, {"drift": 2.0}, {"margin": 0.2}, {"runs": 5}):
        found = verdicts(0.0, 200, 1, **how)
        assert np.mean(found == ATTRIBUTABLE) <= 0.05, how


def test_an_effect_of_two_standard_deviations_is_found() -> None:
    rng = np.random.default_rng(2)
    p = np.array([permutation_p(*halves(arms(rng, 2.0))) for _ in range(200)])
    assert np.mean(p < 0.05) >= 0.8
    # Against a margin that was set before the runs, as half of a standard deviation.
    assert np.mean(verdicts(2.0, 200, 3, margin=0.5) == ATTRIBUTABLE) >= 0.8
    # Against what a single control run shows by itself, about 1.9 standard deviations, it takes twice the effect.
    assert np.mean(verdicts(4.0, 200, 4) == ATTRIBUTABLE) >= 0.8


def halves(runs: list[AttributedRun]) -> tuple[np.ndarray, np.ndarray]:
    return tuple(  # type: ignore[return-value]
        np.array([run.numbers["delta_align"] for run in runs if run.arm == arm]) for arm in ("aligned", "control")
    )


def test_an_effect_of_twice_the_margin_is_never_equivalent() -> None:
    for runs in (5, 10, 20):
        assert np.mean(verdicts(1.0, 150, 5, margin=0.5, runs=runs) == EQUIVALENT) <= 0.05
        assert np.mean(verdicts(3.8, 150, 6, runs=runs) == EQUIVALENT) <= 0.05
    assert np.mean(verdicts(0.0, 150, 7, margin=2.0) == EQUIVALENT) >= 0.8  # so that the word is said at all


def test_the_permutation_test_has_its_level() -> None:
    rng = np.random.default_rng(8)
    for sizes in ((5, 5), (10, 10)):
        p = np.array([permutation_p(*(rng.standard_t(3, size) for size in sizes)) for _ in range(300)])
        assert np.mean(p <= 0.05) <= 0.08
        assert np.mean(p <= 0.5) == pytest.approx(0.5, abs=0.1)


def test_welch_is_that_of_scipy_and_splits_are_counted() -> None:
    rng = np.random.default_rng(9)
    one, other = rng.normal(1, 1, 6), rng.normal(0, 3, 9)
    found = welch(one, other)
    expected = stats.ttest_ind(one, other, equal_var=False)
    interval = expected.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.freedom == pytest.approx(expected.df)
    exact = stats.permutation_test(
        (one, other),
        lambda x, y, axis: np.abs(stats.ttest_ind(x, y, axis=axis, equal_var=False).statistic),
        alternative="greater",
        n_resamples=np.inf,
    )
    assert permutation_p(one, other) == pytest.approx(exact.pvalue)
    assert permutation_p(np.arange(3.0), np.arange(10.0, 13)) == pytest.approx(2 / 20)
    assert permutation_p(np.ones(4), np.ones(4)) == 1.0
    many = permutation_p(np.arange(12.0), np.arange(100.0, 112))  # beyond what is counted: drawn
    assert many == pytest.approx(1 / 20_001)
    assert math.isnan(permutation_p(np.array([1.0, np.nan]), other))
    assert math.isnan(welch(np.array([1.0, np.nan]), other).half)


def test_rank_correlation_is_that_of_scipy_and_its_interval_covers() -> None:
    rng = np.random.default_rng(10)
    x, y = rng.normal(size=(2, 30))
    assert rank_correlation(x, y).value == pytest.approx(stats.spearmanr(x, y).statistic)
    rho = 6 / math.pi * math.asin(0.6 / 2)  # Spearman's of a normal pair with correlation 0.6
    held = []
    for _ in range(400):
        a, b = rng.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], size=20).T
        found = rank_correlation(a, b)
        held.append(found.low <= rho <= found.high)
    assert 0.92 <= np.mean(held) <= 0.98
    for a, b in ((np.ones(9), np.arange(9.0)), (np.arange(4.0), np.arange(4.0))):
        assert math.isnan(rank_correlation(a, b).value)


def test_how_many_more_runs_would_decide() -> None:
    rng = np.random.default_rng(11)
    found = attributed(arms(rng, 1.0), margin=0.05)
    assert found.verdict == UNDECIDED
    assert 1 <= found.more_runs < 100
    assert f"about {found.more_runs:.0f} more runs an arm would decide" in found.sentence
    same = attributed(arms(rng, 0.0), margin=1e-9)
    assert same.verdict == UNDECIDED
    few = attributed(arms(rng, 9.0, runs=4), margin=0.4)
    assert few.verdict == UNDECIDED
    assert any("a verdict needs 5" in line for line in few.warnings)
    assert few.more_runs == 1


def test_every_number_has_its_effect_and_boundaries_are_corrected() -> None:
    found = attributed(arms(np.random.default_rng(12), 6.0))
    effect = found.effects["delta_align"]
    one, other = found.arm("aligned", "delta_align"), found.arm("control", "delta_align")
    assert effect["effect"] == pytest.approx(one.mean() - other.mean())
    assert effect["margin"] == pytest.approx(np.quantile(np.abs(other), 0.95))
    assert effect["d_seed"] == pytest.approx(one.mean() / one.std(ddof=1))
    assert math.isnan(found.effects["kl"]["effect"])  # which these runs have not
    assert "verdict" not in found.effects["output_distance"]
    column = found.boundaries["delta_contraction"]
    assert math.isnan(column["p"][0])
    assert np.all(column["p_holm"][1:] < 0.05)
    assert np.all(column["p_holm"][1:] >= column["p"][1:])
    behaviour = found.correlations["delta_align"]
    assert behaviour["value"] == pytest.approx(1)
    assert "a correlation over these runs and no more" in behaviour["sentence"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"reference": "ef" * 32}, "starts from other weights .efefefefefef. than runs/aligned-0"),
        ({"measured": {"prompts' sha256": "xy", "window": [0.1, 0.5]}}, "prompts' sha256 is 'xy' there and 'cd' here"),
        ({"measured": {"prompts' sha256": "cd", "window": [0.2, 0.5]}}, "window is"),
        ({"trained": {"steps": 41, "optimizer.learning_rate": 1e-4}}, "steps is 41 there and 40 here"),
        ({"trained": {"steps": 40, "optimizer.learning_rate": 1e-3}}, "optimizer.learning_rate is 0.001"),
        ({"folder": "runs/aligned-0"}, "is given twice, as aligned and as control"),
    ],
)
def test_runs_that_do_not_match_are_refused_by_name(more: dict[str, Any], words: str) -> None:
    rng = np.random.default_rng(13)
    runs = arms(rng, 0.0)
    check_comparable_runs(runs, True)
    with pytest.raises(UserError, match=words) as refused:
        check_comparable_runs([*runs, run("control", 99, 0.0, rng, **more)], True)
    assert str(refused.value).startswith("runs/")


def test_arms_may_differ_in_objective_labels_and_seeds_and_in_base_where_allowed() -> None:
    rng = np.random.default_rng(14)
    own = {"steps": 40, "optimizer.learning_rate": 1e-4, "objective.kind": "sft", "preferences.shuffle_labels": True}
    runs = [
        *arms(rng, 0.0),
        run("beside", 0, 0.0, rng, trained=own),
        run("control", 9, 0.0, rng, trained={}, folder="x"),
    ]
    check_comparable_runs(runs, True)
    assert any("their budget" in line for line in attributed(runs).warnings)
    other = [*runs, run("control", 98, 0.0, rng, reference="ef")]
    check_comparable_runs(other, False)
    assert any("bases of their own" in line for line in attributed(other).warnings)


def same(a: Attribution, b: Attribution) -> None:
    assert a.to_json() == b.to_json()
    assert repr(a) == repr(b)


def test_files_tell_the_same_and_the_gate_reads_the_verdict(tmp_path: Path) -> None:
    found = attributed(arms(np.random.default_rng(15), 6.0), settings={"base": None})
    save_attribution(found, tmp_path / "a")
    same(load_attribution(tmp_path / "a"), found)
    assert len((tmp_path / "a" / "attribution.csv").read_text().splitlines()) == 1 + 2 * RUNS
    assert attribution_shortfalls(found, verdict="attributable") == []
    assert attribution_shortfalls(found, verdict="equivalent") == ["the verdict is 'attributable', not 'equivalent'"]
    (tmp_path / "a" / "attribution.json").write_text('{"schema": "spinal-attribution/9"}')
    with pytest.raises(UserError, match="spinal-attribution/9"):
        load_attribution(tmp_path / "a")
    with pytest.raises(UserError, match="cannot be read"):
        load_attribution(tmp_path)
