"""What stands around a command: closed pipes, odd locales, Ctrl-C at once, faults of the disk, unforeseen errors."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spinal_jax.audit.trace import save_trace
from spinal_jax.cli import console
from spinal_jax.cli import main as cli
from spinal_jax.cli.arguments import hydras_arguments, quoted
from spinal_jax.cli.commands import COMMANDS
from spinal_jax.cli.error_report import without_secrets
from spinal_jax.config import AuditConfig
from spinal_jax.errors import UserError

from ..laws.conftest import _make_trace
from .conftest import Outcome, Spinal, Start


@pytest.fixture
def audit_that(monkeypatch: pytest.MonkeyPatch, spinal: Spinal) -> Callable[..., Outcome]:
    """`audit_that(job)`: `spinal audit` with another job."""

    def run(job: Callable[[AuditConfig, Path], int]) -> Outcome:
        monkeypatch.setitem(COMMANDS, "audit", replace(COMMANDS["audit"], job=job))
        return spinal("audit", "m", "hydra.run.dir=run")

    return run


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["prompts=null"], ["prompts is 'null'", "default, hh"]),
        (["metrics=null"], ["metrics is 'null'"]),
        (["model=null"], ["model is 'null'", "others, which --help lists"]),
        (["model=qwen3-0.5b"], ["qwen3-0.6b", "others, which --help lists"]),
        *(
            ([f"metrics={value}"], ["metrics is", "default"])
            for value in ("-1", "1e99", "nan", "true", "[1]", "", "''")
        ),
        (["hydra=null"], ["hydra=null"]),
        (["hydra.run=null"], ["hydra.run=null"]),
        (["m", "hydra.run.dir=null"], ["hydra.run.dir"]),
        (["m", "hydra.run.dir=${nowhere}"], ["nowhere"]),
        (["--resolve"], ["--resolve", "--cfg"]),
        (["--cfg", "jib"], ["--cfg is 'jib'", "job, hydra, all"]),
        (["--info=nothing"], ["--info is 'nothing'", "searchpath"]),
        (["-p"], ["-p takes"]),
        (["-p", "false", "-c"], ["-p is 'false'", "model, prompts"]),
        (["--multirun=3"], ["--multirun takes no value"]),
        (["a", "b"], ["does not know what 'b' is"]),
        (["model.dtype"], ["'model.dtype'", "NAME=VALUE"]),
        (["model.source=random:0.3m@9999999999999999999999"], ["seed", "4294967295"]),
        (["model.source=random:0.3m@" + "9" * 5000], ["seed", "4294967295"]),
        (["model.source=random:0.3m", "model.revision=step-10"], ["revision 'step-10'", "random:0.3m"]),
        (["model.source=random:0.3m@1", "model.base=b"], ["base 'b'", "no adapter"]),
        (["m", "metrics.groups=99999999999999999999999"], ["metrics.groups", "64 bits"]),
        (["m", "prompts.limit=1e999"], ["prompts.limit", "whole number"]),
        (["m", "metrics.transport.temperature=1e999"], ["metrics.transport.temperature", "finite"]),
        (["m", "prompts=hh"], ["m"]),
        (["~model.source"], ["model.source"]),
        (["+hydra.callbacks=null"], ["hydra.callbacks"]),
    ],
)
def test_overrides_that_no_run_can_follow(
    spinal: Spinal, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    spinal("audit", *arguments).refusal(*words)
    assert not list(tmp_path.glob("runs/*/*"))


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("seed=99999999999999999999999", ["seed", "64 bits"]),
        ("seed=-1", ["seed", "2^32"]),
        ("steps=9223372036854775807", ["steps is", "1 to 10,000,000"]),
        ("batch_size=9223372036854775807", ["batch_size is", "1,048,576"]),
        ("lora.rank=9223372036854775807", ["lora.rank is", "at most 65536"]),
        ("optimizer.learning_rate=1e99", ["optimizer.learning_rate is", "3.4e+38"]),
        ("objective.beta=1e-99", ["objective.beta is", "1.2e-38"]),
    ],
)
def test_settings_that_no_training_can_follow(spinal: Spinal, setting: str, words: list[str]) -> None:
    spinal("train", "m", "preferences=world", setting).refusal(*words)


def test_sizes_of_the_world_and_of_epochs_are_bounded(spinal: Spinal) -> None:
    tiny = ("preferences=world", "preferences.limit=8", "preferences.held_out=0")
    for setting, words in (
        ("epochs=1e30", ["epochs is 1e+30", "10,000,000 are the most"]),
        ("preferences.limit=9223372036854775807", ["1 to 1,000,000"]),
    ):
        spinal("train", "random:0.3m", *tiny, setting).refusal(*words)


def test_what_hydra_can_tell_is_told(spinal: Spinal) -> None:
    for arguments in (
        ["--info"],
        ["--info", "defaults"],
        ["-i", "m"],
        ["--cfg", "all", "--resolve", "m"],
        ["-c", "job"],
    ):
        outcome = spinal("audit", *arguments)
        assert (outcome.code, outcome.err) == (0, ""), arguments
        assert outcome.out


@pytest.mark.parametrize(
    "text", ["a,b", "it's", "a\\", "a\\'b", "${x}", "[1]", "x=1", "", " ", "a b", "\\\\", "é{}:(", "$$"]
)
def test_a_source_without_a_name_arrives_as_it_was_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str
) -> None:
    from hydra import compose, initialize_config_dir

    from spinal_jax.cli.help import conf_folder

    cli._store(COMMANDS["audit"])
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        words = hydras_arguments(COMMANDS["audit"], [f"model.name={quoted(text)}"])
        assert compose("audit", words).model.name == text
        if "=" not in text and text.strip():
            assert compose("audit", hydras_arguments(COMMANDS["audit"], [text])).model.source == text


def test_run_folders_given_to_compare_are_its_traces(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "trace.json").write_text("{}")
    run = str(tmp_path / "run")
    words = hydras_arguments(COMMANDS["compare"], [run, run])
    assert words == [f"model.trace='{run}'", f"reference.trace='{run}'"]
    assert hydras_arguments(COMMANDS["compare"], ["a", "b"]) == ["model.source='a'", "reference.source='b'"]


def test_help_into_a_pipe_that_closes(start: Start) -> None:
    read, write = os.pipe()
    process = start("audit", "--help", stdout=write)
    os.close(write)
    os.close(read)
    _, err = process.communicate()
    assert (process.returncode, err) == (0, "")


def test_standard_output_that_is_full_or_closed(start: Start) -> None:
    with open("/dev/full", "w") as full:
        process = start("audit", "--help", stdout=full)
        _, err = process.communicate()
    assert process.returncode == 2
    assert err.startswith("spinal: ")
    assert len(err.splitlines()) == 1
    process = start("--help", before="import os, sys; os.close(1); sys.stdout = None")
    assert process.communicate()[1] == ""
    assert process.returncode == 0


def test_a_locale_without_utf8(start: Start, tmp_path: Path) -> None:
    odd = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    process = start("audit", "mödél", env=odd, cwd=str(tmp_path), encoding="utf-8")
    _, err = process.communicate()
    assert process.returncode == 2
    assert "there is no 'mödél'" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("seconds", [0.0, 0.05, 0.2, 0.5])
def test_ctrl_c_in_the_first_second(start: Start, tmp_path: Path, seconds: float) -> None:
    """From when Python has begun with the program, whatever is being imported then."""
    process = start("audit", "random:0.3m", before="print('begun', flush=True)", cwd=str(tmp_path))
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    if not re.search(r'File "<string>", line [12]\b', err):  # up to the import of the program no handler can stand
        assert process.returncode == 130, err
        assert err.splitlines()[-1].startswith("spinal: interrupted; ")
        assert "Traceback" not in err


@pytest.mark.parametrize("error", ["UserError", "ValueError"])
def test_an_interrupt_that_a_library_makes_an_error_of_is_one(error: str) -> None:
    program = f"""
