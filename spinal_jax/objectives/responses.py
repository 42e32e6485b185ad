"""Fixed shapes for training: responses packed into rows, rows into micro-batches, micro-batches into optimiser steps.

An example is one sequence (`sft`, `lm`) or two (chosen and rejected), which stay in one micro-batch because the loss
needs both. A step has as many micro-batches as its examples need; all have one shape, so one compiled function serves a
run whatever the lengths, and padding wastes little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

ROW_TOKENS = 256  # short sequences share rows of about this many tokens
MICRO_OVERHEAD = 128  # what starting a micro-batch costs, in tokens: weighs many small ones against padding
TRIED_STEPS = 32  # steps that are packed to choose how many rows a micro-batch has


class Response(Protocol):
    """A tokenised prompt with the response behind it."""

    @property
    def ids(self) -> np.ndarray:
        """int32 [L]."""
        ...

    @property
    def start(self) -> int:
        """Index of the first response token, at least 1."""
        ...


Example = Sequence[Response]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ResponseBatch:
    """R rows of T tokens that hold up to S sequences. Those of pair p are 2 p (chosen) and 2 p + 1 (rejected)."""

    tokens: Array  # int32 [R, T]
    positions: Array  # int32 [R, T] place in its own sequence
    segments: Array  # int32 [R, T] 0: padding; 1, 2, ...: the sequences of a row
    lengths: Array  # int32 [R, T] tokens in its own sequence
    predicting: Array  # int32 [R, T] positions of a row that predict a response token, which come first; then 0
    targets: Array  # int32 [R, T] the tokens they predict
    owner: Array  # int32 [R, T] the sequences they belong to
    weight: Array  # float32 [R, T] 1 for the real ones, then 0
    counts: Array  # float32 [S] response tokens of a sequence; 0 where there is none
    reference: Array  # float32 [S] its log-probability under the reference, nats; 0 where that is not known

    @property
    def sequences(self) -> int:
        """S."""
        return self.counts.shape[0]


@dataclass(frozen=True)
class Shape:
    """The one shape of a run's micro-batches: R rows of T tokens for at most S sequences."""

    rows: int
    length: int
    sequences: int


def row_length(longest: int, micro_tokens: int) -> int:
    """T for sequences of up to `longest` tokens: a few of them share a row where they are short."""
    tight = -(-longest // 8) * 8
    return tight * max(1, min(ROW_TOKENS, micro_tokens) // tight)


def choose_shape(steps: Sequence[Sequence[Example]], longest: int, micro_tokens: int, multiple: int = 1) -> Shape:
    """The shape with the least computed tokens over `steps`, each a list of examples, at most `micro_tokens` at a time.

    Args:
        steps: examples of some optimiser steps.
        longest: tokens of the longest sequence of the run.
        micro_tokens: most tokens of a micro-batch; a single example may need more.
        multiple: of which the number of rows must be one: the devices that share them.
    """
    length = row_length(longest, micro_tokens)
    width = max(len(example) for step in steps for example in step)
    sequences = width * max(len(step) for step in steps)
    least = max(multiple, -(-width // multiple) * multiple if length < 2 * longest else multiple)
    most = max(least, micro_tokens // length // multiple * multiple)
    tried = {max(least, most // k // multiple * multiple) for k in (1, 2, 3, 4, 6, 8, 12, 16)}

    def cost(rows: int) -> int:
        shape = Shape(rows, length, sequences)
        return sum(len(assign(step, shape)) for step in steps[:TRIED_STEPS]) * (rows * length + MICRO_OVERHEAD)

    return Shape(min(sorted(tried, reverse=True), key=cost), length, sequences)


class _Open:
    """A micro-batch that still has room: which sequence stands where."""

    def __init__(self, shape: Shape):
        self.room = [shape.length] * shape.rows
        self.examples: list[int] = []
        self.rows: list[list[int]] = []  # of each example, the rows of its sequences

    def take(self, number: int, sizes: Sequence[int]) -> bool:
        """Puts the sequences of an example into the fullest rows that have room, or says that they do not fit."""
        room, rows = list(self.room), []
        for size in sizes:
            row = min((r for r in range(len(room)) if room[r] >= size), key=lambda r: room[r], default=None)
            if row is None:
                return False
            room[row] -= size
            rows.append(row)
        self.room = room
        self.examples.append(number)
        self.rows.append(rows)
        return True


def assign(step: Sequence[Example], shape: Shape) -> list[_Open]:
    """Which micro-batch and rows every example of a step goes into, the longest first."""
    opened: list[_Open] = []
    sizes = [[len(sequence.ids) for sequence in example] for example in step]
    for number in sorted(range(len(step)), key=lambda n: (-sum(sizes[n]), n)):
        if not any(micro.take(number, sizes[number]) for micro in opened):
            micro = _Open(shape)
            if not micro.take(number, sizes[number]):
                raise ValueError(f"sequences of {sizes[number]} tokens do not fit {shape}")
            opened.append(micro)
    return opened


def micro_batches(
    step: Sequence[Example], shape: Shape, reference: np.ndarray | None = None
) -> list[tuple[list[int], ResponseBatch]]:
    """The micro-batches of a step, each with the numbers of its examples in order.

    Args:
        step: the examples, of equally many sequences each.
        shape: from `choose_shape`.
        reference: [examples, sequences of each] log-probabilities under the reference, nats; None: not known.
    """
    return [(micro.examples, _fill(step, micro, shape, reference)) for micro in assign(step, shape)]


def _fill(step: Sequence[Example], micro: _Open, shape: Shape, reference: np.ndarray | None) -> ResponseBatch:
    size = (shape.rows, shape.length)
    tokens, positions, segments, lengths, predicting, targets, owner = (np.zeros(size, np.int32) for _ in range(7))
    weight = np.zeros(size, np.float32)
    counts, known = np.zeros(shape.sequences, np.float32), np.zeros(shape.sequences, np.float32)
    filled, predicted, held = ([0] * shape.rows for _ in range(3))
    slot = 0
    for number, rows in zip(micro.examples, micro.rows, strict=True):
        for place, (sequence, row) in enumerate(zip(step[number], rows, strict=True)):
            ids, start, first = sequence.ids, sequence.start, filled[row]
            span = slice(first, first + len(ids))
            held[row] += 1
            tokens[row, span], positions[row, span] = ids, np.arange(len(ids))
            segments[row, span], lengths[row, span] = held[row], len(ids)
            into = slice(predicted[row], predicted[row] + len(ids) - start)
            predicting[row, into] = np.arange(first + start - 1, first + len(ids) - 1)
            targets[row, into], owner[row, into], weight[row, into] = ids[start:], slot, 1
            filled[row], predicted[row] = span.stop, into.stop
            counts[slot] = len(ids) - start
            if reference is not None:
                known[slot] = reference[number, place]
            slot += 1
    fields = (tokens, positions, segments, lengths, predicting, targets, owner, weight, counts, known)
    return ResponseBatch(*map(jnp.asarray, fields))
