"""Singular spectra of a pool of prompts from its Gram sums, in float64 on the host: whole and without each group."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import IO

import numpy as np
from threadpoolctl import threadpool_limits

from spinal_jax.config import MetricsConfig
from spinal_jax.data.packing import Plan
from spinal_jax.metrics import contraction

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Spectra:
    """Singular values of a pool, and what other settings of the same pass give."""

    whole: np.ndarray  # [D + 1, d]
    without: np.ndarray  # [G, D + 1, d] without each group of `plan.groups.drops`
    halves: np.ndarray  # [2, D + 1, d] of `plan.groups.halves`, or [0, D + 1, d] where there is but one group
    variants: dict[str, np.ndarray]


class GramStore:
    """Gram sums that have left the device: a scratch file of records, each the lower triangles of all boundaries and
    the sums beside them, read back boundary by boundary."""

    def __init__(self, file: IO[bytes], boundaries: int, width: int, dtype: np.dtype):
        self.file, self.boundaries, self.width, self.dtype = file, boundaries, width, dtype
        self.triangle = np.tril_indices(width)
        self.size = len(self.triangle[0]) * dtype.itemsize  # bytes of a triangle
        self.record = boundaries * (self.size + width * 8)  # bytes
        self.groups: list[int] = []  # of each record
        self.first: dict[int, np.ndarray] = {}  # group -> [D + 1, d]

    def append(self, group: int, second: Callable[[int], np.ndarray], first: np.ndarray) -> None:
        """Stores the sums of one visit to a group: `second(boundary)` [d, d], a boundary at a time, and [D + 1, d]."""
        for boundary in range(self.boundaries):
            self.file.write(second(boundary)[self.triangle].data)
        first = first.astype(np.float64)
        self.file.write(np.ascontiguousarray(first).data)
        self._count(group, first)

    def _count(self, group: int, first: np.ndarray) -> None:
        self.groups.append(group)
        self.first[group] = self.first.get(group, 0) + first

    def go_on(self, groups: Sequence[int]) -> None:
        """Takes over what the file holds of these groups, a record each, and forgets what is behind that. ValueError
        where it holds less."""
        length = len(groups) * self.record
        if (there := self.file.seek(0, os.SEEK_END)) < length:
            raise ValueError(f"the file of Gram sums has {there} bytes of {length}")
        for record, group in enumerate(groups):
            self.file.seek(record * self.record + self.boundaries * self.size)
            first = np.frombuffer(self.file.read(self.boundaries * self.width * 8), np.float64)
            self._count(group, first.reshape(self.boundaries, self.width))
        self.file.truncate(length)
        self.file.seek(length)

    def read(self, boundary: int) -> dict[int, np.ndarray]:
        """group -> Gram sum of its rows at a boundary, float64 [d, d], lower triangle."""
        sums: dict[int, np.ndarray] = {}
        for record, group in enumerate(self.groups):
            self.file.seek(record * self.record + boundary * self.size)
            flat = np.frombuffer(self.file.read(self.size), self.dtype)
            if group not in sums:
                sums[group] = np.zeros((self.width, self.width))
            sums[group][self.triangle] += flat
        return sums


def all_spectra(spools: list[GramStore], plan: Plan, settings: MetricsConfig, advance: Advance) -> Spectra:
    """Spectra as the settings have them, then those of the variants.

    Args:
        spools: the sums of the rows that count and, for each of `metrics.variants.skip`, of those from there on.
        advance: called with 1 for each boundary of each spectrum (`spectra_count` of them in all).
    """
    asked, center = settings.variants, settings.contraction.center
    groups = plan.groups
    nobody = groups.drops[:0]
    one_out = [np.array([group]) for group in groups.drops]
    # Of two halves, leaving out the one is the spectrum of the other.
    every = _spectra(spools[0], [nobody, *one_out, *groups.halves[::-1]], groups.rows, center, advance)
    whole, without, halves = every[0], every[1 : 1 + len(one_out)], every[1 + len(one_out) :]
    variants: dict[str, np.ndarray] = {}

    def add(name: str, spool: GramStore, rows: np.ndarray, center: bool) -> None:
        found = _spectra(spool, [nobody, *(one_out if asked.groups else [])], rows, center, advance)
        variants[f"{name}/singular_values"], variants[f"{name}/rows"] = found[0], np.array(rows.sum())
        variants[f"{name}/groups/rows"] = rows[groups.used]
        if asked.groups:
            variants[f"{name}/groups/singular_values"] = found[1:]

    if asked.center and not center:
        add("center", spools[0], groups.rows, True)
    for skip, spool in zip(asked.skip, spools[1:], strict=True):
        add(f"skip={skip}", spool, plan.rows_by_group(skip), center)
    return Spectra(whole, without, halves, variants)


def spectra_count(boundaries: int, settings: MetricsConfig) -> int:
    """How many boundaries `all_spectra` goes through."""
    asked = settings.variants
    return boundaries * (1 + int(asked.center and not settings.contraction.center) + len(asked.skip))


def _spectra(
    spool: GramStore, left_out: Sequence[np.ndarray], rows: np.ndarray, center: bool, advance: Advance
) -> np.ndarray:
    """[len(left_out), D + 1, d] singular values of the rows of all groups but those in each of `left_out`.

    Args:
        left_out: sets of groups.
        rows: [all G] how many each group has.
        center: of the centred rows.
    """
    found = np.zeros((len(left_out), spool.boundaries, spool.width))

    def one(boundary: int, grams: dict[int, np.ndarray], total: np.ndarray, left: np.ndarray) -> np.ndarray:
        second, first = total, None
        for group in left:
            second = second - grams[group]
        if center:
            first = sum((f[boundary] for g, f in spool.first.items() if g not in left), np.zeros(spool.width))
        return contraction.singular_values(second, first, int(rows.sum() - rows[left].sum()))

    # LAPACK's symmetric eigensolver gains little from threads of its own: one matrix a core instead.
    with threadpool_limits(1, "blas"), ThreadPoolExecutor() as pool:
        for boundary in range(spool.boundaries):
            grams = spool.read(boundary)
            total = sum(grams.values(), np.zeros((spool.width, spool.width)))
            found[:, boundary] = np.stack(list(pool.map(partial(one, boundary, grams, total), left_out)))
            advance(1)
    return found
