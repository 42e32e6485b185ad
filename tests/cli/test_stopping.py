"""Ctrl-C and SIGTERM in the middle of an audit: the folder and the terminal are left as they were."""

from __future__ import annotations

import os
import signal
import subprocess
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from spinal_jax.cli import console

from .conftest import Start


@pytest.fixture
def long_audit(start: Start, model: Path, prompts: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts an audit of more batches than anybody waits for; ends it if the test has not."""
    pool = tmp_path / "long.txt"
    pool.write_text(prompts.read_text() * 100)
    settings = (f"model.source={model}", f"prompts.path={pool}", "prompts.format=text", "batch_tokens=64")
    processes = []

    def begin(**options: object) -> subprocess.Popen[str]:
        processes.append(start("audit", *settings, "hydra.run.dir=run", cwd=tmp_path, **options))
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


def on_screen(written: str) -> list[str]:
    """The lines that a terminal shows after this, for carriage returns and erased rests of lines."""
    lines = [""]
    column = 0
    for part in written.replace("\r\n", "\n").replace("\x1b[K", "\0"):
        if part == "\n":
            lines.append("")
            column = 0
        elif part == "\r":
            column = 0
        elif part == "\0":
            lines[-1] = lines[-1][:column]
        else:
            lines[-1] = lines[-1][:column] + part + lines[-1][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


def read_until(terminal: int, word: str | None) -> str:
    """What comes from a terminal until it has shown a word, or until nobody holds its other end."""
    written = b""
    while word is None or word.encode() not in written:
        try:
            written += os.read(terminal, 4096)
        except OSError:  # how Linux says that the other end is closed
            break
    return written.decode()


def test_ctrl_c_leaves_terminal_and_folder_clean(long_audit: Start, tmp_path: Path) -> None:
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    process = long_audit(stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    shown = read_until(ours, "token/s")
    assert "audit   0% |" in shown
    process.send_signal(signal.SIGINT)
    shown += "^C" + read_until(ours, None)  # the terminal echoes the keys where the bar ends
    os.close(ours)
    assert process.wait() == 130
    first, *rest = on_screen(shown)
    assert first.startswith("tiny: llama")
    assert rest == ["spinal: interrupted; nothing is kept of a run that was not finished", ""]
    assert not (tmp_path / "run").exists()


def test_sigterm_leaves_no_run(long_audit: Start, tmp_path: Path) -> None:
    process = long_audit()
    assert process.stderr is not None
    assert process.stderr.readline().startswith("tiny: llama")
    time.sleep(1)  # compiling, or some way into the batches
    process.terminate()
    out, err = process.communicate()
    assert process.returncode == 143
    assert (out, err) == ("", "spinal: terminated; nothing is kept of a run that was not finished\n")
    assert not (tmp_path / "run").exists()


def test_a_signal_that_garbage_collection_would_swallow_comes_again() -> None:
    """JAX hooks a function of this name into collections; what is raised in it is printed and lost."""
    before = {number: signal.signal(number, console.stop) for number in (signal.SIGINT, signal.SIGTERM)}

    def _xla_gc_callback() -> None:
        signal.raise_signal(signal.SIGINT)

    def work() -> None:
        _xla_gc_callback()
        time.sleep(10)

    try:
        with pytest.raises(console.Stopped) as stopped:
            work()
        assert stopped.value.number == signal.SIGINT
        assert "_xla_gc_callback" not in {entry.name for entry in stopped.traceback}
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN  # what is left to do is clearing up
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
