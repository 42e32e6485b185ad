"""Fixed shapes for training: responses packed into rows, rows into micro-batches, micro-batches into optimiser steps.

An example is one sequence (`sft`, `lm`) or two (chosen and rejected), which stay in one micro-batch because the loss
needs both. If both start with the same prompt, it is computed once and both responses follow it in one row (prefix
sharing). All micro-batches of a run have one shape, so that one function is compiled, with little padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from spinal_jax.models.config import DecoderConfig

ROW_TOKENS = 256  # short sequences share rows of about this many tokens
MICRO_OVERHEAD = 128  # cost of a micro-batch in tokens, which weighs many small ones against padding
UNBOUNDED = 2**31 - 1
TRIED_STEPS = 32  # steps that are packed to choose the number of rows


class Response(Protocol):
    """A tokenised prompt followed by a response."""

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
@dataclass(frozen=True, kw_only=True)
class ResponseBatch:
    """R rows of T tokens with up to S sequences. Pair p has the sequences 2 p (chosen) and 2 p + 1 (rejected)."""

    tokens: Array  # int32 [R, T]
    positions: Array  # int32 [R, T] position within the sequence
    segments: Array  # int32 [R, T] 0 for padding; 1, 2, ... for the units of a row
    lengths: Array  # int32 [R, T] length of the sequence; for a shared prompt, of the longer one
    branches: Array | None  # int32 [R, T] 1, 2 for responses behind a shared prompt; else 0
    predicting: Array  # int32 [R, T] positions of a row that predict a response token, padded with 0
    targets: Array  # int32 [R, T] tokens that these predict
    owner: Array  # int32 [R, T] sequences of these
    weight: Array  # float32 [R, T] 1 for these, 0 for padding
    counts: Array  # float32 [S] response tokens of a sequence; 0 for padding
    reference: Array  # float32 [S] reference log-probability, nats; 0 if unknown

    @property
    def sequences(self) -> int:
        """S."""
        return self.counts.shape[0]

    @staticmethod
    def empty(shape: Shape) -> ResponseBatch:
        """Padding alone, as arrays of the host."""

        def array(dtype: type, *sides: int) -> Any:
            return np.zeros(sides or (shape.rows, shape.length), dtype)

        return ResponseBatch(
            tokens=array(np.int32),
            positions=array(np.int32),
            segments=array(np.int32),
            lengths=array(np.int32),
            branches=array(np.int32) if shape.shares_up_to else None,
            predicting=array(np.int32),
            targets=array(np.int32),
            owner=array(np.int32),
            weight=array(np.float32),
            counts=array(np.float32, shape.sequences),
            reference=array(np.float32, shape.sequences),
        )


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The shape of all micro-batches of a run."""

    rows: int  # R
    length: int  # T
    sequences: int  # maximum S
    shares_up_to: int = 0  # length up to which sequences may share a prompt; 0 disables sharing


class Unit(NamedTuple):
    """Adjacent tokens in a row: one sequence, or two with a shared prompt."""

    members: tuple[int, ...]  # sequences of the example
    prefix: int  # shared leading tokens; 0 for one sequence
    size: int  # tokens in the row


def units(example: Example, shares_up_to: int) -> list[Unit]:
    """The units of an example. Two sequences with common leading prompt tokens are one unit."""
    if len(example) == 2 and max(len(sequence.ids) for sequence in example) <= shares_up_to:
        one, other = example
        most = min(one.start, other.start, len(one.ids) - 1, len(other.ids) - 1)
        differs = np.flatnonzero(one.ids[:most] != other.ids[:most])
        prefix = int(differs[0]) if len(differs) else most
        if prefix:
            return [Unit(members=(0, 1), prefix=prefix, size=len(one.ids) + len(other.ids) - prefix)]
    return [Unit(members=(index,), prefix=0, size=len(sequence.ids)) for index, sequence in enumerate(example)]


def longest_unit(examples: Iterable[Example], shares_up_to: int) -> int:
    """Tokens of the longest unit of some examples."""
    return max(unit.size for example in examples for unit in units(example, shares_up_to))


def shareable(config: DecoderConfig) -> int:
    """The length up to which sequences may share a prompt. Beyond the pretraining length, `dynamic` and `longrope`
    rotations depend on the length of the sequence. Models with delta nets share no prompts, because their state runs
    along the row."""
    if config.delta is not None:
        return 0
    bounds = [rope.original_positions for rope in config.ropes if rope.kind in ("dynamic", "longrope")]
    return min(bounds, default=UNBOUNDED)


