"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): `W + (alpha / rank) B A`, with trained A and B.

B starts at zero, so an adapted model starts as its base. Setting B to zero gives the base again, so one copy of the
weights serves as policy and reference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from spinal_jax.errors import UserError
from spinal_jax.models.decoder import Decoder
from spinal_jax.models.layers import Linear

# Names of adapted layers in Hugging Face models.
ALIASES = {
    "q_proj": "attention.query",
    "k_proj": "attention.key",
    "v_proj": "attention.value",
    "o_proj": "attention.out",
    "gate_proj": "mlp.gate",
    "up_proj": "mlp.up",
    "down_proj": "mlp.down",
}
ALL_LINEAR = "all-linear"


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def adapted(scale: float, x: Array, merged: Array, a: Array, b: Array) -> Array:
    """`x (W + scale B A)^T` [..., out] for a frozen weight W, in float32.

    The forward pass costs as much as that of the base. W has no gradient: the backward pass has one large product for x
    and four low-rank products for A and B.

    Args:
        scale: alpha / rank.
        x: [..., in]
        merged: `W + scale B A` [out, in]; treated as constant.
        a: A [rank, in]
        b: B [out, rank]
    """
    return _adapted_forward(scale, x, merged, a, b)[0]


def _adapted_forward(
    scale: float, x: Array, merged: Array, a: Array, b: Array
) -> tuple[Array, tuple[Array, Array, Array, Array]]:
    return jnp.einsum("...i,oi->...o", x, merged, precision="highest"), (x, merged, a, b)


def _adapted_backward(
    scale: float, saved: tuple[Array, Array, Array, Array], gradient: Array
) -> tuple[Array, Array, Array, Array]:
    x, merged, a, b = saved
    # Said here, not left to `jax.default_matmul_precision`, because a custom backward pass is traced outside of it.
    product = partial(jnp.einsum, precision="highest")
    to_x = product("...o,oi->...i", gradient, merged)
    to_a = product("...r,...i->ri", product("...o,or->...r", gradient, b), x) * scale
    to_b = product("...o,...r->or", gradient, product("...i,ri->...r", x, a)) * scale
    return to_x, jnp.zeros_like(merged), to_a, to_b


adapted.defvjp(_adapted_forward, _adapted_backward)


class Adapter(nnx.Module):
    """Adds `scale * x A^T B^T` to `x W^T`, x [..., in]; A is [..., rank, in], B [..., out, rank], W [..., out, in]."""

    def __init__(self, weight: Array, rank: int, scale: float, rngs: nnx.Rngs):
        *lead, out, width = weight.shape
        bound = 1 / math.sqrt(width)
        draw = jax.random.uniform(rngs.params(), (*lead, rank, width), jnp.float32, -bound, bound)
        self.a = nnx.LoRAParam(draw.astype(weight.dtype))
        self.b = nnx.LoRAParam(jnp.zeros((*lead, out, rank), weight.dtype))
        self.scale = scale
        self.is_merged = False  # whether `scale B A` is already added to W

    def __call__(self, x: Array, weight: Array) -> Array:
        """`x (W + scale B A)^T`. Below float32 the two products are separate, because rounding the sum to the precision
        of W would hide small adapters."""
        a, b = self.a[...], self.b[...]
        if x.dtype == jnp.float32:
            return adapted(self.scale, x, weight if self.is_merged else weight + self.delta(), a, b)
        low = jnp.einsum("...i,ri->...r", x, a) * self.scale
        return jnp.einsum("...i,oi->...o", x, weight) + jnp.einsum("...r,or->...o", low, b)

    def delta(self) -> Array:
        """The change of the weight, [..., out, in] float32."""
        product = jnp.einsum(
            "...or,...ri->...oi", self.b[...], self.a[...], precision="highest", preferred_element_type=jnp.float32
        )
        return product * self.scale


def _linears(model: Decoder) -> Iterator[tuple[str, Linear]]:
    """The linear layers of the blocks by name, such as `attention.query`; by stack."""
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Linear):
            yield ".".join(map(str, path[2:])), module


def attach(model: Decoder, rank: int, alpha: float, targets: Sequence[str], seed: int = 0) -> list[str]:
    """Attaches adapters to the target layers and returns their names.

    Args:
        model: changed in place.
        rank: of the adapters, at least 1.
        alpha: the scale is alpha / rank.
        targets: names or last parts of names (`attention.query`, `query`), Hugging Face's names for them (`q_proj`), or
            `all-linear`.
        seed: of the initial A.

    Raises:
        UserError: a target matches no layer.
    """
    layers = list(_linears(model))
    names = sorted({name for name, _ in layers})
    chosen: set[str] = set()
    for target in targets:
        wanted = ALIASES.get(target, target)
        found = [name for name in names if target == ALL_LINEAR or name == wanted or name.endswith(f".{wanted}")]
        if not found:
            raise UserError(
                f"lora.targets has {target!r}, which is no linear layer of this model; there are {ALL_LINEAR}, "
                + ", ".join(names)
            )
        chosen.update(found)
    rngs = nnx.Rngs(seed)
    for name, layer in layers:
        if name in chosen:
            layer.adapter = Adapter(layer.weight[...], rank, alpha / rank, rngs)
    return sorted(chosen)


def merge(model: Decoder) -> None:
    """Adds every adapter to its weight and removes it."""
    for _, layer in _linears(model):
        if isinstance(layer.adapter, Adapter):
            weight = layer.weight[...]
            layer.weight[...] = (weight.astype(jnp.float32) + layer.adapter.delta()).astype(weight.dtype)
            layer.adapter = None


def sum_once(model: Decoder) -> None:
    """Adds every adapter to its weight but keeps it for gradients, so that several float32 passes share one sum."""
    for _, layer in _linears(model):
        if isinstance(layer.adapter, Adapter):
            layer.weight[...] = layer.weight[...] + layer.adapter.delta()


def expect_sums(model: Decoder) -> None:
    """Marks every adapter as already added to its weight (`sum_once`)."""
    for _, layer in _linears(model):
        if isinstance(layer.adapter, Adapter):
            layer.adapter.is_merged = True
