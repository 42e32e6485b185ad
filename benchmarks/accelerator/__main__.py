"""What this project does on one GPU, against the ceilings of that GPU and against plain PyTorch.

    python -m benchmarks.accelerator [--out RESULT.md] [--sections NAME ...] [--size full|toy]

Needs JAX and PyTorch with a GPU of 80 GB, no network and about seven minutes. Weights are random and are made on the
device; prompts are 512 sequences of 60 to 128 random tokens. Every section is a process of its own and prints its
Markdown tables as soon as it has them; with --out they are also appended to a file. `--size toy` runs the same code on
a CPU in small shapes. Exit code 1 where a section failed or a number is out of its bounds.

What the figures mean: "ceiling" is what the fastest of several products of matrices reaches in the
same run. The audit is
measured after its programs have been compiled, which is stated beside it. Both PyTorch pipelines keep all hidden
states; the one takes singular values of the states in float32, the other eigenvalues of Gram matrices in float64;
neither has intervals.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.accelerator import flows, plain, stages

SECTIONS = ("correctness", "ceilings", "attention", "audit 1B", "audit 8B", "torch 1B", "torch 8B", "dpo", "torch dpo")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file that the tables are appended to")
    parser.add_argument("--sections", nargs="*", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--size", choices=("full", "toy"), default="full")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.section:
        sys.exit(0 if run(args.section, args.size == "toy") else 1)
    began, failed = time.perf_counter(), []
    write(args.out, f"# Accelerator benchmark\n\n`python {' '.join(['-m benchmarks.accelerator', *sys.argv[1:]])}`\n")
    for section in args.sections:
        begin = time.perf_counter()
        command = [sys.executable, "-m", "benchmarks.accelerator", "--section", section, "--size", args.size]
        environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", **os.environ}
        if section == "correctness":  # not timed; without measuring kernels its many programs compile sooner
            environment["XLA_FLAGS"] = environment.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        said, errors = process.communicate()
        write(args.out, said)
        if process.returncode:
            failed.append(section)
            write(args.out, f"**{section} failed** (exit code {process.returncode})\n\n```\n{errors[-3000:]}\n```\n")
        write(args.out, f"_{section}: {time.perf_counter() - begin:.0f} s_\n")
    write(args.out, f"_{time.perf_counter() - began:.0f} s in all{'; failed: ' + ', '.join(failed) if failed else ''}_")
    sys.exit(1 if failed else 0)


def write(out: Path | None, text: str) -> None:
    """To the terminal and to the file, at once."""
    print(text, flush=True)
    if out is not None:
        with out.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())


def run(section: str, toy: bool) -> bool:
    """Runs a section; whether its numbers are within their bounds."""
    name = section.rpartition(" ")[2]
    shape = "toy" if toy else name
    functions: dict[str, Callable[[], bool]] = {
        "correctness": stages.correctness,
        "ceilings": partial(stages.ceilings, toy),
        "attention": partial(stages.attention, toy),
        f"audit {name}": partial(flows.audit, name, shape, toy),
        f"torch {name}": partial(plain.torch_audit, name, shape, toy),
        "dpo": partial(flows.dpo, toy),
        "torch dpo": partial(plain.torch_dpo, toy),
    }
    return functions[section]()


if __name__ == "__main__":
    main()
