"""`spinal attribute` on saved comparisons: what it writes and says, the gate, and mistakes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import spinal_jax
from spinal_jax.comparison.compare import compare_traces
from spinal_jax.comparison.record import save_comparison
from tests.laws.planted import flat, simulated

from .conftest import Spinal


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Comparisons of one pair whose Delta_align is that of five aligned and of five control runs."""
    folder = tmp_path_factory.mktemp("runs")
    ((aligned, reference),) = simulated(flat(4), 1, seed=1)
    found = compare_traces(aligned, reference)
    rng = np.random.default_rng(0)
    for arm, mean in (("dpo", 1.0), ("shuffled", 0.0)):
        for number in range(5):
            summary = {**found.summary, "delta_align": mean + 0.05 * rng.normal()}
            save_comparison(replace(found, summary=summary), folder / f"{arm}-{number}")
    return folder


def test_runs_become_a_run_folder_with_a_page(spinal: Spinal, runs: Path, tmp_path: Path) -> None:
    arms = [f"aligned=[{runs}/dpo-*]", f"control=[{runs}/shuffled-*]"]
    outcome = spinal("attribute", *arms, "assert.verdict=attributable", "hydra.run.dir=out")
    assert (outcome.code, outcome.err) == (0, "")
    assert "Attribution: attributable" in outcome.out
    files = {
        "attribution.csv",
        "attribution.json",
        "effects.csv",
        "figures",
        "manifest.json",
        "report.html",
        "summary.md",
    }
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
    assert "attributable" in (tmp_path / "out" / "summary.md").read_text()
    assert json.loads((tmp_path / "out" / "attribution.json").read_text())["verdict"] == "attributable"
    same = spinal_jax.attribute([str(runs / "dpo-*")], [str(runs / "shuffled-*")])
    assert same.sentence == spinal_jax.load_attribution(tmp_path / "out").sentence
    short = spinal("attribute", *arms, "assert.verdict=equivalent", "hydra.run.dir=short")
    assert short.code == 3
    assert "the verdict is 'attributable', not 'equivalent'" in short.err


def test_mistakes_are_one_sentence(spinal: Spinal, runs: Path) -> None:
    one = f"aligned=[{runs}/dpo-*]"
    spinal("attribute", one, "control=[nowhere-*]").refusal("nowhere-* names no folder")
    spinal("attribute", one, f"control=[{runs}/dpo-0,{runs}/dpo-1]").refusal("is given twice")
    spinal("attribute", one, f"control=[{runs}/shuffled-0]").refusal("control has 1 run")
    spinal("attribute", one, f"control=[{runs}/shuffled-*]", "margin=0").refusal("margin")
