"""Layers of a block. Weights have the layout of Hugging Face, [out, in].

`lead` is a leading shape of every parameter: (blocks,) for stacked blocks, () for single layers.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from spinal_jax.models.config import Activation, ClampedSwiGLU, DecoderConfig


class Linear(nnx.Module):
    """`x @ weight.T + bias` for `x` [..., in], and an optional adapter (`spinal_jax.models.lora`)."""

    def __init__(self, out: int, width: int, *, bias: bool, lead: tuple[int, ...] = (), rngs: nnx.Rngs):
        self.weight = nnx.Param(normal(rngs, (*lead, out, width)))
        self.bias = nnx.Param(jnp.zeros((*lead, out), jnp.float32)) if bias else None
        self.adapter: Callable[[Array, Array], Array] | None = nnx.data(None)

    def __call__(self, x: Array) -> Array:
        weight = self.weight[...]
        y = jnp.einsum("...i,oi->...o", x, weight) if self.adapter is None else self.adapter(x, weight)
        return y if self.bias is None else y + self.bias[...]


class Norm(nnx.Module):
    """RMS or layer norm over the last axis, computed in float32, rounded like Hugging Face."""

    def __init__(
        self, config: DecoderConfig, *shape: int, lead: tuple[int, ...] = (), bias: bool | None = None, rngs: nnx.Rngs
    ):
        self.kind, self.eps = config.norm, config.norm_eps
        self.offset = 1.0 if config.norm_unit_offset else 0.0
        self.round_first = config.norm == "rms" and not config.norm_float32
        # Random around the neutral value, so that random models exercise these parameters.
        self.weight = nnx.Param(1.0 - self.offset + normal(rngs, (*lead, *shape))) if config.norm_weight else None
        has_bias = config.norm_bias if bias is None else bias
        self.bias = nnx.Param(normal(rngs, (*lead, *shape))) if has_bias else None

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.float32)
        if self.kind == "layer":
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        if self.weight is None:
            return y.astype(x.dtype)
        if self.round_first:
            return y.astype(x.dtype) * self.weight[...]
        y = y * (self.weight[...].astype(jnp.float32) + self.offset)
        return (y if self.bias is None else y + self.bias[...].astype(jnp.float32)).astype(x.dtype)


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], scale: float = 0.02) -> Array:
    """Initial weights, normal with the standard deviation of GPT-2."""
    return scale * jax.random.normal(rngs.params(), shape, jnp.float32)


class XIELU(nnx.Module):
    """xIELU (arXiv 2411.13010), an activation with two learnt slopes; see `__call__`."""

    def __init__(self, *, lead: tuple[int, ...], rngs: nnx.Rngs):
        self.positive = nnx.Param(normal(rngs, (*lead, 1), 0.3))
        self.negative = nnx.Param(normal(rngs, (*lead, 1), 0.3))
        self.slope = nnx.Variable(jnp.full((*lead, 1), 0.5, jnp.float32))  # saved with the model, not trained
        self.limit = nnx.Variable(jnp.full((*lead, 1), -1e-6, jnp.float32))

    def __call__(self, x: Array) -> Array:
        """`p x^2 + s x` above 0, else `n (expm1(min(x, limit)) - x) + s x`; p and n are softplus of parameters."""
        slope = self.slope[...]
        positive = jax.nn.softplus(self.positive[...])
        negative = slope + jax.nn.softplus(self.negative[...])
        below = (jnp.expm1(jnp.minimum(x, self.limit[...])) - x) * negative
        return jnp.where(x > 0, positive * x * x, below) + slope * x


def activate(kind: Activation, x: Array) -> Array:
    """An activation without parameters."""
    match kind:
        case "silu":
            return jax.nn.silu(x)
        case "gelu":
            return jax.nn.gelu(x, approximate=False)
        case "gelu_tanh":
            return jax.nn.gelu(x, approximate=True)
        case "relu":
            return jax.nn.relu(x)
        case "relu2":
            return jnp.square(jax.nn.relu(x))
        case "xielu":
            raise AssertionError("xIELU has parameters: it is a layer of an MLP")


def gated(kind: Activation | ClampedSwiGLU, gate: Array, up: Array) -> Array:
    """The hidden features of a gated MLP."""
    if not isinstance(kind, ClampedSwiGLU):
        return activate(kind, gate) * up
    gate, up = jnp.minimum(gate, kind.limit), jnp.clip(up, -kind.limit, kind.limit)
    return gate * jax.nn.sigmoid(kind.alpha * gate) * (up + 1)


class MLP(nnx.Module):
    """`down(act(gate(x)) * up(x))`, or `down(act(up(x)))` without a gate."""

    def __init__(self, config: DecoderConfig, width: int, *, lead: tuple[int, ...] = (), rngs: nnx.Rngs):
        def linear(out: int, into: int) -> Linear:
            return Linear(out, into, bias=config.mlp_bias, lead=lead, rngs=rngs)

        self.activation: Activation | ClampedSwiGLU = config.activation
        self.learnt = XIELU(lead=lead, rngs=rngs) if config.activation == "xielu" else None
        self.gate = linear(width, config.width) if config.gated else None
        self.up = linear(width, config.width)
        self.down = linear(config.width, width)

    def __call__(self, x: Array) -> Array:
        up = self.up(x)
        if self.learnt is not None:
            return self.down(self.learnt(up))
        if self.gate is not None:
            return self.down(gated(self.activation, self.gate(x), up))
        assert not isinstance(self.activation, ClampedSwiGLU)
        return self.down(activate(self.activation, up))
