"""Groups of prompts for the jackknife: prompts that are not independent of each other share one.

Near-duplicates hashed into different groups make intervals far too narrow. So prompts first form components: two
prompts are joined where they share their first turn, or where the Jaccard similarity of their word 3-grams is above
0.3, and so on along chains. A component then falls into a group as a whole.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

ABOVE = (3, 10)  # Jaccard similarity above this fraction joins two prompts
_WORD = re.compile(r"\w+")
_SURROGATE = re.compile("[\ud800-\udfff]")
_PACKED = 1 << 21  # different words of which three fit into 64 bits
_BLOCK, _TABLE = 1 << 22, 29  # words whose 3-grams are made at a time; bits of the largest table that counts them
_FIRST, _AT_ONCE = 8, 512  # candidates of a gram that are compared first; and at a time

Dialogue = tuple[tuple[str, str], ...]  # (role, content)


@dataclass(frozen=True, kw_only=True, eq=False)
class Groups:
    """How much each group of prompts holds, in one plan."""

    rows: np.ndarray  # [all G] contraction rows
    positions: np.ndarray  # [all G] transport positions

    @property
    def used(self) -> np.ndarray:
        """The groups that say something of contraction and of transport."""
        return np.flatnonzero((self.positions > 0) & (self.rows > 0))

    @property
    def drops(self) -> np.ndarray:
        """The groups to leave out, one after the other; without the only group there is nothing."""
        return self.used if len(self.used) > 1 else self.used[:0]

    @property
    def halves(self) -> tuple[np.ndarray, ...]:
        """Two halves of the groups, with as equal numbers of rows as giving each group in turn, largest first, to the
        smaller half makes them; none where there is but one group with rows."""
        halves: tuple[list[int], list[int]] = [], []
        held = np.zeros(2)
        for group in np.argsort(-self.rows, kind="stable"):
            if self.rows[group] > 0:
                smaller = int(held[1] < held[0])
                halves[smaller].append(int(group))
                held[smaller] += self.rows[group]
        return tuple(np.array(sorted(half)) for half in halves) if halves[1] else ()

    @property
    def largest_share(self) -> float:
        """Share of the rows that the largest group holds; 0 where there are none."""
        return float(self.rows.max() / self.rows.sum()) if self.rows.any() else 0.0


def group_of(text: str, groups: int) -> int:
    """The group of a text, 0 to `groups` - 1: the 8-byte BLAKE2b hash of its UTF-8 form, big-endian, modulo `groups`.

    The same in every process and on every machine. Lone surrogates count as U+FFFD.
    """
    hashed = hashlib.blake2b(_SURROGATE.sub("\ufffd", text).encode(), digest_size=8).digest()
    return int.from_bytes(hashed, "big") % groups


def assign_groups(texts: Sequence[str], dialogues: Sequence[Dialogue], groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Each prompt's group and each prompt's component.

    Args:
        texts: the prompts' texts. A component falls into the group of the smallest of its texts, so that the order of
            the prompts changes nothing and a component of one prompt is hashed by its own text.
        dialogues: the same prompts as turns, which decide what is alike.
        groups: G.

    Returns:
        (group [P] from 0 to G - 1, component [P] numbered from 0 by first appearance), both int64.
    """
    component = components(dialogues)
    smallest: dict[int, str] = {}
    for number, text in zip(component.tolist(), texts, strict=True):
        if number not in smallest or text < smallest[number]:
            smallest[number] = text
    group = np.array([group_of(smallest[number], groups) for number in range(len(smallest))], np.int64)
    return group[component], component


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
    grams: np.ndarray  # int [...] numbered by how many prompts have them, ascending
    count: int  # of different shared grams


def _gram_sets(dialogues: Sequence[Dialogue]) -> _GramSets:
    known: dict[str, int] = {}
    words: list[np.ndarray] = []
    for turns in dialogues:
        spoken = [word for role, content in turns for word in (role, *_WORD.findall(content.lower()))]
        # 0 stands for no word, in prompts of fewer than three.
        numbers = [known.setdefault(word, len(known) + 1) for word in spoken]
        words.append(np.array(numbers + [0] * (3 - len(numbers)), np.int32))
    total = sum(map(len, words))
    sizes = np.zeros(len(words), np.int32)
    # Of grams that only one prompt has no more than their number is kept; nearly all of them are told by what a table
    # of hashes has seen, the others by counting.
    once, twice = np.zeros((2, 1 << max(10, min(_TABLE, (4 * total).bit_length()))), bool)
    blocks: list[tuple[range, np.ndarray]] = []  # prompts, and their different grams one prompt after the other
    for first, some in _blocks(words):
        owner, grams = _grams_of(some, len(known))
        sizes[first : first + len(some)] = np.bincount(owner, minlength=len(some))
        different, count = np.unique(_bucket(grams, len(once)), return_counts=True)
        twice[different[once[different] | (count > 1)]] = True
        once[different] = True
        blocks.append((range(first, first + len(some)), grams))
    words.clear()
    owners, kept = [np.zeros(0, np.int32)], [np.zeros(0, np.uint64)]
    for prompts, grams in blocks:
        shared = twice[_bucket(grams, len(once))]
        owners.append(np.repeat(np.array(prompts, np.int32), sizes[prompts.start : prompts.stop])[shared])
        kept.append(grams[shared])
    blocks.clear()
    owner, grams = np.concatenate(owners), np.concatenate(kept)
    del once, twice, owners, kept
    _, place, held_by = np.unique(grams, return_inverse=True, return_counts=True)
    rank = np.empty(len(held_by), np.int32)
    rank[np.argsort(held_by, kind="stable")] = np.arange(len(held_by), dtype=np.int32)
    rank -= np.int32(np.count_nonzero(held_by < 2))
    grams = rank[place.reshape(-1)]
    owner, grams = owner[grams >= 0], grams[grams >= 0]
    order = np.lexsort((grams, owner))
    starts = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=len(sizes)))])
    return _GramSets(sizes=sizes, starts=starts, grams=grams[order], count=int(np.count_nonzero(held_by > 1)))


