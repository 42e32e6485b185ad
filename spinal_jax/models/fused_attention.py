"""Fused attention kernels: cuDNN on GPUs, JAX's splash attention on TPUs.

`kernel_of` selects a kernel if it supports the family; otherwise XLA computes the scores, and the start line of an
audit gives the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from spinal_jax.models.config import DecoderConfig

Kernel = Literal["xla", "cudnn", "splash"]
TITLES: dict[Kernel, str] = {"xla": "XLA", "cudnn": "cuDNN", "splash": "the splash kernel"}
LANES = 128  # block size of the splash kernel
LARGEST_BLOCK = 512
ROW_AXES, HEAD_AXIS = ("data", "fsdp"), "tensor"  # mesh axes that split the rows of a batch, and heads
AnyMesh = Mesh | AbstractMesh
ALONE = AbstractMesh((1, 1, 1), (*ROW_AXES, HEAD_AXIS))  # devices do not share the work


class Chosen(NamedTuple):
    """The implementation of attention, with the reason if it is XLA."""

    kernel: Kernel
    why: str = ""


def kernel_of(config: DecoderConfig, dtype: jnp.dtype, backend: str, mesh: AnyMesh | None = None) -> Chosen:
    """The kernel that computes a model's attention in a dtype.

    cuDNN supports bfloat16 and float16, and heads of at most 128 features. It needs a mask for segments and windows.
    The splash kernel supports the same dtypes, soft-caps and windows. XLA cannot partition either: on several devices
    they need a `mesh` for the rows and heads of each device, or `ALONE`.
    """
    if backend not in ("gpu", "tpu"):
        return Chosen("xla", f"kernels are for GPUs and TPUs, and this is a {backend}")
    if jnp.dtype(dtype).itemsize != 2:
        return Chosen("xla", f"no kernel computes in {jnp.dtype(dtype).name}")
    if config.latent is not None:
        return Chosen("xla", "no kernel takes latent attention, whose keys and values differ in size")
    if config.sinks:
        return Chosen("xla", "no kernel here takes learnt sinks")
    if config.scale_by_depth:
        return Chosen("xla", "the scale of scores differs from block to block")
    if backend == "gpu":
        if config.attention_softcap is not None:
            return Chosen("xla", "cuDNN has no soft-cap")
        if config.head_dim > 128 or config.head_dim % 8:
            return Chosen("xla", f"cuDNN does not take heads of {config.head_dim} features")
        if jax.default_backend() != "gpu":  # as in a plan for absent GPUs
            return Chosen("xla", "JAX traces cuDNN's kernels only where cuDNN is installed")
    if mesh is None and jax.device_count() > 1:
        return Chosen("xla", "it is not known how the devices share the work")
    parts = 1 if mesh is None else mesh.shape[HEAD_AXIS]
    if config.kv_heads % parts or config.heads % parts:
        return Chosen("xla", f"{config.kv_heads} key heads are not shared evenly by {parts} devices")
    return Chosen("cudnn" if backend == "gpu" else "splash")


def attend_cudnn(
    q: Array,
    k: Array,
    v: Array,
    segments: Array,
    *,
    scale: float,
    mask: Array | None,
    mesh: AnyMesh | None = None,
) -> Array:
    """Softmax attention by cuDNN, in bfloat16 or float16.

    Args:
        q: [B, T, H, hd]; k, v: [B, T, K, hd], where K divides H.
        segments: [B, T]; scale: of the scores.
        mask: bool [B, T, T]; None is a causal mask without windows.
        mesh: devices that split rows and heads.

    Returns:
        [B, T, H, hd]
    """
    by_cudnn = partial(jax.nn.dot_product_attention, scale=scale, implementation="cudnn")

    def own(q: Array, k: Array, v: Array, segments: Array, mask: Array | None) -> Array:
        if mask is not None:
            return by_cudnn(q, k, v, mask=mask[:, None])

        def masked(q: Array, k: Array, v: Array) -> Array:
            row = jnp.arange(segments.shape[1], dtype=jnp.int32)
            seen = (row[:, None] >= row) & (segments[:, :, None] == segments[:, None, :])
            return by_cudnn(q, k, v, mask=seen[:, None])

        # Padding follows the sequence of a row, so that no real token attends to it.
        single = jnp.all((segments == segments[:, :1]) | (segments == 0))
        return jax.lax.cond(single, partial(by_cudnn, is_causal=True), masked, q, k, v)

    return _on_each(own, mesh, PartitionSpec(ROW_AXES, None, HEAD_AXIS))(q, k, v, segments, mask)


def _on_each(own: Callable[..., Array], mesh: AnyMesh | None, heads: PartitionSpec) -> Callable[..., Array]:
    """`own(q, k, v, *arrays)` on each device with its rows and heads: `heads` splits q, k and v; the rows of the other
    arrays are split, and scalars are not."""
    if mesh is None or mesh.size == 1:
        return own

    def on_each(q: Array, k: Array, v: Array, *others: Array | None) -> Array:
        rest = tuple(PartitionSpec(ROW_AXES) if x is not None and x.ndim else PartitionSpec() for x in others)
        specs = (heads, heads, heads, *rest)
        return jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)(q, k, v, *others)

    return on_each


def attend_splash(
    q: Array,
    k: Array,
    v: Array,
    segments: Array,
    *,
    windows: tuple[int, ...],
    window: Array | None,
    scale: float,
    softcap: float | None,
    mesh: AnyMesh | None = None,
    interpret: bool = False,
) -> Array:
    """Softmax attention by JAX's splash kernel.

    Args:
        q: [B, T, H, hd]; k, v: [B, T, K, hd], where K divides H.
        segments: [B, T].
        windows: of all blocks, 0 for unlimited; a kernel is compiled for each.
        window: scalar, the window of this block; None if all are 0.
        scale, softcap: of the scores.
        mesh: devices that split rows and heads.
        interpret: run the kernel in interpret mode, on any device.

    Returns:
        [B, T, H, hd]
    """
    length = q.shape[1]
    pad = -length % LANES
    segments = jnp.pad(segments, ((0, 0), (0, pad)), constant_values=-1)
    q, k, v = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))).transpose(0, 2, 1, 3) for x in (q, k, v))
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)
    kinds = tuple(sorted(set(windows))) if window is not None else (0,)

    def own(q: Array, k: Array, v: Array, segments: Array, window: Array) -> Array:
        kernels = [_splash(q.shape[1], length + pad, each, softcap, interpret) for each in kinds]
        if len(kernels) == 1:
            return kernels[0](q, k, v, segments)
        which = jnp.searchsorted(jnp.asarray(kinds, jnp.int32), window)
        return jax.lax.switch(which, kernels, q, k, v, segments)

    here = jnp.int32(0) if window is None else window
    out = _on_each(own, mesh, PartitionSpec(ROW_AXES, HEAD_AXIS))(q, k, v, segments, here)
    return out[:, :, :length].transpose(0, 2, 1, 3)


def _splash(
    heads: int, length: int, window: int, softcap: float | None, interpret: bool
) -> Callable[[Array, Array, Array, Array], Array]:
    """`(q [B, H, T, hd], k, v, segments [B, T]) -> [B, H, T, hd]` for one window."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape = (length, length)
    one = masks.CausalMask(shape) if window == 0 else masks.LocalMask(shape, (window - 1, 0), 0)
    block = next(size for size in (LARGEST_BLOCK, 384, 256, LANES) if length % size == 0)
    sizes = kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )

    def attend(q: Array, k: Array, v: Array, segments: Array) -> Array:
        with jax.enable_x64(False):  # the kernel needs int32 indices, although 64-bit mode is on
            compute = kernel.make_splash_mha(
                masks.MultiHeadMask([one] * heads),
                block_sizes=sizes,
                head_shards=1,
                q_seq_shards=1,
                attn_logits_soft_cap=softcap,
                interpret=interpret,
            )
            each: Any = jax.vmap(lambda q, k, v, ids: compute(q, k, v, kernel.SegmentIds(ids, ids)))
            return each(q, k, v, segments)

    return attend
