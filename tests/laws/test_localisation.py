"""Where a mass lies over depth: closed forms, laws, and what the jackknife says of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from spinal_jax.stats.localisation import MASS, centroid, localise, share, shortest_run

AMOUNTS = arrays(np.float64, st.integers(1, 12), elements=st.floats(0, 100, width=16)).filter(lambda m: m.sum() > 0)


def test_an_even_mass_lies_evenly() -> None:
    found = localise(np.ones(30), np.ones((4, 30)), np.ones(4))
    assert found["share"] == pytest.approx(found["share_even"]) == pytest.approx(1 / 3)
    assert found["centroid"] == pytest.approx(found["centroid_even"]) == pytest.approx(31 / 60)
    assert found["run"][1] - found["run"][0] + 1 == 24
    assert (found["share_low"], found["share_high"]) == pytest.approx((1 / 3, 1 / 3))
    assert found["run_agreement"] == "4 of 4"


def test_a_mass_in_one_block() -> None:
    mass = np.zeros(9)
    mass[6] = 3.0
    assert (float(share(mass)), float(centroid(mass)), shortest_run(mass)) == (1.0, pytest.approx(7 / 9), (7, 7))


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
    assert float(share(unit * mass)) == pytest.approx(float(share(mass)))
    assert float(centroid(unit * mass)) == pytest.approx(float(centroid(mass)))
    assert 0 <= float(share(mass)) <= 1
    assert 0 < float(centroid(mass)) <= 1 + 1e-12


def test_turned_around_the_centroid_is_mirrored() -> None:
    mass = np.random.default_rng(0).random(7)
    assert float(centroid(mass) + centroid(mass[::-1])) == pytest.approx(8 / 7)


def test_groups_that_disagree_widen_the_interval() -> None:
    mass = np.array([1.0, 1, 1, 1, 1, 4])
    without = np.tile(mass, (4, 1))
    without[0, 5], without[1, 0] = 2.0, 9.0
    found = localise(mass, without, np.ones(4))
    assert found["share_low"] < found["share"] < found["share_high"]
    assert 0 <= found["centroid_low"] < found["centroid"] < found["centroid_high"] <= 1
    assert found["run"] == [2, 6]
    assert (found["run_least"], found["run_most"]) == (1, 6)
    assert found["run_agreement"] == "3 of 4"


@pytest.mark.parametrize("mass", [np.zeros(3), np.array([1.0, np.nan, 1.0])])
def test_no_mass_lies_nowhere(mass: np.ndarray) -> None:
    found = localise(mass, np.zeros((2, 3)), np.ones(2))
    assert found["run"] == []
    for name in ("share", "share_low", "centroid", "centroid_high", "run_least"):
        assert math.isnan(found[name])
