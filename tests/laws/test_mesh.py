"""What a mesh of devices must not change, and where parameters must lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spinal_jax.config import ParallelConfig
from spinal_jax.config.training import ObjectiveConfig, OptimizerConfig
from spinal_jax.errors import UserError
from spinal_jax.models.decoder import Decoder
from spinal_jax.models.parts import take_apart
from spinal_jax.objectives.responses import Example, choose_shape, micro_batches
from spinal_jax.objectives.step import TrainState, make_steps
from spinal_jax.parallel.mesh import make_mesh, parameter_sharding, row_multiple, shard_parameters, shard_rows
from spinal_jax.train.optimizer import optimizer

MESHES = [(8, 1, 1), (2, 2, 2), (1, 1, 8)]


@dataclass(frozen=True, eq=False)
class Sequence:
    ids: np.ndarray
    start: int


def pairs(count: int, vocab: int) -> list[Example]:
    rng = np.random.default_rng(3)

    def sequence() -> Sequence:
        length = int(rng.integers(6, 30))
        return Sequence(rng.integers(0, vocab, length).astype(np.int32), int(rng.integers(1, length)))

    return [(sequence(), sequence()) for _ in range(count)]


def steps_on(mesh: Any, model: Decoder, count: int = 3) -> tuple[list[float], dict[str, np.ndarray]]:
    """Gradient norms of some DPO steps on a mesh, and the parameters they end with."""
    parts, arrays = take_apart(model)
    parameters = shard_parameters({k: v.copy() for k, v in arrays.items()}, mesh)
    assert parts.paths(nnx.Param) == set(parameters)
    method = optimizer(OptimizerConfig(name="sgd", learning_rate=0.5, beta1=0.0), count)
    with jax.numpy_dtype_promotion("standard"):
        state = TrainState(parameters, shard_parameters(method.init(parameters), mesh), jnp.int32(0))
    steps = make_steps(parts, model.config, ObjectiveConfig("dpo"), method, dtype="float32", remat="blocks")
    data = pairs(5, model.config.vocab_size)  # an odd number of pairs, and rows that stay empty
    shape = choose_shape([data], 30, 512, row_multiple(mesh))
    norms = []
    for _ in range(count):
        gradients: Any = None
        sums: Any = None
        for _, micro in micro_batches(data, shape):
            arguments = (state.parameters, {}, shard_rows(micro, mesh), jnp.float32(len(data)))
            gradients, sums = steps.first(*arguments) if gradients is None else steps.more(*arguments, gradients, sums)
        updated = steps.update(state, gradients, sums)
        state = updated.state
        norms.append(float(updated.norm))
    return norms, {name: np.asarray(x) for name, x in state.parameters.items()}


def test_training_is_the_same_on_every_mesh(make_decoder: Callable[..., Decoder]) -> None:
    """A vocabulary of 301 and 3 blocks, which no axis divides."""
    model = make_decoder(seed=1, depth=3)
    one = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), ("data", "fsdp", "tensor"))
    norms, parameters = steps_on(one, model)
    for sizes in MESHES:
        found, others = steps_on(make_mesh(ParallelConfig(*sizes)), model)
        # Sums over devices come in another order: a few roundings of float32.
        np.testing.assert_allclose(found, norms, rtol=1e-5, err_msg=str(sizes))
        for name, x in parameters.items():
            np.testing.assert_allclose(others[name], x, atol=1e-5 * np.abs(x).max(), err_msg=f"{sizes} {name}")


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("embedding", (304, 32), ("tensor", "fsdp")),
        ("embedding", (301, 32), (None, ("tensor", "fsdp"))),
        ("stacks.0.attention.query.weight", (7, 32, 32), (None, "tensor", "fsdp")),
        ("stacks.0.attention.out.weight", (7, 32, 32), (None, "fsdp", "tensor")),
        ("stacks.0.mlp.down.weight", (7, 32, 64), (None, "fsdp", "tensor")),
        ("stacks.0.mlp.down", (7, 8, 32, 64), (None, None, "fsdp", "tensor")),
        ("stacks.0.mlp.gate", (7, 8, 64, 32), (None, None, "tensor", "fsdp")),
        ("stacks.0.mlp.gate_bias", (7, 8, 64), (None, "fsdp", "tensor")),
        ("stacks.0.mlp.down_bias", (7, 8, 32), (None, "tensor", "fsdp")),
        ("stacks.0.mlp.router_bias", (7, 8), (None, None)),
        ("stacks.0.attention.sinks", (7, 8), (None, None)),
        ("stacks.0.attention_norm.weight", (7, 32), (None, None)),
        ("stacks.0.attention.query.bias", (7, 32), (None, None)),
        ("stacks.0.attention.query.adapter.a", (7, 4, 32), (None, None, "fsdp")),
        ("stacks.0.attention.query.adapter.b", (7, 32, 4), (None, "fsdp", None)),
        ("final_norm.weight", (32,), (None,)),
    ],
)
def test_where_parameters_lie(path: str, shape: tuple[int, ...], spec: tuple[Any, ...]) -> None:
    mesh = make_mesh(ParallelConfig(2, 2, 2))
    assert parameter_sharding(mesh, path, shape).spec == jax.sharding.PartitionSpec(*spec)


def test_a_large_parameter_that_nothing_divides_is_refused() -> None:
    mesh = make_mesh(ParallelConfig(1, 4, 2))
    with pytest.raises(UserError, match=r"embedding .* would lie whole on each of 8 devices"):
        parameter_sharding(mesh, "embedding", (50257, 1023))


def test_one_axis_takes_what_is_left() -> None:
    assert dict(make_mesh(ParallelConfig(-1, 2, 2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    with pytest.raises(UserError, match="parallel is data 3 x fsdp 1 x tensor 1, but there are 8 devices"):
        make_mesh(ParallelConfig(3, 1, 1))
    with pytest.raises(UserError, match="one axis at most"):
        ParallelConfig(-1, -1, 1)
