"""A finished run: what is in its folder, that it is the same every time, and what may replace it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import spinal_jax
from spinal_jax.errors import UserError
from spinal_jax.runs import folder as run_folder
from spinal_jax.runs.tensorboard import EVENTS

from .conftest import Spinal, Start, sweep_settings

FIGURES = {f"figures/{name}.{kind}" for name in ("depth", "curve", "spectra", "entropy") for kind in ("png", "svg")}
FILES = {
    "trace.json",
    "trace.csv",
    "spectra.safetensors",
    "report.html",
    EVENTS,
    run_folder.MANIFEST,
} | FIGURES


class Finished(NamedTuple):
    folder: Path
    again: Path  # by the same command
    out: str
    err: str


@pytest.fixture(scope="session")
def finished(start: Start, model: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The same audit by two processes at once that hash differently."""
    work = tmp_path_factory.mktemp("work")
    common = ("audit", f"model.source={model}", f"prompts.path={prompts}", "prompts.format=text")
    processes = [
        start(*common, f"hydra.run.dir={folder}", cwd=work, env={"PYTHONHASHSEED": seed})
        for folder, seed in (("one", "1"), ("two", "2"))
    ]
    outcomes = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outcomes
    return Finished(work / "one", work / "two", *outcomes[0])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / run_folder.MANIFEST).read_text())


