"""Batches of fixed shape from prompts of different lengths: sequences are packed into rows, rows into batches.

Several prompts share a row and are separated by `segments`, so that there is little padding and few compiled shapes.
Rows are sorted by jackknife group, each row holds prompts of one group, and `slots` names the accumulator of each row.
By default every group has an accumulator of its own. If the devices have no room for that, a batch contains at most
`SLOTS` groups; the sums of a group leave the devices when they are complete, and the next group takes its slot.

If devices split the rows of a batch, each has a shard of equally many consecutive rows and the measured positions of
these rows, so that no device needs hidden states of another.
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

from spinal_jax.config.positions import Positions
from spinal_jax.data.vocabulary import Vocabulary
from spinal_jax.errors import UserError
from spinal_jax.stats.groups import Groups

SLOTS = 2  # maximum groups in a batch if complete sums leave the devices
LENGTH_CLASSES = (512, 2048, 8192, 32768, 131072)  # upper bounds of the lengths that share a compiled shape
LONG_MULTIPLE = 512  # lengths of rows above the first class are multiples of this, for blockwise attention
ROW_LENGTHS = (128, 192, 256, 384, 512)  # candidates, with multiples of the longest sequence
MEASURED_MULTIPLE = 8
BATCH_OVERHEAD = 128  # cost of a batch in tokens, which weighs many small batches against padding
GOLDEN_RATIO = (5**0.5 - 1) / 2
ATTENTION_LENGTH = 8192  # row length at which attention costs about as much as the rest of a block


if TYPE_CHECKING:
    OnEither = Array
else:
    OnEither = Array | np.ndarray  # on devices or on the host


@dataclass(frozen=True)
class TokenSequence:
    """A tokenised prompt, followed by its response if the data has one."""

    ids: np.ndarray  # int32 [L]
    group: int
    response_start: int | None = None  # index of the first response token

    def measured(self, selector: Positions) -> np.ndarray:
        """int [m] indices of its positions at which transport is measured, ascending."""
        return selector.of(len(self.ids), self.response_start)


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """B rows of T tokens and M measured positions. Padding has segment 0 and weight 0.

    A pytree, whose leaves need not be arrays. Replicas add a leading axis of devices.
    """

    tokens: Int32[OnEither, "*devices B T"]
    positions: Int32[OnEither, "*devices B T"]  # position within the sequence
    segments: Int32[OnEither, "*devices B T"]  # 0 for padding; 1, 2, ... for the sequences of a row
    lengths: Int32[OnEither, "*devices B T"]  # length of the sequence
    counted: Float32[OnEither, "*devices B T"]  # 1 for positions that contraction counts
    slots: Int32[OnEither, "*devices B"]  # accumulator of the group of the row
    measured: Int32[OnEither, "*devices M"]  # flat index b * T + t within the shard
    measured_weight: Float32[OnEither, "*devices M"]  # 1 for real positions, which come first in each shard
    measured_group: Int32[OnEither, "*devices M"]

    @staticmethod
    def empty(height: int, length: int, measured: int) -> TokenBatch:
        """A batch of padding as host arrays: B rows of T tokens and M positions."""
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
    """A batch of any leaves; shapes are checked only for arrays."""
    named = dict(zip(TokenBatch.__dataclass_fields__, leaves, strict=True))
    if all(isinstance(leaf, Array | np.ndarray) for leaf in named.values()):
        return TokenBatch(**named)  # pyright: ignore[reportArgumentType]
    batch = object.__new__(TokenBatch)
    vars(batch).update(named)
    return batch


jax.tree_util.register_pytree_with_keys(TokenBatch, _leaves, _batch)


@dataclass(frozen=True)
class GroupRun:
    """Consecutive rows of one group in one length class, which are summed in one slot."""

    group: int
    slot: int
    last_batch: int  # batch after which the sum is complete


@dataclass(frozen=True)
class Packed:
    """Layout of a batch: sequence numbers and group run of each row, and the shape."""

    rows: tuple[tuple[int, ...], ...]
    runs: tuple[int, ...]
    height: int  # B
    length: int  # T
    measured: int  # M
    shards: int  # devices that split the rows


@dataclass(frozen=True)
class Plan:
    """The batches of a prompt set."""

    sequences: Sequence[TokenSequence]
    selector: Positions
    skip: int
    batches: tuple[Packed, ...]
    runs: tuple[GroupRun, ...]
    slots: int  # number of accumulators
    leaves: bool  # whether complete sums leave the devices and other groups reuse their slots
    group_count: int = 0  # G, including groups without prompts
    counts: Mapping[str, int] = field(default_factory=dict)  # of prompts, for the trace
    notes: tuple[str, ...] = ()  # warnings about the prompts, for the trace
    vocabulary: Vocabulary | None = None  # tokens of the distributions; None is every row of the unembedding

    @cached_property
    def groups_at_once(self) -> int:
        """Maximum number of groups in a batch."""
        return max((len({self.runs[number].slot for number in packed.runs}) for packed in self.batches), default=1)

    @cached_property
    def groups(self) -> Groups:
        """Rows and positions of each group."""
        positions = np.zeros(self.group_count)
        for sequence in self.sequences:
            positions[sequence.group] += len(sequence.measured(self.selector))
        return Groups(rows=self.rows_by_group(self.skip), positions=positions)

    def rows_by_group(self, skip: int) -> np.ndarray:
        """[G] contraction rows of each group, without the first `skip` tokens of each sequence."""
        rows = np.zeros(self.group_count)
        for sequence in self.sequences:
            rows[sequence.group] += max(0, len(sequence.ids) - skip)
        return rows

    @property
    def largest_prompt_share(self) -> float:
        """Share of contraction rows in the longest prompt; 0 without rows."""
        most = max((len(sequence.ids) - self.skip for sequence in self.sequences), default=0)
        return max(0, most) / max(1, self.rows)

    @property
    def tokens(self) -> int:
        """Number of tokens, without padding."""
        return sum(len(s.ids) for s in self.sequences)

    def batch_tokens(self, number: int) -> int:
        """Number of tokens in a batch, without padding."""
        return sum(len(self.sequences[n].ids) for row in self.batches[number].rows for n in row)

    @property
    def padded_tokens(self) -> int:
        """Number of tokens, with padding."""
        return sum(b.height * b.length for b in self.batches)

    @property
    def rows(self) -> int:
        """N, the number of contraction rows."""
        return sum(max(0, len(s.ids) - self.skip) for s in self.sequences)

    @property
    def positions(self) -> int:
        """The number of transport positions."""
        return sum(len(s.measured(self.selector)) for s in self.sequences)

    @property
    def waste(self) -> float:
        """Share of padding among the tokens of all batches."""
        real = sum(self.batch_tokens(number) for number in range(len(self.batches)))
        return 1 - real / max(1, self.padded_tokens)

    def done(self, batches: int) -> frozenset[int]:
        """Numbers of the sequences in the first `batches` batches."""
        return frozenset(n for packed in self.batches[:batches] for row in packed.rows for n in row)

    def complete(self, batch: int) -> list[GroupRun]:
        """The group runs that end with a batch."""
        return self._complete[batch]

    @cached_property
    def _complete(self) -> dict[int, list[GroupRun]]:
        by_last_batch: dict[int, list[GroupRun]] = defaultdict(list)
        for run in self.runs:
            by_last_batch[run.last_batch].append(run)
        return by_last_batch

    def open_after(self, batches: int) -> list[GroupRun]:
        """The group runs that begin within the first `batches` batches and end later."""
        begun = {number for packed in self.batches[:batches] for number in packed.runs}
        return [self.runs[number] for number in sorted(begun) if self.runs[number].last_batch >= batches]

    def __iter__(self) -> Iterator[TokenBatch]:
        """The batches as host arrays."""
        return self.filled()

    def filled(self, parts: Sequence[int] | None = None, begin: int = 0) -> Iterator[TokenBatch]:
        """The batches from number `begin` on, with the rows and measured positions of the shards `parts` only; None is
        all."""
        batches = self.batches[begin:]
        return (self._fill(packed, range(packed.shards) if parts is None else parts) for packed in batches)

    def _fill(self, packed: Packed, parts: Sequence[int]) -> TokenBatch:
        share, room = packed.height // packed.shards, packed.measured // packed.shards
        batch: Any = TokenBatch.empty(share * len(parts), packed.length, room * len(parts))
        filled = 0
        real = range(len(packed.rows))
        for b, number in enumerate(shard * share + k for shard in parts for k in range(share)):
            run = packed.runs[min(number, len(packed.runs) - 1)]
            batch.slots[b] = self.runs[run].slot
            if number not in real:  # padding
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
                chosen = sequence.measured(self.selector)
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
    """Packs sequences into batches of about `batch_tokens` tokens with few shapes and little padding.

    Args:
        sequences: the tokenised prompts.
        selector: positions at which transport is measured.
        skip: number of first tokens of each sequence that contraction leaves out.
        batch_tokens: over all shards; each shard has at least one row.
        shards: number of devices that split the rows; it divides the height and the measured positions of a batch.
        slots: maximum number of groups in a batch, and number of accumulators; None gives every group its own.
        groups: G, including groups without prompts; None is the largest group of a sequence plus 1.
        counts, notes, vocabulary: as in `Plan`.
        among: numbers of the sequences to pack; None is all.

    Sequences are divided into length classes (usually one). In each class, the row length and the number of rows are
    those with the least cost: padding, attention over long rows, and an overhead for each batch.
    """
    group_count = 1 + max((s.group for s in sequences), default=-1) if groups is None else groups
    classes: dict[int, list[int]] = defaultdict(list)
    for number in range(len(sequences)) if among is None else among:
        size = len(sequences[number].ids)
        bound = next((c for c in LENGTH_CLASSES if size <= c), None)
        if bound is None:
            raise UserError(f"a prompt has {size} tokens; set prompts.max_length to at most {LENGTH_CLASSES[-1]}")
        classes[bound].append(number)
    measured = {n: len(sequences[n].measured(selector)) for numbers in classes.values() for n in numbers}
    batches: list[Packed] = []
    runs: list[GroupRun] = []
    for _, numbers in sorted(classes.items()):
        by_group: dict[int, list[int]] = defaultdict(list)
        for number in numbers:
            by_group[sequences[number].group].append(number)
        longest = max(len(sequences[n].ids) for n in numbers)
        options = []
        for length in _row_lengths(longest):
            packed = {g: _pack([(len(sequences[n].ids), n) for n in ns], length) for g, ns in sorted(by_group.items())}
            for height in _heights(batch_tokens, length, shards, sum(map(len, packed.values()))):
                cuts = _cut([len(rows) for rows in packed.values()], height, slots or len(packed))
                cost = len(cuts) * (height * length * (1 + length / ATTENTION_LENGTH) + BATCH_OVERHEAD * shards)
                options.append((cost, -length, -height, packed, cuts))
        _, length, height, packed, cuts = min(options, key=lambda option: option[:3])
        length, height = -length, -height
        first = len(runs)
        rows = [(row, first + k) for k, group in enumerate(packed.values()) for row in _spread(group, measured)]
        share = height // shards
        parts = [(start, min(start + share, b)) for a, b in cuts for start in range(a, b, share)]
        most = max(sum(measured[n] for row, _ in rows[a:b] for n in row) for a, b in parts)
        width = max(MEASURED_MULTIPLE, -(-most // MEASURED_MULTIPLE) * MEASURED_MULTIPLE)
        offset = len(batches)
        for a, b in cuts:
            chosen, owner = zip(*rows[a:b], strict=True)
            batches.append(Packed(chosen, owner, height, length, width * shards, shards))
        last = {owner: offset + i for i, (a, b) in enumerate(cuts) for _, owner in rows[a:b]}
        for k, group in enumerate(packed):
            runs.append(GroupRun(group, (first + k) % slots if slots else group, last[first + k]))
    return Plan(
        sequences=sequences,
        selector=selector,
        skip=skip,
        batches=tuple(batches),
        runs=tuple(runs),
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


def _heights(batch_tokens: int, length: int, shards: int, rows: int) -> list[int]:
    """Candidates for the height of a batch: fractions of `batch_tokens`, and even shares of `rows` below them."""
    most = max(1, batch_tokens // (length * shards))  # rows of a shard
    heights = {shards * max(1, most // k) for k in (1, 2, 3, 4, 6, 8, 16)}
    counts = {-(-rows // height) + more for height in heights for more in (0, 1)}
    even = {-(-rows // (count * shards)) * shards for count in counts}
    return sorted(heights | {height for height in even if height <= most * shards})


def _spread(rows: list[tuple[int, ...]], measured: Mapping[int, int]) -> list[tuple[int, ...]]:
    """The rows in an order in which consecutive ones have about equally many measured positions together.

    In ascending order, the multiples of the golden ratio modulo 1 place neighbours far apart.
    """
    ascending = sorted(rows, key=lambda row: sum(measured[n] for n in row))
    return [ascending[n] for n in sorted(range(len(rows)), key=lambda n: n * GOLDEN_RATIO % 1)]


def _pack(items: list[tuple[int, int]], length: int) -> list[tuple[int, ...]]:
    """Best-fit decreasing: each (size, number) goes into the fullest row with room for it."""
    open_rows: dict[int, list[list[int]]] = defaultdict(list)  # free tokens -> rows
    rooms = 0  # bit r is set if a row has r free tokens
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

    `counts` is the number of rows of each group.
    """
    ends = np.cumsum(counts)
    cuts, start, total = [], 0, int(ends[-1])
    while start < total:
        group = int(np.searchsorted(ends, start, side="right"))
        stop = min(start + height, int(ends[min(group + slots, len(ends)) - 1]))
        cuts.append((start, stop))
        start = stop
    return cuts
