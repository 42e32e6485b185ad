"""The preference gradient by block, and its replicates, against gradients of every subset taken whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from spinal_jax.comparison import preference_gradient as module
from spinal_jax.comparison.preference_gradient import (
    PreferenceGradient,
    log_probabilities,
    preference_gradient,
    shape_for,
)
from spinal_jax.config import ParallelConfig
from spinal_jax.config.training import ObjectiveConfig
from spinal_jax.data import Completion
from spinal_jax.metrics.gradient import block_norms
from spinal_jax.models.config import Experts
from spinal_jax.models.decoder import Decoder
from spinal_jax.models.parts import take_apart
from spinal_jax.objectives.responses import Example
from spinal_jax.parallel.mesh import make_mesh
from spinal_jax.parallel.placement import Shards

COUNT = 11
GROUPS = [3, 5, 5, 3, 9, 9, 3, 3, 5, 9, 3]
MIXED = {  # one dense block, then sparse ones: two stacks
    "experts": Experts(count=4, per_token=2, width=16),
    "expert_layers": (False, True, True),
    "depth": 3,
}


def pairs(seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)

    def side() -> Completion:
        length = int(rng.integers(4, 30))
        return Completion(rng.integers(0, 301, size=length).astype(np.int32), int(rng.integers(1, length)))

    return [(side(), side()) for _ in range(COUNT)]


LONGEST = 32


def padded(example: Example) -> tuple[np.ndarray, np.ndarray]:
    """tokens int32 [2, LONGEST], and 1 where a position predicts a response token."""
    tokens, predicts = np.zeros((2, LONGEST), np.int32), np.zeros((2, LONGEST - 1), np.float32)
    for row, side in enumerate(example):
        tokens[row, : len(side.ids)] = side.ids
        predicts[row, side.start - 1 : len(side.ids) - 1] = 1
    return tokens, predicts


@jax.jit
def logp(model: Decoder, tokens: jax.Array, predicts: jax.Array) -> jax.Array:
    """[2] summed log-probability of both responses, the plain way."""
    z = jax.nn.log_softmax(model.lens(model.forward(tokens)[0]))[:, :-1]
    return jnp.sum(jnp.take_along_axis(z, tokens[:, 1:, None], axis=-1)[..., 0] * predicts, axis=1)


def gradients(model: Decoder, reference: Decoder, examples: list[Example], beta: float) -> list[dict[str, np.ndarray]]:
    """Of the loss of each pair, float64 by path."""
    parts, arrays = take_apart(model)

    @jax.jit
    @jax.grad
    def gradient(arrays: dict[str, jax.Array], tokens: jax.Array, predicts: jax.Array, known: jax.Array) -> jax.Array:
        ratio = logp(parts.assemble(arrays), tokens, predicts) - known
        return -jax.nn.log_sigmoid(beta * (ratio[0] - ratio[1]))

    return [
        {
            name: np.asarray(g, np.float64)
            for name, g in gradient(arrays, *padded(e), logp(reference, *padded(e))).items()
        }
        for e in examples
    ]


def norms(found: list[dict[str, np.ndarray]], depth: int) -> np.ndarray:
    """[D] of the mean gradient, a stack behind the other."""
    mean = {name: np.mean([g[name] for g in found], axis=0) for name in found[0]}
    blocks = []
    for stack in range(depth):
        inside = [g for name, g in mean.items() if name.startswith(f"stacks.{stack}.")]
        if inside:
            blocks += [np.sqrt(sum(np.sum(g[i] ** 2) for g in inside)) for i in range(len(inside[0]))]
    return np.array(blocks)


def found_for(
    model: Decoder, reference: Decoder, examples: list[Example], groups: list[int], **how: Any
) -> PreferenceGradient:
    shape = shape_for(examples, 64)
    done: list[int] = []
    known = log_probabilities(reference, examples, shape, done.append)
    exact = [np.asarray(logp(reference, *padded(example))) for example in examples]
    np.testing.assert_allclose(known, exact, rtol=1e-5)
    assert sum(done) == len(examples)
    done.clear()
    found = preference_gradient(model, examples, groups, known, ObjectiveConfig("dpo", **how), shape, done.append)
    assert sum(done) == len(examples)
    return found


@pytest.mark.parametrize("fields", [{"depth": 3}, MIXED])
def test_norms_and_replicates_are_those_of_each_subset(
    make_decoder: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    model, reference = make_decoder(0, width=16, **fields), make_decoder(1, width=16, **fields)
    examples = pairs()
    exact = gradients(model, reference, examples, 0.3)
    found = found_for(model, reference, examples, GROUPS, beta=0.3)
    assert found.pairs.tolist() == [5, 3, 3]
    # float32 gradients of a loss summed in another order, and the packing of rows.
    np.testing.assert_allclose(found.blocks, norms(exact, 3), rtol=2e-4)
    parameters = sum(g[0].size for name, g in exact[0].items() if name.startswith("stacks.1."))
    assert parameters < module.SKETCH  # so that nothing is lost
    for group, without in zip((3, 5, 9), found.blocks_without, strict=True):
        rest = [g for g, own in zip(exact, GROUPS, strict=True) if own != group]
        np.testing.assert_allclose(without, norms(rest, 3), rtol=1e-3)
    mean = {name: np.mean([g[name] for g in exact], axis=0) for name in exact[0]}
    for name, value in found.apart.items():
        own = [np.sum(g**2) for path, g in mean.items() if path.startswith(name)]
        assert value == pytest.approx(np.sqrt(np.sum(own)), rel=2e-4)


def test_a_sketch_keeps_inner_products() -> None:
    """To about |a| |b| / sqrt(SKETCH), without bias: of 200 pairs of vectors, and with the same signs each time."""
    rng = np.random.default_rng(0)
    shape = (200, 3 * module.SKETCH + 17)
    a = rng.normal(size=shape).astype(np.float32)
    b = (0.3 * a + rng.normal(size=shape)).astype(np.float32)
    one, other = (
        np.asarray(
            module._sketch(
                {"stacks.0.x": jnp.asarray(x[:, :999]), "stacks.0.y": jnp.asarray(x[:, 999:])}, (tuple(range(200)),)
            )
        )
        for x in (a, b)
    )
    assert one.shape == (200, module.SKETCH)
    scale = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    error = (np.sum(one.astype(np.float64) * other, axis=1) - np.sum(a.astype(np.float64) * b, axis=1)) / scale
    spread = 1 / module.SKETCH**0.5
    assert np.abs(error).max() < 4.5 * spread
    assert np.abs(error.mean()) < 4 * spread / 200**0.5
    assert error.std() == pytest.approx(spread, rel=0.35)


def test_a_single_group_has_no_replicates(make_decoder: Callable[..., Decoder]) -> None:
    model = make_decoder(0, width=16, depth=3)
    found = found_for(model, model, pairs(), [4] * COUNT)
    assert found.blocks_without.shape == (0, 3)
    assert found.pairs.tolist() == [COUNT]


def test_norms_by_block_survive_tiny_and_huge_gradients() -> None:
    rng = np.random.default_rng(0)
    gradient = {
        "stacks.0.mlp.up.weight": rng.normal(size=(2, 5, 3)),
        "stacks.1.norm.weight": rng.normal(size=(1, 4)),
        "stacks.0.norm.weight": rng.normal(size=(2, 4)),
        "embedding": rng.normal(size=(7, 3)),
        "positions": rng.normal(size=(4, 3)),
        "final_norm.weight": rng.normal(size=(3,)),
    }
    for scale in (1e-30, 1.0, 1e25):
        found = block_norms({k: jnp.asarray(scale * v, jnp.float32) for k, v in gradient.items()}, ((0, 2), (1,)))
        up, norm = gradient["stacks.0.mlp.up.weight"], gradient["stacks.0.norm.weight"]
        blocks = [np.sqrt(np.sum(up[i] ** 2) + np.sum(norm[i] ** 2)) for i in (0, 1)]
        blocks.insert(1, np.linalg.norm(gradient["stacks.1.norm.weight"]))  # which lies between the others
        np.testing.assert_allclose(np.asarray(found.blocks, np.float64) / scale, blocks, rtol=1e-6)
        both = np.sqrt(np.sum(gradient["embedding"] ** 2) + np.sum(gradient["positions"] ** 2))
        assert float(found.embedding) / scale == pytest.approx(both, rel=1e-6)
        assert float(found.final_norm) / scale == pytest.approx(np.linalg.norm(gradient["final_norm.weight"]), rel=1e-6)
        assert float(found.unembedding) == 0
    nothing = block_norms({"embedding": jnp.zeros((2, 2))}, ((0, 1, 2),))
    assert nothing.blocks.shape == (3,)
    assert not np.asarray(nothing.blocks).any()
    assert float(nothing.embedding) == 0


def test_devices_that_share_the_pairs_find_what_one_does(make_decoder: Callable[..., Decoder]) -> None:
    """Rows of a micro-batch on four devices, parameters split among two of them in each of two ways."""
    examples, reference = pairs(), np.random.default_rng(1).normal(size=(COUNT, 2)).astype(np.float32)
    model = make_decoder(0, depth=2)
    alone = found_on(model, examples, reference, None)
    mesh = make_mesh(ParallelConfig(2, 2, 2))
    parts, arrays = take_apart(model)
    shards = Shards(mesh)
    split = parts.assemble({path: jax.device_put(x, shards.parameter(path, x.shape)) for path, x in arrays.items()})
    shared = found_on(split, examples, reference, mesh)
    for one, two in zip(alone, shared, strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-5, atol=1e-6)


def found_on(
    model: Decoder, examples: list[Example], reference: np.ndarray, mesh: Mesh | None
) -> tuple[np.ndarray, ...]:
    shape = shape_for(examples, 256, mesh)
    assert shape.rows % (1 if mesh is None else 4) == 0
    logp = log_probabilities(model, examples, shape, lambda n: None, mesh)
    found = preference_gradient(model, examples, GROUPS, reference, ObjectiveConfig("dpo"), shape, lambda n: None, mesh)
    return logp, found.blocks, found.blocks_without, found.margin_without, np.array(list(found.apart.values()))
