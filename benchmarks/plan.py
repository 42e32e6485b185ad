"""What `spinal plan device=cpu` says of memory against the peak of the same audit's process.

    python benchmarks/plan.py [MODEL.gguf] [--prompts 80] [--tokens 128]

Three models: one of 30M parameters over bytes, one of random weights in the shape of SmolLM2 at two thirds of its width
and depth, and the .gguf file that is named. Each is audited by `spinal audit` in a process of its own on prompts of
exactly as many tokens as the plan is told, and the peak of that process's resident memory is what counts: Python and
its libraries are in it. How much those take is measured first, by an audit of the smallest model on next to nothing,
and is what the plan has as PROCESS.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from spinal_jax.models.formats.byte_level import SIZES, byte_tokenizer
from spinal_jax.models.formats.export import export
from spinal_jax.models.formats.memory import random_checkpoint
from spinal_jax.models.formats.open import open_checkpoint

MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", nargs="?", default="downloads/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--prompts", type=int, default=80)
    parser.add_argument("--tokens", type=int, default=128)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        few = write_prompts(here / "few.jsonl", 64, 16)
        many = write_prompts(here / "many.jsonl", args.prompts, args.tokens)
        models = {
            "nothing": as_folder(here / "nothing", SIZES["0.3m"], byte_tokenizer()),
            "30M parameters over bytes": as_folder(here / "30m", SIZES["30m"], byte_tokenizer()),
            "SmolLM2 at two thirds": smaller(args.gguf, here / "smaller"),
            Path(args.gguf).name: args.gguf,
        }
        base = peak(audit(models.pop("nothing"), few, 16, here / "runs" / "nothing"))
        print(f"Python, libraries and what they compile: {base / MIB:.0f} MiB\n", flush=True)
        print("| model | planned MiB | measured MiB | planned / measured |\n|---|---|---|---|")
        for number, (name, source) in enumerate(models.items()):
            asked = f"prompt_count={args.prompts}", f"prompt_tokens={args.tokens}"
            planned = plan(source, here / "plans" / str(number), *asked)["memory"]["peak"]
            measured = peak(audit(source, many, args.tokens, here / "runs" / str(number)))
            print(f"| {name} | {planned / MIB:.0f} | {measured / MIB:.0f} | {planned / measured:.2f} |", flush=True)


def write_prompts(path: Path, count: int, length: int) -> Path:
    """Prompts of `length` or more tokens for any tokenizer: as many words of three letters."""
    rng = np.random.default_rng(0)
    words = rng.choice([*"abcdefghijklmnopqrstuvwxyz"], (count, length, 3))
    texts = (" ".join("".join(word) for word in prompt) for prompt in words)
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return path


def as_folder(folder: Path, config: dict[str, Any], tokenizer: Any) -> str:
    """Random weights of a config as safetensors: a checkpoint that an audit reads and does not keep."""
    export(random_checkpoint("random", dict(config), tokenizer, 0), str(folder))
    return str(folder)


def smaller(gguf: str, folder: Path) -> str:
    """The shape of SmolLM2-135M with 6 heads of 9 and 20 blocks of 30."""
    checkpoint = open_checkpoint(gguf)
    sizes = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 20}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2}
    return as_folder(folder, {**checkpoint.config, **sizes, **heads, "head_dim": 64}, checkpoint.tokenizer())


def audit(source: str, prompts: Path, tokens: int, run: Path) -> list[str]:
    """The command."""
    asked = f"model.source={source}", f"prompts.path={prompts}", f"prompts.max_length={tokens}"
    return ["audit", *asked, f"hydra.run.dir={run}"]


def plan(source: str, run: Path, *asked: str) -> dict[str, Any]:
    """plan.json of a model."""
    command = ["plan", f"model.source={source}", "device=cpu", *asked, f"hydra.run.dir={run}"]
    spinal(command).wait()
    return json.loads((run / "plan.json").read_text())


def peak(command: list[str]) -> int:
    """Bytes of resident memory that the process of a command had at most, as the kernel counts them for the process
    alone; `getrusage` would include what this process had when it started it."""
    with tempfile.NamedTemporaryFile("r") as file:
        keep = (
            f"import atexit; atexit.register(lambda: open({file.name!r}, 'w').write(open('/proc/self/status').read()))"
        )
        process = spinal(command, keep)
        if process.wait():
            raise SystemExit(f"spinal {' '.join(command)} ended with exit code {process.returncode}")
        status = dict(line.split(":", 1) for line in file.read().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def spinal(command: list[str], before: str = "") -> subprocess.Popen[bytes]:
    code = f"{before}\nfrom spinal_jax.cli.main import main\nmain()"
    own = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen([sys.executable, "-c", code, *command], stdout=subprocess.DEVNULL, env=own)


if __name__ == "__main__":
    main()
