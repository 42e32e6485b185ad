"""Cost model of an audit from its shapes: FLOPs, memory traffic, and the work of the host.

A multiplication and an addition are two FLOPs; only matrix products are counted. Memory traffic assumes that only the
operands of one product are cached. Times are lower bounds, with perfect overlap and no waiting.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from spinal_jax.audit.spectra import replicate_counts
from spinal_jax.config import MetricsConfig
from spinal_jax.config.data_sheets import Device
from spinal_jax.data.packing import Plan
from spinal_jax.metrics import contraction
from spinal_jax.models.config import DecoderConfig
from spinal_jax.models.delta_net import CHUNK_LENGTH
from spinal_jax.models.translate import KEEP_FLOAT32
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
    """Cost of one stage of the whole audit, on one device or on the host."""

    name: str
    dtype: str  # of its products
    flops: float
    bytes: float

    def seconds(self, device: Device) -> float:
        """Roofline time: the larger of FLOPs at the peak rate and bytes at the bandwidth."""
        return max(self.flops / device.rate(self.dtype), self.bytes / device.bandwidth)


def parameter_count(shapes: Mapping[str, jax.ShapeDtypeStruct]) -> int:
    """Number of parameters."""
    return sum(math.prod(shape.shape) for shape in shapes.values())


def parameter_bytes(shapes: Mapping[str, jax.ShapeDtypeStruct], dtype: str) -> int:
    """Size of the parameters in `dtype`, over all devices."""
    return sum(math.prod(s.shape) * item_bytes(path, dtype) for path, s in shapes.items())


def item_bytes(path: str, dtype: str) -> int:
    """Bytes of one element of a parameter."""
    return 4 if dtype == "float32" or path.endswith(KEEP_FLOAT32) else 2


def active_weights(config: DecoderConfig, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> float:
    """Number of weights that a token is multiplied with, counting selected experts only."""
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
    """Dimensions of keys and of values of a head."""
    return config.head_dim, config.head_dim if config.latent is None else config.latent.value_dim


def forward_flops(config: DecoderConfig, shapes: Mapping[str, jax.ShapeDtypeStruct], rows: int, length: int) -> float:
    """FLOPs of the blocks for rows of `length` tokens: active weights for every token, and all attention scores of a
    row, including those that the causal mask discards."""
    tokens = rows * length
    attention = 2 * attention_blocks(config) * config.heads * tokens * length * sum(head_dims(config))
    return 2 * tokens * active_weights(config, shapes) + attention + tokens * _state_flops(config, length)


def attention_blocks(config: DecoderConfig) -> int:
    """Number of blocks with attention instead of a delta net."""
    return config.depth - sum(config.delta_layers)


def _state_flops(config: DecoderConfig, length: int) -> float:
    """FLOPs of the delta nets for a token in a row of this length: products within a chunk and with the state."""
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
    """Costs of the forward pass, the Gram sums and the lens over all batches, for one device."""
    item, width, boundaries = item_bytes("", dtype), config.width, config.depth + 1
    n = layout.devices
    fsdp, tensor = (layout.fsdp, layout.tensor) if layout.kind == "mesh" else (1, 1)
    flops = dict.fromkeys(("forward", "gram", "lens"), 0.0)
    traffic = dict.fromkeys(flops, 0.0)
    gram = contraction.gram_dtype()
    weights = sum(math.prod(shape) * item_bytes(path, dtype) for path, shape in _matrices(shapes)) / tensor
    ends = sum(sum(shape[-2:]) * _uses(config, shape) for _, shape in _matrices(shapes))  # numbers in and out, a token
    computed = contraction.product_size(width, jnp.dtype(dtype), kind)  # elements of a Gram matrix
    kept = contraction.triangle_size(width)
    passes = 1 + len(settings.variants.skip)
    unembed = config.vocab_size * width * item
    for batch in work.batches:
        tokens = batch.height * batch.length
        scores = attention_blocks(config) * config.heads * tokens * batch.length
        flops["forward"] += forward_flops(config, shapes, batch.height, batch.length) / n
        traffic["forward"] += weights + (tokens * ends * item + SCORE_PASSES * 4 * scores) / n
        flops["gram"] += passes * 2 * tokens * computed * boundaries / n
        # Each product of rows is one more added to the sum, which is read and written.
        products = max(layout.rows * work.groups_at_once, tokens / contraction.gram_rows(kind))
        traffic["gram"] += passes * 2 * products * kept * boundaries * gram.itemsize / n
        logits = boundaries * batch.measured * config.vocab_size
        flops["lens"] += 2 * logits * width / n
        traffic["lens"] += unembed / (fsdp * tensor) + LOGIT_PASSES * 4 * logits / n
    dtypes = {"forward": dtype, "gram": gram_products(dtype, kind), "lens": dtype}
    forward, grams, lens = (Stage(name, dtypes[name], flops[name], traffic[name]) for name in flops)
    return forward, grams, lens


def gram_products(dtype: str, kind: str) -> str:
    """The dtype that sets the rate of Gram products for states in `dtype`."""
    products = contraction.product_dtype(jnp.dtype(dtype), contraction.gram_dtype(), kind)
    return dtype if products.itemsize == 4 else products.name


def _uses(config: DecoderConfig, shape: tuple[int, ...]) -> float:
    """How often a token is multiplied with such a matrix: once in each block, or once for each selected expert."""
    if len(shape) == 3:
        return shape[0]
    assert config.experts is not None
    return shape[0] * config.experts.per_token


@dataclass(frozen=True)
class SpectraCost:
    """Cost of all eigenvalues of the Gram sums."""

    stage: Stage
    width: int
    matrices: int
    host_memory: float  # bytes of one host at its most, where LAPACK takes them
    device_memory: float  # bytes of one device at its most, where it takes them itself

    def seconds(self, device: Device, host: Device, layout: DeviceLayout) -> float:
        """Time on the devices, or on the hosts for devices that do not compute eigenvalues."""
        if (each := device.eigenvalues(self.width)) is not None:
            return -(-self.matrices // layout.devices) * each
        return self.stage.seconds(host) / hosts(device, layout)


def hosts(device: Device, layout: DeviceLayout) -> int:
    """Minimum number of hosts for the devices."""
    return -(-layout.devices // device.host)


def spectra(
    config: DecoderConfig, work: Plan, settings: MetricsConfig, cores: int, layout: DeviceLayout | None = None
) -> SpectraCost:
    """Cost of the spectra of all boundaries and replicates, on devices of a layout, or on `cores` cores, one matrix for
    each core. None is one device."""
    d, boundaries = config.width, config.depth + 1
    matrices = boundaries * sum(replicate_counts(work, settings))
    square = 8 * d * d
    reread = matrices * (REREAD * d**3 if square > HOST_CACHE else square)
    boundary = 8 * work.group_count * contraction.triangle_size(d)  # bytes of the sums of all groups at one
    # While each device gets the sums of its boundary, it holds a stripe of all groups twice, or of all replicas' sums.
    stripe = 8 * work.group_count * d * (d // contraction.stripe_count(d))
    copies = {"one": 0, "mesh": 2}.get(layout.kind, layout.devices) if layout is not None and layout.devices > 1 else 0
    return SpectraCost(
        stage=Stage("spectra", "float64", matrices * EIGENVALUES * d**3, reread),
        width=d,
        matrices=matrices,
        # Twice the stripes; in each core's hands their sum, whole, centred and LAPACK's own.
        host_memory=2 * boundary + 4 * square * min(cores, matrices),
        device_memory=boundary + max(4 * square, copies * stripe),
    )
