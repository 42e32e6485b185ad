"""What this project does on one GPU, against the ceilings of that GPU and against plain PyTorch.

    python -m benchmarks.accelerator [--out RESULT.md] [--sections NAME ...] [--size full|toy]

Needs JAX and PyTorch with a GPU of 80 GB and no network. Weights are random and are made on the device; prompts are 512
sequences of 60 to 128 random tokens. Every section is a process of its own and prints its Markdown tables as soon as it
has them; with --out they are also appended to a file. One section at a time has the device. Its programs are compiled
at once, on as many cores as there are, before anything is timed. `--size toy` runs the same code on a CPU in small
shapes. Exit code 1 where a section failed or a number is out of its bounds.

"Ceiling" is what the fastest of several products of matrices reaches in the same run. The audit is measured after its
programs have been compiled, which is stated beside it. Both PyTorch pipelines keep all hidden states; the one takes
singular values of the states in float32, the other eigenvalues of Gram matrices in float64; neither has intervals.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.accelerator import flows, plain
from benchmarks.accelerator.attention import attention
from benchmarks.accelerator.ceilings import ceilings
from benchmarks.accelerator.common import SHAPES, decoder_config
from benchmarks.accelerator.correctness import correctness

SECTIONS = ("correctness", "ceilings", "attention", "audit 1B", "audit 8B", "torch 1B", "torch 8B", "dpo", "torch dpo")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file that the tables are appended to")
    parser.add_argument("--sections", nargs="*", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--size", choices=("full", "toy"), default="full")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.section:
        load(args.section)
        if not sys.stdin.readline():  # whoever started this is gone
            sys.exit(1)
        sys.exit(0 if run(args.section, args.size == "toy") else 1)
    began, failed = time.perf_counter(), []
    write(args.out, f"# Accelerator benchmark\n\n`python {' '.join(['-m benchmarks.accelerator', *sys.argv[1:]])}`\n")
    processes = {args.sections[0]: started(args.sections[0], args.size)}
    for section, after in zip(args.sections, [*args.sections[1:], None], strict=True):
        begin = time.perf_counter()
        if after:
            processes[after] = started(after, args.size)
        said, errors = processes[section].communicate("go\n")
        write(args.out, said)
        if code := processes[section].returncode:
            failed.append(section)
            write(args.out, f"**{section} failed** (exit code {code})\n\n```\n{errors[-3000:]}\n```\n")
        write(args.out, f"_{section}: {time.perf_counter() - begin:.0f} s_\n")
    write(args.out, f"_{time.perf_counter() - began:.0f} s in all{'; failed: ' + ', '.join(failed) if failed else ''}_")
    sys.exit(1 if failed else 0)


def started(section: str, size: str) -> subprocess.Popen[str]:
    """The process of a section. It loads its libraries while the section before it has the device, and then waits for a
    line."""
    command = [sys.executable, "-m", "benchmarks.accelerator", "--section", section, "--size", size]
    # One GPU: where there are more, a model that is given no mesh takes XLA's attention.
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", "CUDA_VISIBLE_DEVICES": "0", **os.environ}
    if section == "correctness":  # not timed; without measuring kernels its many programs compile sooner
        environment["XLA_FLAGS"] = environment.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)


def load(section: str) -> None:
    """Imports what a section needs, and takes no device."""
    if section.startswith("torch"):
        plain.load()
    else:
        importlib.import_module("spinal_jax.audit.measure")
        importlib.import_module("spinal_jax.objectives.step")
        decoder_config(SHAPES["toy"])


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
        "correctness": correctness,
        "ceilings": partial(ceilings, toy),
        "attention": partial(attention, toy),
        f"audit {name}": partial(flows.audit, name, shape, toy),
        f"torch {name}": partial(plain.torch_audit, name, shape, toy),
        "dpo": partial(flows.dpo, toy),
        "torch dpo": partial(plain.torch_dpo, toy),
    }
    return functions[section]()


if __name__ == "__main__":
    main()
