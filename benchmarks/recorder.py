"""What `spinal_jax.Recorder` without `every` costs an optax loop: steps per second with it against those without it.

    python -m benchmarks.recorder [--model random:3m] [--prompts 32] [--seconds 240]

The loop without the recorder runs before and after the one with it, for a quarter of the time each. The time with the
recorder includes the traces, but neither the reading of the model nor the report at the end.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import spinal_jax
from examples.decoder_optax import train_step
from spinal_jax.config import PromptsConfig


def rate(step: Callable[[int], None], first: int, seconds: float) -> tuple[int, float]:
    """The number of the next step, and steps per second over at least `seconds`."""
    begin, number = time.monotonic(), first
    while time.monotonic() - begin < seconds:
        step(number)
        number += 1
    return number, (number - first) / (time.monotonic() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random:3m")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=240)
    args = parser.parse_args()
    model, _ = spinal_jax.load_model(args.model)
    optimizer = nnx.Optimizer(model, optax.adamw(1e-4), wrt=nnx.Param)
    rng = np.random.default_rng(0)

    def plain(number: int) -> None:
        tokens = rng.integers(0, model.config.vocab_size, (8, 128))
        float(train_step(model, optimizer, jnp.asarray(tokens, jnp.int32)))

    plain(0)  # compiles
    with tempfile.TemporaryDirectory() as folder:
        settings = PromptsConfig(limit=args.prompts)
        recorder = spinal_jax.Recorder(args.model, folder=Path(folder) / "traces", prompt_settings=settings)
        recorder(0, model)

        def recorded(number: int) -> None:
            recorder(number, model)
            plain(number)

        following, before = rate(plain, 1, args.seconds / 4)
        following, with_it = rate(recorded, following, args.seconds)
        recorder.wait()
        traces = len(recorder.series.steps) - 1
        _, after = rate(plain, following, args.seconds / 4)
        recorder.close()
    without = (before + after) / 2
    print(
        f"{args.model} on {jax.default_backend()}: {without:.2f} steps/s without the recorder ({before:.2f} before, "
        f"{after:.2f} after), {with_it:.2f} with it and {traces} more traces: "
        f"{1 - with_it / without:.1%} slower"
    )


if __name__ == "__main__":
    main()
