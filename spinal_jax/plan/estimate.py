"""The arithmetic of an audit from its shapes alone: products of matrices, bytes through memory, and the host's share.

FLOPs count a multiplication and an addition as two and leave out everything that is not a product of matrices. Bytes
are those that memory must see where nothing but the operands of one product stays in a cache, so times from either are
lower bounds: no overlap is lost, no device waits for another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from spinal_jax.audit.spectra import replicate_counts
from spinal_jax.config import MetricsConfig
from spinal_jax.data.packing import Plan
from spinal_jax.metrics import contraction
from spinal_jax.models.config import DecoderConfig
from spinal_jax.models.delta_net import CHUNK_LENGTH
from spinal_jax.models.translate import KEEP_FLOAT32
from spinal_jax.parallel.data_sheets import Device
from spinal_jax.plan.layout import DeviceLayout

# How often memory sees a logit of the lens, float32: written by the product, read for the maximum and for the
# exponential, which is written and read for the mass, and read twice and written for the distances of two blocks.
LOGIT_PASSES = 8
SCORE_PASSES = 4  # and an attention score: written, read for the maximum and the sum, its weight written and read
EIGENVALUES = 4 / 3  # FLOPs of all eigenvalues of a symmetric d x d matrix over d^3: its reduction to a tridiagonal one
REREAD = 4 / 3  # bytes over d^3 that this reads of a float64 matrix beyond any cache: half of it for every column
HOST_CACHE = 2**20  # bytes of a float64 matrix above which it does not stay in a core's own cache


@dataclass(frozen=True)
class Stage:
    """What one stage of the whole audit costs: of one device, or of the host."""

    name: str
    dtype: str  # of its products
    flops: float
    bytes: float

    def seconds(self, device: Device) -> float:
        """The roofline: FLOPs at the peak rate or bytes at the bandwidth, whichever takes longer."""
        return max(self.flops / device.rate(self.dtype), self.bytes / device.bandwidth)


def parameter_count(shapes: Mapping[str, jax.ShapeDtypeStruct]) -> int:
    """All numbers of the model."""
    return sum(math.prod(shape.shape) for shape in shapes.values())


def parameter_bytes(shapes: Mapping[str, jax.ShapeDtypeStruct], dtype: str) -> int:
    """Of the model in `dtype`, all devices together."""
    return sum(math.prod(s.shape) * item_bytes(path, dtype) for path, s in shapes.items())


def item_bytes(path: str, dtype: str) -> int:
    """Of one number of a parameter."""
    return 4 if dtype == "float32" or path.endswith(KEEP_FLOAT32) else 2


def active_weights(config: DecoderConfig, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> float:
    """How many numbers of the blocks' matrices a token is multiplied with; of experts, those of the chosen."""
    total = 0.0
    for _, shape in _matrices(shapes):
        share = 1.0
        if config.experts and len(shape) == 4:  # [blocks, experts, out, in]
            share = config.experts.per_token / config.experts.count
        total += share * math.prod(shape)
    return total


def _matrices(shapes: Mapping[str, jax.ShapeDtypeStruct]) -> list[tuple[str, tuple[int, ...]]]:
    """The blocks' matrices: [blocks, out, in], or [blocks, experts, out, in]."""
    return [
        (path, s.shape)
        for path, s in shapes.items()
        if path.startswith("stacks.") and len(s.shape) > 2 and "norm" not in path and not path.endswith("bias")
    ]


def head_dims(config: DecoderConfig) -> tuple[int, int]:
    """Features of a head's keys, and of its values."""
    return config.head_dim, config.head_dim if config.latent is None else config.latent.value_dim


def forward_flops(config: DecoderConfig, shapes: Mapping[str, jax.ShapeDtypeStruct], rows: int, length: int) -> float:
    """Of the blocks, for rows of `length` tokens: every token with every active weight, and all scores of a row, of
    which causality discards half after they are made."""
    tokens = rows * length
    attention = 2 * attention_blocks(config) * config.heads * tokens * length * sum(head_dims(config))
    return 2 * tokens * active_weights(config, shapes) + attention + tokens * _state_flops(config, length)


def attention_blocks(config: DecoderConfig) -> int:
    """How many blocks have attention, not a delta net."""
    return config.depth - sum(config.delta_layers)


def _state_flops(config: DecoderConfig, length: int) -> float:
    """Of the delta nets, for a token of a row of that length: the products within a chunk and those with the state."""
    delta = config.delta
    if delta is None:
        return 0.0
    chunk, heads = min(CHUNK_LENGTH, length), delta.value_heads
    within = 2 * delta.key_heads * 2 * chunk * delta.key_dim + heads * chunk * (3 * delta.value_dim + delta.key_dim)
    return sum(config.delta_layers) * (within + 3 * 2 * heads * delta.key_dim * delta.value_dim)


