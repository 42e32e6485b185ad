"""Sample prompts of a plan: equal length, packed like those of an audit."""

from __future__ import annotations

import numpy as np

from spinal_jax.config.plan import PlanConfig
from spinal_jax.config.positions import Positions
from spinal_jax.data import packing
from spinal_jax.errors import UserError
from spinal_jax.models.config import DecoderConfig
from spinal_jax.parallel.device_defaults import batch_tokens
from spinal_jax.plan.layout import DeviceLayout, planned_gram_home


def sample_prompts(config: PlanConfig, decoder: DecoderConfig, layout: DeviceLayout) -> packing.Plan:
    """Batches of `config.prompt_count` prompts for this layout. Raises UserError if the prompts are too long."""
    length, groups = config.prompt_tokens, config.metrics.groups
    if decoder.learned_positions and length > decoder.max_positions:
        raise UserError(f"prompt_tokens is {length}, but the model has {decoder.max_positions} positions")
    ids = np.zeros(length, np.int32)
    start = length // 2  # start of a response, for the selector response:K
    sequences = [packing.TokenSequence(ids, number % groups, start) for number in range(config.prompt_count)]
    most = batch_tokens("cpu" if config.device == "cpu" else "gpu") * layout.rows
    selector = Positions.parse(config.metrics.transport.positions)
    skip, tokens = config.metrics.contraction.skip, config.batch_tokens or most
    slots = planned_gram_home(config, decoder, layout).slots
    return packing.plan_batches(sequences, selector, skip, tokens, layout.rows, slots, groups)


def widest(work: packing.Plan) -> packing.Packed:
    """The batch with the most tokens."""
    return max(work.batches, key=lambda packed: packed.height * packed.length)
