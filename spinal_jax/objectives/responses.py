"""Fixed shapes for training: responses packed into rows, rows into micro-batches, micro-batches into optimiser steps.

An example is one sequence (`sft`, `lm`) or two (chosen and rejected), which stay in one micro-batch because the loss
needs both. Where the two begin with the same prompt it is computed once, and both responses lie behind it in one row
(prefix sharing). A step has as many micro-batches as its examples need; all have one shape, so one compiled function
serves a run whatever the lengths, and padding wastes little.
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
MICRO_OVERHEAD = 128  # what starting a micro-batch costs, in tokens: weighs many small ones against padding
UNBOUNDED = 2**31 - 1
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
@dataclass(frozen=True, kw_only=True)
class ResponseBatch:
    """R rows of T tokens that hold up to S sequences. Those of pair p are 2 p (chosen) and 2 p + 1 (rejected)."""

    tokens: Array  # int32 [R, T]
    positions: Array  # int32 [R, T] place in its own sequence
    segments: Array  # int32 [R, T] 0: padding; 1, 2, ...: the sequences of a row, a pair with a shared prompt being one
    lengths: Array  # int32 [R, T] tokens in its own sequence; of a shared prompt, in the longer of the two
    branches: Array | None  # int32 [R, T] 0: prompts that are shared and sequences by themselves; 1, 2: the responses
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
    """The one shape of a run's micro-batches."""

    rows: int  # R
    length: int  # T
    sequences: int  # S, at most
    shares_up_to: int = 0  # tokens of the longest sequence whose prompt may be shared with another; 0: none is


class Unit(NamedTuple):
    """What lies together in a row: one sequence, or two behind one prompt."""

    members: tuple[int, ...]  # which sequences of the example
    prefix: int  # leading tokens that are computed once; 0 for one sequence
    size: int  # tokens in the row


def units(example: Example, shares_up_to: int) -> list[Unit]:
    """The units of an example: two sequences that begin with the same prompt tokens are one unit."""
    if len(example) == 2 and max(len(sequence.ids) for sequence in example) <= shares_up_to:
        one, other = example
        most = min(one.start, other.start, len(one.ids) - 1, len(other.ids) - 1)
        differs = np.flatnonzero(one.ids[:most] != other.ids[:most])
        prefix = int(differs[0]) if len(differs) else most
        if prefix:
            return [Unit(members=(0, 1), prefix=prefix, size=len(one.ids) + len(other.ids) - prefix)]
    return [Unit(members=(place,), prefix=0, size=len(sequence.ids)) for place, sequence in enumerate(example)]


def longest_unit(examples: Iterable[Example], shares_up_to: int) -> int:
    """Tokens of the longest unit of some examples."""
    return max(unit.size for example in examples for unit in units(example, shares_up_to))


def shareable(config: DecoderConfig) -> int:
    """Tokens of the longest sequence whose prompt may be shared: beyond the length of pretraining, `dynamic` and
    `longrope` rotations depend on how long a sequence is. The state of a delta net goes from token to token of a row,
    so that no prompt of its models is shared."""
    if config.delta is not None:
        return 0
    bounds = [rope.original_positions for rope in config.ropes if rope.kind in ("dynamic", "longrope")]
    return min(bounds, default=UNBOUNDED)


def row_length(longest: int, micro_tokens: int) -> int:
    """T for units of up to `longest` tokens: a few of them share a row where they are short."""
    tight = -(-longest // 8) * 8
    return tight * max(1, min(ROW_TOKENS, micro_tokens) // tight)


def choose_shape(
    steps: Sequence[Sequence[Example]], longest: int, micro_tokens: int, multiple: int = 1, shares_up_to: int = 0
) -> Shape:
    """The shape with the least computed tokens over `steps`, each a list of examples, at most `micro_tokens` at a time.

    Args:
        steps: examples of some optimiser steps.
        longest: tokens of the longest unit of the run (`longest_unit`).
        micro_tokens: most tokens of a micro-batch; a single example may need more.
        multiple: of which the number of rows must be one: the devices that share them.
        shares_up_to: tokens of the longest sequence whose prompt may be shared (`shareable`); 0: none is.
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
    """A micro-batch that still has room: which unit stands in which row."""

    def __init__(self, shape: Shape):
        self.room = [shape.length] * shape.rows
        self.examples: list[int] = []
        self.rows: list[list[int]] = []  # of each example, the rows of its units

    def take(self, number: int, sizes: Sequence[int]) -> bool:
        """Puts the units of an example into the fullest rows that have room; False where they do not fit."""
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
    """The micro-batches of a step, each with the numbers of its examples in order.

    Args:
        step: the examples, of equally many sequences each.
        shape: from `choose_shape`.
        reference: [examples, sequences of each] log-probabilities under the reference, nats; None: not known.
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
            for branch, place in enumerate(unit.members, 1):
                ids, start = example[place].ids, example[place].start
                # The first member lies whole behind `begin`; of the second, what is its own lies behind the first.
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
                    batch.reference[slot] = reference[number, place]
                slot += 1
    return jax.tree.map(jnp.asarray, batch)
