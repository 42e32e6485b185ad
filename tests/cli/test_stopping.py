"""Ctrl-C and SIGTERM in the middle of an audit: the folder and the terminal are left as they were."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import termios
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

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


# Each sends a signal while Python runs a callback whose exceptions it prints and drops.
CALLBACKS = {
    "the finalizer of an object": """
class Object:
    def __del__(self):
        signal.raise_signal(number)

Object()
""",
    "the callback of a weak reference": """
class Object: ...

target = Object()
reference = weakref.ref(target, lambda _: signal.raise_signal(number))
del target
""",
    "a hook of the garbage collector": """
def hook(phase, info):
    gc.callbacks.remove(hook)
    signal.raise_signal(number)

gc.callbacks.append(hook)
gc.collect()
""",
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("callback", CALLBACKS)
def test_a_signal_in_a_callback_that_drops_exceptions_comes_again(callback: str, number: signal.Signals) -> None:
    program = f"""
import gc, os, signal, sys, time, weakref
from spinal_jax.cli.guard import guarded
from spinal_jax.interrupts import Interruption

class Told(Interruption):  # as the end of another process of a run
    number = signal.SIGUSR1

def told(number, frame):
    raise Told

def run():
    number = {number:d}
    signal.signal(signal.SIGUSR1, told)
    try:
{textwrap.indent(CALLBACKS[callback], " " * 8)}
        time.sleep(60)
    except Told:
        return 3
    finally:
        if number != signal.SIGUSR1:
            signal.raise_signal(signal.SIGTERM)  # does not interrupt the clean-up
            print("cleared up")

guarded(run)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    if number == signal.SIGUSR1:
        assert (done.returncode, done.stdout, done.stderr) == (3, "", "")
    else:
        said = "interrupted" if number == signal.SIGINT else "terminated"
        assert (done.returncode, done.stdout) == (128 + number, "cleared up\n"), done
        assert done.stderr == f"spinal: {said}; nothing is kept of a run that was not finished\n"


def test_other_errors_in_callbacks_are_printed() -> None:
    program = """
from spinal_jax.cli.guard import guarded

class Object:
    def __del__(self):
        raise ValueError("seen")

def run():
    Object()
    return 0

guarded(run)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr.splitlines()[-1] == "ValueError: seen"


def test_a_signal_during_an_import_waits_for_its_end(tmp_path: Path) -> None:
    """An exception there can crash an extension module. A program that is itself imported is no such import."""
    (tmp_path / "inner.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\nprint('inner')\n")
    (tmp_path / "program.py").write_text("""
import time
from spinal_jax.cli.guard import guarded

def run():
    import inner
    for _ in range(6000):
        time.sleep(0.01)

guarded(run)
""")
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.path.append(sys.argv[1]); import program", tmp_path],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (130, "inner\n")
    assert done.stderr == "spinal: interrupted; nothing is kept of a run that was not finished\n"


def test_an_interrupt_that_a_library_drops_ends_the_next_stage() -> None:
    program = """
import contextlib, signal
from spinal_jax.cli.console import stages
from spinal_jax.cli.guard import guarded

def run():
    with stages({})("audit", 2, "batch") as advance:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        print("one")
        advance(1)
        print("two")

guarded(run)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "one\n")
    assert done.stderr == "spinal: interrupted; nothing is kept of a run that was not finished\n"