import signal
from spinal_jax.cli.guard import guarded
from spinal_jax.errors import UserError

def run():
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        raise {error}("a setting is wrong")

guarded(run)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        130,
        "spinal: interrupted; nothing is kept of a run that was not finished\n",
    )


def test_an_unforeseen_error_is_one_sentence_and_a_report_without_secrets(
    audit_that: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def job(asked: AuditConfig, folder: Path) -> int:
        raise ZeroDivisionError("with hf_abcdefghijklmnop and\npassword=hunter2")

    outcome = audit_that(job)
    assert outcome.code == 70
    assert len(outcome.err.splitlines()) == 1
    assert outcome.err.startswith("spinal: unforeseen error (ZeroDivisionError: ")
    (report,) = tmp_path.glob("spinal-error-*.txt")
    assert str(report) in outcome.err
    text = report.read_text()
    assert "ZeroDivisionError" in text
    assert "in job" in text
    for secret in ("hf_abcdefghijklmnop", "hunter2", os.path.expanduser("~/")):
        assert secret not in text
        assert secret not in outcome.err
    monkeypatch.setenv("SPINAL_DEBUG", "1")
    outcome = audit_that(job)
    assert (outcome.code, "Traceback" in outcome.err) == (70, True)


@pytest.mark.parametrize(
    "text", ["token=abc123", "HF_TOKEN: abc123", "https://user:abc123@host/x", "sk-abc123abc123", "api_key = abc123"]
)
def test_what_looks_like_a_secret_is_left_out(text: str) -> None:
    assert "abc123" not in without_secrets(f"x {text} y")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EMFILE, errno.ENOTDIR])