def events(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    accumulator.Reload()
    return accumulator


def test_a_run_holds_its_files_and_nothing_else(finished: Finished) -> None:
    assert set(contents(finished.folder)) == FILES
    trace = spinal_jax.load_trace(finished.folder)
    assert trace.prompts["count"] == 40
    assert np.isfinite(trace.columns["contraction"]).all()


def test_what_is_printed(finished: Finished) -> None:
    (line,) = finished.err.splitlines()  # no bar where standard error is no terminal
    for words in ("tiny", "llama", "float32", "cpu", "mesh", "40 prompts", "N = ", "4 d = 128"):
        assert words in line
    assert "\r" not in finished.err
    assert "\x1b" not in finished.out + finished.err
    assert finished.out.startswith("DepthTrace of tiny")
    assert finished.out.splitlines()[-1].split() == ["report", "one/report.html"]


def test_the_manifest_says_what_ran(finished: Finished, model: Path) -> None:
    manifest = manifest_of(finished.folder)
    trace = spinal_jax.load_trace(finished.folder)
    assert manifest["command"] == "audit"
    assert manifest["config"]["model"]["source"] == str(model)
    assert manifest["config"]["metrics"]["contraction"] == {"window": [0.1, 0.5], "skip": 1, "center": False}
    assert manifest["environment"] == dict(trace.environment)
    assert manifest["sha256"]["weights"] == trace.model["sha256"]
    assert manifest["sha256"]["prompts"] == trace.prompts["sha256"]
    assert len(manifest["sha256"]["settings"]) == 64
    assert set(manifest["files"]) == {name.split("/")[0] for name in FILES} - {run_folder.MANIFEST}
    assert set(manifest["time"]["seconds"]) == {"load weights", "audit", "spectra", "report"}


def test_equal_inputs_give_equal_bytes_apart_from_times(finished: Finished) -> None:
    one, two = contents(finished.folder), contents(finished.again)
    assert one.keys() == two.keys()
    for name in one.keys() - {EVENTS, run_folder.MANIFEST}:
        assert one[name] == two[name], name
    manifests = manifest_of(finished.folder), manifest_of(finished.again)
    assert [set(manifest.pop("time")) for manifest in manifests] == [{"ended", "seconds"}] * 2
    assert manifests[0] == manifests[1]
    first, second = events(finished.folder), events(finished.again)
    assert first.Tags() == second.Tags()
    for tag in first.Tags()["scalars"]:
        assert [astuple(e)[1:] for e in first.Scalars(tag)] == [astuple(e)[1:] for e in second.Scalars(tag)]
    for tag in first.Tags()["images"]:
        assert [astuple(e)[1:] for e in first.Images(tag)] == [astuple(e)[1:] for e in second.Images(tag)]


def test_tensorboard_shows_the_same_scalars_and_figures(finished: Finished) -> None:
    trace, shown = spinal_jax.load_trace(finished.folder), events(finished.folder)
    assert set(shown.Tags()["images"]) == {f"spinal/{name}" for name in ("depth", "curve", "spectra", "entropy")}
    for tag in shown.Tags()["images"]:
        (image,) = shown.Images(tag)
        assert image.encoded_image_string.startswith(b"\x89PNG")
    for name, values in trace.columns.items():
        points = shown.Scalars(f"spinal/by_boundary/{name}")
        assert [point.step for point in points] == np.flatnonzero(np.isfinite(values)).tolist()
        np.testing.assert_allclose([p.value for p in points], values[np.isfinite(values)], rtol=1e-6)  # float32
    for name in ("contraction", "transport", "coherence", "directness", "path_length"):
        if np.isnan(trace.summary[name]):  # a model this shallow has no coherence
            assert f"spinal/summary/{name}" not in shown.Tags()["scalars"]
            continue
        (point,) = shown.Scalars(f"spinal/summary/{name}")
        assert point.value == pytest.approx(trace.summary[name], rel=1e-6)


def test_tensorboard_knows_the_settings_of_a_sweep(finished: Finished, prompts: Path) -> None:
    settings = sweep_settings(finished.folder)
    assert settings["metrics.contraction.window"] == "[0.1, 0.5]"
    assert settings["prompts.path"] == str(prompts)
    assert settings["metrics.contraction.center"] is False
    assert not any(name.startswith("parallel") for name in settings)


def test_code_that_comes_with_a_checkpoint_is_never_run(finished: Finished, model: Path) -> None:
    assert finished.folder.exists()
    assert not (model / "ran").exists()


def test_report_draws_the_same_again_without_model_or_jax(finished: Finished, start: Start, tmp_path: Path) -> None:
    folder = shutil.copytree(finished.folder, tmp_path / "run")
    whole = contents(folder)
    shutil.rmtree(folder / "figures")
    (folder / "report.html").unlink()
    libraries = ("jax", "jaxlib", "flax", "transformers", "safetensors.torch", "tensorboard", "hydra")
    process = start("report", folder, before=f"import sys; sys.modules |= dict.fromkeys({libraries})")
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    assert out.strip() == str(folder / "report.html")
    assert contents(folder) == whole


def test_a_complete_run_is_replaced_only_on_request_and_then_wholly(
    finished: Finished, spinal: Spinal, model: Path, prompts: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(finished.folder, tmp_path / "run")
    whole = contents(folder)
    common = ("audit", f"model.source={model}", f"prompts.path={prompts}", "prompts.format=text")
    refused = spinal(*common, f"hydra.run.dir={folder}")
    refused.refusal(str(folder), "complete run", "overwrite=true")
    assert contents(folder) == whole

    manifest = manifest_of(folder) | {"files": [*manifest_of(folder)["files"], "onset.json", "traces"]}
    (folder / run_folder.MANIFEST).write_text(json.dumps(manifest))
    for name in ("onset.json", "figures/old.png", "traces/step_1/trace.json", ".writing-killed/trace.json", "notes.md"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("old")
    done = spinal(*common, f"hydra.run.dir={folder}", "overwrite=true", "prompts.limit=20")
    assert done.code == 0, done
    assert set(contents(folder)) == FILES | {"notes.md"}  # what the old run wrote is gone, what it did not write is not
    assert not (folder / "traces").exists()
    assert spinal_jax.load_trace(folder).prompts["count"] == 20


def test_a_sweep_writes_a_folder_for_each_value(spinal: Spinal, model: Path, prompts: Path, tmp_path: Path) -> None:
    settings = (f"model.source={model}", f"prompts.path={prompts}", "prompts.format=text", "prompts.limit=20")
    windows = "metrics.contraction.window=[0.1,0.6],[0.6,0.1],[0.2,0.7]"
    outcome = spinal("audit", "-m", *settings, windows, f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert outcome.code == 2  # the second one is a mistake, which does not stop the third
    (complaint,) = (line for line in outcome.err.splitlines() if line.startswith("spinal: "))
    assert "[0.6, 0.1]" in complaint
    assert "(run 2 of 3: metrics.contraction.window=[0.6,0.1])" in complaint
    folders = sorted(path.parent for path in tmp_path.rglob(run_folder.MANIFEST))
    assert folders == [tmp_path / "sweep" / "0", tmp_path / "sweep" / "2"]
    assert [manifest_of(f)["config"]["metrics"]["contraction"]["window"] for f in folders] == [[0.1, 0.6], [0.2, 0.7]]
    assert set(contents(folders[0])) == FILES
    assert not (tmp_path / "sweep" / "1").exists()


def test_a_thousand_prompts_of_every_kind(spinal: Spinal, model: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    alphabet = [*"abcdefghijklmnopqrstuvwxyz      ", "é", "ß", "漢", "🙂", "👩‍👩‍👧‍👦", "\u202e", "\x00", "\u2028"]
    lines = ["".join(rng.choice(alphabet, rng.integers(1, 2001))).strip() or "x" for _ in range(1000)]
    lines[10:900:89] = ["long " * 400, *[""] * 4, *["  \t "] * 5]
    lines[500] = "word " * 20_000
    raw = [line.encode() for line in lines]
    raw[600] = b"\xff\xfe invalid \xc3\x28 \xed\xa0\x80 bytes"
    path = tmp_path / "odd.txt"
    path.write_bytes(b"\n".join(raw) + b"\n")
    settings = (f"model.source={model}", f"prompts.path={path}", "prompts.format=text", "prompts.max_length=64")
    outcome = spinal("audit", *settings, "hydra.run.dir=run")
    assert outcome.code == 0, outcome
    assert manifest_of(tmp_path / "run")["prompts"] == {"count": 991, "skipped_empty": 9}


def test_a_run_that_fails_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("mine")

    def run() -> None:
        with run_folder.writing(tmp_path) as scratch:
            (scratch / "trace.json").write_text("{}")
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        run()
    assert set(contents(tmp_path)) == {"notes.md"}
    assert [path.name for path in tmp_path.iterdir()] == ["notes.md"]


def test_a_signal_waits_until_a_folder_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = run_folder.os.replace

    def interrupted(source: Path, target: Path) -> None:
        signal.raise_signal(signal.SIGINT)
        replace(source, target)

    monkeypatch.setattr(run_folder.os, "replace", interrupted)

    def run() -> None:
        with run_folder.writing(tmp_path) as scratch:
            for name in ("trace.json", "trace.csv", run_folder.MANIFEST):
                (scratch / name).write_text("{}")

    with pytest.raises(KeyboardInterrupt):
        run()
    assert set(contents(tmp_path)) == {"trace.json", "trace.csv", run_folder.MANIFEST}
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def a_run(folder: Path, parts: dict[str, str]) -> None:
    """Writes a run's parts and its manifest."""
    for name, text in parts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    files = sorted({name.partition("/")[0] for name in parts})
    (folder / run_folder.MANIFEST).write_text(json.dumps({"schema": run_folder.SCHEMA, "files": files}))


@pytest.mark.parametrize("replaces", [False, True])
def test_a_run_killed_while_its_parts_move_up_is_whole_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaces: bool
) -> None:
    """Killed before any change of the folder; what a half-moved run leaves is completed under the lock."""
    new = {"trace.json": "new", "trace.csv": "new", "figures/a.png": "new", "figures/b.png": "new"}
    wanted: dict[str, bytes] | None = None
    for killed_at in range(20):
        folder = tmp_path / str(killed_at)
        scratch = folder / ".writing-1"
        scratch.mkdir(parents=True)
        (folder / "notes.md").write_text("mine")
        if replaces:
            a_run(folder, {"trace.json": "old", "figures/a.png": "old", "figures/c.png": "old", "onset.json": "old"})
        a_run(scratch, new)
        left = killed_at

        def counted(change: Callable[..., object]) -> Callable[..., object]:
            def once(*arguments: object, **options: object) -> object:
                nonlocal left
                left -= 1
                if left < 0:
                    raise KeyboardInterrupt
                return change(*arguments, **options)

            return once

        with monkeypatch.context() as patched, contextlib.suppress(KeyboardInterrupt):
            for module, name in ((os, "replace"), (shutil, "rmtree"), (Path, "unlink")):
                patched.setattr(module, name, counted(getattr(module, name)))
            run_folder._move_up(scratch, folder, overwrite=replaces)
        with run_folder.held(folder):
            pass
        wanted = contents(folder) if wanted is None else wanted
        assert contents(folder) == wanted
        assert not list(folder.glob(".*"))
        if left > 0:
            break
    assert left > 0
    assert wanted is not None
    assert set(wanted) == {"notes.md", run_folder.MANIFEST, *new}
    assert wanted["figures/a.png"] == b"new"


def test_a_run_killed_while_it_was_written_goes(tmp_path: Path) -> None:
    a_run(tmp_path / ".writing-1", {"trace.json": "half"})
    manifest = json.loads((tmp_path / ".writing-1" / run_folder.MANIFEST).read_text())
    (tmp_path / ".writing-1" / run_folder.MANIFEST).write_text(json.dumps(manifest | {"files": ["trace.json", "gone"]}))
    (tmp_path / ".writing-1" / ".trace.csv.7.tmp").write_text("half")
    with run_folder.held(tmp_path):
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "manifest",
    [
        "{",
        "[]",
        '{"name": "web app"}',
        '{"schema": "spinal-manifest/1"}',
        '{"schema": "spinal-manifest/1", "files": ["../notes"]}',
        '{"schema": "spinal-manifest/1", "files": ["/etc"]}',
        '{"schema": "spinal-manifest/1", "files": [".."]}',
        '{"schema": "spinal-manifest/1", "files": [""]}',
    ],
)
def test_another_programs_manifest_is_never_taken_for_a_run(tmp_path: Path, manifest: str) -> None:
    (tmp_path / run_folder.MANIFEST).write_text(manifest)
    with pytest.raises(UserError, match="complete run"):
        run_folder.check_free(tmp_path, overwrite=False)
    with pytest.raises(UserError, match="not the manifest of a run"):
        run_folder.check_free(tmp_path, overwrite=True)


def test_what_lies_in_the_way_is_not_lost_without_asking(tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    with pytest.raises(UserError, match="figures"):
        run_folder.check_free(tmp_path, overwrite=False)
    run_folder.check_free(tmp_path, overwrite=True)


def test_of_two_runs_into_one_folder_the_later_gives_way(tmp_path: Path) -> None:
    def run() -> None:
        with run_folder.writing(tmp_path) as late:
            (late / run_folder.MANIFEST).write_text("late")
            with run_folder.writing(tmp_path) as early:
                (early / run_folder.MANIFEST).write_text("early")
            (late / "trace.json").write_text("late")

    with pytest.raises(UserError, match="complete run"):
        run()
    assert contents(tmp_path) == {run_folder.MANIFEST: b"early"}
