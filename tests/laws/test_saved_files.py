"""What a run has saved and somebody has changed since is read or refused in one sentence, whichever part reads it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from spinal_jax.audit.trace import DepthTrace, load_trace
from spinal_jax.comparison.attribution import load_attribution
from spinal_jax.comparison.attribution_runs import read_attributed_run
from spinal_jax.comparison.record import load_comparison
from spinal_jax.comparison.sources import step_folders, step_name, steps_of
from spinal_jax.comparison.step_records import Rules, load_control
from spinal_jax.errors import UserError
from spinal_jax.recording.checkpoints import checkpoints, has_ended, is_complete, step_of, trainer_metrics
from spinal_jax.recording.series import TraceSeries
from spinal_jax.runs.find import find_runs
from spinal_jax.runs.training_run import load_training_run
from spinal_jax.train.folder import TrainingFolder

from .test_training_report import CONFIG, ends, write_run

__all__ = ["ends"]  # a fixture
CONTENTS = [
    *("", "{", "{}", "[]", "3", "null", "[" * 200_000, '{"records": 3}', '{"records": [{}]}', '{"schema": []}'),
    *('{"config": 3}', '{"step": "x"}\n', "[]\n", "{}\n", "\ufeff{}", "NaN\n"),
]
SCHEMAS = ["spinal-onset/2", "spinal-attribution/1", "spinal-comparison/2", "spinal-trace/2", "spinal-manifest/1"]
CONTENTS += [json.dumps({"schema": schema}) for schema in SCHEMAS]


def attributed(run: Path) -> object:
    return read_attributed_run(str(run), "aligned", None, None)


def found(run: Path) -> object:
    return find_runs([run])


READERS: dict[str, Callable[[Path], object]] = {
    "trace.json": load_trace,
    "comparison.json": load_comparison,
    "attribution.json": load_attribution,
    "onset.json": load_control,
    "manifest.json": found,
    "settings.json": lambda run: TrainingFolder(run, {"config": CONFIG}, overwrite=False),
    "metrics.jsonl": load_training_run,
}


@pytest.fixture
def run(tmp_path: Path, ends: tuple[DepthTrace, DepthTrace]) -> Path:
    """A training run that ended."""
    folder = tmp_path / "run"
    folder.mkdir()
    write_run(folder, ends, [0, 0.2, 0.5, 0.8, 0.9, 1.0, 1.0], "sound")
    manifest = {"schema": "spinal-manifest/1", "command": "train", "config": CONFIG, "files": []}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def refused(read: Callable[[Path], object], run: Path) -> None:
    """It may be read; where it is not, one sentence says so."""
    said = ""
    try:
        read(run)
    except UserError as error:
        said = str(error)
    assert "\n" not in said
    assert len(said) < 800


@pytest.mark.parametrize("name", READERS)
def test_other_content_is_refused(name: str, run: Path) -> None:
    settings = (run / "settings.json").read_bytes()
    for content in CONTENTS:
        (run / "settings.json").write_bytes(settings)
        (run / name).write_text(content, encoding="utf-8")
        for read in (READERS[name], load_training_run, attributed, found, series):
            refused(read, run)
    (run / name).write_bytes(b"\xff{}")
    refused(READERS[name], run)


def series(run: Path) -> None:
    """What `spinal watch` and the Recorder go on with."""
    (run / "settings.json").write_text(json.dumps({"config": {}}, indent=1) + "\n")
    with contextlib.closing(TraceSeries(run, {}, Rules(0))) as opened:
        opened.logged()


@pytest.mark.parametrize("name", READERS)
def test_what_is_no_file_is_refused(name: str, run: Path) -> None:
    """A FIFO would be waited for without end."""
    (run / name).unlink(missing_ok=True)
    for make in (os.mkfifo, os.mkdir, lambda path: path.symlink_to(path)):
        make(run / name)
        refused(READERS[name], run)
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()


@pytest.mark.parametrize("content", [*CONTENTS, '{"log_history": [3]}', '{"max_steps": "9", "global_step": []}'])
def test_what_a_trainer_left_is_read_or_refused(content: str, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-5"
    checkpoint.mkdir()
    for name in ("trainer_state.json", "config.json", "model.safetensors.index.json"):
        (checkpoint / name).write_text(content, encoding="utf-8")
    assert not is_complete(checkpoint, 0)
    assert not has_ended(tmp_path)
    refused(trainer_metrics, tmp_path)
    (tmp_path / "metrics.jsonl").write_text(content, encoding="utf-8")
    refused(trainer_metrics, tmp_path)


@pytest.mark.parametrize("number", ["1e999", "-1e999", "1e101", "-Infinity", "Infinity", "1" + "0" * 400])
def test_infinite_numbers_are_refused(number: str, run: Path) -> None:
    trace = run / "traces" / "step_000010"
    for name, section, read in (("trace", "path_length", load_trace), ("comparison", "delta_align", load_comparison)):
        file = trace / f"{name}.json"
        sound = file.read_text()
        changed = re.sub(rf'("{section}": )[-0-9.e]+', rf"\g<1>{number}", sound)
        assert changed != sound
        file.write_text(changed)
        with pytest.raises(UserError, match="beyond any measurement"):
            read(trace)


def test_other_folders_beside_the_traces_are_kept(run: Path) -> None:
    others = [run / "traces" / name for name in ("step_x", "step_7", "step_000010 (copy)", "summary", "zip.txt")]
    for path in others[:-1]:
        path.mkdir()
    others[-1].touch()
    cut_off = run / "traces" / "step_000070"
    cut_off.mkdir()
    assert list(step_folders(run)) == [0, 10, 20, 30, 40, 50, 60, 70]
    series(run)
    assert not cut_off.exists()
    (run / "manifest.json").unlink()
    training = TrainingFolder(run, {"config": {}}, overwrite=False)
    training.go_on(30)
    training.close()
    assert list(steps_of(run)) == [0, 10, 20]
    assert all(path.exists() for path in others)


def test_steps_beyond_a_million_are_in_order(tmp_path: Path) -> None:
    training = TrainingFolder(tmp_path, {"config": {}}, overwrite=False)
    for step in (999_000, 1_000_000, 1_001_000):
        (tmp_path / "traces" / step_name(step)).mkdir()
    training.go_on(1_000_000)
    training.close()
    assert list(step_folders(tmp_path)) == [999_000]


def test_what_lies_among_the_logs_of_a_trainer(tmp_path: Path) -> None:
    logged = [{"step": 1, "loss": 10**400, "good": 0.5}, {"step": 10**30, "loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in logged))
    assert trainer_metrics(tmp_path) == [{"step": 1, "good": 0.5}]
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / f"checkpoint-{10**20}").mkdir()
    assert step_of(tmp_path / f"checkpoint-{10**20}") is None
    os.mkfifo(tmp_path / "events.out.tfevents.1")
    refused(trainer_metrics, tmp_path)


def test_two_checkpoints_of_one_step(tmp_path: Path) -> None:
    for name in ("checkpoint-5", "checkpoint-10"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "_CHECKPOINT_METADATA").touch()
    assert [step for step, _ in checkpoints(tmp_path, 0)] == [5, 10]
    (tmp_path / "checkpoint-10").rename(tmp_path / "step_005")
    with pytest.raises(UserError, match="checkpoint-5 and step_005 are both checkpoints of step 5"):
        checkpoints(tmp_path, 0)
