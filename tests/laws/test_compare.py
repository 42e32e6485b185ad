"""The comparison of two traces finds what was planted, as surely as it says, and nothing where nothing was."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import spinal_jax
from spinal_jax.audit.trace import DepthTrace
from spinal_jax.comparison.compare import BothModels, compare_traces
from spinal_jax.comparison.flow import compare
from spinal_jax.comparison.ranking import rank, save_ranking
from spinal_jax.comparison.record import BOTH, METRICS, Comparison, load_comparison, save_comparison
from spinal_jax.comparison.score import Weights
from spinal_jax.comparison.verdict import comparison_shortfalls, driver, verdict
from spinal_jax.errors import UserError
from spinal_jax.metrics.depth import curve_coherence
from spinal_jax.stats.jackknife import Estimate, t_quantile

from .planted import GROUPS, POSITIONS, Truth, both_models, flat, simulated

Pair = tuple[DepthTrace, DepthTrace]


@pytest.fixture(scope="module")
def pair() -> Pair:
    """One pair of depth 12 with an effect in the terminal block, boundaries 9 to 12, of a curve that moves."""
    truth = moving(12)
    truth.delta_alpha[9:], truth.delta_transport[9:] = 0.2, -0.1
    (found,) = simulated(truth, 1, seed=1)
    return found


@pytest.fixture(scope="module")
def both() -> BothModels:
    """What both models of depth 12 would give: more of each towards the end."""
    return both_models(12)


def moving(depth: int) -> Truth:
    """No difference, between curves whose coherence is defined."""
    wave = 0.3 * np.sin(np.arange(depth + 1.0))
    return flat(depth)._replace(alpha=1 + wave, transport=1 - wave)


def same(a: Comparison, b: Comparison) -> None:
    assert a.to_json() == b.to_json()
    assert a.arrays.keys() == b.arrays.keys()
    for name, values in a.arrays.items():
        np.testing.assert_array_equal(values, b.arrays[name])


PAIRS = 400
# What the method promises. At exactly 95 % and 5 % the shares of 400 trials lie within these in 99 % and 94 % of seeds.
COVERED, NULL = (0.92, 0.98), (0.03, 0.07)


def test_intervals_cover_what_was_planted() -> None:
    truth = Truth(np.array([0.9, 1.1, 1.0]), np.array([0.1, -0.05, 0.15]), np.array([0.0, -0.05, -0.1]))
    found = [compare_traces(*traces) for traces in simulated(truth, PAIRS, seed=2)]
    low, high = (np.array([c.summary[f"delta_align_{end}"] for c in found]) for end in ("low", "high"))
    planted = truth.delta_alpha[2] - truth.delta_transport[2]  # the terminal block of 2 is the last
    assert COVERED[0] <= np.mean((low <= planted) & (planted <= high)) <= COVERED[1]
    for name, planted in (("contraction", truth.delta_alpha), ("transport", truth.delta_transport)):
        low, high = (np.array([c.columns[f"delta_{name}_{end}"] for c in found])[:, 1:] for end in ("low", "high"))
        assert COVERED[0] <= np.mean((low <= planted[1:]) & (planted[1:] <= high)) <= COVERED[1]
    assert {c.verdict for c in found} == {"toward contraction"}
    assert all(c.summary["p_value"] < 0.001 for c in found)


def test_null_pairs_are_rarely_significant() -> None:
    found = [compare_traces(*traces) for traces in simulated(flat(2), PAIRS, seed=3)]
    p = np.array([c.summary["p_value"] for c in found])
    assert NULL[0] <= np.mean(p < 0.05) <= NULL[1]
    assert NULL[0] <= np.mean([c.verdict != "no detectable change" for c in found]) <= NULL[1]
    for name in ("contraction", "transport"):
        by_layer = np.array([c.columns[f"delta_{name}_p"] for c in found])[:, 1:]
        assert NULL[0] <= np.mean(by_layer < 0.05) <= NULL[1]
        corrected = np.array([c.columns[f"delta_{name}_p_holm"] for c in found])[:, 1:]
        assert np.mean(np.any(corrected < 0.05, axis=1)) <= NULL[1]


@pytest.mark.parametrize("seed", range(3))
def test_differences_in_a_random_half_of_the_layers_are_found(seed: int) -> None:
    depth = 12
    changed = np.sort(np.random.default_rng(seed).permutation(np.arange(1, depth + 1))[: depth // 2])
    truth = flat(depth)
    truth.delta_alpha[changed], truth.delta_transport[changed] = 0.2, -0.15
    ((aligned, reference),) = simulated(truth, 1, seed=10 + seed)
    found = compare_traces(aligned, reference)
    for name in ("contraction", "transport"):
        assert np.flatnonzero(found.columns[f"delta_{name}_p_holm"] < 0.05).tolist() == changed.tolist()
        where = found.summary["localisation"][f"delta_{name}"]
        # Sampling error of the other half has a mass of its own, about a tenth of the whole, spread evenly.
        assert where["share"] == pytest.approx(np.mean(changed >= 9), abs=0.1)
        assert where["centroid"] == pytest.approx(changed.mean() / depth, abs=0.06)
        assert where["run"][0] <= changed[1]
        assert where["run"][1] >= changed[-2]


def test_stronger_effects_give_stronger_scores(both: BothModels) -> None:
    scores, changes, shares = [], [], []
    for size in (0.0, 0.1, 0.2, 0.4):
        truth = moving(12)
        truth.delta_alpha[9:], truth.delta_transport[9:] = size, -size / 2
        ((aligned, reference),) = simulated(truth, 1, seed=4)  # the same rows each time
        found = compare_traces(aligned, reference, both)
        scores.append(found.summary["spinal_score"])
        changes.append(found.summary["delta_align"])
        shares.append(found.summary["localisation"]["delta_contraction"]["share"])
    assert np.all(np.diff(changes) > 0.1)
    assert np.all(np.diff(scores) > 0)
    assert math.isnan(shares[0])  # nothing changed, so it is not told where
    assert min(shares[1:]) > 0.8


def test_swapping_the_models_flips_every_delta(pair: Pair) -> None:
    one, other = compare_traces(*pair), compare_traces(*reversed(pair))
    for name in METRICS:
        np.testing.assert_array_equal(one.columns[f"delta_{name}"], -other.columns[f"delta_{name}"])
        np.testing.assert_array_equal(one.columns[f"delta_{name}_low"], -other.columns[f"delta_{name}_high"])
        np.testing.assert_array_equal(one.columns[f"delta_{name}_p"], other.columns[f"delta_{name}_p"])
        np.testing.assert_array_equal(one.columns[f"aligned_{name}_low"], other.columns[f"reference_{name}_low"])
    for name in ("delta_align", "delta_contraction", "delta_transport"):
        assert one.summary[name] == -other.summary[name]
        assert one.summary[f"{name}_low"] == -other.summary[f"{name}_high"]
    assert one.summary["p_value"] == other.summary["p_value"]
    assert one.summary["localisation"]["delta_contraction"] == other.summary["localisation"]["delta_contraction"]
    for a, b in zip(one.robustness["settings"], other.robustness["settings"], strict=True):
        assert a["delta_align"] == -b["delta_align"]
    assert (one.verdict, other.verdict) == ("toward contraction", "toward expansion")


def test_a_trace_against_itself_has_not_changed(pair: Pair) -> None:
    found = compare_traces(pair[0], pair[0])
    for name in METRICS:
        for end in ("", "_low", "_high"):
            assert np.all(np.nan_to_num(found.columns[f"delta_{name}{end}"]) == 0)
        assert set(np.nan_to_num(found.columns[f"delta_{name}_p"], nan=1.0)) == {1.0}
    for end in ("", "_se", "_low", "_high"):
        assert found.summary[f"delta_align{end}"] == 0
    assert found.summary["p_value"] == 1
    assert found.verdict == "no detectable change"
    assert math.isnan(found.summary["localisation"]["delta_contraction"]["share"])
    assert found.robustness["holds"] == 0
    assert "no sign" in found.robustness["sentence"]
    assert any("same weights" in line for line in found.warnings)


def test_the_numbers_are_those_of_the_definition(pair: Pair, both: BothModels) -> None:
    aligned, reference = pair
    weights = Weights(0.5, 0.2, 0.3)
    first, share = 9, 42 / 78  # blocks 9 to 12 of 1..12
    found = compare_traces(aligned, reference, both, weights=weights)
    a, b = aligned.columns, reference.columns
    delta = np.mean(a["contraction"][first:] - b["contraction"][first:])
    delta -= np.mean(a["transport"][first:] - b["transport"][first:])
    assert found.summary["delta_align"] == pytest.approx(delta, rel=1e-12)
    smooth, before = (
        (curve_coherence(x["contraction"][first:]) + curve_coherence(x["transport"][first:])) / 2 for x in (a, b)
    )
    assert found.summary["coherence"] == pytest.approx(smooth, rel=1e-12)
    assert found.summary["gradient_concentration"] == pytest.approx(share, rel=1e-12)
    score = 0.5 * delta + 0.2 * smooth + 0.3 * share
    assert found.summary["spinal_score"] == pytest.approx(score, rel=1e-12)
    gain = 0.5 * delta + 0.2 * (smooth - before) + 0.3 * (share - 1 / 3)
    assert found.summary["spinal_gain"] == pytest.approx(gain, rel=1e-12)
    assert found.summary["spinal_gain_low"] < gain < found.summary["spinal_gain_high"]
    # Preference pairs are other texts than the prompts, and in fewer groups: squares add, 4 degrees of freedom.
    alone = [
        compare_traces(aligned, reference, both, weights=one).summary
        for one in (Weights(0.5, 0.2, 0), Weights(0, 0, 0.3))
    ]
    halves = [part["spinal_score_high"] - part["spinal_score"] for part in alone]
    half = found.summary["spinal_score_high"] - found.summary["spinal_score"]
    assert min(halves) > 0
    halves[0] *= t_quantile(4) / t_quantile(GROUPS - 1)
    assert half == pytest.approx(math.hypot(*halves), rel=1e-9)
    share_half = found.summary["gradient_concentration_high"] - found.summary["gradient_concentration"]
    assert halves[1] == pytest.approx(0.3 * share_half, rel=1e-9)
    np.testing.assert_array_equal(found.columns["gradient_norm"], [np.nan, *range(1, 13)])
    np.testing.assert_array_equal(found.columns["policy_distance"], 0.1 + np.arange(13) / 100)
    assert np.all(found.columns["policy_distance_high"][1:] > found.columns["policy_distance"][1:])
    assert found.summary["localisation"]["policy_distance"]["share"] == pytest.approx(0.82 / 1.98)
    assert found.summary["gradient_apart"] == {"embedding": 0.5, "final_norm": 0.1, "unembedding": 0.4}
    assert (found.summary["kl"], found.summary["reward_margin"]) == (0.5, 1.5)
    assert found.summary["output_distance"] == 0.1 + 12 / 100
    assert found.summary["reward_accuracy_high"] == 1.0  # cut off at its bound
    assert not any("needs both" in line or "need both" in line for line in found.warnings)
    # With the groups' rows and positions in proportion, Delta_align is as one number of all of them.
    moved = aligned.arrays["groups/transport"] - reference.arrays["groups/transport"]
    gained = aligned.arrays["groups/contraction"] - reference.arrays["groups/contraction"]
    without = gained[:, first:].mean(axis=1) - moved[:, first:].mean(axis=1)
    error = Estimate.of(delta, without, POSITIONS).error
    assert found.summary["delta_align_se"] == pytest.approx(float(error), rel=1e-9)


def test_without_both_models_their_numbers_are_missing_and_it_says_so(pair: Pair) -> None:
    found = compare_traces(*pair)
    for name in BOTH:
        assert np.isnan(found.columns[name]).all()
    for name in ("gradient_concentration", "spinal_score", "spinal_gain", "reward_accuracy", "output_distance", "kl"):
        assert math.isnan(found.summary[name])
        assert "needs both models" in found.summary["undefined"][name]
    without = compare_traces(*pair, weights=Weights(0.5, 0.5, 0.0)).summary  # a part without weight is not missed
    assert math.isfinite(without["spinal_gain_low"])
    assert "spinal_gain" not in without["undefined"]
    assert any("policy distance" in line for line in found.warnings)
    assert any("SPINALScore" in line and "preference pairs" in line for line in found.warnings)


def changed(trace: DepthTrace, section: str, **values: Any) -> DepthTrace:
    return replace(trace, **{section: {**getattr(trace, section), **values}})


@pytest.mark.parametrize(
    ("section", "values", "words"),
    [
        ("settings", {"window": [0.1, 0.6]}, ["window", "[0.1, 0.6]", "[0.1, 0.5]"]),
        ("settings", {"skip": 0}, ["skip", "0", "1"]),
        ("settings", {"center": True}, ["center", "True", "False"]),
        ("settings", {"positions": "last:8"}, ["positions", "'last:8'", "'last:4'"]),
        ("settings", {"top_k": 5}, ["top_k", "5", "null"]),
        ("settings", {"temperature": 2.0}, ["temperature", "2.0", "1.0"]),
        ("settings", {"groups": 8}, ["groups", "8", "16"]),
        ("prompts", {"sha256": "ef"}, ["prompts' sha256", "'cd'", "'ef'", "same_prompts=false"]),
        ("prompts", {"max_length": 99}, ["max_length", "99", "128"]),
        ("prompts", {"tokens": 5}, ["tokens", "5", "tokenizer"]),
        ("prompts", {"rows": 5}, ["rows", "5", "tokenizer"]),
        ("model", {"vocabulary_tokens": 98}, ["the vocabulary's tokens", "98", "99", "that they share"]),
        ("model", {"vocabulary_sha256": "ef"}, ["the vocabulary's sha256", "'cd'", "'ef'"]),
        ("settings", {"terminal": "last:4"}, ["the setting terminal", "'third'", "'last:4'"]),
        ("arrays", {"groups/rows": np.arange(1.0, 17)}, ["rows by group", "tokenizer"]),
        ("arrays", {"groups/positions": np.arange(1.0, 17)}, ["positions by group", "tokenizer"]),
    ],
)
def test_what_was_not_measured_alike_is_refused(
    pair: Pair, section: str, values: dict[str, Any], words: list[str]
) -> None:
    aligned, reference = pair
    with pytest.raises(UserError) as refused:
        compare_traces(aligned, changed(reference, section, **values))
    assert "\n" not in str(refused.value)
    for word in ("aligned", "reference", *words):
        assert word in str(refused.value)


def test_equal_tokens_count_for_more_than_equal_vocabularies(pair: Pair) -> None:
    """Models of a family share a tokenizer and pad their vocabularies differently."""
    aligned, reference = (changed(trace, "prompts", tokens_sha256="aa") for trace in pair)
    compare_traces(aligned, changed(reference, "model", vocabulary=100))
    with pytest.raises(UserError, match="tokens' sha256 is 'aa' in aligned and 'bb' in reference"):
        compare_traces(aligned, changed(reference, "prompts", tokens_sha256="bb"))
    compare_traces(aligned, pair[1])  # a trace of before tokens were hashed


def test_different_depths_need_relative_alignment(pair: Pair) -> None:
    ((aligned, _),) = simulated(flat(4), 1, seed=6)
    with pytest.raises(UserError, match=r"blocks is 4 in aligned and 12 in reference; align=relative"):
        compare_traces(aligned, pair[1])
    found = compare_traces(aligned, pair[1], align="relative")
    assert found.depth == 4
    assert any("interpolated" in line for line in found.warnings)
    assert np.isnan(found.columns["delta_curvature"]).all()
    # States at the relative depth, steps that add up to the same path.
    at = np.arange(5) * 12 / 4
    expected = np.interp(at, np.arange(13), pair[1].columns["contraction"])
    np.testing.assert_allclose(found.columns["reference_contraction"], expected, rtol=1e-12)
    steps = found.columns["reference_transport"][1:]
    assert steps.sum() == pytest.approx(pair[1].columns["transport"][1:].sum(), rel=1e-12)
    assert np.isfinite([found.summary["delta_align_low"], found.summary["p_value"]]).all()
    same(
        compare_traces(*pair, align="relative"),
        replace(compare_traces(*pair), settings=compare_traces(*pair, align="relative").settings),
    )


def test_traces_of_different_prompts_serve_as_a_control(pair: Pair) -> None:
    ((other, _),) = simulated(flat(12), 1, seed=7)
    other = changed(changed(other, "prompts", sha256="ef"), "model", name="other")
    with pytest.raises(UserError, match="same_prompts=false"):
        compare_traces(pair[1], other)
    assert compare_traces(pair[1], other, same_prompts=False).settings["same_prompts"] is False


def test_a_trace_without_its_arrays_or_with_one_group(pair: Pair) -> None:
    aligned, reference = pair
    with pytest.raises(UserError, match=r"spectra\.safetensors"):
        compare_traces(replace(aligned, arrays={}), reference)
    alone = {
        name: values[:1] if name in ("groups/rows", "groups/positions") else values[:0]
        for name, values in aligned.arrays.items()
        if name.startswith("groups/")
    }
    found = compare_traces(*(replace(trace, arrays=alone) for trace in pair))
    assert found.verdict == "undetermined"
    assert found.summary["delta_align"] == compare_traces(*pair).summary["delta_align"]
    assert math.isnan(found.summary["delta_align_low"])
    assert math.isnan(found.summary["p_value"])
    assert any("one group" in line for line in found.warnings)


def test_files_round_trip_and_appear_whole(pair: Pair, both: BothModels, tmp_path: Path) -> None:
    for found in (compare_traces(*pair), compare_traces(*pair, both), compare_traces(pair[0], pair[0])):
        save_comparison(found, tmp_path / "run")
        again = load_comparison(tmp_path / "run")
        same(found, again)
        assert repr(again) == repr(found)
        assert again.rows()[0].keys() == {"boundary", "relative_depth", "metric", "value", "low", "high", "p", "p_holm"}
    assert "NaN" not in (tmp_path / "run" / "comparison.json").read_text()
    table = (tmp_path / "run" / "comparison.csv").read_text().splitlines()
    metrics = len(METRICS) * 3 + len(BOTH)
    assert len(table) == 1 + metrics * 13
    with pytest.raises(UserError, match="no comparison at"):
        load_comparison(tmp_path)
    with pytest.raises(UserError, match="spinal-comparison/2"):
        Comparison.from_json(found.to_json().replace("spinal-comparison/2", "spinal-comparison/1"))
    with pytest.raises(UserError, match="summary has no verdict"):
        Comparison.from_json(found.to_json().replace('"verdict"', '"word"'))


def test_what_notebooks_show_is_escaped(pair: Pair) -> None:
    found = compare_traces(changed(pair[0], "model", name="<b>x</b>"), pair[1])
    text = found._repr_html_()
    assert "<b>x</b>" not in text
    assert "&lt;b&gt;x" in text
    assert "contraction" in text


@pytest.mark.parametrize(
    ("low", "high", "holds", "rows_per_width", "word"),
    [
        (0.1, 0.2, 0.8, 4.0, "toward contraction"),
        (-0.2, -0.1, 1.0, 9.0, "toward expansion"),
        (-0.2, -0.1, 0.79, 9.0, "differs, direction not robust"),
        (-0.1, 0.1, 1.0, 9.0, "no detectable change"),
        (0.0, 0.0, 0.0, 9.0, "no detectable change"),
        (math.nan, math.nan, 1.0, 9.0, "undetermined"),
        (0.1, 0.2, 1.0, 3.9, "undetermined"),
    ],
)
def test_the_verdict_needs_interval_grid_and_rows(
    low: float, high: float, holds: float, rows_per_width: float, word: str
) -> None:
    assert verdict(low, high, holds, rows_per_width) == word


@pytest.mark.parametrize(
    ("gained", "moved", "larger", "words"),
    [
        (
            0.01,
            0.03,
            "transport",
            "transport rose by 0.0300 rad and drives it; contraction rose by 0.0100, against it.",
        ),
        (0.2, -0.1, "contraction", "contraction rose by 0.200 and drives it; transport fell by 0.100 rad, in the same"),
        (0.0, -0.1, "transport", "transport fell by 0.100 rad and drives it; contraction did not change."),
        (0.0, 0.0, "", "Neither contraction nor transport changed."),
        (math.nan, 0.1, "", ""),
    ],
)
def test_the_part_that_drives_the_change_is_named(gained: float, moved: float, larger: str, words: str) -> None:
    name, sentence = driver(gained, moved)
    assert name == larger
    assert words in sentence


def test_the_sentence_names_its_limits(pair: Pair) -> None:
    said = compare_traces(*pair).summary["sentence"]
    for words in (
        "aligned against reference, boundaries 9 to 12: toward contraction.",
        "drives it",
        "The sign holds in 5 of 5 settings",
        "0 with the opposite sign",
        "One pair of checkpoints, an interval over 16 groups of prompts: not attributable to alignment",
    ):
        assert words in said
    other = changed(pair[1], "model", family="gpt2")
    assert "different families (llama and gpt2)" in compare_traces(pair[0], other).summary["sentence"]
    few = [changed(trace, "prompts", rows=100) for trace in pair]
    found = compare_traces(few[0], few[1])
    assert found.verdict == "undetermined"
    assert "N = 100 rows are 3.1 d, fewer than 4 d = 128" in found.summary["sentence"]


def test_a_heavy_group_and_few_groups_are_warned_of(pair: Pair) -> None:
    rows = np.where(np.arange(GROUPS) == 3, 400, 8)
    heavy = [changed(trace, "arrays", **{"groups/rows": rows}) for trace in pair]
    assert any(
        "One of 16 groups of prompts holds 77% of the rows" in line
        for line in compare_traces(heavy[0], heavy[1]).warnings
    )
    assert not any("groups of prompts holds" in line for line in compare_traces(*pair).warnings)
    cut = [
        replace(trace, arrays={k: v[:5] if k.startswith("groups/") else v for k, v in trace.arrays.items()})
        for trace in pair
    ]
    found = compare_traces(cut[0], cut[1])
    assert math.isnan(found.summary["p_value"])
    assert np.isnan(found.columns["delta_contraction_p"]).all()
    assert any("Only 5 groups of prompts: no p-value could be below 0.062" in line for line in found.warnings)


def test_a_flat_curve_has_no_coherence(pair: Pair, both: BothModels) -> None:
    noise = 0.01 * np.random.default_rng(0).normal(size=(GROUPS, 13))
    level = [
        replace(
            trace,
            columns={**trace.columns, "contraction": np.full(13, 1.0)},
            arrays={
                **trace.arrays,
                "groups/contraction": 1 + noise,
            },
        )
        for trace in pair
    ]
    summary = compare_traces(level[0], level[1], both).summary
    assert math.isnan(summary["coherence"])
    assert summary["undefined"]["coherence"] == "aligned: contraction is flat within noise in the terminal block"
    assert "flat within noise" in summary["undefined"]["spinal_score"]
    assert math.isnan(summary["spinal_gain"])
    ((short, reference),) = simulated(flat(6), 1, seed=6)
    few = compare_traces(short, reference).summary["undefined"]["coherence"]
    assert few == "aligned: the terminal block has 2 boundaries and coherence needs 4"


def test_evidence_that_falls_short_is_told(pair: Pair) -> None:
    found = compare_traces(*pair)
    low, high = found.summary["delta_align_low"], found.summary["delta_align_high"]
    enough = {
        "verdict": "toward contraction",
        "delta_align_low": low,
        "delta_align_high": high,
        "p_value": 0.001,
        "holds": 1.0,
    }
    assert comparison_shortfalls(found, **enough) == []
    assert comparison_shortfalls(found) == []
    more = {
        "verdict": "toward expansion",
        "delta_align_low": low + 1e-9,
        "delta_align_high": high - 1e-9,
        "p_value": 1e-9,
    }
    for name, value in more.items():
        assert len(comparison_shortfalls(found, **{**enough, name: value})) == 1, name
    (line,) = comparison_shortfalls(found, spinal_score_low=0.0)  # not defined
    assert "SPINALScore" in line
    assert len(comparison_shortfalls(found, spinal_gain_low=0.0)) == 1
    assert len(comparison_shortfalls(compare_traces(*reversed(pair)), **enough)) == 2
    assert len(comparison_shortfalls(compare_traces(pair[0], pair[0]), holds=0.5)) == 1


def ladder() -> Iterator[Comparison]:
    for size, depth in ((0.1, 3), (0.4, 6), (0.2, 4)):
        truth = flat(depth)
        truth.delta_alpha[-2:] = size
        ((aligned, reference),) = simulated(truth, 1, seed=8)
        yield compare_traces(changed(aligned, "model", name=f"+{size}"), reference)


def test_several_are_ranked_by_what_changed(pair: Pair, tmp_path: Path) -> None:
    undefined = compare_traces(*(changed(trace, "columns", contraction=np.full(13, np.nan)) for trace in pair))
    ranking = rank([undefined, *ladder()])
    rows = ranking.rows()
    assert [row["aligned"] for row in rows] == ["+0.4", "+0.2", "+0.1", "aligned"]
    assert [row["blocks"] for row in rows] == [6, 4, 3, 12]
    assert undefined.verdict == "undetermined"
    save_ranking(ranking, tmp_path)
    table = (tmp_path / "ranking.csv").read_text().splitlines()
    assert len(table) == 5
    assert "NaN" not in (tmp_path / "ranking.json").read_text()
    assert "+0.4 against reference" in repr(ranking)
    folders = []
    for number, found in enumerate(ladder()):
        save_comparison(found, tmp_path / str(number))
        folders.append(tmp_path / str(number))
    assert [row["aligned"] for row in spinal_jax.rank(folders).rows()] == ["+0.4", "+0.2", "+0.1"]


def test_rank_takes_run_folders_and_says_what_it_does_not_take(tmp_path: Path) -> None:
    small, large, _ = ladder()
    save_comparison(large, tmp_path)
    assert [row["aligned"] for row in rank([small, tmp_path]).rows()] == ["+0.4", "+0.1"]
    for wrong, words in (([], "no comparison is given"), (small, "takes a list"), ([3], "not int")):
        with pytest.raises(UserError, match=words):
            rank(wrong)  # type: ignore[arg-type]


def test_the_package_gives_the_function(pair: Pair) -> None:
    assert spinal_jax.compare is compare
    assert spinal_jax.compare(*pair).to_json() == compare_traces(*pair).to_json()
    assert spinal_jax.load_comparison is load_comparison
