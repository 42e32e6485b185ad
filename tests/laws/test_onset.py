"""Onset and destabilisation: what is planted is found where it was planted, and nothing is found where nothing is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spinal_jax.comparison.onset import (
    MIN_RECORDS,
    NOISE_SE,
    STRONG_SE,
    Course,
    destabilisation,
    detect,
    last_healthy,
    no_onset_sentence,
    onset,
)
from spinal_jax.comparison.step_records import MAX_DISTANCE, SCHEMA, SERIES, Rules, StepRecord, control_wobble, recall
from spinal_jax.errors import UserError

TRIALS = 500
MOST = 0.05
OWN = Rules()  # the wobble is estimated from the run itself


def records(
    delta: Sequence[float] | np.ndarray,
    transport: Sequence[float] | np.ndarray | None = None,
    error: float = 1.0,
    every: int = 10,
    distance: Sequence[float] | np.ndarray | None = None,
) -> list[StepRecord]:
    """A series with the standard error `error` everywhere but at step 0, where everything is exactly 0."""
    moved = np.zeros(len(delta)) if transport is None else np.asarray(transport, float)
    away = np.zeros(len(delta)) if distance is None else np.asarray(distance, float)
    return [
        StepRecord(at * every, *(x for value in values for x in (float(value), error if at else 0.0)))
        for at, values in enumerate(zip(delta, moved, away, strict=True))
    ]


def changes(series: list[StepRecord], rules: Rules = OWN) -> tuple[int | None, int | None]:
    """The indices of onset and destabilisation."""
    course = Course.of(series, rules)
    began = onset(course)
    broke = destabilisation(course, began)
    return None if began is None else began.start, None if broke is None else broke.start


def healthy_step(series: list[StepRecord]) -> int:
    course = Course.of(series, OWN)
    return last_healthy(course, onset(course))


def noise(rng: np.random.Generator, count: int, rho: float) -> np.ndarray:
    """[count] of AR(1) with variance 1, 0 at step 0."""
    x = rng.normal(size=count)
    for at in range(1, count):
        x[at] = rho * x[at - 1] + np.sqrt(1 - rho**2) * x[at]
    x[0] = 0
    return x


def level(*parts: tuple[float, int]) -> np.ndarray:
    """Step 0 and then each (value, how often)."""
    return np.concatenate([[0.0], *(np.full(count, value) for value, count in parts)])


counts = st.integers(MIN_RECORDS, 12)
sizes = st.floats(2 * STRONG_SE, 1e4)
signs = st.sampled_from([1.0, -1.0])
errors = st.sampled_from([1e-6, 1e-3, 1.0, 1e3])


@given(before=st.integers(0, 12), after=counts, size=sizes, sign=signs, error=errors)
def test_a_planted_change_is_found_at_its_first_record(
    before: int, after: int, size: float, sign: float, error: float
) -> None:
    series = records(error * level((0, before), (sign * size, after)), error=error)
    assert changes(series) == (before + 1, None)
    assert healthy_step(series) == series[-1].step


@given(before=st.integers(0, 6), held=counts, fallen=counts, size=sizes, left=st.floats(-2, 0.2), sign=signs)
def test_a_planted_fall_after_an_onset_is_found_towards_and_beyond_step_0(
    before: int, held: int, fallen: int, size: float, left: float, sign: float
) -> None:
    series = records(sign * level((0, before), (size, held), (left * size, fallen)))
    assert changes(series) == (before + 1, before + held + 1)
    assert healthy_step(series) == series[before + held].step


@given(before=st.integers(0, 6), held=counts, fallen=counts, size=sizes, sign=signs, with_delta=signs)
def test_transport_that_turns_back_is_found_whichever_way_it_went(
    before: int, held: int, fallen: int, size: float, sign: float, with_delta: float
) -> None:
    delta = with_delta * level((0, before), (size, held + fallen))
    transport = sign * level((0, before), (size, held), (0, fallen))
    assert changes(records(delta, transport)) == (before + 1, before + held + 1)
    kept = sign * level((0, before), (size, held + fallen))
    assert changes(records(delta, kept)) == (before + 1, None)


@given(held=counts, later=counts, size=sizes, sign=signs)
def test_transport_that_had_not_moved_may_go_with_the_footprint_only(
    held: int, later: int, size: float, sign: float
) -> None:
    """Down with contraction, as the method has it, and up with expansion, its mirror image."""
    delta = sign * level((size, held + later))
    rising, falling = (side * level((0, held), (size, later)) for side in (1.0, -1.0))
    found = {"up": changes(records(delta, rising))[1], "down": changes(records(delta, falling))[1]}
    good, bad = ("down", "up") if sign > 0 else ("up", "down")
    assert found == {good: None, bad: held + 1}


@given(count=st.integers(8, 40), slope=st.floats(1, 1e3), sign=signs, with_transport=signs)
def test_a_steady_footprint_is_not_destabilised_until_it_turns_around(
    count: int, slope: float, sign: float, with_transport: float
) -> None:
    way = np.arange(count + 1.0) * slope
    assert changes(records(sign * way, with_transport * way))[1] is None
    turned = np.concatenate([way, way[-1] - 3 * way[1:]])
    _, broke = changes(records(sign * turned, np.zeros(len(turned))))
    assert broke is not None
    assert count < broke <= count + 2 + NOISE_SE * np.sqrt(2) / slope


@given(count=st.integers(1, 2), size=sizes, sign=signs, rest=counts)
def test_two_records_are_not_enough(count: int, size: float, sign: float, rest: int) -> None:
    spike = sign * level((0, 2), (size, count), (0, rest))
    assert changes(records(spike)) == (None, None)
    dip = level((size, rest), (-size, count), (size, rest))
    assert changes(records(sign * dip, sign * dip)) == (1, None)
    assert changes(records(sign * level((size, rest), (3 * size, count), (size, rest)))) == (1, None)
    assert changes(records(sign * level((0, rest), (size, count)))) == (None, None)


@given(
    before=st.integers(0, 6),
    gone=st.integers(1, 8),
    beyond=st.floats(STRONG_SE + 0.1, 100.0),
    error=st.floats(1e-4, 0.01),
)
def test_an_output_that_stays_further_than_half_way_from_step_0_is_found_whatever_the_footprint_did(
    before: int, gone: int, beyond: float, error: float
) -> None:
    away = level((MAX_DISTANCE - error, before), (MAX_DISTANCE + beyond * error, gone))
    still = records(np.zeros(len(away)), error=error, distance=away)
    found = (before + 1) if gone >= MIN_RECORDS else None
    assert changes(still) == (None, found)
    steady = records(100 * error * np.arange(len(away)), error=error, distance=away)
    assert changes(steady)[1] == found
    assert healthy_step(steady) == 10 * before


def test_both_sides_do_not_make_one_stay() -> None:
    assert changes(records([0, 9, -9, 9, -9, 9, -9])) == (None, None)


def test_what_lasts_without_ever_being_sure_is_not_called() -> None:
    assert changes(records(level((STRONG_SE - 0.1, 30)))) == (None, None)
    rising = np.concatenate([level((0, 2), (NOISE_SE + 0.1, 4)), [STRONG_SE + 0.1] * 2])
    assert changes(records(rising)) == (3, None)
    began = onset(Course.of(records(rising), OWN))
    assert began is not None
    assert (began.known, began.stop) == (7, 9)


@given(count=st.integers(0, 30), value=st.floats(-NOISE_SE, NOISE_SE), error=st.floats(1e-6, 1e3))
def test_nothing_is_found_where_nothing_moves(count: int, value: float, error: float) -> None:
    assert changes(records(np.zeros(count + 1))) == (None, None)
    assert changes(records(error * level((value, count)), error * level((-value, count)), error=error)) == (None, None)


def test_a_change_without_any_noise_is_sure_and_an_unknown_one_is_not() -> None:
    assert changes([StepRecord(at, 1.0 if at else 0.0, *[0.0] * 5) for at in range(4)]) == (1, None)
    assert changes([StepRecord(at, *[np.nan, 1.0] * 3) for at in range(5)]) == (None, None)
    assert detect([], [], OWN)["onset"] is None


def plateau(count: int) -> np.ndarray:
    """A healthy run: a footprint that appears at once and stays."""
    return level((0, 4), (20.0, count - 5))


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_noise_alone_raises_an_alarm_in_5_percent_of_series_at_most(rho: float) -> None:
    rng = np.random.default_rng(round(10 * rho))
    onsets = broken = after_a_footprint = 0
    for _ in range(TRIALS):
        count = int(rng.integers(20, 61))
        delta, transport = noise(rng, count, rho), noise(rng, count, rho)
        began, broke = changes(records(delta, transport))
        onsets, broken = onsets + (began is not None), broken + (broke is not None)
        footprint = plateau(count)
        _, broke = changes(records(delta + footprint, transport - footprint))
        after_a_footprint += broke is not None
    assert onsets <= MOST * TRIALS
    assert broken <= MOST * TRIALS
    assert after_a_footprint <= MOST * TRIALS


def walk(rng: np.random.Generator, count: int) -> np.ndarray:
    """A random walk of 0.5 standard errors a record, 0 at step 0."""
    return 0.5 * np.concatenate([[0.0], np.cumsum(rng.normal(size=count - 1))])


def rates(
    make: Callable[[np.random.Generator, int], np.ndarray], controlled: bool, trials: int = TRIALS
) -> tuple[float, float]:
    """How often an onset and how often a destabilisation is called, `make` giving Delta_align and transport alike; with
    the wobble of a control run of the same kind, or of the run itself."""
    rng = np.random.default_rng(11)
    onsets = broken = 0
    for _ in range(trials):
        count = int(rng.integers(20, 61))
        series, control = (records(make(rng, count), -make(rng, count)) for _ in range(2))
        began, broke = changes(series, Rules(control=control_wobble(control, 0)) if controlled else OWN)
        onsets, broken = onsets + (began is not None), broken + (broke is not None)
    return onsets / trials, broken / trials


@pytest.mark.parametrize("controlled", [False, True])
def test_healthy_runs_whose_optimiser_wobbles_are_seldom_called_destabilised(controlled: bool) -> None:
    """A wobble of 2 standard errors on a plateau, a walk from there, and a steady drift."""
    for rho in (0.0, 0.5):
        assert rates(lambda rng, n, rho=rho: plateau(n) + 2 * noise(rng, n, rho), controlled)[1] <= 0.05
    assert rates(lambda rng, n: plateau(n) + walk(rng, n), controlled, 2 * TRIALS)[1] <= 0.10
    assert rates(lambda rng, n: np.arange(n) + 2 * noise(rng, n, 0.5), controlled)[1] <= 0.01
    assert rates(lambda rng, n: 0.5 * np.arange(n) + walk(rng, n), controlled)[1] <= 0.01


@pytest.mark.parametrize(("rho", "begins", "falls"), [(0.0, 0.7, 0.0), (0.5, 0.9, 0.25), (0.9, 0.9, 0.75)])
def test_what_the_wobble_costs_in_detection_of_5_standard_errors(rho: float, begins: float, falls: float) -> None:
    """Least rates at which an onset of 5 standard errors, and a fall from 10 to 5, are found. Errors of other prompts
    are alike from record to record, 0.9 and above; the less they are, the more of them counts as wobble."""

    def rise(rng: np.random.Generator, count: int) -> np.ndarray:
        return level((0, 9), (5.0, count - 10)) + noise(rng, count, rho)

    def fall(rng: np.random.Generator, count: int) -> np.ndarray:
        return level((0, 4), (10.0, 7), (5.0, count - 12)) + noise(rng, count, rho)

    assert rates(rise, False, 200)[0] >= begins
    assert rates(fall, False, 200)[1] >= falls


@pytest.mark.parametrize(("rho", "least"), [(0.0, 60), (0.5, 180), (0.9, 180)])
def test_what_is_planted_in_noise_is_found_near_its_record(rho: float, least: int) -> None:
    """A footprint of 8 standard errors that falls to nothing."""
    rng = np.random.default_rng(1)
    near = 0
    for _ in range(200):
        wave = level((0, 9), (8, 15), (0, 15))
        began, broke = changes(records(wave + noise(rng, 40, rho)))
        near += began is not None and abs(began - 10) <= 1 and broke is not None and abs(broke - 25) <= 1
    assert near >= least


def test_a_matched_control_takes_the_place_of_the_runs_own_wobble() -> None:
    """A control that wobbles by 4 hides an onset of 6; one that does not move leaves it."""
    rng = np.random.default_rng(0)
    series = records(level((0, 2), (6, 5)))
    still, shaken = (
        control_wobble(records(size * rng.normal(size=30), size * rng.normal(size=30)), 0) for size in (0.0, 4.0)
    )
    assert set(still) == set(SERIES)
    assert still["delta_align"] == 0
    assert shaken["delta_align"] == pytest.approx(4 * np.sqrt(2), rel=0.4)
    assert changes(series, Rules(control=still)) == (3, None)
    assert changes(series, Rules(control=shaken)) == (None, None)
    with pytest.raises(UserError, match="3 traces after step 0 and its warm-up"):
        control_wobble(series, 50)


def test_records_of_the_warm_up_are_no_wobble() -> None:
    warm = np.concatenate([[0.0], 20 * (-1.0) ** np.arange(6), np.full(6, 8.0)])
    assert changes(records(warm)) == (None, None)
    assert changes(records(warm), Rules(warmup_steps=70)) == (7, None)


def test_transport_has_a_side_of_its_own_only_where_its_stay_goes_on_when_the_onset_is_known() -> None:
    """Transport rises while the learning rate warms up, and is back at 0 before the onset of a contraction: that it is
    then below 0 is the footprint's own direction. Where it still is up at the onset, coming down is a loss."""
    delta = level((0, 6), (8, 8))
    before = level((8, 4), (0, 2), (-8, 8))
    assert changes(records(delta, before)) == (7, None)
    during = level((8, 10), (-8, 4))
    assert changes(records(delta, during)) == (7, 11)


