"""`spinal attribute` on saved comparisons: what it writes and says, the gate, and mistakes."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import spinal_jax
from spinal_jax.comparison.compare import compare_traces
from spinal_jax.comparison.record import save_comparison
from tests.laws.planted import flat, simulated

from .conftest import Spinal, Start


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


MAKES = (
    *("attribute", "experiment=attribution", "arm=dpo,shuffled", "seed=range(0,2)", "hydra.sweep.dir=runs"),
    *("preferences.limit=24", "preferences.held_out=4", "steps=2", "batch_size=2", "optimizer.learning_rate=1e-2"),
    *("metrics.groups=4", "metrics.variants.center=false", "objective.cache=cache", "save_every=1"),
    *("model.source=random:0.3m@1", "prompts=world", "prompts.limit=24", "margin=1e-6"),
)


def test_one_command_makes_the_runs_and_judges_them(start: Start, spinal: Spinal, tmp_path: Path) -> None:
    """Killed in its last run and started again, it ends with the files of one that nothing disturbed."""
    compiled = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    runs = tmp_path / "runs"
    process = start(*MAKES, cwd=tmp_path, env=compiled)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "Attribution: undecided" in out  # of two runs an arm
    names = ["dpo-0", "dpo-1", "shuffled-0", "shuffled-1"]
    assert sorted(path.name for path in runs.iterdir() if path.is_dir()) == ["attribution", *names]
    found = spinal_jax.load_attribution(runs / "attribution")
    assert [run["folder"] for run in found.runs] == [f"runs/{name}" for name in names]
    assert found.effects["delta_align"]["margin"] == 1e-6
    assert len({run["delta_align"] for run in found.runs}) == 4  # seeds and arms differ
    result = [runs / "attribution" / file for file in ("attribution.json", "effects.csv", "summary.md", "report.html")]
    written = {
        path: path.read_bytes() for path in (*result, *runs.glob("*/onset.json"), *runs.glob("*/model/*.safet*"))
    }
    assert len(written) == 12

    shutil.rmtree(runs / "attribution")
    shutil.rmtree(runs / "shuffled-1")
    process = start(*MAKES, cwd=tmp_path, env=compiled)
    while not (runs / "shuffled-1" / "metrics.jsonl").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (runs / "attribution").exists()
    process = start(*MAKES, cwd=tmp_path, env=compiled)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert err.count("  complete: runs/") == 3
    for path, content in written.items():
        assert path.read_bytes() == content, path
    assert spinal("collect", "runs").code == 0


def test_runs_that_belong_to_no_arm_are_not_trained(spinal: Spinal, tmp_path: Path) -> None:
    words = ("attribute", "experiment=smollm2_hh", "preferences.path=nowhere", "hydra.sweep.dir=runs")
    outcome = spinal(*words)
    assert outcome.code == 2
    assert "the run has no arm" in outcome.err
    assert "there is no attribution until all runs are complete" in outcome.err
    spinal("attribute", "experiment=attribution", "parallel.coordinator=host:1").refusal("spinal train experiment=")
