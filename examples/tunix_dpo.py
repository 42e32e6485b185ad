"""Depth traces of a Llama 3 that Tunix trains with DPO: a hook calls the recorder before each step.

    python examples/tunix_dpo.py BASE OUT [STEPS [PROMPTS]]

BASE is a Hugging Face folder. OUT gets the traces, onset.json and report.html. `pip install google-tunix`.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType
from tunix.models.llama3 import model as llama3
from tunix.models.llama3 import params
from tunix.sft import hooks
from tunix.sft.dpo.dpo_trainer import DPOTrainer, DPOTrainingConfig, TrainingInput

from spinal_jax import Recorder

# Tunix's path of a parameter, Hugging Face's, and how many of its axes are the outputs, which come first there.
NAMES = (
    (r"embedder\.input_embedding", "model.embed_tokens.weight", 0),
    (r"final_norm\.w", "model.norm.weight", 0),
    (r"lm_head\.w", "lm_head.weight", 1),
    (r"layers\.(\d+)\.attn\.([qkv]_proj)\.w", r"model.layers.\1.self_attn.\2.weight", 2),
    (r"layers\.(\d+)\.attn\.o_proj\.w", r"model.layers.\1.self_attn.o_proj.weight", 1),
    (r"layers\.(\d+)\.mlp\.(\w+)\.kernel", r"model.layers.\1.mlp.\2.weight", 1),
    (r"layers\.(\d+)\.(\w+_layernorm)\.w", r"model.layers.\1.\2.weight", 0),
)


def named(model: llama3.Llama3) -> dict[str, jax.Array]:
    """The parameters by their names in the Hugging Face checkpoint."""
    found = {}
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        own = ".".join(map(str, path))
        for pattern, theirs, outputs in NAMES:
            if re.fullmatch(pattern, own):
                value = leaf.get_value()
                split = value.ndim - outputs
                matrix = value.reshape(int(np.prod(value.shape[:split])), -1).T if outputs else value
                found[re.sub(pattern, theirs, own)] = matrix
    return found


class DepthTraces(hooks.TrainingHooks):
    """Traces the model before a step, when it has had as many updates as `train_steps` says."""

    def __init__(self, recorder: Recorder):
        self.recorder = recorder

    def on_train_step_start(self, train_ctx: Any) -> None:
        self.recorder(train_ctx.train_steps, train_ctx.model)

    def on_train_end(self, train_ctx: Any) -> None:
        self.recorder(train_ctx.train_steps, train_ctx.model)
        self.recorder.close()

    def on_train_start(self, train_ctx: Any) -> None: ...
    def on_train_step_end(self, train_ctx: Any, train_step: int, train_loss: float) -> None: ...
    def on_eval_step_start(self, train_ctx: Any) -> None: ...
    def on_eval_step_end(self, train_ctx: Any, eval_loss: float) -> None: ...


def load(base: str) -> llama3.Llama3:
    """Tunix's model with the weights of a Hugging Face folder."""
    config = json.loads((Path(base) / "config.json").read_text())
    shape = llama3.ModelConfig(
        num_layers=config["num_hidden_layers"],
        vocab_size=config["vocab_size"],
        embed_dim=config["hidden_size"],
        hidden_dim=config["intermediate_size"],
        num_heads=config["num_attention_heads"],
        head_dim=config["hidden_size"] // config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        rope_theta=int(config["rope_parameters"]["rope_theta"]),
        norm_eps=config["rms_norm_eps"],
        weight_tying=config["tie_word_embeddings"],
    )
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)
    return params.create_model_from_safe_tensors(base, shape, mesh)


def pairs(vocab: int, count: int) -> list[TrainingInput]:
    """Your pairs: here random tokens, a prompt of 8 and two responses of 16."""
    rng = np.random.default_rng(0)

    def ids(length: int) -> np.ndarray:
        return rng.integers(0, vocab, (4, length)).astype(np.int32)

    def of(prompt: np.ndarray, chosen: np.ndarray, rejected: np.ndarray) -> TrainingInput:
        return TrainingInput(
            prompt_ids=prompt,
            prompt_mask=np.ones_like(prompt),
            chosen_ids=chosen,
            chosen_mask=np.ones_like(chosen),
            rejected_ids=rejected,
            rejected_mask=np.ones_like(rejected),
        )

    return [of(ids(8), ids(16), ids(16)) for _ in range(count)]


def main(base: str, out: str, steps: str = "20", prompts: str | None = None) -> None:
    model, reference = load(base), load(base)
    settings = DPOTrainingConfig(eval_every_n_steps=1_000_000, max_steps=int(steps))
    trainer = DPOTrainer(model, reference, optax.adamw(1e-4), settings)
    trainer.with_training_hooks(DepthTraces(Recorder(base, prompts, folder=out, every=10, mapping=named)))
    with jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2):
        trainer.train(pairs(model.config.vocab_size, int(steps)))


if __name__ == "__main__":
    main(*sys.argv[1:])
