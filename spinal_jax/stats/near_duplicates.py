"""Which prompts are so alike that they count as one: connected components of a shared first turn or of similar 3-grams.

What is held of many prompts: their words as numbers of 32 bits, a table of 2^29 bytes, and 12 bytes for each 3-gram
that several prompts have.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from array import array
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

ABOVE = (3, 10)  # Jaccard similarity above this fraction joins two prompts
_WORD = re.compile(r"\w+")
_PACKED = 21  # bits of a word's number, of which three fit into 63
_BLOCK, _TABLE = 1 << 22, 29  # words whose 3-grams are made at a time; bits of the largest table that counts them
_PARTS = 16  # by which 3-grams are numbered, a part at a time
_FIRST, _AT_ONCE, _TOGETHER = (
    8,
    512,
    1 << 20,
)  # candidates of a gram that are compared first; prompts, and candidates, at a time

Dialogue = tuple[tuple[str, str], ...]  # (role, content)


def components(dialogues: Sequence[Dialogue]) -> np.ndarray:
    """[P] int64, the component of each prompt, numbered from 0 by first appearance.

    Two prompts are joined where their first turns are equal, or where the Jaccard similarity of their sets of word
    3-grams is above 3/10; components are the connected components of these joins, found exactly. Words are runs of
    letters, digits and underscores in lower case, and each turn begins with its role as a word; a prompt of fewer than
    three words is one gram. System turns do not count: many data sets give all their prompts the same one.

    Candidates come from an inverted index of each prompt's rarest 3-grams, with prefix and positional filtering (Xiao
    et al. 2008, "Efficient similarity joins for near duplicate detection"), and prompts already joined are not compared
    again: time is close to linear in the number of prompts.
    """
    spoken = [tuple((role, content) for role, content in turns if role != "system") for turns in dialogues]
    joined = _Joined(len(spoken))
    first: dict[tuple[str, str] | None, int] = {}
    for number, turns in enumerate(spoken):
        if turns and turns[0][1].strip():
            joined.join(number, first.setdefault(turns[0], number))
    _join_alike(_gram_sets(spoken), joined)
    _, appears, inverse = np.unique(joined.label, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(appears))[inverse]


class _Joined:
    """Disjoint sets of 0..count - 1, whose `label` can be compared for many members at once."""

    def __init__(self, count: int):
        self.label = np.arange(count)  # [count] of the set that each member is in
        self._members: dict[int, list[int]] = {}

    def join(self, one: int, other: int) -> None:
        a, b = int(self.label[one]), int(self.label[other])
        if a == b:
            return
        ours, theirs = self._members.pop(a, [a]), self._members.pop(b, [b])
        if len(ours) < len(theirs):
            a, ours, theirs = b, theirs, ours
        self.label[theirs] = a
        ours.extend(theirs)
        self._members[a] = ours


@dataclass(frozen=True, kw_only=True, eq=False)
class _GramSets:
    """Sets of 3-grams, of which only those that several prompts have are listed, the rarest first."""

    sizes: np.ndarray  # [P] grams of each prompt, those that no other prompt has included
    starts: np.ndarray  # [P + 1] where a prompt's shared grams begin in `grams`
    grams: np.ndarray  # int32 [...] numbered by how many prompts have them, ascending
    count: int  # of different shared grams


def _gram_sets(dialogues: Sequence[Dialogue]) -> _GramSets:
    characters = sum(len(content) for turns in dialogues for _, content in turns)
    # What no other prompt has is told by a table: how many prompts have a gram of a hash, up to 2. The few that share
    # their hash with another are told by counting.
    table = np.zeros(1 << max(10, min(_TABLE, characters.bit_length())), np.uint8)
    sizes = np.zeros(len(dialogues), np.int32)
    blocks: list[tuple[int, np.ndarray, np.ndarray]] = []  # first prompt, their words, how many each has
    for first, lengths, words in _blocks(dialogues):
        counts, grams = _distinct(lengths, words)
        sizes[first : first + len(counts)] = counts
        different, often = np.unique(_mixed(grams) & np.uint64(len(table) - 1), return_counts=True)
        table[different] = np.minimum(table[different] + np.minimum(often, 2), 2)
        blocks.append((first, lengths, words))
    parts: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in range(_PARTS)]  # (owner, gram)
    while blocks:
        first, lengths, words = blocks.pop()
        counts, grams = _distinct(lengths, words)
        owner = np.repeat(np.arange(first, first + len(counts), dtype=np.int32), counts)
        hashed = _mixed(grams)
        shared = table[hashed & np.uint64(len(table) - 1)] > 1
        owner, grams, part = owner[shared], grams[shared], (hashed[shared] >> np.uint64(60)).astype(np.uint8)
        order = np.argsort(part, kind="stable")
        ends = np.cumsum(np.bincount(part, minlength=_PARTS))
        for held, some in zip(parts, np.split(order, ends[:-1]), strict=True):
            held.append((owner[some], grams[some]))
    del table
    return _numbered(sizes, parts)


def _numbered(sizes: np.ndarray, parts: list[list[tuple[np.ndarray, np.ndarray]]]) -> _GramSets:
    """The sets, from lists of (owner, gram) of which none has a gram of another; empties the lists."""
    often, keys, count = [np.zeros(0, np.int32)], [np.zeros(0, np.uint64)], 0
    for part in parts:
        if part:
            owner, grams = (np.concatenate(each) for each in zip(*part, strict=True))
            part.clear()
            _, place, held_by = np.unique(grams, return_inverse=True, return_counts=True)
            several = held_by > 1
            number = count - 1 + np.cumsum(several)
            kept = several[place]
            keys.append((owner[kept].astype(np.uint64) << np.uint64(32)) | number[place[kept]].astype(np.uint64))
            often.append(held_by[several].astype(np.int32))
            count += len(often[-1])
    rank = np.empty(count, np.uint64)
    rank[np.argsort(np.concatenate(often), kind="stable")] = np.arange(count, dtype=np.uint64)
    low = np.uint64(0xFFFFFFFF)
    for key in keys:
        key[:] = (key & ~low) | rank[key & low]
    together = np.concatenate(keys)
    keys.clear()
    together.sort()
    starts = np.searchsorted(together, np.arange(len(sizes) + 1, dtype=np.uint64) << np.uint64(32))
    return _GramSets(sizes=sizes, starts=starts, grams=(together & low).astype(np.int32), count=count)


def _blocks(dialogues: Sequence[Dialogue]) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(number of the first, how many words each has, the words) of consecutive prompts of about _BLOCK words."""
    known: defaultdict[str, int] = defaultdict(itertools.count(1).__next__)
    number_of = known.__getitem__
    first, lengths, words = 0, [], array("i")
    for number, turns in enumerate(dialogues, start=1):
        before = len(words)
        for role, content in turns:
            words.append(number_of(role))
            words.extend(map(number_of, _WORD.findall(content.lower())))
        words.extend([0] * (before + 3 - len(words)))  # 0 stands for no word, in prompts of fewer than three
        lengths.append(len(words) - before)
        if len(words) >= _BLOCK or number == len(dialogues):
            yield first, np.array(lengths), np.array(words, np.int32)
            first, lengths, words = number, [], array("i")


