"""The structure of a decoder, and its arrays as a flat dictionary by path."""

from __future__ import annotations

from collections.abc import Mapping

import jax
from flax import nnx
from jax import Array

from spinal_jax.models.decoder import Decoder


class Parts:
    """The structure of a decoder, adapters included, without its arrays; hashable by identity.

    >>> parts, arrays = take_apart(model)
    >>> model = parts.assemble(arrays)
    """

    def __init__(self, model: Decoder):
        self.graph, state = nnx.split(nnx.eval_shape(lambda: model))
        self.leaves = {".".join(map(str, path)): (path, leaf) for path, leaf in nnx.to_flat_state(state)}

    def paths(self, kind: type[nnx.Variable]) -> set[str]:
        """Paths of the arrays of an nnx type, such as `nnx.Param`."""
        return {name for name, (_, leaf) in self.leaves.items() if isinstance(leaf, kind)}

    def assemble(self, arrays: Mapping[str, Array]) -> Decoder:
        """The decoder with these arrays, one for every path."""
        flat = [(path, leaf.replace(arrays[name])) for name, (path, leaf) in self.leaves.items()]
        return nnx.merge(self.graph, nnx.from_flat_state(flat))


def take_apart(model: Decoder) -> tuple[Parts, dict[str, Array]]:
    """The structure and the arrays of a decoder."""
    state = nnx.to_flat_state(nnx.state(model))
    return Parts(model), {".".join(map(str, path)): leaf.get_value() for path, leaf in state}


def cast(arrays: Mapping[str, Array], dtype: jax.typing.DTypeLike) -> dict[str, Array]:
    """The arrays in a dtype; a router's correction bias stays float32, as checkpoints keep it."""
    return {name: x if name.endswith(".correction") else x.astype(dtype) for name, x in arrays.items()}
