"""The audit's two steps on abstract shapes: without weights or devices they compile, and their memory is known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from spinal_jax.audit.device_base import jit_forward_step, jit_lens_step
from spinal_jax.audit.forward_step import gram_shardings
from spinal_jax.audit.lens_step import LensSums, zero_lens_sums
from spinal_jax.config import MetricsConfig
from spinal_jax.data.packing import TokenBatch
from spinal_jax.metrics import contraction
from spinal_jax.metrics.transport import Lens
from spinal_jax.models.config import DecoderConfig
from spinal_jax.models.decoder import Decoder
from spinal_jax.models.translate import KEEP_FLOAT32, assemble, parameter_shapes
from spinal_jax.parallel.placement import Shards


class Abstract(NamedTuple):
    """What the steps take, as `jax.ShapeDtypeStruct`s that know their shardings."""

    model: Decoder
    grams: tuple[contraction.Grams, ...]
    lens_error: Any
    batch: TokenBatch
    lens: Lens
    lens_sums: LensSums
    x: Any


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
    """Everything on the devices while one checkpoint is audited by itself.

    Args:
        config: the model's shape.
        dtype: of its weights.
        settings: what is measured.
        batch_shape: B, T and M of a batch; `shards.rows` divides B and M.
        gram_dtype: `contraction.gram_dtype` of the pool; float64 is lost without `jax.enable_x64(True)`.
        shards: where things lie on a mesh; None: on one device.
        device: which one, where it is not JAX's default: one that is only compiled for.
        slots: groups whose Gram sums are on the devices.
    """

    alone = None if device is None else SingleDeviceSharding(device)

    def array(shape: tuple[int, ...], dtype: Any, sharding: Any = None) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding or alone)

    def parameter(path: str, shape: tuple[int, ...]) -> Any:
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
    """(`forward_step`, `lens_step`) as an audit jits them for a kind of device, to be compiled; `groups` is the most
    in a batch."""
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