def test_a_fault_of_the_disk_is_one_sentence(audit_that: Callable[..., Outcome], tmp_path: Path, number: int) -> None:
    def job(asked: AuditConfig, folder: Path) -> int:
        try:
            raise OSError(number, os.strerror(number), str(tmp_path / "there"))
        except OSError as error:
            raise ValueError("as a library wraps it") from error

    audit_that(job).refusal(os.strerror(number), str(tmp_path / "there"))
    assert not (tmp_path / "run").exists()


def test_a_disk_that_tensorstore_finds_full_is_no_lack_of_memory(audit_that: Callable[..., Outcome]) -> None:
    def job(asked: AuditConfig, folder: Path) -> int:
        raise ValueError('RESOURCE_EXHAUSTED: Failed writing: "x": No space left on device')

    assert "out of memory" not in audit_that(job).refusal("No space left on device")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")])
def test_too_little_memory_is_one_sentence(audit_that: Callable[..., Outcome], error: Exception) -> None:
    def job(asked: AuditConfig, folder: Path) -> int:
        raise error

    audit_that(job).refusal("out of memory", "batch_tokens")


def test_a_panic_in_rust_is_one_sentence(audit_that: Callable[..., Outcome], tmp_path: Path) -> None:
    panic = type("PanicException", (BaseException,), {})  # as PyO3 makes it

    def job(asked: AuditConfig, folder: Path) -> int:
        raise panic("Onig: Regex search error: retry-limit-in-match over")

    audit_that(job).refusal("retry-limit-in-match", "tokenizer.json")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("JAX_NUMPY_RANK_PROMOTION", "raise", "shapes (2,) (3, 1) with the option jax_numpy_rank_promotion='raise'"),
        ("JAX_ENABLE_X64", "maybe", "invalid truth value 'maybe' for environment 'JAX_ENABLE_X64'"),
    ],
)
def test_a_variable_of_jax_is_named(
    audit_that: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, name: str, value: str, text: str
) -> None:
    monkeypatch.setenv(name, value)

    def job(asked: AuditConfig, folder: Path) -> int:
        raise ValueError(text)

    audit_that(job).refusal(f"{name}={value} does not suit", "unset it")


def test_devices_that_are_not_there(start: Start, tmp_path: Path) -> None:
    asked = ("audit", "random:0.3m", "prompts=world", f"hydra.run.dir={tmp_path / 'run'}")
    process = start(*asked, env={"JAX_PLATFORMS": "foo"})
    said = process.communicate()[1]
    assert (process.returncode, said.count("\n")) == (2, 1), said
    assert "JAX_PLATFORMS=foo does not suit" in said


def test_names_do_not_command_the_terminal(audit_that: Callable[..., Outcome]) -> None:
    def job(asked: AuditConfig, folder: Path) -> int:
        print("a\x1b[2J\tb\n")
        raise UserError("c\x1b]0;d\x07 \x9b2J")

    outcome = audit_that(job)
    assert outcome.out == "a\\x1b[2J\tb\n\n"
    assert outcome.refusal().endswith("c\\x1b]0;d\\x07 \\x9b2J")


def test_files_that_may_not_grow(start: Start, model: Path, prompts: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: what is written of a run vanishes with it."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))"
    process = start(
        *("audit", model, f"prompts.path={prompts}", "prompts.format=text", "metrics.groups=4", "hydra.run.dir=run"),
        before=limit,
        cwd=str(tmp_path),
        env={"JAX_ENABLE_COMPILATION_CACHE": "false"},
    )
    _, err = process.communicate()
    assert process.returncode == 2, err
    assert err.splitlines()[-1].startswith("spinal: ")
    assert "File too large" in err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["convert", "export", "collect", "report"])