def audit_stages(
    config: DecoderConfig,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    work: Plan,
    settings: MetricsConfig,
    dtype: str,
    layout: DeviceLayout,
    kind: str,
) -> tuple[Stage, Stage, Stage]:
    """Forward, Gram sums and lens over all batches, of one of the devices of a kind that share them evenly."""
    item, width, boundaries = item_bytes("", dtype), config.width, config.depth + 1
    n = layout.devices
    fsdp, tensor = (layout.fsdp, layout.tensor) if layout.kind == "mesh" else (1, 1)
    flops = dict.fromkeys(("forward", "gram", "lens"), 0.0)
    traffic = dict.fromkeys(flops, 0.0)
    gram = contraction.gram_dtype()
    weights = sum(math.prod(shape) * item_bytes(path, dtype) for path, shape in _matrices(shapes)) / tensor
    ends = sum(sum(shape[-2:]) * _uses(config, shape) for _, shape in _matrices(shapes))  # numbers in and out, a token
    share = contraction.triangle_size(width) / width**2  # of a Gram matrix that is computed
    passes = 1 + len(settings.variants.skip)
    unembed = config.vocab_size * width * item
    for batch in work.batches:
        tokens = batch.height * batch.length
        scores = attention_blocks(config) * config.heads * tokens * batch.length
        flops["forward"] += forward_flops(config, shapes, batch.height, batch.length) / n
        traffic["forward"] += weights + (tokens * ends * item + SCORE_PASSES * 4 * scores) / n
        flops["gram"] += passes * share * 2 * tokens * width**2 * boundaries / n
        # Each product of rows is one more added to the sum, which is read and written.
        products = max(layout.rows * work.groups_at_once, tokens / contraction.gram_rows(kind))
        traffic["gram"] += passes * share * 2 * products * width**2 * boundaries * gram.itemsize / n
        logits = boundaries * batch.measured * config.vocab_size
        flops["lens"] += 2 * logits * width / n
        traffic["lens"] += unembed / (fsdp * tensor) + LOGIT_PASSES * 4 * logits / n
    dtypes = {"forward": dtype, "gram": gram_products(dtype, kind), "lens": dtype}
    forward, grams, lens = (Stage(name, dtypes[name], flops[name], traffic[name]) for name in flops)
    return forward, grams, lens


def gram_products(dtype: str, kind: str) -> str:
    """The dtype whose rate the products of Gram sums have, of states in `dtype`."""
    products = contraction.product_dtype(jnp.dtype(dtype), contraction.gram_dtype(), kind)
    return dtype if products.itemsize == 4 else products.name


def _uses(config: DecoderConfig, shape: tuple[int, ...]) -> float:
    """How often a token passes such a matrix: once in every block, with experts as often as it has chosen some."""
    if len(shape) == 3:
        return shape[0]
    assert config.experts is not None
    return shape[0] * config.experts.per_token


@dataclass(frozen=True)
class SpectraCost:
    """Eigenvalues of the Gram sums, all of them together."""

    stage: Stage
    width: int
    matrices: int
    host_memory: float  # bytes of one host at its most, where LAPACK takes them
    device_memory: float  # bytes of one device at its most, where it takes them itself

    def seconds(self, device: Device, host: Device, layout: DeviceLayout) -> float:
        """Of all of them on devices, or on the hosts of devices that do not take them."""
        if (each := device.eigenvalues(self.width)) is not None:
            return -(-self.matrices // layout.devices) * each
        return self.stage.seconds(host) / hosts(device, layout)


def hosts(device: Device, layout: DeviceLayout) -> int:
    """How many machines so many devices take, at least."""
    return -(-layout.devices // device.host)


def spectra(config: DecoderConfig, work: Plan, settings: MetricsConfig, cores: int) -> SpectraCost:
    """The spectra at every boundary, whole, without each group and of halves, on so many cores; one matrix a core."""
    d, boundaries = config.width, config.depth + 1
    matrices = boundaries * sum(replicate_counts(work, settings))
    square = 8 * d * d
    reread = matrices * (REREAD * d**3 if square > HOST_CACHE else square)
    boundary = 8 * work.group_count * contraction.triangle_size(d)  # bytes of the sums of all groups at one
    return SpectraCost(
        stage=Stage("spectra", "float64", matrices * EIGENVALUES * d**3, reread),
        width=d,
        matrices=matrices,
        # Twice the stripes; in each core's hands their sum, whole, centred and LAPACK's own.
        host_memory=2 * boundary + 4 * square * min(cores, matrices),
        device_memory=boundary + 4 * square,
    )
