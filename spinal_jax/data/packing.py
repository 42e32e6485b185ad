"""Fixed shapes from ragged prompts: sequences are packed into rows, rows into batches.

Several prompts share a row, told apart by `segments`, so that padding wastes little and one compiled shape serves a
whole prompt set. Rows are sorted by jackknife group, a row holds prompts of one group only, and each row names the
accumulator of its group (its `slot`). Every group has its own. Where the devices have no room for all of them, a batch
touches at most `SLOTS` groups in a row, whose sums are complete and leave before another group takes their slot.

Where devices share the rows of a batch, each has equally many, one after the other (a shard), and the measured
positions of its own rows: what a device measures never has to come from another.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax import Array
from jaxtyping import Float32, Int32

from spinal_jax.data.positions import Positions as Positions
from spinal_jax.data.positions import TokenSequence as TokenSequence
from spinal_jax.data.vocabulary import Vocabulary
from spinal_jax.errors import UserError
from spinal_jax.stats.groups import Groups

SLOTS = 2  # most groups in a batch where the sums of a group leave the devices as soon as they are complete
LENGTH_CLASSES = (512, 2048, 8192, 32768, 131072)  # sequences up to each of these lengths share a compiled shape
LONG_MULTIPLE = 512  # rows above the first class are a multiple of this, for attention by blocks of queries
ROW_LENGTHS = (128, 192, 256, 384, 512)  # tried beside multiples of the longest sequence
MEASURED_MULTIPLE = 8
BATCH_OVERHEAD = 128  # what starting a batch costs, in tokens: weighs many small batches against padding
ATTENTION_LENGTH = 8192  # the row length at which attention costs as much as the rest of a block, roughly


if TYPE_CHECKING:
    OnEither = Array
else:
    OnEither = Array | np.ndarray  # on devices, or on the host


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """B rows of T tokens, and M measured positions among them. Padding has segment 0 and weight 0.

    A pytree, whose leaves may be other things than arrays. Replicas have an axis of devices in front of all others.
    """

    tokens: Int32[OnEither, "*devices B T"]
    positions: Int32[OnEither, "*devices B T"]  # place in its own sequence
    segments: Int32[OnEither, "*devices B T"]  # 0: padding; 1, 2, ...: the sequences of a row
    lengths: Int32[OnEither, "*devices B T"]  # tokens in its own sequence
    counted: Float32[OnEither, "*devices B T"]  # 1 where the position counts for contraction
    slots: Int32[OnEither, "*devices B"]  # the accumulator of the row's group
    measured: Int32[OnEither, "*devices M"]  # flat index b * T + t, within its shard
    measured_weight: Float32[OnEither, "*devices M"]  # 1 for the real ones, which come first in each shard
    measured_group: Int32[OnEither, "*devices M"]

    @staticmethod
    def empty(height: int, length: int, measured: int) -> TokenBatch:
        """A batch of padding alone, as arrays of the host: B rows of T tokens and room for M positions."""
        by_token, by_row, by_position = (height, length), (height,), (measured,)
        arrays: dict[str, Any] = {
            "tokens": np.zeros(by_token, np.int32),
            "positions": np.zeros(by_token, np.int32),
            "segments": np.zeros(by_token, np.int32),
            "lengths": np.zeros(by_token, np.int32),
            "counted": np.zeros(by_token, np.float32),
            "slots": np.zeros(by_row, np.int32),
            "measured": np.zeros(by_position, np.int32),
            "measured_weight": np.zeros(by_position, np.float32),
            "measured_group": np.zeros(by_position, np.int32),
        }
        return TokenBatch(**arrays)


def _leaves(batch: TokenBatch) -> tuple[list[tuple[object, object]], None]:
    return [(jax.tree_util.GetAttrKey(name), leaf) for name, leaf in vars(batch).items()], None


def _batch(_: None, leaves: Iterable[object]) -> TokenBatch:
    """A batch of any leaves; only arrays have shapes that can be checked."""
    named = dict(zip(TokenBatch.__dataclass_fields__, leaves, strict=True))
    if all(isinstance(leaf, Array | np.ndarray) for leaf in named.values()):
        return TokenBatch(**named)  # pyright: ignore[reportArgumentType]
    batch = object.__new__(TokenBatch)
    vars(batch).update(named)
    return batch


jax.tree_util.register_pytree_with_keys(TokenBatch, _leaves, _batch)


@dataclass(frozen=True)
class GroupRun:
    """Consecutive rows of one group in one length class: what one accumulator gathers before it is read."""

    group: int
    slot: int
    last_batch: int  # the batch after which it is complete


@dataclass(frozen=True)
class Packed:
    """One batch to be: the sequence numbers in each row, each row's visit, and the shape."""

    rows: tuple[tuple[int, ...], ...]
    visits: tuple[int, ...]
    height: int  # B
    length: int  # T
    measured: int  # M
    shards: int  # how many share the rows


