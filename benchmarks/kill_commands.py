"""Kills commands, runs each again, and compares what it ends in with an undisturbed run.

    python benchmarks/kill_commands.py      # five kills of each of eight commands, on tiny models of random weights
    python benchmarks/kill_commands.py --only audit --only train --kills 4

Of the eight, two kills of five are inside the writing: before the n-th time that the command opens, renames or removes
something at the place where it writes. The others come at random moments. After each kill what is there is opened as
its user would: half-written, it must be refused or said to be incomplete. The command is then run again until it ends,
must end in the files of the undisturbed run, and leave nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from spinal_jax.errors import UserError

# Before the command, in its process: counts what is done to files at KILL_IN, and ends the process at the KILL_AT-th.
HOOK = """
import atexit, os, signal, sys
done, place, last = 0, os.environ["KILL_IN"], int(os.environ["KILL_AT"])
def count(event, arguments):
    global done
    if event == "open":
        writes = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    else:
        writes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "shutil.move")
    if writes and any(isinstance(path, (str, os.PathLike)) and place in os.fspath(path) for path in arguments[:2]):
        done += 1
        if done == last:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(count)
if not last:
    atexit.register(lambda: os.write(2, b"changes of files: %d" % done))
"""
RUN = "from spinal_jax.cli.main import main; main()"
TIMED = ("manifest.json", "checkpoints/", "events.out.tfevents")  # hold times and seconds
SMALL = ("prompts=world", "prompts.limit=40", "metrics.groups=4", "batch_tokens=512")
TRAIN = (
    *("experiment=world_base", "save_every=2", "trace_every=3", "batch_size=8", "optimizer.warmup_steps=0"),
    *("prompts.limit=40", "metrics.groups=4"),
)


@dataclass(frozen=True)
class Kind:
    """A command that is killed.

    Attributes:
        command: what `spinal` is given; {out} stands for where it writes.
        open: opens what lies at a place as a user would; an exception is a refusal.
    """

    command: tuple[str, ...]
    open: Callable[[Path], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=5, help="of each command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", help="one of the eight; may be given again")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        known = kinds(Path(scratch), args.only)
        inside = at_random = 0
        for name, kind in known.items():
            counts = of_kind(name, kind, args.kills, random.Random(f"{args.seed}-{name}"), Path(scratch) / name)
            inside, at_random = inside + counts[0], at_random + counts[1]
        print(
            f"{inside + at_random} kills of {', '.join(known)}, {inside} of them inside the writing: all as they must"
        )


def kinds(scratch: Path, only: list[str] | None) -> dict[str, Kind]:
    """The eight commands by name, on tiny models and on runs of them that are made here."""
    from spinal_jax.comparison.attribution import load_attribution
    from spinal_jax.comparison.record import load_comparison
    from spinal_jax.models.formats.open import open_checkpoint
    from spinal_jax.runs.find import find_runs

    runs, trained, wanted = scratch / "runs", scratch / "trained", only or ALL
    if {"attribute", "collect"} & {*wanted}:
        for seed in range(5):
            finish("audit", f"random:0.3m@{seed}", *SMALL, f"hydra.run.dir={runs / str(seed)}")
    if {"convert", "export", "watch"} & {*wanted}:
        for seed in range(2):
            base = scratch / f"base-{seed}"
            finish("train", *TRAIN, "steps=1", f"model.source=random:0.3m@{seed}", f"hydra.run.dir={base}")
            finish("export", str(base / "model"), f"out={trained / f'checkpoint-{seed}'}")

    def checkpoint(place: Path) -> object:
        with contextlib.closing(open_checkpoint(str(place))) as opened:
            return [opened.tensor(name) for name in opened.names()]

    def run(place: Path) -> object:
        return [complete(found.complete) for found in find_runs([place])]

    where = "hydra.run.dir={out}"
    pair = ("model.source=random:0.3m@1", "reference.source=random:0.3m@0")
    arms = (f"aligned=[{runs / '1'},{runs / '2'}]", f"control=[{runs / '3'},{runs / '4'}]", f"base={runs / '0'}")
    found = {
        "convert": Kind(("convert", str(trained / "checkpoint-0"), "out={out}"), checkpoint),
        "export": Kind(("export", str(trained / "checkpoint-0"), "out={out}"), checkpoint),
        "audit": Kind(("audit", "random:0.3m", *SMALL, "checkpoint_every=2", where), run),
        "compare": Kind(("compare", *pair, *SMALL, where), lambda place: (run(place), load_comparison(place))),
        "train": Kind(("train", *TRAIN, "steps=6", where), run),
        "watch": Kind(("watch", str(trained), "once=true", *SMALL[:3], where), lambda place: complete(False)),
        "attribute": Kind(("attribute", *arms, where), lambda place: (whole(place), load_attribution(place))),
        "collect": Kind(("collect", str(runs), "out={out}"), lambda place: complete(False)),
    }
    return {name: kind for name, kind in found.items() if name in wanted}


ALL = ("convert", "export", "audit", "compare", "train", "watch", "attribute", "collect")


def complete(said: bool) -> None:
    """RuntimeError unless a run is said to be complete."""
    if not said:
        raise RuntimeError("incomplete")


def whole(folder: Path) -> None:
    """RuntimeError unless a run folder has its manifest."""
    complete((folder / "manifest.json").exists())


def of_kind(name: str, kind: Kind, kills: int, rng: random.Random, scratch: Path) -> tuple[int, int]:
    """Kills a command so many times, and returns how many kills were inside its writing and at random moments."""
    out = scratch / "undisturbed" / "out"
    out.parent.mkdir(parents=True)
    begin = time.perf_counter()
    process = begun(kind, out, 0)
    _, said = process.communicate()
    length = time.perf_counter() - begin
    if process.returncode != 0:
        sys.exit(f"{name}: the undisturbed run ended with exit code {process.returncode}: {said}")
    changes = int(re.findall(r"changes of files: (\d+)", said)[-1])
    wanted = contents(out)
    print(f"{name}: {length:.1f} s, {changes} changes of files, {len(wanted)} files to compare", flush=True)
    inside = at_random = 0
    while inside + at_random < kills:
        writes = inside < round(0.4 * kills)
        at = rng.randint(1, changes) if writes else 0
        place = scratch / f"killed-{inside + at_random}" / "out"
        shutil.rmtree(place.parent, ignore_errors=True)
        place.parent.mkdir()
        process = begun(kind, place, at or -1)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=None if writes else rng.uniform(0, length))
        process.kill()
        process.communicate()
        if process.returncode != -signal.SIGKILL:
            continue  # it had ended
        inside, at_random = inside + writes, at_random + (not writes)
        print(f"  kill {inside + at_random} {f'at change {at}' if writes else 'at random'}: ", end="", flush=True)
        refused = check_half(kind, place, wanted)
        process = begun(kind, place, -1)
        _, said = process.communicate()
        if process.returncode != 0 and "already holds a complete" not in said:
            sys.exit(f"run again it ended with exit code {process.returncode}: {said}")
        if differing := differences(wanted, contents(place)):
            sys.exit(f"run again it ended in other files: {', '.join(differing)}")
        if left := [path for path in place.parent.rglob("*") if is_left(path)]:
            sys.exit(f"left behind: {', '.join(map(str, left))}")
        print(f"{'nothing that opens' if refused else 'whole'}, and in the end the same", flush=True)
    return inside, at_random


def begun(kind: Kind, place: Path, kill_at: int) -> subprocess.Popen[str]:
    """The command, which writes to a place, in a process of its own."""
    words = [word.format(out=place) for word in kind.command]
    environment = {**os.environ, "KILL_IN": str(place), "KILL_AT": str(kill_at)}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", HOOK + RUN, *words], stdout=pipe, stderr=pipe, text=True, env=environment
    )


def finish(*words: str) -> None:
    """Runs a command to its end."""
    subprocess.run([sys.executable, "-c", RUN, *words], check=True, stdout=subprocess.DEVNULL)


def check_half(kind: Kind, place: Path, wanted: dict[str, str]) -> bool:
    """Whether what a kill left is refused where it is opened. Ends the program where it passes for whole and is not."""
    refused = True
    for there in (place, place.with_name(f"{place.name}.partial")):
        if there.exists():
            try:
                kind.open(there)
            except (UserError, RuntimeError):  # another exception is a find: a reader that breaks on a half
                continue
            refused = False
            if differing := differences(wanted, contents(there)):
                sys.exit(f"{there} passes for whole without {', '.join(differing)}")
    return refused


def contents(folder: Path) -> dict[str, str]:
    """Hash by path of the files that equal runs have equal."""
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    kept = {name: path for name, path in files.items() if not any(part in name for part in TIMED)}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in kept.items()}


def differences(wanted: dict[str, str], found: dict[str, str]) -> list[str]:
    return sorted(name for name in wanted.keys() | found if wanted.get(name) != found.get(name))


def is_left(path: Path) -> bool:
    """Whether a name is one of what is on its way."""
    hidden = path.name.startswith(".") and path.name != ".zarray"
    return hidden or path.name == "progress" or path.suffix in (".partial", ".replaced", ".tmp")


if __name__ == "__main__":
    main()
