"""Optimisers and learning-rate schedules from optax, by name."""

from __future__ import annotations

import re
from collections.abc import Mapping

import jax.numpy as jnp
import optax
from jax import Array

from spinal_jax.config.training import OptimizerConfig

UNDECAYED = re.compile(r".*norm\.weight|.*[._]bias|.*correction|.*sinks")


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by optimiser step: linear warm-up, then the named decay to 0 at `steps`."""
    warmup = min(config.warmup_steps, steps)
    rest = max(1, steps - warmup)
    after: optax.Schedule
    match config.schedule:
        case "linear":
            after = optax.linear_schedule(config.learning_rate, 0.0, rest)
        case "cosine":
            after = optax.cosine_decay_schedule(config.learning_rate, rest)
        case "constant":
            after = optax.constant_schedule(config.learning_rate)
    if not warmup:
        return after
    rise = optax.linear_schedule(0.0, config.learning_rate, warmup)
    return optax.join_schedules([rise, after], [warmup])


def decayed(parameters: Mapping[str, Array]) -> dict[str, bool]:
    """Mask of weight decay: all parameters but norms and biases."""
    return {name: UNDECAYED.fullmatch(name) is None for name in parameters}


def optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by the global norm, then the named method. Its moments are float32, like the parameters, but for the
    first where `first_moment` says bfloat16. Second moments are always float32: with a decay of 0.999 their changes
    are too small for bfloat16."""
    rate, decay, first = schedule(config, steps), config.weight_decay, jnp.dtype(config.first_moment)
    match config.name:
        case "adamw":
            method = optax.adamw(
                rate, config.beta1, config.beta2, config.eps, mu_dtype=first, weight_decay=decay, mask=decayed
            )
        case "adafactor":
            method = optax.adafactor(rate, weight_decay_rate=decay or None, weight_decay_mask=decayed)
        case "lion":
            method = optax.lion(rate, config.beta1, config.beta2, mu_dtype=first, weight_decay=decay, mask=decayed)
        case "sgd":
            descent = optax.sgd(rate, config.beta1 or None, accumulator_dtype=first)
            method = optax.chain(optax.add_decayed_weights(decay, decayed), descent)
    return method if config.clip is None else optax.chain(optax.clip_by_global_norm(config.clip), method)
