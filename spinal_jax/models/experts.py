"""Sparse mixture of experts without dropped tokens.

The selected (token, expert) pairs are sorted by expert, and each expert processes its rows in blocks, so that the cost
is that of the selected experts. (`jax.lax.ragged_dot` of jax 0.10 multiplies every row with every expert on a CPU.)
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from spinal_jax.models.config import Activation, ClampedSwiGLU, DecoderConfig, Experts
from spinal_jax.models.layers import MLP, Linear, gated, normal

LARGEST_BLOCK = 128  # rows of one expert multiplied at once


class ExpertWeights(NamedTuple):
    """The gated MLPs of all experts, or of one expert without the axis E."""

    gate: Array  # [E, f, d]
    up: Array  # [E, f, d]
    down: Array  # [E, d, f]
    gate_bias: Array | None = None  # [E, f]
    up_bias: Array | None = None  # [E, f]
    down_bias: Array | None = None  # [E, d]


def route(experts: Experts, logits: Array, correction: Array | None) -> tuple[Array, Array]:
    """Selects the experts of each token and their weights.

    Args:
        experts: see `config.Experts`.
        logits: float32 [N, E] of the router.
        correction: [E] added to the scores for the selection only, or None.

    Returns:
        (chosen int32 [N, k], weight float32 [N, k])
    """
    scores = jax.nn.softmax(logits) if experts.scoring == "softmax" else jax.nn.sigmoid(logits)
    merit = jax.lax.stop_gradient(scores)
    if correction is not None:
        merit = merit + jax.lax.stop_gradient(correction).astype(jnp.float32)
    if experts.groups > 1:
        grouped = merit.reshape(-1, experts.groups, experts.count // experts.groups)
        worth = jnp.sum(jax.lax.top_k(grouped, experts.group_top)[0], axis=-1)  # [N, groups]
        kept = jax.lax.top_k(worth, experts.groups_kept)[1]
        competes = jnp.any(jax.nn.one_hot(kept, experts.groups, dtype=jnp.bool_), axis=1)  # [N, groups]
        merit = jnp.where(competes[..., None], grouped, -jnp.inf).reshape(merit.shape)
    chosen = jax.lax.top_k(merit, experts.per_token)[1]
    weight = jnp.take_along_axis(scores, chosen, axis=-1)
    if experts.normalise:
        weight = weight / (jnp.sum(weight, axis=-1, keepdims=True) + 1e-20)  # DeepSeek's guard, below any softmax sum
    return chosen, weight * experts.scale


def expert_mlp(activation: Activation | ClampedSwiGLU, weights: ExpertWeights, x: Array) -> Array:
    """One expert on its rows `x` [n, d]."""
    # Set here, because a custom backward pass is traced outside of `jax.default_matmul_precision`.
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT

    def linear(rows: Array, weight: Array, bias: Array | None) -> Array:
        y = jnp.einsum("ni,oi->no", rows, weight, precision=precision)
        return y if bias is None else y + bias

    gate, up = linear(x, weights.gate, weights.gate_bias), linear(x, weights.up, weights.up_bias)
    return linear(gated(activation, gate, up), weights.down, weights.down_bias)


def block_rows(rows: int, experts: int) -> int:
    """Rows in a block of an expert: a power of two, at least the mean number of rows, within limits."""
    share = -(-rows // experts)
    return min(LARGEST_BLOCK, max(8, 1 << (share - 1).bit_length()))


def apply_experts(activation: Activation | ClampedSwiGLU, weights: ExpertWeights, rows: Array, sizes: Array) -> Array:
    """Applies to every row its expert.

    Args:
        activation: of the experts' MLPs.
        weights: of all experts.
        rows: [M, d] sorted by expert.
        sizes: int32 [E] number of rows of each expert, with sum M.

    Returns:
        [M, d]
    """
    # Never false, and compiled away. Under shard_map it marks the weights as differing between devices as the rows do:
    # else their gradients would be summed over devices within loops that take another number of turns on each.
    always = sizes[0] >= 0
    return _apply(activation, jax.tree.map(lambda w: jnp.where(always, w, w), weights), rows, sizes)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _apply(activation: Activation | ClampedSwiGLU, weights: ExpertWeights, rows: Array, sizes: Array) -> Array:
    size = block_rows(rows.shape[0], sizes.shape[0])
    padded = jnp.pad(rows, ((0, size), (0, 0)))  # the last block may extend beyond the last row

    def expert(out: Array, xs: tuple[ExpertWeights, Array, Array]) -> tuple[Array, None]:
        own, start, count = xs

        def block(index: Array, out: Array) -> Array:
            at = start + index * size
            part = jax.lax.dynamic_slice_in_dim(padded, at, size)
            # A block may write into rows of the next expert, which overwrites them later.
            return jax.lax.dynamic_update_slice_in_dim(out, expert_mlp(activation, own, part), at, axis=0)

        return jax.lax.fori_loop(0, (count + size - 1) // size, block, out), None

    out, _ = jax.lax.scan(expert, padded, (weights, jnp.cumsum(sizes, dtype=sizes.dtype) - sizes, sizes))
    return out[: rows.shape[0]]


def _forward(
    activation: Activation | ClampedSwiGLU, weights: ExpertWeights, rows: Array, sizes: Array
) -> tuple[Array, tuple[ExpertWeights, Array, Array]]:
    return _apply(activation, weights, rows, sizes), (weights, rows, sizes)


def _backward(
    activation: Activation | ClampedSwiGLU, saved: tuple[ExpertWeights, Array, Array], gradient: Array
) -> tuple[ExpertWeights, Array, None]:
    """The same loop over blocks, with recomputed activations."""
    weights, rows, sizes = saved
    size = block_rows(rows.shape[0], sizes.shape[0])
    padded, padded_gradient = (jnp.pad(x, ((0, size), (0, 0))) for x in (rows, gradient))

    def expert(out: Array, xs: tuple[ExpertWeights, Array, Array]) -> tuple[Array, ExpertWeights]:
        own, start, count = xs

        def block(index: Array, carry: tuple[Array, ExpertWeights]) -> tuple[Array, ExpertWeights]:
            out, sums = carry
            at = start + index * size
            part = jax.lax.dynamic_slice_in_dim(padded, at, size)
            above = jax.lax.dynamic_slice_in_dim(padded_gradient, at, size)
            mine = jnp.arange(size, dtype=jnp.int32)[:, None] < count - index * size
            _, pull = jax.vjp(partial(expert_mlp, activation), own, part)
            to_weights, to_rows = pull(jnp.where(mine, above, jnp.zeros_like(above)))
            sums = jax.tree.map(lambda s, g: s + g.astype(jnp.float32), sums, to_weights)
            return jax.lax.dynamic_update_slice_in_dim(out, to_rows, at, axis=0), sums

        zeros = jax.tree.map(lambda w: jnp.where(count < 0, w.astype(jnp.float32), 0.0), own)  # marked as `count` is
        out, sums = jax.lax.fori_loop(0, (count + size - 1) // size, block, (out, zeros))
        return out, jax.tree.map(lambda s, w: s.astype(w.dtype), sums, own)

    out, to_weights = jax.lax.scan(
        expert, padded_gradient, (weights, jnp.cumsum(sizes, dtype=sizes.dtype) - sizes, sizes)
    )
    return to_weights, out[: rows.shape[0]], None


_apply.defvjp(_forward, _backward)


class MixtureOfExperts(nnx.Module):
    """The mixture in place of the dense MLP: routed experts, and in some families a shared one."""

    def __init__(self, config: DecoderConfig, *, lead: tuple[int, ...], rngs: nnx.Rngs):
        experts = config.experts
        assert experts is not None
        stack, width = (*lead, experts.count), config.width
        self.experts = experts
        self.activation: Activation | ClampedSwiGLU = config.activation

        def bias(*shape: int) -> nnx.Param | None:
            return nnx.Param(jnp.zeros((*stack, *shape), jnp.float32)) if experts.bias else None

        self.router = nnx.Param(normal(rngs, (*stack, width)))
        self.router_bias = bias()
        # Not a Param: DeepSeek updates it by the load of the experts, without gradients or weight decay.
        self.correction = nnx.Variable(normal(rngs, stack)) if experts.correction_bias else None
        self.gate = nnx.Param(normal(rngs, (*stack, experts.width, width)))
        self.up = nnx.Param(normal(rngs, (*stack, experts.width, width)))
        self.down = nnx.Param(normal(rngs, (*stack, width, experts.width)))
        self.gate_bias, self.up_bias, self.down_bias = bias(experts.width), bias(experts.width), bias(width)
        self.shared = MLP(config, experts.shared_width, lead=lead, rngs=rngs) if experts.shared_width else None
        self.shared_gate = Linear(1, width, bias=False, lead=lead, rngs=rngs) if experts.shared_gate else None

    def __call__(self, x: Array) -> Array:
        count, per_token = self.experts.count, self.experts.per_token
        tokens = x.reshape(-1, x.shape[-1])  # [N, d]
        # Full float32 for any dtype of the model, because rounded logits change the selection.
        logits = jnp.einsum(
            "nd,ed->ne",
            tokens.astype(jnp.float32),
            self.router[...].astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
        if self.router_bias is not None:
            logits = logits + self.router_bias[...].astype(jnp.float32)
        chosen, weight = route(self.experts, logits, None if self.correction is None else self.correction[...])
        expert = chosen.reshape(-1)  # [N k]
        order = jnp.argsort(expert)
        # Permutations by gathers only, without scatter-adds, so that sums are deterministic.
        copies = jnp.repeat(tokens, per_token, axis=0).at[order].get(unique_indices=True)
        biases = (None if b is None else b[...] for b in (self.gate_bias, self.up_bias, self.down_bias))
        weights = ExpertWeights(self.gate[...], self.up[...], self.down[...], *biases)
        sorted_out = apply_experts(
            self.activation, weights, copies, jnp.bincount(expert, length=count).astype(jnp.int32)
        )
        out = sorted_out.at[jnp.argsort(order)].get(unique_indices=True).reshape(-1, per_token, x.shape[-1])
        mixed = jnp.sum(weight[..., None] * out.astype(jnp.float32), axis=1).astype(x.dtype).reshape(x.shape)
        if self.shared is None:
            return mixed
        shared = self.shared(x)
        return mixed + (shared if self.shared_gate is None else jax.nn.sigmoid(self.shared_gate(x)) * shared)