def row_length(longest: int, micro_tokens: int) -> int:
    """T for units of up to `longest` tokens; several short units share a row."""
    tight = -(-longest // 8) * 8
    return tight * max(1, min(ROW_TOKENS, micro_tokens) // tight)


def choose_shape(
    steps: Sequence[Sequence[Example]], longest: int, micro_tokens: int, multiple: int = 1, shares_up_to: int = 0
) -> Shape:
    """The shape with the fewest tokens, padding included, over `steps`, with at most `micro_tokens` in a micro-batch.

    Args:
        steps: examples of some optimiser steps.
        longest: tokens of the longest unit of the run (`longest_unit`).
        micro_tokens: maximum tokens of a micro-batch; a single example may need more.
        multiple: the number of rows is a multiple of this, the number of devices that split them.
        shares_up_to: length up to which sequences may share a prompt (`shareable`); 0 disables sharing.
    """
    length = row_length(longest, micro_tokens)
    width = max(len(example) for step in steps for example in step)
    widest = max(len(units(example, shares_up_to)) for step in steps for example in step)
    sequences = width * max(len(step) for step in steps)
    least = max(multiple, -(-widest // multiple) * multiple if length < 2 * longest else multiple)
    most = max(least, micro_tokens // length // multiple * multiple)
    tried = {max(least, most // k // multiple * multiple) for k in (1, 2, 3, 4, 6, 8, 12, 16)}

    def shape(rows: int) -> Shape:
        return Shape(rows=rows, length=length, sequences=sequences, shares_up_to=shares_up_to)

    def cost(rows: int) -> int:
        return sum(len(assign(step, shape(rows))) for step in steps[:TRIED_STEPS]) * (rows * length + MICRO_OVERHEAD)

    return shape(min(sorted(tried, reverse=True), key=cost))


class _Open:
    """A micro-batch during packing: the rows of its units."""

    def __init__(self, shape: Shape):
        self.room = [shape.length] * shape.rows
        self.examples: list[int] = []
        self.rows: list[list[int]] = []  # for each example, the rows of its units

    def take(self, number: int, sizes: Sequence[int]) -> bool:
        """Puts the units of an example into the fullest rows with room. Returns False if they do not fit."""
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
    """Assigns the examples of a step to micro-batches and rows, the longest first."""
    opened: list[_Open] = []
    sizes = [[unit.size for unit in units(example, shape.shares_up_to)] for example in step]
    for number in sorted(range(len(step)), key=lambda n: (-sum(sizes[n]), n)):
        if not any(micro.take(number, sizes[number]) for micro in opened):
            micro = _Open(shape)
            if not micro.take(number, sizes[number]):
                raise ValueError(f"units of {sizes[number]} tokens do not fit {shape}")
            opened.append(micro)
    return opened


def micro_batches(
    step: Sequence[Example], shape: Shape, reference: np.ndarray | None = None
) -> list[tuple[list[int], ResponseBatch]]:
    """The micro-batches of a step, each with the numbers of its examples.

    Args:
        step: the examples, of equally many sequences each.
        shape: from `choose_shape`.
        reference: [examples, sequences of each] reference log-probabilities, nats; None if unknown.
    """
    return [(micro.examples, _fill(step, micro, shape, reference)) for micro in assign(step, shape)]


def _fill(step: Sequence[Example], micro: _Open, shape: Shape, reference: np.ndarray | None) -> ResponseBatch:
    batch: Any = ResponseBatch.empty(shape)
    filled, predicted, held = ([0] * shape.rows for _ in range(3))
    slot = 0
    for number, rows in zip(micro.examples, micro.rows, strict=True):
        example = step[number]
        for unit, row in zip(units(example, shape.shares_up_to), rows, strict=True):
            begin, held[row] = filled[row], held[row] + 1
            for branch, member in enumerate(unit.members, 1):
                ids, start = example[member].ids, example[member].start
                # The first member starts at `begin`; of the second, the part after the shared prompt follows the first.
                own = unit.prefix if branch > 1 else 0
                span = slice(filled[row], filled[row] + len(ids) - own)
                where = np.arange(len(ids)) + begin
                where[own:] = np.arange(span.start, span.stop)
                batch.tokens[row, span], batch.positions[row, span] = ids[own:], np.arange(own, len(ids))
                batch.segments[row, span] = held[row]
                batch.lengths[row, span] = len(ids)
                if len(unit.members) > 1:
                    batch.branches[row, where[unit.prefix :]] = branch
                    shared = slice(begin, begin + unit.prefix)
                    batch.lengths[row, shared] = np.maximum(batch.lengths[row, begin], len(ids))
                into = slice(predicted[row], predicted[row] + len(ids) - start)
                batch.predicting[row, into] = where[start - 1 : -1]
                batch.targets[row, into], batch.owner[row, into], batch.weight[row, into] = ids[start:], slot, 1
                filled[row], predicted[row] = span.stop, into.stop
                batch.counts[slot] = len(ids) - start
                if reference is not None:
                    batch.reference[slot] = reference[number, member]
                slot += 1
    return jax.tree.map(jnp.asarray, batch)