def _blocks(words: Sequence[np.ndarray]) -> Iterator[tuple[int, Sequence[np.ndarray]]]:
    """Consecutive prompts of about _BLOCK words together, with the number of the first."""
    first, held = 0, 0
    for number, each in enumerate(words, start=1):
        held += len(each)
        if held >= _BLOCK or number == len(words):
            yield first, words[first:number]
            first, held = number, 0


def _grams_of(words: Sequence[np.ndarray], known: int) -> tuple[np.ndarray, np.ndarray]:
    """(owner, gram) of each different 3-gram of each prompt: the prompt's place among these, and a number of 64 bits
    that stands for its three words, two different ones for the same only where there are 2 million words or more.

    Where there are so many, 3-grams are hashed, and the chance that any two of 10^8 share a number is 3 in 10,000.
    """
    lengths = np.array([len(numbers) for numbers in words], np.int64)
    flat = np.concatenate(words).astype(np.uint64)
    last = np.cumsum(lengths)
    inside = np.ones(len(flat), bool)  # where a gram begins
    inside[last - 1] = inside[last - 2] = False
    at = np.flatnonzero(inside)
    if known < _PACKED:
        grams = (flat[at] << np.uint64(42)) | (flat[at + 1] << np.uint64(21)) | flat[at + 2]
    else:
        grams = _mixed(_mixed(_mixed(flat[at]) ^ flat[at + 1]) ^ flat[at + 2])
    owner = np.repeat(np.arange(len(words)), lengths)[at]
    order = np.lexsort((grams, owner))
    owner, grams = owner[order], grams[order]
    new = np.ones(len(grams), bool)
    new[1:] = (owner[1:] != owner[:-1]) | (grams[1:] != grams[:-1])
    return owner[new], grams[new]


def _mixed(x: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit numbers that spreads them (the finaliser of SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _bucket(grams: np.ndarray, size: int) -> np.ndarray:
    """The place of each gram in a table of `size`, a power of two."""
    return (_mixed(grams) & np.uint64(size - 1)).astype(np.int64)


def _join_alike(sets: _GramSets, joined: _Joined) -> None:
    """Joins the prompts whose sets are alike."""
    above, of = ABOVE
    prompts = _distinct(sets, joined)
    prompts = prompts[np.argsort(sets.sizes[prompts], kind="stable")]  # by size, ascending
    # Grams that no other prompt has are the rarest: `left` of a set's grams are left from each shared one onwards.
    held = np.diff(sets.starts).astype(np.int32)
    left = (sets.starts[1:].repeat(held) - np.arange(sets.starts[-1])).astype(np.int32)
    size_of = sets.sizes.repeat(held)
    # Alike sets x and y share more than above / (above + of) (|x| + |y|) grams. From the rarest one that they share
    # onwards, both have as many left; |y| is at most |x| and above above / of |x|.
    probed = of * left > above * size_of
    indexed = (above + of) * left > 2 * above * size_of
    room = np.bincount(sets.grams[indexed], minlength=sets.count)
    begin = np.concatenate([[0], np.cumsum(room)])
    end = begin.copy()  # gram g is in the prompts postings[begin[g]:end[g]], its `remaining` beside it
    postings, remaining = np.empty((2, begin[-1]), np.int32)
    mine = np.zeros(sets.count, bool)
    for number in prompts.tolist():
        size, label = int(sets.sizes[number]), joined.label
        own = slice(*sets.starts[number : number + 2].tolist())
        grams, lefts = sets.grams[own], left[own]
        mine[grams] = True
        lists = [
            (a, b, rest)
            for a, b, rest, ask in zip(
                begin[grams].tolist(), end[grams].tolist(), lefts.tolist(), probed[own].tolist(), strict=True
            )
            if ask and a < b
        ]
        # The last of each list first: where most of a list are of one component, one of them joins it.
        for most in (_FIRST, None):
            found = []
            for a, b, rest in lists:
                span = slice(a if most is None else max(a, b - most), b)
                others = postings[span]
                apart = np.flatnonzero(label[others] != label[number])
                if len(apart):
                    others, shared = others[apart], np.minimum(remaining[span][apart], rest)
                    found.append(others[(above + of) * shared > above * (sets.sizes[others] + size)])
            if any(map(len, found)):
                _compare(number, np.unique(np.concatenate(found)), mine, sets, joined)
        mine[grams] = False
        kept = indexed[own]
        grams, lefts = grams[kept], lefts[kept]
        postings[end[grams]], remaining[end[grams]] = number, lefts
        end[grams] += 1


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


def _distinct(sets: _GramSets, joined: _Joined) -> np.ndarray:
    """The prompts, one of those that have equal sets, which are joined."""
    first: dict[tuple[int, bytes], int] = {}
    for number, size in enumerate(sets.sizes.tolist()):
        start, end = sets.starts[number : number + 2].tolist()
        if end - start == size:  # all its grams are shared
            joined.join(number, first.setdefault((size, sets.grams[start:end].tobytes()), number))
        else:
            first[number, b""] = number
    return np.array(sorted(first.values()), np.int64)


def _ragged(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The indices starts[0].. of counts[0], then starts[1].. of counts[1], and so on."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(starts - (ends - counts), counts)
