"""The prompts that a plan is of: so many of equal length, packed as an audit packs them."""

from __future__ import annotations

import math

import numpy as np

from spinal_jax.config.plan import PlanConfig
from spinal_jax.data import packing
from spinal_jax.errors import UserError
from spinal_jax.models.config import DecoderConfig
from spinal_jax.parallel.device_defaults import batch_tokens
from spinal_jax.plan.estimate import Split


def pool(config: PlanConfig, decoder: DecoderConfig, shards: int) -> packing.Plan:
    """Batches of `config.prompt_count` prompts whose rows `shards` devices share. Errors: UserError."""
    length, groups = config.prompt_tokens, config.metrics.groups
    if decoder.learned_positions and length > decoder.max_positions:
        raise UserError(f"prompt_tokens is {length}, but the model has {decoder.max_positions} positions")
    ids = np.zeros(length, np.int32)
    start = length // 2  # where a response would begin, for positions of responses
    sequences = [packing.TokenSequence(ids, number % groups, start) for number in range(config.prompt_count)]
    most = batch_tokens("cpu" if config.device == "cpu" else "gpu")
    selector = packing.Positions.parse(config.metrics.transport.positions)
    skip, tokens = config.metrics.contraction.skip, config.batch_tokens or most
    return packing.plan(sequences, selector, skip, tokens, shards, groups=groups)


def widest(work: packing.Plan) -> packing.Packed:
    """The batch with most tokens, whose shape the others have where all prompts are equal."""
    return max(work.batches, key=lambda packed: packed.height * packed.length)


def split_of(config: PlanConfig) -> Split:
    """Data x fsdp x tensor, as the mesh will have them. Errors: UserError."""
    asked = config.parallel
    sizes = [asked.data, asked.fsdp, asked.tensor]
    known = math.prod(size for size in sizes if size > 0)
    if -1 in sizes and config.devices % known == 0:
        sizes[sizes.index(-1)] = config.devices // known
    if math.prod(sizes) != config.devices:
        raise UserError(
            f"parallel is data {asked.data} x fsdp {asked.fsdp} x tensor {asked.tensor}, which does not multiply to "
            f"devices={config.devices}; -1 for one axis takes what is left"
        )
    return Split(*sizes)
