"""Groups of prompts for the jackknife: prompts that are not independent of each other share one.

Near-duplicates hashed into different groups make intervals far too narrow. So prompts first form components: two
prompts are joined where they share their first turn, or where the Jaccard similarity of their word 3-grams is above
0.3, and so on along chains. A component then falls into a group as a whole.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spinal_jax.stats.near_duplicates import Dialogue, components

_SURROGATE = re.compile("[\ud800-\udfff]")


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
