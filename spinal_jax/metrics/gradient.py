"""Where in depth a loss pulls: norms of its gradient over the parameters of each block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array


class BlockNorms(NamedTuple):
    """L2 norms of a gradient, float32; 0 where nothing was differentiated."""

    blocks: Array  # [D]
    embedding: Array  # learned positions included, and the unembedding where the two are tied
    final_norm: Array
    unembedding: Array


def block_norms(gradient: Mapping[str, Array], layers: Sequence[Sequence[int]]) -> BlockNorms:
    """Norms from a gradient by parameter path, its blocks stacked (`stacks.0.attention.query.weight` [blocks, ...]);
    float64 is not needed because squares of float32 gradients neither overflow nor all vanish once the largest is
    divided out.

    Args:
        gradient: by path; parameters that were not differentiated are missing.
        layers: the blocks that each stack holds, counted from 0.
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
