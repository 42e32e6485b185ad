"""Norms of a gradient over the parameters of each block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array


class BlockNorms(NamedTuple):
    """L2 norms of a gradient, float32; 0 for parameters that were not differentiated."""

    blocks: Array  # [D]
    embedding: Array  # with learned positions, and with the unembedding if it is tied
    final_norm: Array
    unembedding: Array


def block_norms(gradient: Mapping[str, Array], layers: Sequence[Sequence[int]]) -> BlockNorms:
    """Norms of a gradient given by parameter path, with stacked blocks (`stacks.0.attention.query.weight`
    [blocks, ...]).

    Gradients are divided by their largest magnitude before they are squared, so that float32 does not overflow.

    Args:
        gradient: by path; parameters that were not differentiated are absent.
        layers: the blocks of each stack, counted from 0.
    """
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(g)) for g in gradient.values()])).astype(jnp.float32)
    unit = jnp.where(largest > 0, largest, 1.0)

    def squares(g: Array, lead: int) -> Array:  # [...] -> the first `lead` axes
        return jnp.sum(jnp.square(g.astype(jnp.float32) / unit), axis=tuple(range(lead, g.ndim)))

    blocks = jnp.zeros(sum(map(len, layers)), jnp.float32)
    apart = {name: jnp.zeros((), jnp.float32) for name in BlockNorms._fields[1:]}
    for path, g in gradient.items():
        root, _, rest = path.partition(".")
        if root == "stacks":
            blocks = blocks.at[jnp.array(layers[int(rest.partition(".")[0])])].add(squares(g, 1))
        else:
            name = "embedding" if root == "positions" else root
            apart[name] = apart[name] + squares(g, 0)
    return BlockNorms(*(jnp.sqrt(x) * unit for x in (blocks, *apart.values())))
