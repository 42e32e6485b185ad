"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): `W + (alpha / rank) B A`, of which only A and B are trained.

B starts at zero, so an adapted model begins as its base; with B zeroed at any later time it is its base again, which is
how one copy of the weights serves as policy and reference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from spinal_jax.errors import UserError
from spinal_jax.models.decoder import Decoder
from spinal_jax.models.layers import Linear

# What Hugging Face's models call the layers that people adapt.
ALIASES = {
    "q_proj": "attention.query",
    "k_proj": "attention.key",
    "v_proj": "attention.value",
    "o_proj": "attention.out",
    "gate_proj": "mlp.gate",
    "up_proj": "mlp.up",
    "down_proj": "mlp.down",
}
ALL = "all-linear"


class Adapter(nnx.Module):
    """`scale * x A^T B^T` for x [..., in]; A is [..., rank, in], B [..., out, rank]."""

    def __init__(self, weight: Array, rank: int, scale: float, rngs: nnx.Rngs):
        *lead, out, width = weight.shape
        bound = 1 / math.sqrt(width)
        draw = jax.random.uniform(rngs.params(), (*lead, rank, width), jnp.float32, -bound, bound)
        self.a = nnx.LoRAParam(draw.astype(weight.dtype))
        self.b = nnx.LoRAParam(jnp.zeros((*lead, out, rank), weight.dtype))
        self.scale = scale

    def __call__(self, x: Array) -> Array:
        return jnp.einsum("...r,or->...o", jnp.einsum("...i,ri->...r", x, self.a[...]), self.b[...]) * self.scale

    def delta(self) -> Array:
        """What it adds to the weight, [..., out, in] float32."""
        product = jnp.einsum(
            "...or,...ri->...oi", self.b[...], self.a[...], precision="highest", preferred_element_type=jnp.float32
        )
        return product * self.scale


def _linears(model: Decoder) -> Iterator[tuple[str, Linear]]:
    """The linear layers of the blocks by name, such as `attention.query`; blocks of each stack have their own."""
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Linear):
            yield ".".join(map(str, path[2:])), module


def attach(model: Decoder, rank: int, alpha: float, targets: Sequence[str], seed: int = 0) -> list[str]:
    """Gives the layers that `targets` name an adapter each, and returns their names.

    Args:
        model: is changed in place.
        rank: of the adapters, at least 1.
        alpha: their scale is alpha / rank.
        targets: names or last parts of names (`attention.query`, `query`), Hugging Face's names for them (`q_proj`), or
            `all-linear`.
        seed: of the initial A.

    Raises:
        UserError: a target that matches no layer.
    """
    layers = list(_linears(model))
    names = sorted({name for name, _ in layers})
    chosen: set[str] = set()
    for target in targets:
        wanted = ALIASES.get(target, target)
        found = [name for name in names if target == ALL or name == wanted or name.endswith(f".{wanted}")]
        if not found:
            raise UserError(
                f"lora.targets has {target!r}, which is no linear layer of this model; there are {ALL}, "
                + ", ".join(names)
            )
        chosen.update(found)
    rngs = nnx.Rngs(seed)
    for name, layer in layers:
        if name in chosen:
            layer.adapter = Adapter(layer.weight[...], rank, alpha / rank, rngs)
    return sorted(chosen)


def merge(model: Decoder) -> None:
    """Adds every adapter to its weight and takes it off."""
    for _, layer in _linears(model):
        if isinstance(layer.adapter, Adapter):
            weight = layer.weight[...]
            layer.weight[...] = (weight.astype(jnp.float32) + layer.adapter.delta()).astype(weight.dtype)
            layer.adapter = None
