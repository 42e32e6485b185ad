"""Kills a command at random moments, runs it again each time, and compares what it ends in with an undisturbed run.

    python benchmarks/kills.py --compare metrics.jsonl --compare 'model/*.safetensors' -- train experiment=world_base
    python benchmarks/kills.py --signal TERM --compare trace.json -- audit model.source=FOLDER checkpoint_every=4
    python benchmarks/kills.py --sweep --compare '*/metrics.jsonl' --compare '*/onset.json' -- train \\
        experiment=scaling_small model.name=0.3m seed=0 steps=12

A run that gets to its end before its moment comes is compared, and the next one begins in a new folder, until as many
kills as asked for are done and the last run is whole.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--signal", choices=["KILL", "TERM"], default="KILL")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compare", action="append", required=True, help="files of the run folder, as a pattern")
    parser.add_argument("--sweep", action="store_true", help="the command is a sweep, which is whole when it ends")
    parser.add_argument("command", nargs="+", help="what `spinal` is given, without the folder it writes into")
    args = parser.parse_args()
    where = "hydra.sweep.dir" if args.sweep else "hydra.run.dir"
    rng, number = random.Random(args.seed), signal.Signals[f"SIG{args.signal}"]
    with tempfile.TemporaryDirectory() as scratch:
        undisturbed = Path(scratch) / "undisturbed"
        begin = time.perf_counter()
        if (code := start([*args.command, f"{where}={undisturbed}"]).wait()) != 0:
            sys.exit(f"the undisturbed run ended with exit code {code}")
        length = time.perf_counter() - begin
        wanted = digests(undisturbed, args.compare)
        print(f"undisturbed: {length:.1f} s, {len(wanted)} files to compare", flush=True)
        done = runs = 0
        codes: set[int] = set()
        while done < args.kills:
            runs += 1
            folder, whole = Path(scratch) / f"killed-{runs}", False
            while not whole:
                process = start([*args.command, f"{where}={folder}"])
                moment = rng.uniform(0, length) if done < args.kills else None
                try:
                    code, whole = process.wait(moment), True
                except subprocess.TimeoutExpired:
                    process.send_signal(number)
                    code = process.wait()
                    # It was past stopping, or had written everything and was about to end.
                    whole = code == 0 or (folder / "manifest.json").exists()
                    if not whole:
                        codes.add(code)
                        done += 1
                        print(f"kill {done} after {moment:.1f} s, exit code {code}", flush=True)
                if whole and code not in (0, -number, 128 + number):
                    sys.exit(f"the run that went on ended with exit code {code}")
            found = digests(folder, args.compare)
            if found != wanted:
                differing = sorted(name for name in wanted.keys() | found if wanted.get(name) != found.get(name))
                sys.exit(f"run {runs} ended in other files: {', '.join(differing)}")
            print(f"run {runs} ended in the same {len(found)} files", flush=True)
    print(f"{done} kills by SIG{args.signal}, exit codes {sorted(codes)}: each of {runs} runs ended in the same files")


def start(command: list[str]) -> subprocess.Popen[bytes]:
    """The command in a process of its own."""
    code = "from spinal_jax.cli.main import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def digests(folder: Path, patterns: list[str]) -> dict[str, str]:
    """Hash of each file that a pattern names."""
    files = sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
    if not files:
        sys.exit(f"{folder} has none of {', '.join(patterns)}")
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


if __name__ == "__main__":
    main()
