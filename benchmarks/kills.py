"""Kills a command at random moments, runs it again each time, and compares what it ends in with an undisturbed run.

    python benchmarks/kills.py --compare metrics.jsonl --compare 'model/*.safetensors' -- train experiment=world_base
    python benchmarks/kills.py --signal TERM --compare trace.json -- audit model.source=FOLDER checkpoint_every=4
    python benchmarks/kills.py --sweep --compare '*/metrics.jsonl' --compare '*/onset.json' -- train \\
        experiment=scaling_small model.name=0.3m seed=0 steps=12
    python benchmarks/kills.py --processes 2 --others 1 4 --kills 10 --compare trace.json -- audit \\
        model.source=random:0.3m prompts=world prompts.limit=400 batch_tokens=128 checkpoint_every=4 metrics.groups=4

With `--processes` the command is shared by so many over loopback, of which one at random is killed; the others must end
by themselves, not with 0. With `--others` it is started again each time by that many or, at random, by one of these
numbers; files of a run that others had a part in are compared by their numbers, to 1e-5. After each kill every JSON and
safetensors file of the folder must open.

A run that gets to its end before its moment comes is compared, and the next one begins in a new folder, until as many
kills as asked for are done and the last run is whole.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

LARGE = 1 << 24  # bytes from which a file is kept as its hash


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--signal", choices=["KILL", "TERM"], default="KILL")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compare", action="append", required=True, help="files of the run folder, as a pattern")
    parser.add_argument("--sweep", action="store_true", help="the command is a sweep, which is whole when it ends")
    parser.add_argument("--processes", type=int, default=1, help="that share the command")
    parser.add_argument("--others", type=int, nargs="*", default=[], help="numbers of processes that may go on with it")
    parser.add_argument("command", nargs="+", help="what `spinal` is given, without the folder it writes into")
    args = parser.parse_args()
    where = "hydra.sweep.dir" if args.sweep else "hydra.run.dir"
    rng, number = random.Random(args.seed), signal.Signals[f"SIG{args.signal}"]
    counts = sorted({args.processes, *args.others})
    with tempfile.TemporaryDirectory() as scratch:
        undisturbed = Path(scratch) / "undisturbed"
        begin = time.perf_counter()
        if any(codes_of(start([*args.command, f"{where}={undisturbed}"], args.processes))):
            sys.exit("the undisturbed run did not end with exit code 0")
        length = time.perf_counter() - begin
        wanted = files(undisturbed, args.compare)
        print(f"undisturbed: {length:.1f} s, {len(wanted)} files to compare", flush=True)
        done = runs = 0
        codes: set[int] = set()
        while done < args.kills:
            runs += 1
            folder, whole, used = Path(scratch) / f"killed-{runs}", False, {args.processes}
            while not whole:
                count = args.processes if not folder.exists() else rng.choice(counts)
                used.add(count)
                processes = start([*args.command, f"{where}={folder}"], count)
                victim = rng.choice(processes)
                moment = rng.uniform(0, length) if done < args.kills else None
                try:
                    victim.wait(moment)
                    ended, whole = codes_of(processes), True
                except subprocess.TimeoutExpired:
                    victim.send_signal(number)
                    struck = time.perf_counter()
                    ended = codes_of(processes)
                    # It was past stopping, or had written everything and was about to end.
                    whole = not any(ended) or (folder / "manifest.json").exists()
                    if not whole:
                        codes |= set(ended)
                        done += 1
                        after = f", all ended {time.perf_counter() - struck:.1f} s later" if count > 1 else ""
                        print(f"kill {done} of {count} after {moment:.1f} s, exit codes {ended}{after}", flush=True)
                        if half := half_written(folder):
                            sys.exit(f"a kill left half-written files: {', '.join(half)}")
                        if 0 in ended:
                            sys.exit(f"a process of a run that was killed ended with exit code 0: {ended}")
                if whole and not set(ended) <= {0, 1, -number, 128 + number, -signal.SIGABRT}:
                    sys.exit(f"the run that went on ended with exit codes {ended}")
            check(files(folder, args.compare), wanted, used == {args.processes}, runs)
            print(f"run {runs} ended in the same {len(wanted)} files, by {sorted(used)} processes", flush=True)
    print(f"{done} kills by SIG{args.signal}, exit codes {sorted(codes)}: each of {runs} runs ended in the same files")


def check(found: dict[str, bytes], wanted: dict[str, bytes], exact: bool, run: int) -> None:
    """Ends where a run has other files than the undisturbed one, or where `exact` is false other numbers in them."""
    same = bytes.__eq__ if exact else close
    differing = sorted(name for name in wanted.keys() | found if not same(wanted.get(name, b""), found.get(name, b"")))
    if differing:
        sys.exit(f"run {run} ended in other files: {', '.join(differing)}")


def close(one: bytes, other: bytes) -> bool:
    """Whether two traces have equal columns to 1e-5."""
    if not one or not other:
        return False
    ours, theirs = (json.loads(each)["columns"] for each in (one, other))
    return ours.keys() == theirs.keys() and all(
        np.allclose(np.array(ours[name], float), np.array(theirs[name], float), 1e-5, 1e-5, equal_nan=True)
        for name in ours
    )


def half_written(folder: Path) -> list[str]:
    """Files that do not open. Hidden ones and Orbax checkpoints, which appear by a rename when whole, are left out."""
    found = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if not path.is_file() or {"checkpoints", "progress"} & {*parts} or any(part[0] == "." for part in parts):
            continue
        try:
            if path.suffix == ".json":
                json.loads(path.read_bytes())
            elif path.suffix == ".jsonl":
                list(map(json.loads, path.read_bytes().splitlines()))
            elif path.suffix == ".safetensors":
                load_file(path)
        except (ValueError, SafetensorError):
            found.append(str(path.relative_to(folder)))
    return found


def codes_of(processes: list[subprocess.Popen[bytes]]) -> list[int]:
    """Their exit codes, once all have ended."""
    return [process.wait() for process in processes]


def start(command: list[str], count: int) -> list[subprocess.Popen[bytes]]:
    """The command in processes of their own."""
    code = "from spinal_jax.cli.main import main; main()"
    shared: list[list[str]] = [[]]
    if count > 1:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        place = f"parallel.coordinator=127.0.0.1:{port}", f"parallel.processes={count}"
        shared = [[*place, f"parallel.process={number}"] for number in range(count)]
    return [
        subprocess.Popen(
            [sys.executable, "-c", code, *command, *own],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for own in shared
    ]


def files(folder: Path, patterns: list[str]) -> dict[str, bytes]:
    """The content of each file that a pattern names: of large ones their hash."""
    found = sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
    if not found:
        sys.exit(f"{folder} has none of {', '.join(patterns)}")
    content = {str(file.relative_to(folder)): file.read_bytes() for file in found}
    return {
        name: held if len(held) < LARGE else hashlib.sha256(held).hexdigest().encode() for name, held in content.items()
    }


if __name__ == "__main__":
    main()