@dataclass(frozen=True)
class Plan:
    """How a prompt set's sequences become batches, and what that costs."""

    sequences: Sequence[TokenSequence]
    selector: Positions
    skip: int
    batches: tuple[Packed, ...]
    visits: tuple[GroupRun, ...]
    slots: int  # accumulators that the rows of batches name
    leaves: bool  # whether sums of a group leave its accumulator, which others then take
    group_count: int = 0  # G, groups without a prompt included
    counts: Mapping[str, int] = field(default_factory=dict)  # what a trace says of how its prompts became sequences
    notes: tuple[str, ...] = ()  # sentences on that which a reader must know
    vocabulary: Vocabulary | None = None  # that distributions are taken over; None: every row of the unembedding

    @cached_property
    def groups_at_once(self) -> int:
        """Most groups in a batch."""
        return max((len({self.visits[visit].slot for visit in packed.visits}) for packed in self.batches), default=1)

    @cached_property
    def groups(self) -> Groups:
        """How much each group holds."""
        positions = np.zeros(self.group_count)
        for sequence in self.sequences:
            positions[sequence.group] += len(self.selector.of(sequence))
        return Groups(rows=self.rows_by_group(self.skip), positions=positions)

    def rows_by_group(self, skip: int) -> np.ndarray:
        """[G] contraction rows of each group where the first `skip` tokens of each sequence are left out."""
        rows = np.zeros(self.group_count)
        for sequence in self.sequences:
            rows[sequence.group] += max(0, len(sequence.ids) - skip)
        return rows

    @property
    def largest_prompt_share(self) -> float:
        """Share of the contraction rows that the longest prompt holds; 0 where there are none."""
        most = max((len(sequence.ids) - self.skip for sequence in self.sequences), default=0)
        return max(0, most) / max(1, self.rows)

    @property
    def tokens(self) -> int:
        """Real tokens."""
        return sum(len(s.ids) for s in self.sequences)

    def batch_tokens(self, number: int) -> int:
        """Real tokens of a batch."""
        return sum(len(self.sequences[n].ids) for row in self.batches[number].rows for n in row)

    @property
    def padded_tokens(self) -> int:
        """Tokens computed, padding included."""
        return sum(b.height * b.length for b in self.batches)

    @property
    def rows(self) -> int:
        """N: the positions that contraction measures."""
        return sum(max(0, len(s.ids) - self.skip) for s in self.sequences)

    @property
    def positions(self) -> int:
        """The positions that transport measures."""
        return sum(len(self.selector.of(s)) for s in self.sequences)

    @property
    def waste(self) -> float:
        """Share of the computed tokens that is padding."""
        real = sum(self.batch_tokens(number) for number in range(len(self.batches)))
        return 1 - real / max(1, self.padded_tokens)

    def done(self, batches: int) -> frozenset[int]:
        """The sequences in the first so many batches."""
        return frozenset(n for packed in self.batches[:batches] for row in packed.rows for n in row)

    def complete(self, batch: int) -> list[GroupRun]:
        """The visits whose last batch this is."""
        return self._complete[batch]

    @cached_property
    def _complete(self) -> dict[int, list[GroupRun]]:
        found: dict[int, list[GroupRun]] = defaultdict(list)
        for visit in self.visits:
            found[visit.last_batch].append(visit)
        return found

    def open_after(self, batches: int) -> list[GroupRun]:
        """The visits that have begun in the first so many batches and have not ended."""
        begun = {visit for packed in self.batches[:batches] for visit in packed.visits}
        return [self.visits[number] for number in sorted(begun) if self.visits[number].last_batch >= batches]

    def __iter__(self) -> Iterator[TokenBatch]:
        """The batches, as arrays of the host."""
        return self.filled()

    def filled(self, parts: Sequence[int] | None = None, begin: int = 0) -> Iterator[TokenBatch]:
        """The batches from number `begin` on, of each only the rows and measured positions of these shards, in order;
        None: of all."""
        batches = self.batches[begin:]
        return (self._fill(packed, range(packed.shards) if parts is None else parts) for packed in batches)

    def _fill(self, packed: Packed, parts: Sequence[int]) -> TokenBatch:
        share, room = packed.height // packed.shards, packed.measured // packed.shards
        batch: Any = TokenBatch.empty(share * len(parts), packed.length, room * len(parts))
        filled = 0
        real = range(len(packed.rows))
        for b, number in enumerate(shard * share + k for shard in parts for k in range(share)):
            visit = packed.visits[min(number, len(packed.visits) - 1)]
            batch.slots[b] = self.visits[visit].slot
            if number not in real:  # padding, which counts nowhere
                continue
            row = packed.rows[number]
            if b % share == 0:
                filled = b // share * room
            start = 0
            for segment, number in enumerate(row, start=1):
                sequence = self.sequences[number]
                size = len(sequence.ids)
                span = slice(start, start + size)
                batch.tokens[b, span] = sequence.ids
                batch.positions[b, span] = np.arange(size)
                batch.segments[b, span] = segment
                batch.lengths[b, span] = size
                batch.counted[b, start + self.skip : start + size] = 1
                chosen = self.selector.of(sequence)
                into = slice(filled, filled + len(chosen))
                batch.measured[into] = b % share * packed.length + start + chosen
                batch.measured_group[into], batch.measured_weight[into] = sequence.group, 1
                filled += len(chosen)
                start += size
        return batch


