"""Console output: messages, progress bars, exit codes."""

from __future__ import annotations

import contextlib
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from spinal_jax.interrupts import Interruption, outside_imports, send_again

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

    from spinal_jax.progress import Advance, Bar

DONE, FAILED, MISTAKE, SHORT, UNFORESEEN = 0, 1, 2, 3, 70  # exit codes; 70 is EX_SOFTWARE of sysexits.h
SEVERITY = (UNFORESEEN, FAILED, MISTAKE, SHORT, DONE)  # the worst first


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    number: int  # from 0
    code: int
    message: str = ""  # what went wrong
    passed_over: bool = False  # complete before


def worst(outcomes: Sequence[Outcome]) -> int:
    """The exit code of several runs: the most severe one, in the order 70, 1, 2, 3, 0."""
    return min((outcome.code for outcome in outcomes), key=SEVERITY.index, default=DONE)


class Stopped(KeyboardInterrupt, Interruption):
    """Ctrl-C or SIGTERM."""

    def __init__(self, number: int):
        super().__init__("interrupted" if number == signal.SIGINT else "terminated")
        self.number = number
        self.kept = "nothing is kept of a run that was not finished"


STOPS: list[Stopped] = []  # what `stop` has raised in this process: none or one


@outside_imports
def stop(number: int, frame: FrameType | None) -> None:
    """A signal handler that raises `Stopped` once; later signals do not interrupt the clean-up."""
    if not STOPS:
        STOPS.append(Stopped(number))
        raise STOPS[0]


def raise_again(ignored: UnraisableHookArgs) -> None:
    """A `sys.unraisablehook`. Python prints an exception in a finalizer or in a callback of a weak reference or of the
    garbage collector and goes on. The signal of an `Interruption` is sent again, to be handled after the callback."""
    error = ignored.exc_value
    if not isinstance(error, Interruption):
        sys.__unraisablehook__(ignored)
        return
    if isinstance(error, Stopped):
        STOPS.clear()
    send_again(error.number)


def check_stopped() -> None:
    """Raises the `Stopped` that a library has caught and dropped."""
    if STOPS:
        raise STOPS[0]


@contextlib.contextmanager
def stops_kept() -> Iterator[None]:
    """Raises `Stopped` in the place of an error if the process was interrupted: a library has made an error of it."""
    try:
        yield
    except Exception:
        check_stopped()
        raise


# Control characters except tab and line break, as escapes: names of models and files may hold commands to a terminal.
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(9), *range(11, 32), *range(127, 160))}


def escaped(text: str) -> str:
    """The text with its control characters as escapes."""
    return text.translate(_ESCAPES)


def say(line: str) -> None:
    """Prints a line on standard error."""
    print(escaped(line), file=sys.stderr, flush=True)


def complain(message: str) -> None:
    """Prints a message as one line on standard error."""
    say(f"spinal: {' '.join(message.split())}")


BAR = "{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt}, {rate_fmt}, {remaining} left"


MINUTE = 60.0  # seconds between lines if standard error is not a terminal


def stages(seconds: dict[str, float]) -> Bar:
    """Progress on standard error: bars on a terminal, else a line each minute. The time of each stage is added to
    `seconds`."""
    from tqdm import tqdm

    @contextlib.contextmanager
    def stage(what: str, total: int, unit: str) -> Iterator[Advance]:
        check_stopped()
        begin = time.perf_counter()
        lines = None if sys.stderr.isatty() else Lines(what, total, unit)
        with tqdm(
            total=total,
            desc=what,
            unit=unit,
            unit_scale=total > 10_000,
            bar_format=BAR,
            ncols=shutil.get_terminal_size().columns - 4,  # leaves room for ^C
            leave=False,
            disable=lines is not None,
        ) as bar:

            def advance(amount: int) -> None:
                check_stopped()
                bar.update(amount)
                if lines is not None:
                    lines.advance(amount)

            yield advance
        seconds[what] = round(seconds.get(what, 0.0) + time.perf_counter() - begin, 3)

    return stage


class Lines:
    """Progress as log lines, such as `audit 40 % (80 of 200 batches), 2 min left`, one each minute."""

    def __init__(self, what: str, total: int, unit: str):
        self._what, self._total, self._unit = what, total, unit
        self._done, self._begin = 0, time.monotonic()
        self._next = self._begin + MINUTE

    def advance(self, amount: int) -> None:
        """Adds completed work."""
        self._done += amount
        now = time.monotonic()
        if now < self._next or not self._done:
            return
        self._next = now + MINUTE
        left = (now - self._begin) * max(0, self._total - self._done) / self._done
        share = 100 * self._done / max(self._total, 1)
        units = {"B": "bytes", "boundary": "boundaries"}.get(self._unit, f"{self._unit}s")
        amounts = f"{self._done:,} of {self._total:,} {units}"
        print(f"{self._what} {share:.0f} % ({amounts}), about {duration(left)} left", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """A duration as text with a suitable unit."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def short_path(path: Path) -> str:
    """The path, relative to the current folder if it is inside."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
