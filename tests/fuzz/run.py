"""Fuzzes the readers of everything a user can give: `make fuzz N=5000`, or python -m tests.fuzz.run --help.

Input number n of a class is the same on every machine. A find is an error that is no UserError, a signal, more than
20 s of processor time or more than 2 GiB beyond what the process holds. Finds are printed with class and number;
`--class NAME --only n` runs one again.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SECONDS, BYTES = 20, 2 << 30
COMPILED = ("measured",)  # classes whose inputs are compiled for


class TooSlow(BaseException):
    """An input took more processor time than any honest one."""


@contextlib.contextmanager
def bounded(memory: bool = True) -> Iterator[None]:
    """Raises TooSlow after 20 s of this process's own time; with `memory` MemoryError beyond 2 GiB more than it has.

    XLA ends the process where it cannot start a thread, so memory is not bounded for what compiles.
    """

    def late(*_: object) -> None:
        raise TooSlow(f"more than {SECONDS} s")

    limit = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = signal.signal(signal.SIGPROF, late)
    if memory:
        resource.setrlimit(resource.RLIMIT_AS, (held + BYTES, limit[1]))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, limit)
        signal.signal(signal.SIGPROF, before)


def tried(target: Any, name: str, number: int, folder: Path) -> str | None:
    """What went wrong with an input; None where it was read or refused in one sentence."""
    from spinal_jax.errors import UserError

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        with bounded(memory=name not in COMPILED):
            target(folder, random.Random(f"{name}-{number}"))
    except UserError as error:
        return f"two lines: {error}" if "\n" in str(error) else None
    except SystemExit as error:
        return None if error.code in (0, 2, None) else f"exit code {error.code}"
    except (Exception, TooSlow):
        return traceback.format_exc()
    return None


def _work(wire: Any, names: list[str], first: int, count: int) -> None:
    """In a process of its own: inputs in turn over the classes; tells each before it is tried, and each find."""
    from tests.fuzz.targets import Sound, targets

    with tempfile.TemporaryDirectory() as scratch:
        known = targets(Sound(Path(scratch)))
        for number in range(first, first + count):
            name = names[number % len(names)]
            wire.send((name, number, "begun"))
            if (trouble := tried(known[name], name, number, Path(scratch) / "one")) is not None:
                wire.send((name, number, trouble))
        wire.send(("", 0, "done"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=200, help="how many inputs")
    parser.add_argument("--first", type=int, default=0, help="number of the first")
    parser.add_argument("--class", dest="name", action="append", help="only this class; may be given again")
    parser.add_argument("--only", type=int, help="one input alone, of the one class")
    args = parser.parse_args()
    from tests.fuzz.targets import Sound, targets

    names = args.name or list(targets(Sound(Path("."))))
    first, count = (args.first, args.n) if args.only is None else (args.only, 1)
    numbers = range(first, first + count)
    finds: list[tuple[str, int, str]] = []
    context = multiprocessing.get_context("spawn")
    while count > 0:
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, names, first, count))
        process.start()
        theirs.close()
        last = ("", first, "begun")
        with contextlib.suppress(EOFError):
            while (told := ours.recv())[2] != "done":
                if told[2] == "begun":
                    last = told
                else:
                    finds.append(told)
                    print(f"{told[0]} {told[1]}: {told[2]}", flush=True)
            last = told
        process.join()
        if last[2] == "done":
            break
        finds.append((last[0], last[1], f"the process ended with {process.exitcode}"))
        print(f"{last[0]} {last[1]}: the process ended with {process.exitcode}", flush=True)
        count -= last[1] + 1 - first
        first = last[1] + 1
    tried_of = Counter(names[number % len(names)] for number in numbers)
    print(", ".join(f"{name} {count}" for name, count in tried_of.items()))
    print(f"{sum(tried_of.values())} inputs of {len(names)} classes, {len(finds)} finds")
    sys.exit(bool(finds))


if __name__ == "__main__":
    main()