def plan_batches(
    sequences: Sequence[TokenSequence],
    selector: Positions,
    skip: int,
    batch_tokens: int,
    shards: int = 1,
    slots: int | None = None,
    groups: int | None = None,
    counts: Mapping[str, int] | None = None,
    notes: Sequence[str] = (),
    among: Sequence[int] | None = None,
    vocabulary: Vocabulary | None = None,
) -> Plan:
    """Packs sequences into batches of about `batch_tokens` tokens, few shapes and little padding.

    Args:
        sequences: the tokenised prompts.
        selector: which positions transport measures.
        skip: how many first tokens of each sequence contraction leaves out.
        batch_tokens: of all shards together; each gets a row at least.
        shards: how many share the rows of a batch; it divides every batch's height and number of measured positions.
        slots: most groups in a batch, which then share as many accumulators; None: every group has its own.
        groups: how many there are, those without a prompt included; None: up to the last that a sequence names.
        counts, notes, vocabulary: as of `Plan`.
        among: which of the sequences go into batches; None: all.

    Sequences are classed by length (usually one class). Within a class the row length and the number of rows are chosen
    by trying the packing: least padding, weighed against attention over long rows and the cost of many small batches.
    """
    group_count = 1 + max((s.group for s in sequences), default=-1) if groups is None else groups
    classes: dict[int, list[int]] = defaultdict(list)
    for number in range(len(sequences)) if among is None else among:
        size = len(sequences[number].ids)
        bound = next((c for c in LENGTH_CLASSES if size <= c), None)
        if bound is None:
            raise UserError(f"a prompt has {size} tokens; set prompts.max_length to at most {LENGTH_CLASSES[-1]}")
        classes[bound].append(number)
    batches: list[Packed] = []
    visits: list[GroupRun] = []
    for _, numbers in sorted(classes.items()):
        by_group: dict[int, list[int]] = defaultdict(list)
        for number in numbers:
            by_group[sequences[number].group].append(number)
        longest = max(len(sequences[n].ids) for n in numbers)
        options = []
        for length in _row_lengths(longest):
            packed = {g: _pack([(len(sequences[n].ids), n) for n in ns], length) for g, ns in sorted(by_group.items())}
            for height in _heights(batch_tokens, length, shards):
                cuts = _cut([len(rows) for rows in packed.values()], height, slots or len(packed))
                cost = len(cuts) * (height * length * (1 + length / ATTENTION_LENGTH) + BATCH_OVERHEAD * shards)
                options.append((cost, -length, -height, packed, cuts))
        _, length, height, packed, cuts = min(options, key=lambda option: option[:3])
        length, height = -length, -height
        first = len(visits)
        rows = [(row, first + k) for k, group in enumerate(packed.values()) for row in group]
        share = height // shards
        parts = [(start, min(start + share, b)) for a, b in cuts for start in range(a, b, share)]
        most = max(sum(len(selector.of(sequences[n])) for row, _ in rows[a:b] for n in row) for a, b in parts)
        width = max(MEASURED_MULTIPLE, -(-most // MEASURED_MULTIPLE) * MEASURED_MULTIPLE)
        offset = len(batches)
        for a, b in cuts:
            chosen, owner = zip(*rows[a:b], strict=True)
            batches.append(Packed(chosen, owner, height, length, width * shards, shards))
        last = {owner: offset + i for i, (a, b) in enumerate(cuts) for _, owner in rows[a:b]}
        for k, group in enumerate(packed):
            visits.append(GroupRun(group, (first + k) % slots if slots else group, last[first + k]))
    return Plan(
        sequences=sequences,
        selector=selector,
        skip=skip,
        batches=tuple(batches),
        visits=tuple(visits),
        slots=slots or group_count,
        leaves=slots is not None,
        group_count=group_count,
        counts=dict(counts or {}),
        notes=tuple(notes),
        vocabulary=vocabulary,
    )


def _row_lengths(longest: int) -> list[int]:
    if longest > LENGTH_CLASSES[0]:
        return [-(-longest // LONG_MULTIPLE) * LONG_MULTIPLE]
    tight = -(-longest // 8) * 8
    tried = {tight * k for k in range(1, 5)} | set(ROW_LENGTHS)
    return sorted(t for t in tried if tight <= t <= LENGTH_CLASSES[0])


def _heights(batch_tokens: int, length: int, shards: int) -> list[int]:
    most = max(1, batch_tokens // (length * shards))  # rows of a shard
    return sorted({shards * max(1, most // k) for k in (1, 2, 3, 4, 6, 8, 16)})


def _pack(items: list[tuple[int, int]], length: int) -> list[tuple[int, ...]]:
    """Best-fit decreasing: each (size, number) goes into the fullest row that still has room for it."""
    open_rows: dict[int, list[list[int]]] = defaultdict(list)  # room left -> rows
    rooms = 0  # bit r: some row has room r left
    rows: list[list[int]] = []
    for size, number in sorted(items, key=lambda item: (-item[0], item[1])):
        fitting = rooms >> size
        if not fitting:
            row: list[int] = []
            rows.append(row)
            room = length
        else:
            room = size + (fitting & -fitting).bit_length() - 1
            row = open_rows[room].pop()
            if not open_rows[room]:
                rooms ^= 1 << room
        row.append(number)
        open_rows[room - size].append(row)
        rooms |= 1 << (room - size)
    return [tuple(row) for row in rows]


def _cut(counts: list[int], height: int, slots: int) -> list[tuple[int, int]]:
    """Cuts consecutive rows into batches [a, b) of at most `height` rows and `slots` groups.

    `counts` says how many rows each group has.
    """
    ends = np.cumsum(counts)
    cuts, start, total = [], 0, int(ends[-1])
    while start < total:
        group = int(np.searchsorted(ends, start, side="right"))
        stop = min(start + height, int(ends[min(group + slots, len(ends)) - 1]))
        cuts.append((start, stop))
        start = stop
    return cuts