def _distinct(lengths: np.ndarray, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many different 3-grams each prompt has, and these, one prompt after the other."""
    grams, begins, held = _grams(words), np.cumsum(lengths) - lengths, lengths - 2
    counts, found = np.empty(len(lengths), np.int64), []
    # Prompts of similar lengths are sorted together, each in a row of its own.
    similar = np.log2(lengths) // 0.25
    for each in np.unique(similar):
        rows = np.flatnonzero(similar == each)
        columns = np.arange(held[rows].max())
        inside = columns < held[rows, None]
        table = grams[np.minimum(begins[rows, None] + columns, len(grams) - 1)]
        table[~inside] = np.uint64(2**64 - 1)
        table.sort(axis=1)
        inside[:, 1:] &= table[:, 1:] != table[:, :-1]
        counts[rows] = inside.sum(axis=1)
        found.append((rows, table[inside]))
    together = np.empty(counts.sum(), np.uint64)
    starts = np.cumsum(counts) - counts
    for rows, some in found:
        together[_ragged(starts[rows], counts[rows])] = some
    return counts, together


def _grams(words: np.ndarray) -> np.ndarray:
    """[words - 2] a number of 64 bits for each three words in a row, two different ones for the same only where a word
    is not among the first 2 million: such 3-grams are hashed to 63 bits, and the chance that any two of 10^8 share a
    number is 6 in 10,000."""
    one, two, three = (words[begin : len(words) - 2 + begin].astype(np.uint64) for begin in range(3))
    bits = np.uint64(_PACKED)
    packed = (one << (bits + bits)) | (two << bits) | three
    if (large := np.flatnonzero((one | two | three) >> bits)).size:
        hashed = _mixed(_mixed(_mixed(one[large]) ^ two[large]) ^ three[large])
        packed[large] = hashed | np.uint64(1 << 63)
    return packed


def _mixed(x: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit numbers that spreads them (the finaliser of SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _join_alike(sets: _GramSets, joined: _Joined) -> None:
    """Joins the prompts whose sets are alike."""
    above, of = ABOVE
    prompts = _first_of_equal(sets, joined)
    prompts = prompts[np.argsort(sets.sizes[prompts], kind="stable")]  # by size, ascending
    # Grams that no other prompt has are the rarest: n - j of a set's grams are left from its j-th shared one onwards.
    # Alike sets x and y share more than above / (above + of) (|x| + |y|) grams. From the rarest one that they share
    # onwards, both have as many left; |y| is at most |x| and above above / of |x|. So only the first ones of each set
    # are looked up, and fewer of them are listed.
    held = np.diff(sets.starts)
    probed = np.maximum(0, held - above * sets.sizes.astype(np.int64) // of)
    listed = np.maximum(0, held - 2 * above * sets.sizes.astype(np.int64) // (above + of))
    room = np.zeros(sets.count, np.int64)
    for some in np.array_split(np.arange(len(held)), 1 + len(sets.grams) // (8 * _BLOCK)):
        room += np.bincount(sets.grams[_ragged(sets.starts[some], listed[some])], minlength=sets.count)
    begin = np.concatenate([[0], np.cumsum(room)])
    end = begin.copy()  # gram g is in the prompts postings[begin[g]:end[g]], its `remaining` beside it
    postings, remaining = np.empty((2, begin[-1]), np.int32)
    mine = np.zeros(sets.count, bool)
    for number in prompts[held[prompts] > 0].tolist():
        size, label = int(sets.sizes[number]), joined.label
        grams = sets.grams[sets.starts[number] : sets.starts[number + 1]]
        mine[grams] = True
        asked = grams[: probed[number]]
        some = np.flatnonzero(begin[asked] < end[asked])
        first, last, left = begin[asked[some]], end[asked[some]], len(grams) - some
        middle = np.maximum(first, last - _FIRST)
        # The last of each list first: where most of a list are of one component, one of them joins it.
        for low, high in ((middle, last), (first, middle)):
            found = []
            for span, rest in _pieces(low, high, left):
                others = postings[span]
                apart = np.flatnonzero(label[others] != label[number])
                if len(apart):
                    others, shared = others[apart], np.minimum(remaining[span[apart]], rest[apart])
                    found.append(others[(above + of) * shared > above * (sets.sizes[others] + size)])
            if any(map(len, found)):
                _compare(number, np.unique(np.concatenate(found)), mine, sets, joined)
        mine[grams] = False
        kept = grams[: listed[number]]
        postings[end[kept]], remaining[end[kept]] = number, len(grams) - np.arange(len(kept))
        end[kept] += 1


def _pieces(low: np.ndarray, high: np.ndarray, left: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The places low[i] to high[i] of many lists with left[i] beside each, about _TOGETHER at a time."""
    counts = high - low
    if not counts.any():
        return
    cuts = np.flatnonzero(np.diff(np.cumsum(counts) // _TOGETHER)) + 1
    for some in np.split(np.arange(len(counts)), cuts):
        yield _ragged(low[some], counts[some]), np.repeat(left[some], counts[some])


def _compare(number: int, others: np.ndarray, mine: np.ndarray, sets: _GramSets, joined: _Joined) -> None:
    """Joins a prompt, whose grams `mine` marks, to those of `others` that are like it."""
    above, of = ABOVE
    others = others[::-1]
    while len(others):
        some, others = others[:_AT_ONCE], others[_AT_ONCE:]
        counts = sets.starts[some + 1] - sets.starts[some]
        ends = np.cumsum(counts)
        hits = np.concatenate([[0], np.cumsum(mine[sets.grams[_ragged(sets.starts[some], counts)]])])
        both = hits[ends] - hits[ends - counts]
        union = sets.sizes[some] + sets.sizes[number] - both
        for other in some[of * both > above * union].tolist():
            joined.join(number, other)
        others = others[joined.label[others] != joined.label[number]]


def _first_of_equal(sets: _GramSets, joined: _Joined) -> np.ndarray:
    """The prompts, one of those that have equal sets, which are joined."""
    first: dict[bytes, int] = {}
    alone: list[int] = []
    for number, size in enumerate(sets.sizes.tolist()):
        start, end = sets.starts[number : number + 2].tolist()
        if end - start == size:  # all its grams are shared
            joined.join(number, first.setdefault(hashlib.sha256(sets.grams[start:end].tobytes()).digest(), number))
        else:
            alone.append(number)
    return np.array(sorted([*first.values(), *alone]), np.int64)


def _ragged(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The indices starts[0].. of counts[0], then starts[1].. of counts[1], and so on."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(starts - (ends - counts), counts)