def test_no_command_leaves_half_a_file(spinal: Spinal, model: Path, tmp_path: Path, command: str) -> None:
    run = tmp_path / "runs" / "one"
    save_trace(_make_trace(), run)
    manifest = {"schema": "spinal-manifest/1", "command": "audit", "config": {}, "files": []}
    (run / "manifest.json").write_text(json.dumps(manifest))
    before = {path for path in run.rglob("*") if path.is_file()}
    given = {"report": (run,), "collect": (tmp_path / "runs", "out=out")}.get(command, (model, "out=out"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        outcome = spinal(command, *given)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    outcome.refusal("File too large")
    assert {path for path in run.rglob("*") if path.is_file()} == before
    written = [path for path in tmp_path.glob("out/**/*") if path.is_file()]
    assert not written
    for path in ("/proc/nowhere", "/dev/null/nowhere"):
        if command != "report":
            assert path in spinal(command, *given[:1], f"out={path}").refusal()


def test_two_runs_in_one_folder_and_what_a_killed_one_left(
    spinal: Spinal, model: Path, prompts: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    (run / ".writing-1").mkdir(parents=True)
    (run / ".writing-1" / "trace.json").write_text("half")
    (run / "traces").mkdir()
    for half in (".trace.json.77.tmp", "traces/.trace.csv.77.tmp"):
        (run / half).write_text("half")
    (run / "mine").mkdir()
    others = [run / "mine" / ".trace.json.77.tmp", run / ".notes.77.tmp"]
    for path in others:
        path.write_text("of somebody else")
    asked = (
        "audit",
        model,
        f"prompts.path={prompts}",
        "prompts.format=text",
        "metrics.groups=4",
        f"hydra.run.dir={run}",
    )
    descriptor = os.open(run, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    for checkpoint_every in ((), ("checkpoint_every=2",)):
        spinal(*asked, *checkpoint_every).refusal(str(run), "in use by another run")
    os.close(descriptor)
    assert spinal(*asked).code == 0
    assert {*run.rglob(".*")} == {*others}
    assert (run / "manifest.json").exists()


@pytest.mark.parametrize(
    "content", ["", "{", "{}", "[]", "3", "null", "[" * 200_000, '{"records": 3}', '{"records": [{}]}']
)
def test_saved_files_that_were_edited(spinal: Spinal, tmp_path: Path, content: str) -> None:
    run = tmp_path / "runs" / "one"
    save_trace(_make_trace(), run)
    for name in ("trace.json", "onset.json"):
        before = (run / name).read_bytes() if (run / name).exists() else None
        (run / name).write_text(content)
        spinal("report", run).refusal(str(run))
        (run / name).unlink()
        if before is not None:
            (run / name).write_bytes(before)
    (run / "manifest.json").write_text(content)
    spinal("collect", tmp_path / "runs").refusal()
    manifest = {"schema": "spinal-manifest/1", "command": "train", "config": {}}
    (run / "manifest.json").write_text(json.dumps(manifest))
    (run / "onset.json").write_text(content)
    spinal("collect", tmp_path / "runs").refusal(str(run))


def test_python_starts_the_command_line_without_jax() -> None:
    code = (
        "import sys, spinal_jax, spinal_jax.cli.main; print([m for m in ('jax', 'numpy', 'hydra') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_held_refuses_nobody_where_folders_have_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from spinal_jax.runs.folder import held

    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "no locks")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    (tmp_path / ".writing-1").mkdir()
    with held(tmp_path):
        assert (tmp_path / ".writing-1").exists()
    monkeypatch.undo()
    with held(tmp_path), pytest.raises(UserError, match="in use by another run"), held(tmp_path):
        pass
    assert not (tmp_path / ".writing-1").exists()


def test_the_package_audit_is_the_function_too() -> None:
    import spinal_jax
    import spinal_jax.audit.trace

    assert spinal_jax.audit.trace.DepthTrace is spinal_jax.DepthTrace
    with pytest.raises(UserError, match="there is no 'nowhere'"):
        spinal_jax.audit("nowhere")
    with pytest.raises(UserError, match="settings has overwrite, which belongs to the command"):
        spinal_jax.audit("nowhere", settings={"overwrite": True})
    with pytest.raises(UserError, match=r"settings has model\.dtype='float32', but 'bfloat16' is given too"):
        spinal_jax.audit("nowhere", dtype="bfloat16", settings={"model": {"dtype": "float32"}})
    with pytest.raises(UserError, match=r"metrics\.groups"):
        spinal_jax.audit("nowhere", settings={"metrics": {"groups": 0}})


def test_a_command_that_there_is_not_is_answered_by_the_nearest(spinal: Spinal) -> None:
    assert list(COMMANDS)[:3] == ["audit", "compare", "attribute"]
    spinal("audti").refusal("there is no command 'audti'; did you mean audit?")
    spinal("zzz").refusal("there is no command 'zzz'; there are audit, compare, ")


def test_what_audit_and_compare_refuse_as_a_model(model: Path) -> None:
    import spinal_jax

    decoder, _ = spinal_jax.load_model(model)
    with pytest.raises(UserError, match="prompts holds 2; it takes a list of texts"):
        spinal_jax.audit(model, ["one", 2])  # type: ignore[list-item]
    with pytest.raises(UserError, match="model is a dict; it takes a hub id"):
        spinal_jax.audit({})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="aligned is a Decoder; it takes a DepthTrace"):
        spinal_jax.compare(decoder, model)  # type: ignore[arg-type]


def test_a_model_in_memory_has_the_trace_of_its_checkpoint(model: Path, prompts: Path) -> None:
    import spinal_jax

    decoder, tokenizer = spinal_jax.load_model(model)
    asked: dict[str, Any] = {"format": "text", "offset": 1, "variants": {"skip": (0,)}, "progress": False}
    found = spinal_jax.audit(decoder, prompts, tokenizer=tokenizer, name="mine", **asked)
    wanted = spinal_jax.audit(model, prompts, **asked)
    assert found.model["name"] == "mine"
    assert found.model["sha256"] != wanted.model["sha256"]
    for name, values in wanted.columns.items():
        np.testing.assert_array_equal(found[name], values)
    assert found.arrays.keys() == wanted.arrays.keys()
    assert any("skip" in name for name in found.arrays)
    assert spinal_jax.compare(found, wanted).verdict == "no detectable change"
    for message, arguments in {
        "needs its tokenizer": {},
        "has no revision": {"tokenizer": tokenizer, "revision": "main"},
        "is float32; convert it": {"tokenizer": tokenizer, "dtype": "bfloat16"},
        "leave settings parallel out": {"tokenizer": tokenizer, "settings": {"parallel": {"data": 2}}},
    }.items():
        with pytest.raises(UserError, match=message):
            spinal_jax.audit(decoder, prompts, **asked, **arguments)
    with pytest.raises(UserError, match="has a tokenizer of its own"):
        spinal_jax.audit(model, prompts, tokenizer=tokenizer)


def test_a_line_a_minute_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with console.stages({})("audit", 8, "step") as advance:
        for _ in range(8):
            now[0] += 25
            advance(1)
    assert capsys.readouterr().err.splitlines() == [
        "audit 38 % (3 of 8 steps), about 2 min left",
        "audit 75 % (6 of 8 steps), about 50 s left",
    ]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_names_commands_settings_and_files(spinal: Spinal, shell: str) -> None:
    text = spinal("completion", shell).out
    for word in (*COMMANDS, "model.dtype=bfloat16", "prompts.limit=", "prompts=hh", "objective.loss=cdpo"):
        assert word in text, word
    spinal("completion", "csh").refusal("'csh'", "bash, zsh, fish")


@pytest.mark.parametrize(
    ("typed", "completed"),
    [("spinal tr", ["train"]), ("spinal audit model.dt", ["model.dtype=float32", "model.dtype=bfloat16"])],
)
def test_bash_completes(spinal: Spinal, tmp_path: Path, typed: str, completed: list[str]) -> None:
    script = tmp_path / "completion.sh"
    script.write_text(spinal("completion", "bash").out)
    count = len(typed.split()) - 1
    line = f'source {script}; COMP_LINE="{typed}" COMP_POINT={len(typed)} COMP_WORDS=({typed}) COMP_CWORD={count}'
    found = subprocess.run(
        ["bash", "-c", f'{line}; _spinal; printf "%s\\n" "${{COMPREPLY[@]}}"'], capture_output=True, text=True
    )
    assert found.stdout.split() == completed
