"""The grid of settings: refits from saved spectra, variants that both traces hold, and what is said of the sign."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from spinal_jax.audit.trace import DepthTrace
from spinal_jax.comparison.robustness import MEASURED, WINDOWS, robustness_grid, sign_counts
from spinal_jax.metrics.tail import tail_fit

from .planted import POSITIONS, ROWS, flat, simulated

Pair = tuple[DepthTrace, DepthTrace]


@pytest.fixture(scope="module")
def pair() -> Pair:
    truth = flat(6)
    truth.delta_alpha[5:], truth.delta_transport[5:] = 0.2, -0.1
    (found,) = simulated(truth, 1, seed=1)
    return found


def with_variants(trace: DepthTrace, **arrays: np.ndarray) -> DepthTrace:
    return replace(trace, arrays={**trace.arrays, **{f"variants/{k.replace('__', '/')}": v for k, v in arrays.items()}})


def test_each_window_is_refitted_from_the_spectra(pair: Pair) -> None:
    found = robustness_grid(*pair)
    assert [record["window"] for record in found] == [[0.1, 0.5], *(list(w) for w in WINDOWS if w != (0.1, 0.5))]
    for record in found:
        alphas = [
            [
                tail_fit(trace.arrays["singular_values"][at], int(ROWS.sum()), tuple(record["window"])).alpha
                for at in (5, 6)
            ]
            for trace in pair
        ]
        gained = np.mean(alphas[0]) - np.mean(alphas[1])
        moved = np.mean(pair[0].columns["transport"][5:]) - np.mean(pair[1].columns["transport"][5:])
        assert record["delta_contraction"] == pytest.approx(gained, rel=1e-9)
        assert record["delta_align"] == pytest.approx(gained - moved, rel=1e-9)
        assert record["low"] < record["delta_align"] < record["high"]
        assert (record["contraction"], record["transport"]) == (MEASURED, MEASURED)
        assert 0 < record["p_value"] < 0.001
    assert sign_counts(found)["sentence"] == (
        "The sign holds in 5 of 5 settings of the measurement; of the 5 with an interval, 5 exclude 0 with this sign "
        "and 0 with the opposite sign."
    )


def test_the_window_of_the_traces_is_first_whichever_it_is(pair: Pair) -> None:
    wide = tuple(replace(trace, settings=trace.settings | {"window": [0.2, 0.8]}) for trace in pair)
    found = robustness_grid(*wide)
    assert [record["window"] for record in found] == [[0.2, 0.8], *map(list, WINDOWS)]


def test_variants_multiply_and_only_those_of_both_count(pair: Pair) -> None:
    aligned, reference = (
        with_variants(
            trace,
            center__singular_values=trace.arrays["singular_values"] ** 1.1,
            skip__singular_values=trace.arrays["singular_values"] ** 1.2,
            skip__groups__singular_values=trace.arrays["groups/singular_values"] ** 1.2,
            skip__rows=np.array(ROWS.sum() - 5),
            skip__groups__rows=ROWS,
            last__transport=-trace.columns["transport"],
            last__groups__transport=-trace.arrays["groups/transport"],
            last__groups__positions=POSITIONS / 4,
        )
        for trace in pair
    )
    aligned = with_variants(aligned, own__singular_values=aligned.arrays["singular_values"])
    found = robustness_grid(aligned, reference)
    assert len(found) == 3 * len(WINDOWS) * 2
    assert {record["contraction"] for record in found} == {MEASURED, "center", "skip"}
    base = {tuple(r["window"]): r for r in found if (r["contraction"], r["transport"]) == (MEASURED, MEASURED)}
    for record in found:
        plain = base[tuple(record["window"])]
        factor = {MEASURED: 1, "center": 1.1, "skip": 1.2}[record["contraction"]]
        assert record["delta_contraction"] == pytest.approx(factor * plain["delta_contraction"], rel=1e-9)
        sign = 1 if record["transport"] == MEASURED else -1
        assert record["delta_transport"] == pytest.approx(sign * plain["delta_transport"], rel=1e-9)
        assert math.isnan(record["low"]) == math.isnan(record["p_value"]) == (record["contraction"] == "center")
    told = sign_counts(found)
    assert (told["holds"], told["of"]) == (sum(r["delta_align"] > 0 for r in found), len(found))
    assert "of the 20 with an interval" in told["sentence"]


def test_a_group_with_nothing_that_counts_leaves_a_variant_without_interval(pair: Pair) -> None:
    rows = np.where(np.arange(16) == 12, 0.0, ROWS)
    traces = [
        with_variants(
            trace,
            skip__singular_values=trace.arrays["singular_values"],
            skip__groups__singular_values=trace.arrays["groups/singular_values"],
            skip__rows=np.array(rows.sum()),
            skip__groups__rows=rows,
        )
        for trace in pair
    ]
    found = [record for record in robustness_grid(traces[0], traces[1]) if record["contraction"] == "skip"]
    assert len(found) == len(WINDOWS)
    for record in found:
        assert record["delta_align"] > 0
        assert math.isnan(record["low"])


def test_traces_without_spectra_have_the_one_setting(pair: Pair) -> None:
    bare = [replace(t, arrays={k: v for k, v in t.arrays.items() if not k.endswith("singular_values")}) for t in pair]
    found = robustness_grid(bare[0], bare[1])
    assert len(found) == 1
    assert "1 of 1 settings" in sign_counts(found)["sentence"]


def test_the_sign_is_that_of_the_first_setting() -> None:
    numbers = [
        (-0.2, -0.3, -0.1),
        (-0.1, -0.3, 0.1),
        (0.1, 0.05, 0.2),
        (-0.1, np.nan, np.nan),
        (np.nan, np.nan, np.nan),
    ]
    told = sign_counts([{"delta_align": value, "low": low, "high": high} for value, low, high in numbers])
    assert (told["holds"], told["sure"], told["opposite"], told["bounded"], told["of"]) == (3, 1, 1, 3, 5)
    assert "3 of 5 settings of the measurement; of the 3 with an interval, 1 exclude 0" in told["sentence"]
    assert sign_counts([{"delta_align": np.nan, "low": np.nan, "high": np.nan}])["holds"] == 0
