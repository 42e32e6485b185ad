"""Training as an iterator over optimiser steps; the caller decides when to log, trace and save."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from spinal_jax.config.training import TrainConfig
from spinal_jax.metrics.gradient import BlockNorms
from spinal_jax.objectives.examples import Examples
from spinal_jax.objectives.responses import Example, ResponseBatch, Shape, micro_batches
from spinal_jax.objectives.step import Arrays, Steps, Sums, TrainState, metrics
from spinal_jax.parallel.agreement import to_host
from spinal_jax.parallel.mesh import shard_rows

# Reference log-probabilities [examples, sequences of each] of the examples with these numbers.
Lookup = Callable[[Sequence[int]], np.ndarray]


class Diverged(Exception):
    """The loss or a gradient was not finite; nothing was updated."""

    def __init__(self, step: int, rows: list[int], state: TrainState):
        super().__init__(f"step {step}: the loss or a gradient is not finite, on the examples of rows {rows}")
        self.step, self.rows, self.state = step, rows, state


class Stepped(NamedTuple):
    """One optimiser step: `state` after `number + 1` updates; the metrics are from before the last update."""

    number: int
    state: TrainState
    metrics: dict[str, float]
    norms: BlockNorms  # of the gradient, before clipping


@dataclass(frozen=True)
class Task:
    """Constants of a run."""

    config: TrainConfig
    steps: Steps
    fixed: Arrays  # parameters that are not trained
    examples: Examples
    shape: Shape
    mesh: Mesh
    rate: Callable[[int], jax.typing.ArrayLike]  # learning rate of a step
    train_reference: Lookup | None  # of training examples; None without a reference or with a live one
    held_out_reference: Lookup | None
    live_reference: Arrays | None  # parameters of a reference that is evaluated in each step

    def batches(self, examples: Sequence[Example], reference: np.ndarray | None) -> Iterator[ResponseBatch]:
        """The micro-batches of some examples, on the mesh."""
        for _, host in micro_batches(examples, self.shape, reference):
            batch = shard_rows(host, self.mesh)
            if self.live_reference is not None:
                logp = self.steps.score(self.live_reference, self.fixed, batch)
                batch = dataclasses.replace(batch, reference=logp)
            yield batch

    def normaliser(self, examples: Sequence[Example]) -> float:
        """The normaliser of the summed loss: number of pairs or of response tokens."""
        if self.config.objective.kind == "dpo":
            return float(len(examples))
        return float(sum(len(sequence.ids) - sequence.start for example in examples for sequence in example))


def optimise(task: Task, state: TrainState, start: int, stop: int) -> Iterator[Stepped]:
    """Optimiser steps `start` to `stop`, 0-based. The initial state and each yielded state are donated
    by the next step.

    Raises:
        Diverged: the loss or a gradient is not finite.
    """
    config, examples = task.config, task.examples
    lengths = np.array([sum(len(sequence.ids) for sequence in example) for example in examples.train])
    tokens = sum(int(lengths[examples.step(n, config.batch_size, config.seed)[0]].sum()) for n in range(start))
    for number in range(start, stop):
        chosen, step = examples.step(number, config.batch_size, config.seed)
        reference = None if task.train_reference is None else task.train_reference(chosen)
        normaliser = np.float32(task.normaliser(step))
        gradients: Arrays | None = None
        sums: Sums | None = None
        fixed = {**task.fixed, **task.steps.merge(state.parameters, task.fixed)}
        for batch in task.batches(step, reference):
            if gradients is None:
                gradients, sums = task.steps.first(state.parameters, fixed, batch, normaliser)
            else:
                gradients, sums = task.steps.more(state.parameters, fixed, batch, normaliser, gradients, sums)
        assert gradients is not None
        assert sums is not None
        updated = task.steps.update(state, gradients, sums)
        del gradients, fixed
        state = updated.state
        host_sums, norm, norms, fine = to_host((sums, updated.norm, updated.norms, updated.fine))
        if not fine:
            raise Diverged(number, [examples.train_ids[i] for i in chosen], state)
        tokens += int(lengths[chosen].sum())
        logged = metrics(host_sums, config.objective.kind)
        logged |= {
            "grad_norm": float(norm),
            "learning_rate": float(jnp.asarray(task.rate(number))),
            "epoch": (number + 1) * config.batch_size / len(examples.train),
            "num_tokens": tokens,
        }
        yield Stepped(number, state, logged, norms)


def evaluate(task: Task, parameters: Arrays) -> dict[str, float]:
    """The `metrics` of the held-out examples."""
    config, held_out = task.config, task.examples.held_out
    total: Sums | None = None
    for start in range(0, len(held_out), config.batch_size):
        part = held_out[start : start + config.batch_size]
        numbers = range(start, start + len(part))
        reference = None if task.held_out_reference is None else task.held_out_reference(numbers)
        for batch in task.batches(part, reference):
            sums = jax.tree.map(np.float64, to_host(task.steps.evaluate(parameters, task.fixed, batch)))
            total = sums if total is None else jax.tree.map(np.add, total, sums)
    assert total is not None  # only called where examples are held out
    return metrics(total, config.objective.kind, "eval_")
