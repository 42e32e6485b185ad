"""Groups of prompts for the jackknife. Prompts that depend on each other are in one group.

Intervals are far too narrow if near-duplicates are in different groups. Prompts are therefore clustered first: two
prompts are linked if they share their first turn, or if the Jaccard similarity of their word 3-grams is above 0.3. Each
connected component is assigned to one group.
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
    """Rows and positions of each group of prompts."""

    rows: np.ndarray  # [all G] contraction rows
    positions: np.ndarray  # [all G] transport positions

    @property
    def used(self) -> np.ndarray:
        """Groups with at least one row and one position."""
        return np.flatnonzero((self.positions > 0) & (self.rows > 0))

    @property
    def drops(self) -> np.ndarray:
        """Groups to delete in turn; none if there is only one group."""
        return self.used if len(self.used) > 1 else self.used[:0]

    @property
    def halves(self) -> tuple[np.ndarray, ...]:
        """Two halves of the groups with about equal rows: each group, largest first, goes to the smaller half. Empty if
        only one group has rows."""
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
        """Share of rows in the largest group; 0 without rows."""
        return float(self.rows.max() / self.rows.sum()) if self.rows.any() else 0.0


def group_of(text: str, groups: int) -> int:
    """The group of a text, 0 to `groups` - 1: the 8-byte BLAKE2b hash of its UTF-8 form, big-endian, modulo `groups`.

    The result is the same in every process and on every machine. Lone surrogates are replaced by U+FFFD.
    """
    hashed = hashlib.blake2b(_SURROGATE.sub("\ufffd", text).encode(), digest_size=8).digest()
    return int.from_bytes(hashed, "big") % groups


def assign_groups(texts: Sequence[str], dialogues: Sequence[Dialogue], groups: int) -> tuple[np.ndarray, np.ndarray]:
    """The group and the component of each prompt.

    Args:
        texts: texts of the prompts. A component is hashed by the smallest of its texts, so the result does not depend
            on the order of the prompts.
        dialogues: the same prompts as turns, for the similarity.
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
