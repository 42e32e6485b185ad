"""`spinal compare` on saved runs: what it writes and says, the gate for CI, and mistakes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from spinal_jax.audit.trace import DepthTrace, load_trace, save_trace
from spinal_jax.comparison.record import load_comparison
from spinal_jax.runs.tensorboard import EVENTS

from .conftest import Spinal, sweep_settings


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, model: Path, prompts: Path) -> Path:
    """Two runs: an audit of the tiny model, and the same with an effect put into the last block's numbers."""
    from spinal_jax.api import audit

    folder = tmp_path_factory.mktemp("runs")
    base = audit(model, prompts, format="text", progress=False)
    save_trace(base, folder / "base")
    save_trace(moved(base, 0.3, "tuned"), folder / "tuned")
    save_trace(moved(base, -0.3, "other"), folder / "other")
    return folder


def moved(trace: DepthTrace, by: float, name: str) -> DepthTrace:
    """The trace with steeper spectra at the last boundary, in every setting, by a little more or less in each group."""
    rng = np.random.default_rng(0)
    arrays = dict(trace.arrays)
    for key in (key for key in arrays if key.endswith("singular_values")):
        spectra = np.array(arrays[key], np.float64)
        spectra[..., -1, :] *= np.arange(1.0, spectra.shape[-1] + 1) ** -by
        arrays[key] = spectra
    alpha, without = trace.columns["contraction"].copy(), arrays["groups/contraction"].copy()
    alpha[-1] += by
    without[:, -1] += by * (1 + 0.01 * rng.normal(size=len(without)))
    return replace(
        trace,
        model={**trace.model, "name": name, "sha256": name},
        columns={**trace.columns, "contraction": alpha},
        arrays={**arrays, "groups/contraction": without},
    )


def test_two_saved_runs_make_a_run_folder(spinal: Spinal, runs: Path, tmp_path: Path) -> None:
    arguments = ["compare", f"model.trace={runs / 'tuned'}", f"reference.trace={runs / 'base'}", "hydra.run.dir=out"]
    outcome = spinal(*arguments)
    assert (outcome.code, outcome.err) == (0, "")
    assert "Comparison of tuned with tiny: toward contraction" in outcome.out
    assert "out/report.html" in outcome.out
    folder = tmp_path / "out"
    files = {"comparison.csv", "comparison.json", "comparison.safetensors", "figures", "report.html", "summary.md"}
    files.add(EVENTS)
    assert {path.name for path in folder.iterdir()} == files | {"manifest.json"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["command"] == "compare"
    assert set(manifest["files"]) == files
    assert manifest["sha256"]["aligned"] == "tuned"
    assert sweep_settings(folder)["model.trace"] == str(runs / "tuned")
    assert manifest["config"]["assert"]["verdict"] is None
    found = load_comparison(folder)
    assert found.verdict == "toward contraction"
    # The audit keeps what other settings gave, so the grid is wider than the windows alone.
    assert {"center"} < {record["contraction"] for record in found.robustness["settings"]}
    spinal(*arguments).refusal("already holds a complete run", "overwrite=true")
    assert spinal(*arguments, "overwrite=true").code == 0


def test_evidence_that_falls_short_exits_3_and_is_kept(spinal: Spinal, runs: Path, tmp_path: Path) -> None:
    arguments = ["compare", f"model.trace={runs / 'tuned'}", f"reference.trace={runs / 'base'}"]
    enough = spinal(
        *arguments, "assert.verdict=toward contraction", "assert.delta_align_low=0.05", "hydra.run.dir=enough"
    )
    assert (enough.code, enough.err) == (0, "")
    short = spinal(*arguments, "assert.delta_align_low=0.5", "assert.verdict=toward expansion", "hydra.run.dir=short")
    assert short.code == 3
    assert short.err.startswith("spinal: the evidence falls short of assert: the verdict is 'toward contraction', not")
    assert "not at 0.5 or above" in short.err
    assert (tmp_path / "short" / "manifest.json").exists()


def test_more_runs_are_ranked(spinal: Spinal, runs: Path, tmp_path: Path) -> None:
    others = f"others=[{runs / 'other'},{runs / 'base'}]"
    both = f"model.trace={runs / 'tuned'}", f"reference.trace={runs / 'base'}"
    assert spinal("compare", *both, others, "hydra.run.dir=out").code == 0
    names = [row["aligned"] for row in json.loads((tmp_path / "out" / "ranking.json").read_text())["rows"]]
    assert names == ["tuned", "tiny", "other"]
    assert load_comparison(tmp_path / "out" / "others" / "1").verdict == "toward expansion"
    own, called = f"other_references=[{runs / 'other'},{runs / 'tuned'}]", "names=[best,same,least]"
    assert spinal("compare", *both, others, own, called, "hydra.run.dir=own").code == 0
    rows = json.loads((tmp_path / "own" / "ranking.json").read_text())["rows"]
    assert {row["aligned"]: row["reference"] for row in rows} == {"best": "tiny", "same": "other", "least": "tuned"}
    spinal("compare", *both, others, "names=[one]").refusal("names is ['one']", "one for each of others")
    spinal("compare", *both, others, "other_references=[a]").refusal("other_references", "as many folders as others")


def test_mistakes(spinal: Spinal, runs: Path, tmp_path: Path) -> None:
    one, other = f"model.trace={runs / 'tuned'}", f"reference.trace={runs / 'base'}"
    spinal("compare", one).refusal("reference is missing", "reference.trace=RUN")
    spinal("compare", one, other, "model.source=x").refusal("model.trace is", "model.source is 'x'", "one of them")
    spinal("compare", one, "reference.trace=nowhere").refusal("no trace at nowhere")
    spinal("compare", one, other, "assert.delta=1").refusal("'assert.delta'", "assert.")
    spinal("compare", one, other, "assert.verdit=x").refusal("'assert.verdit'", "did you mean assert.verdict?")
    spinal("compare", one, other, "assert.zzz=1").refusal("assert.verdict, assert.delta_align_low", "assert.holds")
    spinal("compare", one, other, "assert.verdict=worse").refusal("assert.verdict", "'worse'", "no detectable change")
    spinal("compare", one, other, "assert.p_value=5").refusal("assert.p_value", "5", "0 to 1")
    spinal("compare", one, other, "align=depth").refusal("align", "'depth'", "equal or relative")
    spinal("compare", one, other, "score.delta=-1").refusal("score.delta", "0 or more")
    apart = load_trace(runs / "base")
    save_trace(replace(apart, settings={**apart.settings, "skip": 2}), tmp_path / "apart")
    spinal("compare", one, "reference.trace=apart").refusal("the setting skip is 1 in tuned and 2 in tiny")
    assert not any(tmp_path.glob("runs/compare/*"))
