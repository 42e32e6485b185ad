"""Memory and speed of `spinal convert` on a synthetic checkpoint of 8 shards, and what kill -9 does to it.

    python benchmarks/convert.py [--gib 2] [--kills 20] [--kill-gib 0.1]

Prints one line of JSON for each part. `peak_mib` is the process's largest resident memory; `idle_mib` that of the same
command on a checkpoint of next to nothing. The time includes hashing what is read and what is written. Needs a little
more than twice the size on disk, in the folder for temporary files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

SHARDS = 8


def write_checkpoint(folder: Path, width: int, depth: int, seed: int = 0) -> dict[str, int]:
    """A Llama in bfloat16 of random bits, in shards; returns bytes of all, of the largest tensor, the largest stack."""
    heads, vocabulary, inner = width // 128 or 1, 16 * width, 4 * width
    config = {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (vocabulary, width),
    }
    for layer in range(depth):
        block = f"model.layers.{layer}"
        shapes |= {f"{block}.self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        shapes |= {f"{block}.mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        shapes |= {f"{block}.mlp.down_proj.weight": (width, inner)}
        shapes |= {f"{block}.{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    sizes = {name: 2 * math.prod(shape) for name, shape in shapes.items()}
    rng = np.random.default_rng(seed)
    weight_map: dict[str, str] = {}
    shard: dict[str, np.ndarray] = {}
    held = number = 0
    folder.mkdir(parents=True)
    for name, shape in shapes.items():
        bits = rng.integers(0, 1 << 16, math.prod(shape), np.uint16)
        shard[name] = bits.view(ml_dtypes.bfloat16).reshape(shape)
        held += sizes[name]
        if held >= (number + 1) * sum(sizes.values()) / SHARDS or len(weight_map) + len(shard) == len(shapes):
            file = f"model-{number + 1:05}.safetensors"
            save_file(shard, folder / file)
            weight_map |= dict.fromkeys(shard, file)
            shard, number = {}, number + 1
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    stack = depth * 2 * inner * width
    return {"bytes": sum(sizes.values()), "tensor": max(sizes.values()), "stack": max(stack, max(sizes.values()))}


def shape_of(gib: float) -> tuple[int, int]:
    """Width and depth of a checkpoint of at least so many GiB."""
    width = 2048 if gib >= 1 else 256
    layer, ends = 16 * width * width * 2, 32 * width * width * 2
    return width, max(1, math.ceil((gib * 2**30 - ends) / layer))


def command(source: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "spinal_jax.cli.main", "convert", f"model.source={source}", f"out={out}"]


def converted(source: Path, out: Path) -> tuple[float, float]:
    """Seconds and peak resident MiB of one conversion, in a process of its own."""
    measure = (
        "import resource, subprocess, sys\n"
        "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", measure, *command(source, out)], check=True, stdout=subprocess.PIPE, text=True
    )
    return time.perf_counter() - begin, int(done.stdout) / (1024 if sys.platform == "linux" else 1 << 20)


def digest(folder: Path) -> str:
    """Of every file's name and bytes."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found.update(f"{path.relative_to(folder)}\0".encode())
            found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def speed(folder: Path, gib: float) -> dict[str, Any]:
    """One conversion of a large checkpoint."""
    write_checkpoint(folder / "tiny", 8, 1)
    idle_seconds, idle = converted(folder / "tiny", folder / "tiny_out")
    sizes = write_checkpoint(folder / "large", *shape_of(gib))
    seconds, peak = converted(folder / "large", folder / "large_out")
    return {
        "gib": round(sizes["bytes"] / 2**30, 2),
        "shards": len(list((folder / "large").glob("*.safetensors"))),
        "largest_tensor_mib": sizes["tensor"] >> 20,
        "largest_stack_mib": sizes["stack"] >> 20,
        "peak_mib": round(peak),
        "idle_mib": round(idle),
        "seconds": round(seconds, 1),
        "idle_seconds": round(idle_seconds, 1),
        "mb_per_second": round(sizes["bytes"] / 1e6 / max(seconds - idle_seconds, 1e-9)),
    }


def kills(folder: Path, count: int, gib: float) -> dict[str, Any]:
    """Conversions killed at a random moment after the first byte, and then run to their end."""
    sizes = write_checkpoint(folder / "source", *shape_of(gib))
    process = subprocess.Popen(command(folder / "source", folder / "whole"), stdout=subprocess.DEVNULL)
    wait_for(folder / "whole.partial", process)
    begin = time.perf_counter()
    wait_for(folder / "whole", process)
    writing = time.perf_counter() - begin
    assert process.wait() == 0
    wanted = digest(folder / "whole")
    rng = random.Random(0)
    same, tried = 0, 0
    left: list[int] = []
    while len(left) < count:
        tried += 1
        out = folder / f"killed_{tried}"
        process = subprocess.Popen(command(folder / "source", out), stdout=subprocess.DEVNULL)
        wait_for(partial := out.with_name(f"{out.name}.partial"), process)
        time.sleep(rng.uniform(0, writing))
        process.kill()
        process.wait()
        if out.exists():  # it had ended before
            shutil.rmtree(out)
            continue
        left.append(sum(1 for path in partial.rglob("*") if path.is_file()))
        subprocess.run(command(folder / "source", out), check=True, stdout=subprocess.DEVNULL)
        same += digest(out) == wanted and not partial.exists()
        shutil.rmtree(out)
    files = sum(1 for path in (folder / "whole").rglob("*") if path.is_file())
    return {"mib": sizes["bytes"] >> 20, "files": files, "killed": count, "files_at_kill": left, "same_bytes": same}


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    """Until the process has made `path`; RuntimeError if it ends without."""
    while not path.exists():
        if process.poll() is not None and not path.exists():
            raise RuntimeError(f"the conversion ended with code {process.returncode} before there was {path}")
        time.sleep(0.002)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2.0, help="size of the large checkpoint; 0 leaves it out")
    parser.add_argument("--kills", type=int, default=20, help="how many conversions are killed")
    parser.add_argument("--kill-gib", type=float, default=0.1, help="size of the checkpoint of those")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="spinal-convert-") as scratch:
        if asked.gib:
            print(json.dumps({"convert": speed(Path(scratch), asked.gib)}), flush=True)
        if asked.kills:
            found = kills(Path(scratch), asked.kills, asked.kill_gib)
            print(json.dumps({"kill": found}), flush=True)
            if found["same_bytes"] != asked.kills:
                sys.exit("a resumed conversion ended in other bytes")


if __name__ == "__main__":
    main()
