"""`spinal train` from start to end: what it writes, what a killed run leaves, and what it refuses."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from spinal_jax.audit.trace import load_trace
from spinal_jax.models import lora

from .conftest import Spinal, Start

SMALL = (
    "objective=dpo",
    "preferences=world",
    "preferences.limit=40",
    "preferences.held_out=8",
    "prompts=world",
    "prompts.limit=24",
    "metrics.groups=4",
    "steps=4",
    "batch_size=4",
    "trace_every=2",
    "save_every=1",
    "optimizer.learning_rate=1e-3",
    "objective.cache=cache",
)
WORLD = ("model.source=random:0.3m@1", *SMALL)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, start: Start) -> Path:
    """A run of SMALL that nothing disturbed. Nobody may change it."""
    folder = tmp_path_factory.mktemp("whole")
    process = start("train", *WORLD, f"hydra.run.dir={folder}/run", cwd=folder)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "report" in out
    return folder / "run"


def test_a_run_folder_holds_what_it_should(whole: Path) -> None:
    assert {path.name for path in whole.iterdir()} >= {
        *("manifest.json", "settings.json", "metrics.jsonl", "onset.json", "traces", "checkpoints", "model"),
        *("figures", "report.html"),
    }
    found = lines(whole)
    assert [line["step"] for line in found] == [0, 1, 2, 3, 4]
    first = found[0]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert first["eval_loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert len(first["block_grad_norms"]) == 6
    assert {"rewards/chosen", "logps/rejected", "logits/chosen", "entropy", "grad_norm", "num_tokens"} <= first.keys()
    assert first["learning_rate"] == pytest.approx(1e-3)
    assert found[-1].keys() == {"step", *(name for name in first if name.startswith("eval_"))}
    assert found[3]["loss"] < first["loss"]
    traces = sorted(path.name for path in (whole / "traces").iterdir())
    assert traces == ["step_000000", "step_000002", "step_000004"]
    assert [record["step"] for record in json.loads((whole / "onset.json").read_text())["records"]] == [0, 2, 4]
    zero = load_trace(whole / "traces" / "step_000000")
    comparison = json.loads((whole / "traces" / "step_000000" / "comparison.json").read_text())
    assert comparison["summary"]["delta_align"] == 0
    assert zero.depth == 6


def test_the_trained_model_opens_like_any_other(whole: Path, spinal: Spinal, tmp_path: Path) -> None:
    """An audit of the exported model is the last trace of the run, to the digit that batches leave."""
    settings = ("prompts=world", "prompts.limit=24", "metrics.groups=4")
    outcome = spinal("audit", f"model.source={whole / 'model'}", *settings, f"hydra.run.dir={tmp_path / 'audit'}")
    assert outcome.code == 0, outcome.err
    audited, traced = load_trace(tmp_path / "audit"), load_trace(whole / "traces" / "step_000004")
    for name in ("contraction", "transport", "entropy"):
        np.testing.assert_allclose(audited.columns[name], traced.columns[name], rtol=1e-5, err_msg=name)


def test_a_killed_run_goes_on_to_the_same_end(whole: Path, start: Start, tmp_path: Path) -> None:
    """Killed at three moments, and each time run again: the same metrics, traces and weights, bit for bit."""
    rng = random.Random(5)
    command = ("train", *WORLD, "hydra.run.dir=run")
    run = tmp_path / "run"
    for _ in range(3):
        process = start(*command, cwd=tmp_path)
        until = time.monotonic() + rng.uniform(4, 16)
        while process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    if not (run / "manifest.json").exists():
        process = start(*command, cwd=tmp_path)
        _, err = process.communicate()
        assert process.returncode == 0, err
    assert lines(run) == lines(whole)
    assert (run / "onset.json").read_text() == (whole / "onset.json").read_text()
    ours, theirs = weights(run), weights(whole)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    for name in ("step_000002", "step_000004"):
        assert (run / "traces" / name / "trace.json").read_text() == (
            whole / "traces" / name / "trace.json"
        ).read_text()


def test_a_run_killed_between_a_checkpoint_and_its_trace_goes_on_to_the_same_end(
    whole: Path, start: Start, tmp_path: Path
) -> None:
    """What stands beside a trace is of the step before it, which is not done again."""
    folder = shutil.copytree(whole, tmp_path / "run")
    shutil.copytree(whole.parent / "cache", tmp_path / "cache")
    (folder / "manifest.json").unlink()
    shutil.rmtree(folder / "traces" / "step_000004")
    process = start("train", *WORLD, f"hydra.run.dir={folder}", cwd=tmp_path)
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert "going on from step 4 of 4" in err
    for name in ("metrics.jsonl", "onset.json", "traces/step_000004/trace.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name


def test_lora_and_a_live_reference(spinal: Spinal, tmp_path: Path) -> None:
    run = tmp_path / "run"
    changes = ("lora.rank=2", "objective.reference=live", "steps=3", "eval_every=[1]", "compute_dtype=bfloat16")
    assert spinal("train", *WORLD, *changes, f"hydra.run.dir={run}").code == 0
    assert lines(run)[0]["loss"] == pytest.approx(np.log(2), abs=2e-2)
    assert [line["step"] for line in lines(run) if "eval_loss" in line] == [0, 1, 3]
    assert not (tmp_path / "cache").exists()
    assert (run / "model" / "tokenizer.json").exists()


@pytest.mark.parametrize("kind", ["sft", "lm"])
def test_other_objectives(kind: str, spinal: Spinal, tmp_path: Path) -> None:
    run = tmp_path / "run"
    data = ("corpus=world", "corpus.limit=64", "corpus.held_out=8") if kind == "lm" else ()
    assert spinal("train", *WORLD, f"objective={kind}", *data, f"hydra.run.dir={run}").code == 0
    found = lines(run)
    assert 0 < found[3]["loss"] < found[0]["loss"]
    assert {"mean_token_accuracy", "eval_loss"} <= found[0].keys()
    assert (run / "report.html").exists()


def test_a_run_ends_at_the_first_evaluation_that_is_good_enough(spinal: Spinal, tmp_path: Path) -> None:
    data = ("objective=lm", "corpus=world", "corpus.limit=64", "corpus.held_out=8", "eval_every=1", "trace_every=9")
    run = tmp_path / "run"
    outcome = spinal("train", *WORLD, *data, "steps=9", "until_eval_loss=5.5", f"hydra.run.dir={run}")
    assert outcome.code == 0, outcome.err
    losses = [line["eval_loss"] for line in lines(run)]
    assert losses[-1] <= 5.5 < losses[-2]
    last = len(losses) - 1
    assert 0 < last < 9
    assert f"stopped after step {last} of 9: the held-out loss is {losses[-1]:.4g}" in outcome.err
    assert [path.name for path in sorted((run / "traces").iterdir())] == ["step_000000", f"step_{last:06}"]
    refused(spinal, tmp_path, ("until_eval_loss=1", "preferences.held_out=0"), "until_eval_loss", "null", "held out")


def test_what_is_not_finite_ends_the_run_and_keeps_the_state_before(spinal: Spinal, tmp_path: Path) -> None:
    run = tmp_path / "run"
    outcome = spinal("train", *WORLD, "optimizer.learning_rate=1e30", "optimizer.name=sgd", f"hydra.run.dir={run}")
    assert outcome.code == 1
    assert "step 1: the loss or a gradient is not finite, on the examples of rows [" in outcome.err
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["1"]
    assert not (run / "manifest.json").exists()
    assert [line["step"] for line in lines(run)] == [0]


def refused(spinal: Spinal, tmp_path: Path, changes: tuple[str, ...], *words: str) -> None:
    settings = {setting.partition("=")[0]: setting for setting in (*WORLD, f"hydra.run.dir={tmp_path / 'run'}")}
    settings |= {setting.partition("=")[0]: setting for setting in changes}
    spinal("train", *settings.values()).refusal(*words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (("objective=ppo",), ["objective/ppo", "dpo", "sft", "lm"]),
        (("objective.loss=simpo",), ["objective.loss", "'simpo'", "sigmoid", "cdpo", "robust", "ipo", "hinge"]),
        (("optimizer.name=adam",), ["optimizer.name", "'adam'", "adamw", "adafactor", "lion", "sgd"]),
        (("optimizer.schedule=step",), ["optimizer.schedule", "'step'", "linear", "cosine", "constant"]),
        (("objective.beta=0",), ["objective.beta", "0", "above 0"]),
        (("objective.label_smoothing=0.1",), ["objective.label_smoothing", "0.1", "cdpo"]),
        (("lora.rank=2", "lora.targets=[q_prj]"), ["lora.targets", "'q_prj'", "attention.query", lora.ALL_LINEAR]),
        (("preferences=null",), ["objective=dpo", "preferences=world", "preferences.path"]),
        (("objective=lm",), ["objective=lm", "corpus=world"]),
        (("parallel.data=3",), ["parallel", "3", "8 devices"]),
        (("trace_every=0",), ["trace_every", "0"]),
        (("eval_every=[2,-1]",), ["eval_every", "-1", "a list of steps"]),
        (("preferences.held_out=40",), ["preferences.held_out", "40"]),
        (("model.dtype=bfloat16",), ["model.dtype", "compute_dtype"]),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_mistakes(changes: tuple[str, ...], words: list[str], spinal: Spinal, tmp_path: Path) -> None:
    if changes == ("preferences=null",):
        settings = [s for s in WORLD if not s.startswith("preferences")]
        spinal("train", *settings, f"hydra.run.dir={tmp_path / 'run'}").refusal(*words)
    else:
        refused(spinal, tmp_path, changes, *words)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"prompt": "a", "chosen": "b"}], ["line 1", "'rejected'"]),
        ([{"prompt": "a", "chosen": "b", "rejected": 3}], ["line 1", "'rejected'", "3"]),
        ([{"prompt": "a", "chosen": "b", "rejected": "b"}] * 3, ["no preference pair", "3 identical"]),
        ([{"prompt": "a" * 50, "chosen": "b" * 50, "rejected": "c" * 50}], ["max_length=20", "1 overlong"]),
    ],
    ids=["missing", "mistyped", "identical", "truncated"],
)
def test_bad_pairs(rows: list[dict[str, Any]], words: list[str], spinal: Spinal, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [s for s in WORLD if not s.startswith("preferences")]
    data = ("preferences=jsonl", f"preferences.path={path}", "preferences.max_length=20")
    spinal("train", *settings, *data, f"hydra.run.dir={tmp_path / 'run'}").refusal(*words)


def test_a_run_goes_on_only_with_the_same_settings_and_data(spinal: Spinal, tmp_path: Path) -> None:
    run = tmp_path / "run"
    diverging = ("optimizer.learning_rate=1e30", "optimizer.name=sgd", f"hydra.run.dir={run}")
    assert spinal("train", *WORLD, *diverging).code == 1
    before = sorted(path.name for path in run.iterdir())
    for change, words in (
        ("batch_size=2", ["batch_size = 4", "2"]),
        ("model.source=random:1m", ["model.source", "random:1m"]),
        ("preferences.seed=3", ["preferences.seed = 0", "3"]),
    ):
        spinal("train", *WORLD, *diverging, change).refusal(*words, "overwrite=true")
    assert sorted(path.name for path in run.iterdir()) == before


def test_a_complete_run_is_not_replaced_unasked(whole: Path, spinal: Spinal) -> None:
    spinal("train", *WORLD, f"hydra.run.dir={whole}").refusal("already holds a complete run", "overwrite=true")
