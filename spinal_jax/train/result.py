"""The result of a training run: weights of the last step, or of the last healthy one, as a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax import Array

from spinal_jax.config.training import TrainConfig
from spinal_jax.models import lora
from spinal_jax.models.formats.base import Checkpoint
from spinal_jax.models.formats.export import export
from spinal_jax.models.formats.memory import MemoryCheckpoint
from spinal_jax.models.parts import Parts, take_apart
from spinal_jax.objectives.step import Arrays, TrainState
from spinal_jax.parallel.agreement import leads, to_host
from spinal_jax.progress import Bar
from spinal_jax.train.checkpoints import Checkpoints
from spinal_jax.train.history import History


def chosen(
    config: TrainConfig, state: TrainState, history: History, saved: Checkpoints, say: Callable[[str], None]
) -> tuple[int, TrainState]:
    """The step that is exported, and its state."""
    healthy, destabilised = history.health
    if config.keep == "last" or not destabilised:
        return int(state.step), state
    say(f"keeping step {healthy}, the last healthy one")
    return healthy, saved.load(healthy, state)


def export_result(checkpoint: Checkpoint, parts: Parts, arrays: Arrays, out: Path, name: str, bar: Bar) -> None:
    """Writes the model as a Hugging Face folder, with merged adapters. Process 0 writes it from a copy in host
    memory."""
    model = parts.assemble(arrays)
    lora.merge(model)
    whole = {path: _gathered(x) for path, x in sorted(take_apart(model)[1].items())}
    if not leads():
        return
    memory = MemoryCheckpoint(name, dict(checkpoint.config), whole, checkpoint.tokenizer())
    memory.folder = getattr(checkpoint, "folder", None)
    export(memory, str(out), overwrite=True, bar=bar)


def _gathered(x: Array) -> Array | np.ndarray:
    """A whole parameter: unchanged if this process has all of it, else gathered in the host memory of process 0, one
    layer at a time."""
    if x.is_fully_addressable:
        return x
    held = np.empty(x.shape if leads() else (0,), x.dtype)
    if x.ndim < 3:
        whole = to_host(x)
        return whole if leads() else held
    for layer in range(len(x)):
        whole = to_host(_layer(x, layer))
        if leads():
            held[layer] = whole
    return held


@jax.jit
def _layer(x: Array, number: int) -> Array:
    return jax.lax.dynamic_index_in_dim(x, number, keepdims=False)
