"""Depth traces of a `spinal_jax` decoder, of any family that the package reads, in a bare optax loop.

    python examples/decoder_optax.py BASE OUT [STEPS [PROMPTS]]

BASE is whatever `spinal audit` takes: a Hugging Face folder or hub id, a .gguf file. OUT gets the traces, onset.json
and report.html.
"""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import spinal_jax
from spinal_jax.models.decoder import Decoder


@nnx.jit
def train_step(model: Decoder, optimizer: nnx.Optimizer[Decoder], tokens: jax.Array) -> jax.Array:
    """One step of next-token prediction; returns the loss."""

    def loss_of(model: Decoder) -> jax.Array:
        logits = model.lens(model.forward(tokens)[0])[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    loss, gradient = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, gradient)
    return loss


def main(base: str, out: str, steps: str = "100", prompts: str | None = None) -> None:
    model, _ = spinal_jax.load_model(base)
    optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)
    rng = np.random.default_rng(0)
    loss = float("nan")
    with spinal_jax.Recorder(base, prompts, folder=out, every=10) as recorder:
        for step in range(int(steps) + 1):
            recorder(step, model, metrics={"loss": loss} if step else None)
            tokens = rng.integers(0, model.config.vocab_size, (8, 64))  # your batches
            loss = float(train_step(model, optimizer, jnp.asarray(tokens, jnp.int32)))


if __name__ == "__main__":
    main(*sys.argv[1:])
