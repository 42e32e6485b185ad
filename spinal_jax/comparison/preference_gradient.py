"""Where in depth preference pulls: norms of the gradient of the mean DPO loss by block, with replicates.

Without group g the mean gradient is `(S - s_g) / (n - n_g)`, S the sum over all pairs and s_g over the group's, and
`|S - s_g|^2 = |S|^2 - |s_g|^2 - 2 <S - s_g, s_g>`. Keeping every s_g would take a copy of all parameters for each
group, and a second pass over the pairs twice the time. Of each s_g stay instead, block by block, its exact norm and a
sketch: the sums, with random signs, of every SKETCH-th entry. An inner product of two sketches is that of the gradients
to `|a| |b| / sqrt(SKETCH)`, 0.8 % (Alon, Matias, Szegedy 1999), and exact where a block has no more parameters than
SKETCH; that touches the intervals alone, and far less than they are wide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh

from spinal_jax.config.training import ObjectiveConfig
from spinal_jax.metrics.gradient import block_norms
from spinal_jax.models.decoder import Decoder
from spinal_jax.models.parts import take_apart
from spinal_jax.objectives.responses import Example, ResponseBatch, Shape, choose_shape, micro_batches
from spinal_jax.objectives.step import Arrays, Steps, make_steps
from spinal_jax.parallel.mesh import on_all, placed, row_multiple, shard_rows
from spinal_jax.progress import Advance

SKETCH = 2**14
MOST_AT_ONCE = 8  # pairs that are packed together

Layers = tuple[tuple[int, ...], ...]  # the blocks that each stack of parameters holds


@dataclass(frozen=True)
class PreferenceGradient:
    """L2 norms of the gradient of the mean loss, and what the policy's rewards say of the pairs. float64."""

    blocks: np.ndarray  # [D]
    blocks_without: np.ndarray  # [G, D] without each group of pairs; [0, D] where there is only one
    pairs: np.ndarray  # [G] pairs of each group that has any, in ascending order of groups
    apart: Mapping[str, float]  # embedding, final_norm, unembedding
    accuracy: float  # share of pairs whose chosen response has the larger implicit reward
    accuracy_without: np.ndarray  # [G], or [0]
    margin: float  # mean of chosen less rejected reward, beta (log p - log p_ref)
    margin_without: np.ndarray  # [G], or [0]


def shape_for(examples: Sequence[Example], micro_tokens: int, mesh: Mesh | None = None) -> Shape:
    """The common shape of the micro-batches of these pairs: at most `micro_tokens` tokens if a pair fits. The number of
    devices of `mesh` divides its rows."""
    longest = max(len(sequence.ids) for example in examples for sequence in example)
    steps = [examples[i : i + MOST_AT_ONCE] for i in range(0, len(examples), MOST_AT_ONCE)]
    return choose_shape(steps, longest, micro_tokens, 1 if mesh is None else row_multiple(mesh))


def log_probabilities(
    model: Decoder, examples: Sequence[Example], shape: Shape, advance: Advance, mesh: Mesh | None = None
) -> np.ndarray:
    """float32 [pairs, 2]: log-probabilities of the chosen and the rejected response, nats. The devices of `mesh` split
    the rows of each micro-batch."""
    steps, arrays = _steps(model, ObjectiveConfig("dpo"))
    scores = np.zeros((len(examples), 2), np.float32)
    for start in range(0, len(examples), MOST_AT_ONCE):
        part = examples[start : start + MOST_AT_ONCE]
        for numbers, batch in micro_batches(part, shape):
            logp = _on_host(steps.score(arrays, {}, _shared(batch, mesh)), mesh)[: 2 * len(numbers)]
            scores[[start + number for number in numbers]] = logp.reshape(-1, 2)
        advance(len(part))
    return scores


