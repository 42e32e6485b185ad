"""The two steps of an audit on abstract arrays, to compile them without weights or devices."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from spinal_jax.audit.device_base import jit_forward_step, jit_lens_step
from spinal_jax.audit.forward_step import gram_shardings
from spinal_jax.audit.lens_step import LensSums, zero_lens_sums
from spinal_jax.config import MetricsConfig
from spinal_jax.data.packing import TokenBatch
from spinal_jax.metrics import contraction
from spinal_jax.metrics.lens import Lens
from spinal_jax.models.config import DecoderConfig
from spinal_jax.models.decoder import Decoder
from spinal_jax.models.translate import KEEP_FLOAT32, assemble, parameter_shapes
from spinal_jax.parallel.placement import Shards


class Abstract(NamedTuple):
    """Arguments of the steps as `jax.ShapeDtypeStruct`s with shardings."""

    model: Decoder
    grams: tuple[contraction.Grams, ...]
    lens_error: jax.ShapeDtypeStruct
    batch: TokenBatch
    lens: Lens
    lens_sums: LensSums
    x: jax.ShapeDtypeStruct


def abstract_arguments(
    config: DecoderConfig,
    dtype: jnp.dtype,
    settings: MetricsConfig,
    batch_shape: tuple[int, int, int],
    gram_dtype: np.dtype,
    *,
    shards: Shards | None = None,
    device: Any = None,
    slots: int,
) -> Abstract:
    """All arrays on the devices during the audit of one checkpoint.

    Args:
        config: the shape of the model.
        dtype: of its weights.
        settings: what is measured.
        batch_shape: B, T and M of a batch; `shards.rows` divides B and M.
        gram_dtype: `contraction.gram_dtype`; float64 needs `jax.enable_x64(True)`.
        shards: shardings on a mesh; None for one device.
        device: the device to compile for; None is JAX's default.
        slots: number of groups whose Gram sums are on the devices.
    """

    alone = None if device is None else SingleDeviceSharding(device)

    def array(shape: tuple[int, ...], dtype: DTypeLike, sharding: Sharding | None = None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding or alone)

    def parameter(path: str, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        kept = jnp.float32 if path.endswith(KEEP_FLOAT32) else dtype
        return array(shape, kept, None if shards is None else shards.parameter(path, shape))

    whole, by_rows, kept, table = (
        (None,) * 4 if shards is None else (shards.whole, shards.batch, shards.kept, shards.table)
    )
    boundaries, width = config.depth + 1, config.width
    height, length, measured = batch_shape
    model = assemble(config, {path: parameter(path, x.shape) for path, x in parameter_shapes(config).items()})
    sums = jax.eval_shape(lambda: contraction.init(slots, boundaries, width, gram_dtype))
    where = jax.tree.map(lambda _: None, sums) if shards is None else gram_shardings(width, shards)
    grams = jax.tree.map(lambda x, at: array(x.shape, gram_dtype, at), sums, where, is_leaf=lambda x: x is None)
    batch = jax.tree.map(lambda x: array(x.shape, x.dtype, by_rows), TokenBatch.empty(height, length, measured))
    lens = jax.eval_shape(lambda model: model.head(settings.transport.temperature), model)
    multiple = 1 if shards is None else shards.table_multiple
    tokens = -(-config.vocab_size // multiple) * multiple
    lens = jax.tree.map(lambda x: array((tokens, *x.shape[1:]), x.dtype, table), lens)
    lens = replace(lens, size=config.vocab_size)
    lens_sums = jax.eval_shape(lambda: zero_lens_sums(boundaries, settings, 1, False))
    return Abstract(
        model=model,
        grams=(grams,) * (1 + len(settings.variants.skip)),
        lens_error=array((), jnp.float32, whole),
        batch=batch,
        lens=lens,
        lens_sums=jax.tree.map(lambda x: array(x.shape, x.dtype, whole), lens_sums),
        x=array((boundaries, measured, width), dtype, kept),
    )


def lower_steps(
    some: Abstract,
    settings: MetricsConfig,
    groups: int,
    shards: Shards | None = None,
    backend: str | None = None,
) -> tuple[jax.stages.Lowered, jax.stages.Lowered]:
    """`forward_step` and `lens_step`, lowered for a kind of device; `groups` is the maximum in a batch."""
    first = jit_forward_step.lower(
        some.model,
        some.grams,
        some.lens_error,
        some.batch,
        skips=settings.variants.skip,
        groups=groups,
        shards=shards,
        backend=backend,
    )
    second = jit_lens_step.lower(
        (some.lens,),
        some.lens_sums,
        (some.x,),
        some.batch,
        top_k=settings.transport.top_k,
        groups=settings.groups,
        lasts=settings.lasts,
        terminal=settings.terminal,
        shards=shards,
        backend=backend,
    )
    return first, second
