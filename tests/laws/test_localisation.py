"""Where a mass lies over depth: closed forms, laws, and what the jackknife says of it."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from spinal_jax.stats.jackknife import Estimate
from spinal_jax.stats.localisation import (
    MASS,
    RESIDUE,
    TOO_LITTLE,
    centroid,
    localise,
    localise_difference,
    magnitude,
    share,
    shortest_run,
)

T = (1, 1)
AMOUNTS = arrays(np.float64, st.integers(1, 12), elements=st.floats(0, 100, width=16)).filter(lambda m: m.sum() > 0)


def test_an_even_mass_lies_evenly() -> None:
    found = localise(np.ones(30), np.ones((4, 30)), np.ones(4), (21, 30))
    assert found["share"] == pytest.approx(found["share_even"]) == pytest.approx(1 / 3)
    assert found["centroid"] == pytest.approx(found["centroid_even"]) == pytest.approx(31 / 60)
    assert found["run"][1] - found["run"][0] + 1 == 24
    assert (found["share_low"], found["share_high"]) == pytest.approx((1 / 3, 1 / 3))
    assert found["run_agreement"] == "4 of 4"


def test_a_mass_in_one_block() -> None:
    mass = np.zeros(9)
    mass[6] = 3.0
    assert (float(share(mass, (7, 9))), float(centroid(mass)), shortest_run(mass)) == (
        1.0,
        pytest.approx(7 / 9),
        (7, 7),
    )


@given(AMOUNTS)
def test_the_run_is_the_shortest_that_holds_the_mass(mass: np.ndarray) -> None:
    run = shortest_run(mass)
    assert run is not None
    first, last = run
    held = mass[first - 1 : last].sum()
    least = MASS * mass.sum()
    assert held >= least * (1 - 1e-9)
    length = last - first + 1
    for start in range(len(mass) - length + 2):
        assert mass[start : start + length - 1].sum() < least * (1 + 1e-9)
        if start + length <= len(mass):
            assert mass[start : start + length].sum() <= held * (1 + 1e-9)


@given(AMOUNTS, st.floats(0.1, 10))
def test_no_number_depends_on_the_unit(mass: np.ndarray, unit: float) -> None:
    assert float(share(unit * mass, T)) == pytest.approx(float(share(mass, T)))
    assert float(centroid(unit * mass)) == pytest.approx(float(centroid(mass)))
    assert 0 <= float(share(mass, T)) <= 1
    assert 0 < float(centroid(mass)) <= 1 + 1e-12


def test_turned_around_the_centroid_is_mirrored() -> None:
    mass = np.random.default_rng(0).random(7)
    assert float(centroid(mass) + centroid(mass[::-1])) == pytest.approx(8 / 7)


def test_groups_that_disagree_widen_the_interval() -> None:
    mass = np.array([1.0, 1, 1, 1, 1, 4])
    without = np.tile(mass, (4, 1))
    without[0, 5], without[1, 0] = 3.0, 3.0
    found = localise(mass, without, np.ones(4), (5, 6))
    assert found["share_low"] < found["share"] < found["share_high"]
    assert 0 <= found["centroid_low"] < found["centroid"] < found["centroid_high"] <= 1
    assert found["run"] == [2, 6]
    assert (found["run_least"], found["run_most"]) == (1, 6)
    assert found["run_agreement"] == "3 of 4"


@pytest.mark.parametrize("mass", [np.zeros(3), np.array([1.0, np.nan, 1.0])])
def test_no_mass_lies_nowhere(mass: np.ndarray) -> None:
    found = localise(mass, np.zeros((2, 3)), np.ones(2), (3, 3))
    assert found["run"] == found["mass"] == []
    assert found["reason"] == ("it is undefined at block 2" if np.isnan(mass).any() else TOO_LITTLE)
    for name in ("share", "share_low", "centroid", "centroid_high", "run_least"):
        assert math.isnan(found[name])


# Of prompts in each group, as hashing 64 prompts into 16 groups gives them.
SIZES = np.array([4.0, 2, 5, 3, 7, 4, 4, 2, 3, 6, 5, 4, 1, 4, 6, 4])
TERMINAL = (9, 12)
INSIDE = np.r_[np.zeros(8), np.ones(4)]


def drawn(truth: np.ndarray, rng: np.random.Generator, alike: float, heavy: bool) -> tuple[np.ndarray, np.ndarray]:
    """Differences at 12 blocks, and without each group: prompts of a group share a part of their error, blocks share
    another (`alike`), and tails are those of Student's t with 3 degrees of freedom where they are heavy."""
    groups = len(SIZES)
    z, common = (rng.standard_t(3, shape) if heavy else rng.normal(size=shape) for shape in ((groups, 12), (groups, 1)))
    noise = 2 * (np.sqrt(1 - alike) * z + np.sqrt(alike) * common) / np.sqrt(SIZES)[:, None]
    part = SIZES / SIZES.sum()
    values = truth + noise
    full = part @ values
    return full, (full - part[:, None] * values) / (1 - part)[:, None]


@pytest.mark.parametrize(
    "truth", [INSIDE, 5 * INSIDE, np.ones(12), 1 - 0.5 * (1 - INSIDE), 1 - INSIDE, np.tile([0.0, 1.0], 6)]
)
def test_intervals_of_a_share_cover_it(truth: np.ndarray) -> None:
    rng = np.random.default_rng(5)
    planted = float(share(truth, TERMINAL))
    held = []
    for alike, heavy in itertools.product((0.0, 0.6), (False, True)):
        found = (localise_difference(*drawn(truth, rng, alike, heavy), SIZES, TERMINAL) for _ in range(120))
        held += [place["share_low"] <= planted <= place["share_high"] for place in found if not place["reason"]]
    assert len(held) > 300
    # Intervals that a bound of 0 or 1 cuts off cover more often than 95 %.
    assert np.mean(held) >= 0.92


def test_where_nothing_changed_no_place_is_told() -> None:
    rng = np.random.default_rng(1)
    found = [localise_difference(*drawn(np.zeros(12), rng, 0.6, True), SIZES, TERMINAL) for _ in range(200)]
    assert np.mean([place["reason"] == TOO_LITTLE for place in found]) > 0.9


def test_sampling_error_is_taken_from_a_magnitude() -> None:
    assert magnitude(np.array([5.0, -5.0, 3.0, 1.0]), np.array([3.0, 3.0, 3.0, 3.0])).tolist() == [4.0, 4.0, 0.0, 0.0]
    z = np.random.default_rng(0).normal(size=10**6)
    assert magnitude(z, np.ones(1)).mean() == pytest.approx(RESIDUE, abs=2e-3)


def test_a_difference_is_placed_by_its_magnitudes_less_their_error() -> None:
    full, without = drawn(3 * INSIDE, np.random.default_rng(2), 0.0, False)
    found = localise_difference(full, without, SIZES, TERMINAL)
    error = Estimate.of(full, without, SIZES).error
    np.testing.assert_allclose(found["mass"], np.sqrt(np.maximum(0, full**2 - error**2)))
    assert found["share"] == pytest.approx(sum(found["mass"][8:]) / sum(found["mass"]))
    turned = localise_difference(-full, -without, SIZES, TERMINAL)
    assert turned == found


def test_a_difference_with_one_group_has_no_place() -> None:
    found = localise_difference(np.ones(3), np.full((1, 3), np.nan), np.ones(1), (3, 3))
    assert found["reason"] == "its sampling error is not known"