def preference_gradient(
    model: Decoder,
    examples: Sequence[Example],
    groups: Sequence[int],
    reference: np.ndarray,
    objective: ObjectiveConfig,
    shape: Shape,
    advance: Advance,
    mesh: Mesh | None = None,
) -> PreferenceGradient:
    """Norms of the gradient of the mean preference loss over the parameters of each block.

    Args:
        model: the policy.
        examples: chosen and rejected response of each pair.
        groups: of each pair, for the jackknife.
        reference: [pairs, 2] log-probabilities under the reference (`log_probabilities`).
        objective: the loss.
        shape: from `shape_for`.
        advance: called with the number of completed pairs.
        mesh: the devices of the model, which split the rows of a micro-batch; None is one device. A collective
            operation of all processes, with equal arguments and equal results.
    """
    depth, layers = model.config.depth, model.config.layers_of_stacks
    steps, arrays = _steps(model, objective)
    one = np.float32(1)
    total: Arrays | None = None
    squares, sketches, counts, accurate, margins = [], [], [], [], []
    for group in sorted(set(groups)):
        members = [i for i, g in enumerate(groups) if g == group]
        state: Any = None
        for start in range(0, len(members), MOST_AT_ONCE):
            some = members[start : start + MOST_AT_ONCE]
            for _, host in micro_batches([examples[i] for i in some], shape, reference[some]):
                batch = _shared(host, mesh)
                if state is None:  # start from zeros, so that only one function is compiled
                    state = _zeros(jax.eval_shape(steps.first, arrays, {}, batch, one), arrays, mesh)
                state = steps.more(arrays, {}, batch, one, *state)
            advance(len(some))
        gradient, sums = state
        accurate.append(float(sums.accurate))
        margins.append(float(sums.chosen) - float(sums.rejected))
        norms, sketch = (_on_host(x, mesh).astype(np.float64) for x in _described(gradient, layers))
        squares.append(norms**2)
        sketches.append(sketch)
        counts.append(len(members))
        total = gradient if total is None else _add(total, gradient)
    assert total is not None
    norms = jax.tree.map(lambda x: _on_host(x, mesh).astype(np.float64), _all_norms(total, layers))
    pairs = np.array(counts, np.float64)
    count = pairs.sum()
    without = np.zeros((0, depth))
    accuracy, accuracy_without = _means(np.array(accurate), pairs)
    margin, margin_without = _means(np.array(margins), pairs)
    if len(pairs) > 1:
        sketch = np.array(sketches)  # [G, D, SKETCH]
        crossing = np.einsum("gdk,gdk->gd", sketch.sum(axis=0) - sketch, sketch)
        rest = np.maximum(norms.blocks**2 - np.array(squares) - 2 * crossing, 0)
        without = np.sqrt(rest) / (count - pairs)[:, None]
    apart = {name: float(getattr(norms, name) / count) for name in norms._fields[1:]}
    return PreferenceGradient(
        blocks=norms.blocks / count,
        blocks_without=without,
        pairs=pairs,
        apart=apart,
        accuracy=accuracy,
        accuracy_without=accuracy_without,
        margin=margin,
        margin_without=margin_without,
    )


def _means(sums: np.ndarray, pairs: np.ndarray) -> tuple[float, np.ndarray]:
    """The mean over all pairs, and [G] the means without each group ([0] for a single group), from sums [G]."""
    without = (sums.sum() - sums) / (pairs.sum() - pairs) if len(pairs) > 1 else np.zeros(0)
    return float(sums.sum() / pairs.sum()), without


def _steps(model: Decoder, objective: ObjectiveConfig) -> tuple[Steps, Arrays]:
    parts, arrays = take_apart(model)
    dtype = str(model.dtype)
    return make_steps(parts, model.config, objective, optax.identity(), dtype=dtype, remat="blocks"), arrays


def _shared(batch: ResponseBatch, mesh: Mesh | None) -> ResponseBatch:
    return batch if mesh is None else shard_rows(batch, mesh)


def _on_host(x: Array, mesh: Mesh | None) -> np.ndarray:
    return np.asarray(x if mesh is None else placed(x, on_all(mesh)))


def _zeros(shapes: tuple[Any, Any], arrays: Arrays, mesh: Mesh | None) -> Any:
    """Zeros in the shapes of (gradient, sums), with the gradient placed like the parameters."""

    def zeros() -> Any:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    if mesh is None:
        return zeros()
    gradient, sums = shapes
    where = {name: arrays[name].sharding for name in gradient}, jax.tree.map(lambda _: on_all(mesh), sums)
    return jax.jit(zeros, out_shardings=where)()


@jax.jit
def _add(a: Arrays, b: Arrays) -> Arrays:
    return jax.tree.map(jnp.add, a, b)


def _described(gradient: Arrays, layers: Layers) -> tuple[Array, Array]:
    """Norms [D] and sketches [D, SKETCH] of the gradients of the blocks."""
    return _norms(gradient, layers), _sketch(gradient, layers)


_norms = jax.jit(lambda gradient, layers: block_norms(gradient, layers).blocks, static_argnums=1)
_all_norms = jax.jit(block_norms, static_argnums=1)


@partial(jax.jit, static_argnums=1)
def _sketch(gradient: Arrays, layers: Layers) -> Array:
    """[D, SKETCH] linear sketch of the gradient of each block, with the same random signs at every call; `layers`: the
    blocks of each stack."""
    sketch = jnp.zeros((sum(map(len, layers)), SKETCH), jnp.float32)
    begin: dict[int, int] = {}
    for number, (path, g) in enumerate(sorted(gradient.items())):
        if not path.startswith("stacks."):
            continue
        stack = int(path.split(".")[1])
        flat = g.reshape(g.shape[0], -1).astype(jnp.float32)
        signs = jax.random.rademacher(jax.random.fold_in(jax.random.key(0), number), flat.shape[1:], jnp.float32)
        # Entries are placed consecutively, so that blocks of at most SKETCH entries have no collisions.
        behind = begin.get(stack, 0) % SKETCH
        length = -(-(behind + flat.shape[1]) // SKETCH) * SKETCH
        signed = jnp.pad(flat * signs, ((0, 0), (behind, length - behind - flat.shape[1])))
        part = jnp.sum(signed.reshape(len(flat), -1, SKETCH), axis=1)
        sketch = sketch.at[jnp.array(layers[stack])].add(part)
        begin[stack] = begin.get(stack, 0) + flat.shape[1]
    return sketch