def test_the_distance_counts_only_where_the_rules_have_one() -> None:
    series = records(np.zeros(6), distance=level((1.9, 5)), error=0.01)
    assert changes(series)[1] == 1
    assert changes(series, Rules(max_distance=None)) == (None, None)
    far = detect(series, [{}] * 6, OWN)["destabilisation"]
    assert far["series"] == "distance"


def test_a_run_without_onset_says_what_its_last_record_shows() -> None:
    """Two records beyond the noise are no onset, and the comparison of the last with step 0 is still significant."""
    told = detect(records(level((0, 3), (4, 2))), [{}] * 6, OWN)
    assert told["onset"] is None
    assert no_onset_sentence(told) == (
        "No lasting onset by the 3-record rule in 6 traces up to step 50; Delta_align there is 4, standard error 1"
    )
    assert no_onset_sentence(detect(records([0.0]), [{}], OWN)) == "No onset can be detected in a single trace"


def test_an_onset_file_of_another_version_is_refused() -> None:
    told = detect(records([0.0]), [{}], OWN)
    assert told["schema"] == SCHEMA
    assert Rules.from_mapping(told) == OWN
    with pytest.raises(UserError, match="spinal-onset/1"):
        recall({**told, "schema": "spinal-onset/1"}, {})


@given(seed=st.integers(0, 2**32 - 1), rho=st.sampled_from([0.0, 0.9]), drift=st.floats(-1, 1))
def test_what_is_told_during_a_run_is_told_after_it(seed: int, rho: float, drift: float) -> None:
    rng = np.random.default_rng(seed)
    count = 30
    bend = drift * np.minimum(np.arange(count), 40 - 2 * np.arange(count))
    series = records(3 * noise(rng, count, rho) + bend, 3 * noise(rng, count, rho) - bend)
    last: tuple[int | None, int | None] = (None, None)
    for stop in range(1, count + 1):
        now = changes(series[:stop])
        for before, after in zip(last, now, strict=True):
            assert before is None or before == after
        last = now


def test_the_verdict_says_where_by_how_much_and_what_else_was_known() -> None:
    series = records(level((0, 1), (8, 4), (1, 4)))
    beside = [{"kl": 0.1 * at, "rewards/margins": float(at)} for at in range(len(series))]
    told = detect(series, beside, OWN)
    assert told["onset"] == {
        "step": 20,
        "series": "delta_align",
        "evidence": "Delta_align left the noise of step 0 by 8 (8.0 standard errors) at step 20, and did so in every "
        "trace up to step 50, by at most 8.0 standard errors",
        "change": 8.0,
        "standard_errors": 8.0,
        "kl": 0.2,
        "rewards/margins": 2.0,
    }
    assert told["destabilisation"]["step"] == 60
    assert told["destabilisation"]["evidence"].startswith(
        "Delta_align fell below the level it had held by 7 (4.9 standard errors) at step 60"
    )
    assert told["healthy"] == 50
    assert told["records"][2] == {**series[2]._asdict(), **beside[2]}
    mirrored = detect([r._replace(delta_align=-r.delta_align) for r in series], beside, OWN)
    assert "Delta_align rose above the level it had held by 7" in mirrored["destabilisation"]["evidence"]
