"""First step of an audit: forward pass of a batch with a tap that accumulates Gram sums and keeps hidden states."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from spinal_jax.data.packing import TokenBatch
from spinal_jax.metrics import contraction
from spinal_jax.models.decoder import Decoder, Tap
from spinal_jax.models.fused_attention import ALONE
from spinal_jax.parallel.mesh import ROWS
from spinal_jax.parallel.placement import Shards


def forward_step(
    model: Decoder,
    grams: tuple[contraction.Grams, ...],
    lens_error: Array,
    batch: TokenBatch,
    *,
    skips: tuple[int, ...],
    groups: int,
    shards: Shards | None = None,
    backend: str | None = None,
) -> tuple[tuple[contraction.Grams, ...], Array, Array]:
    """Runs the forward pass of a batch. A pure function.

    Args:
        model: the checkpoint.
        grams: Gram sums of the counted rows and, for each of `skips`, of the rows from that position on.
        lens_error: largest difference in probability so far between the output of the model and the lens at boundary D.
        batch: rows of tokens.
        skips: first position of each Gram sum after the first.
        groups: maximum number of groups in a batch.
        shards: shardings on a mesh, if there are several devices.
        backend: kind of device; None is JAX's default.

    Returns:
        (grams, x [D + 1, M, d] at the measured positions after the final norm, lens_error)
    """
    config = model.config
    measured = batch.measured.shape[0]
    real = batch.segments > 0
    counted = (batch.counted, *((real & (batch.positions >= skip)).astype(jnp.float32) for skip in skips))

    def init(h: jax.ShapeDtypeStruct, boundaries: int) -> tuple[tuple[contraction.Grams, ...], Array]:
        kept = jnp.zeros((boundaries, measured, config.width), h.dtype)
        return grams, kept if shards is None else jax.lax.with_sharding_constraint(kept, shards.kept)

    def update(
        carry: tuple[tuple[contraction.Grams, ...], Array], h: Array, index: Array
    ) -> tuple[tuple[contraction.Grams, ...], Array]:
        grams, kept = carry
        rows = pick(h, batch.measured, shards)
        grams = tuple(
            _add(sums, h, which, batch.slots, index, groups, shards, backend)
            for sums, which in zip(grams, counted, strict=True)
        )
        return grams, kept.at[index].set(rows)

    last, (grams, kept) = model.forward(
        batch.tokens,
        tap=Tap(init, update),
        positions=batch.positions,
        segments=batch.segments,
        lengths=batch.lengths,
        backend=backend,
        mesh=ALONE if shards is None else shards.mesh,
    )
    x = model.final_norm(kept)
    # The output of the model itself, from the last block, at one position of the batch.
    own, kept = pick(last, batch.measured, shards)[0], x[-1, 0]
    if shards is not None:
        own, kept = jax.lax.with_sharding_constraint((own, kept), shards.whole)
    output = jax.nn.softmax(model.lens(own))
    with model.precision():
        seen = jax.nn.softmax(model.head().read(kept))
    off = jnp.where(batch.measured_weight[0] > 0, jnp.max(jnp.abs(output - seen)), 0.0)
    if shards is not None:
        like = gram_shardings(config.width, shards)
        grams = jax.lax.with_sharding_constraint(grams, tuple(like for _ in grams))
        x, off = jax.lax.with_sharding_constraint((x, off), (shards.kept, shards.whole))
    return grams, x, jnp.maximum(lens_error, off)


def pick(values: Array, measured: Array, shards: Shards | None) -> Array:
    """`values` [B, T, ...] at the measured positions of a batch, [M, ...]."""

    def own(values: Array, measured: Array) -> Array:
        return values.reshape(-1, *values.shape[2:])[measured]

    return (own if shards is None else shards.by_rows(own))(values, measured)


def gram_shardings(width: int, shards: Shards) -> contraction.Grams:
    """The `NamedSharding` of each array of the Gram sums."""
    stripes = contraction.stripe_count(width)
    second, first = shards.grams(width // stripes)
    return contraction.Grams(second=(second,) * stripes, first=first)


def _add(
    sums: contraction.Grams,
    h: Array,
    counted: Array,
    slots: Array,
    boundary: Array,
    groups: int,
    shards: Shards | None,
    backend: str | None,
) -> contraction.Grams:
    """`contraction.update`, on however many devices."""
    if shards is None:
        return contraction.update(sums, h, counted, slots, boundary, backend)
    width = h.shape[-1]
    present = jnp.unique(slots, size=groups, fill_value=sums.first.shape[0])  # beyond the last slot: none
    split = contraction.GramAxes(ROWS, *shards.features(width // contraction.stripe_count(width)))
    update = partial(contraction.update_shards, split=split, backend=backend)
    return shards.by_features(update, gram_shardings(width, shards))(sums, h, counted, slots, boundary, present)
