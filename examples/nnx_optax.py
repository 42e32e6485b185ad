"""Depth traces of a Flax NNX model that a bare optax loop trains.

    python examples/nnx_optax.py BASE OUT [STEPS [PROMPTS]]

BASE is a Hugging Face folder of a Llama. The model is written out below, as one writes one's own; what `spinal_jax`
needs of it is `named`, which gives its parameters the names of the Hugging Face checkpoint. OUT gets the traces,
onset.json and report.html.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from safetensors.numpy import load_file

from spinal_jax import Recorder

LAYERS = {
    "self_attn.q_proj": "query",
    "self_attn.k_proj": "key",
    "self_attn.v_proj": "value",
    "self_attn.o_proj": "out",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
}


class Block(nnx.Module):
    """Grouped-query attention with rotary positions, and a gated MLP."""

    def __init__(self, config: dict[str, Any], rngs: nnx.Rngs):
        width, hidden = config["hidden_size"], config["intermediate_size"]
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.head, self.theta = width // self.heads, config["rope_parameters"]["rope_theta"]

        def linear(into: int, out: int) -> nnx.Linear:
            return nnx.Linear(into, out, use_bias=False, rngs=rngs)

        self.query, self.out = linear(width, width), linear(width, width)
        self.key, self.value = (linear(width, self.kv_heads * self.head) for _ in range(2))
        self.gate, self.up, self.down = linear(width, hidden), linear(width, hidden), linear(hidden, width)
        self.before, self.between = (nnx.RMSNorm(width, epsilon=config["rms_norm_eps"], rngs=rngs) for _ in range(2))

    def __call__(self, h: jax.Array) -> jax.Array:
        x = self.before(h)
        query, key, value = (
            part(x).reshape(*x.shape[:2], -1, self.head) for part in (self.query, self.key, self.value)
        )
        attended = jax.nn.dot_product_attention(self.turn(query), self.turn(key), value, is_causal=True)
        h = h + self.out(attended.reshape(x.shape))
        x = self.between(h)
        return h + self.down(jax.nn.silu(self.gate(x)) * self.up(x))

    def turn(self, x: jax.Array) -> jax.Array:
        """Rotary positions, pairs being half a head apart."""
        inverse = self.theta ** (-jnp.arange(0, self.head, 2, dtype=jnp.float32) / self.head)
        angle = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None, None] * inverse
        one, two = jnp.split(x, 2, axis=-1)
        return jnp.concatenate(
            [one * jnp.cos(angle) - two * jnp.sin(angle), two * jnp.cos(angle) + one * jnp.sin(angle)], axis=-1
        )


class Llama(nnx.Module):
    """Logits [B, T, V] of tokens [B, T]."""

    def __init__(self, config: dict[str, Any], rngs: nnx.Rngs):
        self.embed = nnx.Embed(config["vocab_size"], config["hidden_size"], rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config["num_hidden_layers"])])
        self.norm = nnx.RMSNorm(config["hidden_size"], epsilon=config["rms_norm_eps"], rngs=rngs)
        self.head = nnx.Linear(config["hidden_size"], config["vocab_size"], use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        h = self.embed(tokens)
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


def variables(model: Llama) -> Iterator[tuple[str, nnx.Variable, bool]]:
    """(Hugging Face's name, parameter, whether it is transposed there) of every parameter."""
    yield "model.embed_tokens.weight", model.embed.embedding, False
    yield "model.norm.weight", model.norm.scale, False
    yield "lm_head.weight", model.head.kernel, True
    for number, block in enumerate(model.blocks):
        at = f"model.layers.{number}"
        yield f"{at}.input_layernorm.weight", block.before.scale, False
        yield f"{at}.post_attention_layernorm.weight", block.between.scale, False
        for theirs, ours in LAYERS.items():
            yield f"{at}.{theirs}.weight", getattr(block, ours).kernel, True


def named(model: Llama) -> dict[str, jax.Array]:
    """The parameters by their names in the Hugging Face checkpoint: the mapping that the recorder is given."""
    return {name: value[...].T if turned else value[...] for name, value, turned in variables(model)}


def load(base: Path) -> Llama:
    """The model with the weights of a Hugging Face folder."""
    model = Llama(json.loads((base / "config.json").read_text()), nnx.Rngs(0))
    tensors = load_file(base / "model.safetensors")
    for name, value, turned in variables(model):
        value[...] = jnp.asarray(tensors[name].T if turned else tensors[name], jnp.float32)
    return model


@nnx.jit
def train_step(model: Llama, optimizer: nnx.Optimizer[Llama], tokens: jax.Array) -> jax.Array:
    """One step of next-token prediction; returns the loss."""

    def loss_of(model: Llama) -> jax.Array:
        logits = model(tokens)[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    loss, gradient = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, gradient)
    return loss


def main(base: str, out: str, steps: str = "100", prompts: str | None = None) -> None:
    model = load(Path(base))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)
    rng = np.random.default_rng(0)
    loss = float("nan")
    with Recorder(base, prompts, folder=out, every=10, mapping=named) as recorder:
        for step in range(int(steps) + 1):
            recorder(step, model, metrics={"loss": loss} if step else None)
            tokens = rng.integers(0, model.embed.num_embeddings, (8, 64))  # your batches
            loss = float(train_step(model, optimizer, jnp.asarray(tokens, jnp.int32)))


if __name__ == "__main__":
    main(*sys.argv[1:])
