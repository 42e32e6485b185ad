"""A sweep: complete runs are passed over, a failure loses no other run, and processes of their own do as well."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spinal_jax.cli import main as cli
from spinal_jax.cli.commands import COMMANDS
from spinal_jax.cli.console import DONE, MISTAKE, SHORT, UNFORESEEN, Outcome, Stopped, worst
from spinal_jax.config import AuditConfig
from spinal_jax.errors import AlreadyDone, UserError

from .conftest import Outcome as Ended
from .conftest import Spinal

Job = Callable[[AuditConfig, Path], int]
JOBLIB = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Ended]:
    """`sweep(job, ARGUMENTS)`: `spinal audit -m` into `tmp_path`, with a job that measures nothing."""

    def run(job: Job, *arguments: str) -> Ended:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setitem(COMMANDS, "audit", replace(COMMANDS["audit"], job=job))
        monkeypatch.setattr(
            "sys.argv", ["spinal", "audit", "-m", "model.source=m", "hydra.sweep.dir=sweep", *arguments]
        )
        code: Any = 0
        try:
            cli.main()
        except SystemExit as exit:
            code = exit.code
        return Ended(code, *capfd.readouterr())

    return run


def test_complete_runs_are_passed_over_and_others_refused(
    spinal: Spinal, model: Path, prompts: Path, tmp_path: Path
) -> None:
    common = ("audit", "-m", f"model.source={model}", f"prompts.path={prompts}", "prompts.format=text")
    common = (*common, "metrics.groups=4", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert spinal(*common, "prompts.limit=20,21").code == 0
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep").rglob("*") if path.is_file()}
    again = spinal(*common, "prompts.limit=20,21")
    assert again.code == 0
    assert again.err.splitlines() == [
        "run 1 of 2: prompts.limit=20",
        "  complete: sweep/0",
        "run 2 of 2: prompts.limit=21",
        "  complete: sweep/1",
    ]
    assert again.out == ""
    assert [path.name for path, when in written.items() if path.stat().st_mtime_ns != when] == ["multirun.yaml"]
    other = spinal(*common, "prompts.limit=20,22")
    assert other.code == 2
    assert "sweep/1 already holds a complete run; set overwrite=true" in other.err
    assert "(run 2 of 2: prompts.limit=22)" in other.err
    # Alone, a run is refused as ever.
    spinal(*common[:1], *common[2:-1], "prompts.limit=20", f"hydra.run.dir={tmp_path / 'sweep' / '0'}").refusal(
        "complete run"
    )


def test_a_failure_loses_no_other_run_and_the_worst_code_is_the_last_word(
    sweep: Callable[..., Ended], tmp_path: Path
) -> None:
    def job(asked: AuditConfig, folder: Path) -> int:
        limit = asked.prompts.limit
        if limit == 1:
            raise RuntimeError("boom")
        if limit == 2:
            raise UserError("nothing there")
        if limit == 3:
            raise AlreadyDone("done")
        (folder / "ran").touch()
        return SHORT if limit == 4 else DONE

    ended = sweep(job, "prompts.limit=1,2,3,4,5", "prompts.max_length=9")
    assert ended.code == UNFORESEEN
    assert "Traceback" not in ended.err
    told = re.search(
        r"^spinal: unforeseen error \(RuntimeError: boom\); a report .* is in (\S+);.*$", ended.err, re.MULTILINE
    )
    assert told is not None
    assert "(run 1 of 5: prompts.limit=1)" in told[0]
    assert "RuntimeError: boom" in Path(told[1]).read_text()
    assert "spinal: nothing there (run 2 of 5: prompts.limit=2)\n" in ended.err
    assert "run 5 of 5, about " in ended.err
    assert "  complete: sweep/2\n" in ended.err
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == ["3", "4", "multirun.yaml"]
    assert sweep(job, "prompts.limit=2,4,5").code == MISTAKE
    assert sweep(job, "prompts.limit=3,4").code == SHORT
    assert sweep(job, "prompts.limit=5,6").code == DONE


def test_a_setting_may_be_made_of_what_hydra_knows_of_its_own_run(sweep: Callable[..., Ended]) -> None:
    seen = []

    def job(asked: AuditConfig, folder: Path) -> int:
        seen.append(asked.prompts.path)
        return DONE

    ended = sweep(job, "prompts=default,hh", "prompts.path=${hydra:runtime.choices.prompts}.jsonl")
    assert (ended.code, seen) == (DONE, ["default.jsonl", "hh.jsonl"])
    assert [line.partition(": ")[0].partition(",")[0] for line in ended.err.splitlines()] == [
        "run 1 of 2",
        "run 2 of 2",
    ]


def test_which_code_is_worst() -> None:
    def code(*codes: int) -> int:
        return worst([Outcome(number, code) for number, code in enumerate(codes)])

    assert [code(), code(0, 3), code(3, 2, 0), code(0, 2, 1, 3)] == [0, 3, 2, 1]


def test_runs_in_processes_of_their_own_tell_how_they_ended(
    sweep: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The joblib launcher: exit codes and messages come back, and each process takes one of the GPUs that are named."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")

    def job(asked: AuditConfig, folder: Path) -> int:
        if asked.prompts.limit == 3:
            raise UserError("nothing there")
        (folder / "seen").write_text(f"{os.getpid()} {os.environ['CUDA_VISIBLE_DEVICES']}")
        time.sleep(1.5)  # until the other process has begun
        return SHORT if asked.prompts.limit == 2 else DONE

    ended = sweep(job, "prompts.limit=1,2,3,4,5,6", *JOBLIB)
    assert ended.code == MISTAKE
    assert "spinal: nothing there (run 3 of 6: prompts.limit=3)\n" in ended.err
    seen = [path.read_text().split() for path in sorted((tmp_path / "sweep").glob("*/seen"))]
    assert len(seen) == 5
    assert str(os.getpid()) not in {pid for pid, _ in seen}
    gpus = {pid: {gpu for other, gpu in seen if other == pid} for pid, _ in seen}
    assert sorted(gpus.values(), key=sorted) == [{"5"}, {"7"}]
    assert not list((tmp_path / "sweep").glob(".sweep-*"))


def test_an_interrupted_sweep_says_how_to_go_on(sweep: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []
    monkeypatch.setattr("os._exit", left.append)

    def job(asked: AuditConfig, folder: Path) -> int:
        raise Stopped(2)

    ended = sweep(job, "prompts.limit=1,2")
    assert left == [130]
    assert ended.err.endswith("interrupted; the same command with hydra.sweep.dir=sweep passes over complete runs\n")
    assert "run 2 of 2" not in ended.err


def test_settings_are_shown_wherever_the_option_stands(spinal: Spinal) -> None:
    for words in (("model.source=m", "--cfg", "job"), ("--cfg", "job", "model.source=m"), ("--cfg", "job")):
        shown = spinal("audit", *words)
        assert shown.code == 0, shown.err
        assert "source: " in shown.out


def test_collect_says_what_it_wrote_and_what_it_takes(spinal: Spinal, tmp_path: Path) -> None:
    (tmp_path / "runs" / "cut" / ".writing-1").mkdir(parents=True)
    ended = spinal("collect", "runs", "out=table")
    assert ended.code == 0, ended.err
    assert "1 runs" not in ended.out
    assert "incomplete  runs/cut" in ended.out
    assert {path.name for path in (tmp_path / "table").iterdir()} == {"runs.csv", "runs.parquet", "index.html"}
    spinal("collect").refusal("collect takes folders", "spinal collect DIR... [out=DIR]")
    spinal("collect", "runs", "--force").refusal("--force")
    spinal("collect", "runs", "runs/cut").refusal("2 folders", "out=DIR")
