"""Error handling around every command: signals, closed pipes, full disks, and unforeseen errors.

Heavy imports are delayed, so that Ctrl-C is handled from the start.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import TextIO

from spinal_jax.cli import console
from spinal_jax.cli.console import DONE, MISTAKE, UNFORESEEN, Stopped, complain
from spinal_jax.errors import UserError

FAULTS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.EFBIG),
    *(errno.EIO, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.ESTALE, errno.ENXIO, errno.ENODEV),
)
# Messages of libraries that do not report an errno.
FAULT_WORDS = ("No space left on device", "Disk quota exceeded", "Read-only file system", "Permission denied")
MEMORY = "out of memory: {}; a smaller batch_tokens or micro_tokens, a smaller model or more devices would need less"
PANIC = "a library written in Rust gave up on its input ({}); often a rule of tokenizer.json asks too much of it"


def guarded(run: Callable[[], int]) -> None:
    """Runs a command. Exceptions become one sentence and an exit code; raises SystemExit unless the code is 0."""
    _in_utf8()
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells of cache folders that cannot be made
    signals = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, console.stop) for number in signals}
    hook, sys.unraisablehook = sys.unraisablehook, console.raise_again
    console.STOPS.clear()
    code = DONE
    try:
        with _open_streams():
            try:
                code = run()
                sys.stdout.flush()
            except Stopped as stopped:
                _end(stopped)
            except Exception as error:
                try:
                    code, message = describe_error(error)
                except Stopped as stopped:
                    _end(stopped)
                else:
                    complain(message)
            except BaseException as error:
                if type(error).__name__ != "PanicException":  # a panic in Rust is no Exception
                    raise
                complain(PANIC.format(" ".join(str(error).split())[:300]))
                code = MISTAKE
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook
    if code:
        sys.exit(code)


def _end(stopped: Stopped) -> None:
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr)  # the ^C of the terminal
    complain(f"{stopped}; {stopped.kept}")
    sys.stdout.flush()
    os._exit(128 + stopped.number)  # JAX may crash at exit while work is in flight


def describe_error(error: Exception) -> tuple[int, str]:
    """The exit code and one sentence for an error. An unforeseen error writes a report file, or with SPINAL_DEBUG=1
    shows its traceback. Raises Stopped if the process was interrupted: a library has made an error of it."""
    console.check_stopped()
    _debug(error)
    if isinstance(error, UserError):
        return MISTAKE, str(error)
    text = " ".join(str(error).split())
    if (fault := _fault(error)) is not None:  # first: TensorStore calls a full disk RESOURCE_EXHAUSTED too
        return MISTAKE, fault
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
        return MISTAKE, MEMORY.format(text[:300] or "the host has no more")
    if name := _variable_of_jax(error, text):
        return MISTAKE, f"{name}={os.environ[name]} does not suit JAX or this command ({text[:200]}); unset it"
    from spinal_jax.cli.error_report import without_secrets, write_error_report

    what = without_secrets(f"{type(error).__name__}: {text[:300]}".rstrip(": "))
    if debugging():
        return UNFORESEEN, f"unforeseen error ({what})"
    try:
        where = f"a report for its authors is in {write_error_report(error)}"
    except OSError as trouble:
        where = f"no report of it could be written ({trouble})"
    return UNFORESEEN, f"unforeseen error ({what}); {where}; SPINAL_DEBUG=1 shows the traceback"


def _variable_of_jax(error: Exception, text: str) -> str | None:
    """The environment variable of JAX to which an error is due: one that its text names, or JAX_PLATFORMS if the
    devices cannot be started."""
    given = [name for name in os.environ if name.startswith("JAX_") and "TRACEBACK" not in name]
    frames = traceback.extract_tb(error.__traceback__)
    if "JAX_PLATFORMS" in given and any(frame.filename.endswith("jax/_src/xla_bridge.py") for frame in frames):
        return "JAX_PLATFORMS"
    return next((name for name in given if name in text or name.lower() in text), None)


def debugging() -> bool:
    """Whether SPINAL_DEBUG is set, and not to 0."""
    return os.environ.get("SPINAL_DEBUG", "0") not in ("", "0")


def _debug(error: Exception) -> None:
    if debugging():
        traceback.print_exception(error)


def _fault(error: BaseException | None) -> str | None:
    """A sentence if the error was caused by the disk or the system, else None."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        if isinstance(error, OSError) and error.errno in FAULTS:
            reason = os.strerror(error.errno)
            where = f"{os.fsdecode(error.filename)} cannot be used" if error.filename else "a file cannot be written"
            return f"{where}: {reason}; nothing that was complete is lost"
        text = " ".join(str(error).split())
        if isinstance(error, OSError) and "No usable temporary directory" in text:
            return f"{text.partition('] ')[2] or text}; set TMPDIR to a folder that can be written to"
        if words := next((words for words in FAULT_WORDS if words in text), None):
            return f"a file cannot be written: {words} ({text[:300]})"
        error = error.__cause__ or error.__context__
    return None


class _Open:
    """A text stream that ignores closed pipes; of `plain` streams control characters are escaped."""

    def __init__(self, stream: TextIO, plain: bool):
        self._stream, self._plain = stream, plain

    def write(self, text: str) -> int:
        with self._unbroken():
            self._stream.write(console.escaped(text) if self._plain else text)
        return len(text)

    def flush(self) -> None:
        with self._unbroken():
            self._stream.flush()

    @contextlib.contextmanager
    def _unbroken(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _open_streams() -> Iterator[None]:
    """Makes standard output and error robust against closed pipes and unencodable characters."""
    before = sys.stdout, sys.stderr
    for name, stream in zip(("stdout", "stderr"), before, strict=True):
        if stream is None:  # closed by the parent process
            continue
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, _Open(stream, plain=name == "stdout"))  # progress bars move the cursor of the other
    if sys.stdout is None or sys.stderr is None:
        nowhere = open(os.devnull, "w")  # noqa: SIM115 (it stays open until the process ends)
        sys.stdout, sys.stderr = sys.stdout or nowhere, sys.stderr or nowhere
    try:
        yield
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        sys.stdout, sys.stderr = before


def _in_utf8() -> None:
    """Restarts the process in Python's UTF-8 mode if the locale has another encoding, because file names, prompts and
    pages are UTF-8."""
    again = "SPINAL_UTF8"
    if sys.getfilesystemencoding().lower().replace("-", "") == "utf8" or again in os.environ:
        return
    os.environ |= {"PYTHONUTF8": "1", again: "1"}
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
