"""Singular spectra from Gram sums in float64: of all prompts, without each group, and of two halves.

The work is a list of (boundary, replicate), divided evenly over the devices of all processes. Each device reads the
Gram sums of its own boundaries only. The processes exchange spectra at the end.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby, pairwise
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from threadpoolctl import threadpool_limits

from spinal_jax.config import MetricsConfig
from spinal_jax.data.packing import Plan
from spinal_jax.metrics import contraction
from spinal_jax.parallel.agreement import gathered
from spinal_jax.parallel.device_defaults import eigenvalues_on_device
from spinal_jax.progress import Advance

Items = list[tuple[int, list[int]]]  # boundaries, each with some of its replicates


class Worker(Protocol):
    """A device of this or another process."""

    @property
    def process_index(self) -> int: ...


class BoundarySums(NamedTuple):
    """Gram sums at one boundary, of all groups, or of one group without the first axis."""

    second: tuple[Any, ...]  # stripes [G, d / S, end]
    first: Any  # [G, d]


class GramSource(ABC):
    """Gram sums of all groups."""

    @abstractmethod
    def at(self, boundaries: Sequence[int]) -> dict[int, BoundarySums]:
        """The sums at one boundary for each device, by the number of the device, for the devices of this process. A
        collective operation of all processes."""


@dataclass(frozen=True)
class Spectra:
    """Singular values of all prompts and replicates, and the results under other settings."""

    whole: np.ndarray  # [D + 1, d]
    without: np.ndarray  # [G, D + 1, d] without each group of `plan.groups.drops`
    halves: np.ndarray  # [2, D + 1, d] of `plan.groups.halves`; [0, D + 1, d] for a single group
    variants: dict[str, np.ndarray]
    resolution: float  # smallest resolved fraction of s_1


def all_spectra(
    sources: Sequence[GramSource],
    plan: Plan,
    settings: MetricsConfig,
    boundaries: int,
    width: int,
    workers: Sequence[Worker],
    advance: Advance,
    resolution: float,
    on_device: bool | None = None,
) -> Spectra:
    """Computes the spectra under the main settings and under those of `settings.variants`, for every process.

    Args:
        sources: Gram sums for `contraction.skip` and for each of `variants.skip`.
        plan: the prompts.
        settings: what is measured.
        boundaries: D + 1.
        width: d.
        workers: the devices that share the work.
        advance: called with the number of completed spectra of all prompts, `spectra_count` in total.
        resolution: of the Gram sums (`contraction.resolution`).
        on_device: whether the devices compute eigenvalues; None decides by the kind of device.
    """
    asked, center = settings.variants, settings.contraction.center
    groups = plan.groups
    solve = partial(
        _spectra,
        boundaries=boundaries,
        width=width,
        workers=workers,
        advance=advance,
        on_device=eigenvalues_on_device(jax.default_backend()) if on_device is None else on_device,
    )
    nobody = groups.drops[:0]
    one_out = [np.array([group]) for group in groups.drops]
    # Without one half, the spectrum is that of the other.
    every = solve(sources[0], [nobody, *one_out, *groups.halves[::-1]], groups.rows, center)
    whole, without, halves = every[0], every[1 : 1 + len(one_out)], every[1 + len(one_out) :]
    variants: dict[str, np.ndarray] = {}

    def add(name: str, source: GramSource, rows: np.ndarray, center: bool) -> None:
        values = solve(source, [nobody, *(one_out if asked.groups else [])], rows, center)
        variants[f"{name}/singular_values"], variants[f"{name}/rows"] = values[0], np.array(rows.sum())
        variants[f"{name}/groups/rows"] = rows[groups.used]
        if asked.groups:
            variants[f"{name}/groups/singular_values"] = values[1:]

    if asked.center and not center:
        add("center", sources[0], groups.rows, True)
    for skip, source in zip(asked.skip, sources[1:], strict=True):
        add(f"skip={skip}", source, plan.rows_by_group(skip), center)
    return Spectra(whole=whole, without=without, halves=halves, variants=variants, resolution=resolution)


def spectra_count(boundaries: int, settings: MetricsConfig) -> int:
    """Number of spectra of all prompts that `all_spectra` computes."""
    asked = settings.variants
    return boundaries * (1 + int(asked.center and not settings.contraction.center) + len(asked.skip))


def dealt_out(boundaries: int, replicates: int, workers: int) -> list[Items]:
    """Assigns spectra to workers: consecutive ones, in numbers that differ by at most one."""
    every = [(boundary, replicate) for boundary in range(boundaries) for replicate in range(replicates)]
    ends = [len(every) * number // workers for number in range(workers + 1)]
    parts = [every[begin:end] for begin, end in pairwise(ends)]
    by_boundary = [groupby(part, key=lambda item: item[0]) for part in parts]
    return [[(at, [replicate for _, replicate in items]) for at, items in grouped] for grouped in by_boundary]


def boundaries_of(boundaries: int, replicates: Sequence[int], workers: int) -> list[list[int]]:
    """The boundaries whose sums each worker reads, over several calls with these numbers of replicates."""
    parts = [dealt_out(boundaries, count, workers) for count in replicates]
    return [sorted({boundary for part in parts for boundary, _ in part[number]}) for number in range(workers)]


def replicate_counts(plan: Plan, settings: MetricsConfig) -> list[int]:
    """Number of spectra at each boundary in each pass of `all_spectra`."""
    asked, drops = settings.variants, len(plan.groups.drops)
    each = 1 + (drops if asked.groups else 0)
    return [1 + drops + len(plan.groups.halves), *[each] * (spectra_count(1, settings) - 1)]


def _spectra(
    source: GramSource,
    left_out: Sequence[np.ndarray],
    rows: np.ndarray,
    center: bool,
    *,
    boundaries: int,
    width: int,
    workers: Sequence[Worker],
    advance: Advance,
    on_device: bool,
) -> np.ndarray:
    """[len(left_out), D + 1, d] singular values of the rows of all groups except each of `left_out`.

    Args:
        source: Gram sums.
        left_out: sets of groups.
        rows: [all G] number of rows of each group.
        center: whether rows are centred.
    """
    work = dealt_out(boundaries, len(left_out), len(workers))
    mine = [number for number, worker in enumerate(workers) if worker.process_index == jax.process_index()]
    keep = np.ones((len(left_out), len(rows)))
    for replicate, groups in enumerate(left_out):
        keep[replicate, groups] = 0
    values = np.zeros((len(left_out), boundaries, width))
    threads = len(mine) if on_device else os.cpu_count() or 1
    # LAPACK's symmetric eigensolver scales badly with threads, so each core solves one matrix.
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(threads) as pool, jax.enable_x64(True):
        for turn in range(max(map(len, work))):
            # Reads are collective on a mesh: processes read equally often, finished ones their last boundary again.
            asked = [items[min(turn, len(items) - 1)][0] if items else 0 for items in work]
            sums = source.at(asked)
            tasks = []
            for number in mine:
                if turn >= len(work[number]):
                    continue
                boundary, replicates = work[number][turn]
                if on_device:
                    tasks.append(
                        (boundary, replicates, pool.submit(_on_device, sums[number], keep[replicates], rows, center))
                    )
                else:
                    host = jax.tree.map(np.asarray, sums[number])
                    for replicate in replicates:
                        task = pool.submit(_on_host, host, keep[replicate], rows, center)
                        tasks.append((boundary, [replicate], task))
            for boundary, replicates, task in tasks:
                values[replicates, boundary] = task.result()
                advance(replicates.count(0))
    _exchange(values, work, workers)
    return values


def _exchange(values: np.ndarray, work: Sequence[Items], workers: Sequence[Worker]) -> None:
    """Fills in the spectra of other processes. They are sent as bytes, because some devices would round float64."""
    if jax.process_count() == 1:
        return

    def of(process: int) -> list[tuple[int, list[int]]]:
        return [
            item
            for items, worker in zip(work, workers, strict=True)
            if worker.process_index == process
            for item in items
        ]

    own = b"".join(values[replicates, boundary].tobytes() for boundary, replicates in of(jax.process_index()))
    for process, given in enumerate(gathered(own)):
        rows = np.frombuffer(given).reshape(-1, values.shape[-1])
        for boundary, replicates in of(process):
            values[replicates, boundary], rows = rows[: len(replicates)], rows[len(replicates) :]


def _on_host(sums: BoundarySums, keep: np.ndarray, rows: np.ndarray, center: bool) -> np.ndarray:
    """[1, d] singular values by LAPACK, of the groups with `keep` [G] = 1."""
    stripes = [np.tensordot(keep, x.astype(np.float64), 1) for x in sums.second]
    width = stripes[-1].shape[-1]
    second = np.concatenate([np.pad(x, ((0, 0), (0, width - x.shape[-1]))) for x in stripes])
    first = keep @ sums.first.astype(np.float64) if center else None
    return contraction.singular_values(second, first, int(keep @ rows))[None]


def _on_device(sums: BoundarySums, keep: np.ndarray, rows: np.ndarray, center: bool) -> np.ndarray:
    """[n, d] singular values on the device of the sums, for each row of `keep` [n, G]."""
    with jax.enable_x64(True):  # a thread-local setting
        spectra = [eigenvalues(sums, each, float(each @ rows), center=center) for each in keep]
        return np.stack([np.asarray(values) for values in spectra])


@partial(jax.jit, static_argnames="center")
def eigenvalues(sums: BoundarySums, keep: Array, rows: Array | float, *, center: bool) -> Array:
    """[d] singular values of the groups with `keep` [G] = 1, which have `rows` rows; needs 64-bit mode."""
    total = [jnp.einsum("g,gij->ij", keep, x, precision=jax.lax.Precision.HIGHEST) for x in sums.second]
    second = contraction.lower_triangle([x.astype(jnp.float64) for x in total])
    if center:
        mean = (keep @ sums.first) / rows
        second = second - rows * jnp.outer(mean, mean)
    values = jnp.linalg.eigvalsh(second, UPLO="L", symmetrize_input=False)
    return jnp.sqrt(jnp.maximum(values[::-1], 0.0))
