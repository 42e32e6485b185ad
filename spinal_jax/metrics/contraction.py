"""Contraction: how fast the tail of a layer's singular spectrum decays.

`alpha_l = - d log s_k / d log k`, the negative slope of the least-squares line through the middle of the log-log
spectrum of `H_l` [N, d], whose rows are the hidden states at the measured positions. `H_l` is never stored: its Gram
matrix is summed batch by batch, and its eigenvalues are taken in float64.

An eigenvalue of a Gram sum is known to about `eps s_1^2`, eps that of the sum, so a singular value is resolved above
`sqrt(eps) s_1`: 1.5e-8 s_1 for a float64 sum, 3.5e-4 s_1 for a float32 sum. The hidden states are float32 themselves,
which resolves 1.2e-7 s_1 (`resolution`). Massive directions of trained models are 10 to 1,000 times the middle of the
spectrum, which a float32 sum does not resolve safely, so sums are float64 (`gram_dtype`).
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from spinal_jax.metrics.tail import EPS32

STRIPES = 4  # a Gram matrix is symmetric: its lower triangle in this many stripes costs 62 % of the whole


def gram_dtype() -> np.dtype:
    """The dtype of Gram sums: float64, whatever the number of rows and the platform.

    Measured: a float64 sum adds 21 % of a forward on CPUs, and on H100 and H200 it is as fast as a float32 sum at
    full precision. TPUs have no float64 unit; XLA emulates it there, in many passes.
    """
    return np.dtype(np.float64)


def resolution(dtype: np.dtype) -> float:
    """Which part of s_1 a singular value must exceed to be known: `max(sqrt(eps), eps32)`, eps that of the sum's
    dtype, eps32 that of the hidden states."""
    return max(math.sqrt(float(np.finfo(dtype).eps)), EPS32)


class Grams(NamedTuple):
    """Sums over rows for each slot and boundary; adding two of them merges what they have seen."""

    second: Array  # [slots, D + 1, d, d] sum of outer products, of which the lower triangle is filled
    first: Array  # [slots, D + 1, d] sum


def init(slots: int, boundaries: int, width: int, dtype: np.dtype) -> Grams:
    """Nothing seen yet."""
    return Grams(jnp.zeros((slots, boundaries, width, width), dtype), jnp.zeros((slots, boundaries, width), dtype))


def update(grams: Grams, h: Array, counted: Array, slots: Array, boundary: Array) -> Grams:
    """Adds the rows of one boundary.

    Args:
        h: [B, T, d] residual stream.
        counted: [B, T] 1 where a row counts, else 0.
        slots: int [B] where each row of the batch is summed.
        boundary: scalar int.
    """
    x = jnp.where(counted[..., None] > 0, h, 0).astype(grams.second.dtype)
    edges = [round(i * x.shape[-1] / STRIPES) for i in range(STRIPES + 1)]

    def add(b: Array, grams: Grams) -> Grams:
        second, at = grams.second, (slots[b], boundary)
        for begin, end in pairwise(edges):
            left, right = x[b, :, begin:end], x[b, :, :end]
            outer = jax.lax.dot_general(left, right, (((0,), (0,)), ((), ())), precision=jax.lax.Precision.HIGHEST)
            second = second.at[*at, begin:end, :end].add(outer)
        return Grams(second, grams.first.at[at].add(jnp.sum(x[b], axis=0)))

    return jax.lax.fori_loop(0, x.shape[0], add, grams)


class Split(NamedTuple):
    """How devices share the work of a Gram sum: names of the axes of a `jax.shard_map`."""

    rows: tuple[str, ...]  # hidden states are split along these
    features: tuple[str, ...]  # each device makes some rows of the matrix: it has all features of its hidden states
    scattered: tuple[str, ...]  # of `rows`: those along which each device keeps a part of the rows it has made


def shard_sums(h: Array, counted: Array, slots: Array, count: int, dtype: np.dtype, split: Split) -> Grams:
    """What one boundary adds to the sums of all devices, within a `jax.shard_map`.

    Args:
        h, counted, slots: as `update` takes them, of this device's rows.
        count: how many slots there are.
        dtype: of the sums.
        split: how the work is shared.

    Returns:
        [count, 1, d / n, d], this device's rows of the matrices, of which the lower triangle counts, and
        [count, 1, d].
    """
    width = h.shape[-1]
    mine = width // jax.lax.axis_size(split.features)
    if mine == width:
        sums = update(init(count, 1, width, dtype), h, counted, slots, jnp.int32(0))
    else:
        begin = jax.lax.axis_index(split.features) * mine
        x = jnp.where(counted[..., None] > 0, h, 0).astype(dtype)

        def add(b: Array, sums: Grams) -> Grams:
            left = jax.lax.dynamic_slice_in_dim(x[b], begin, mine, axis=1)
            outer = jax.lax.dot_general(left, x[b], (((0,), (0,)), ((), ())), precision=jax.lax.Precision.HIGHEST)
            at = slots[b], 0
            return Grams(sums.second.at[at].add(outer), sums.first.at[at].add(jnp.sum(x[b], axis=0)))

        empty = Grams(jnp.zeros((count, 1, mine, width), dtype), jnp.zeros((count, 1, width), dtype))
        sums = jax.lax.fori_loop(0, x.shape[0], add, empty)
    second = jax.lax.psum(sums.second, tuple(axis for axis in split.rows if axis not in split.scattered))
    if split.scattered:
        second = jax.lax.psum_scatter(second, split.scattered, scatter_dimension=2, tiled=True)
    return Grams(second, jax.lax.psum(sums.first, split.rows))


def singular_values(second: np.ndarray, first: np.ndarray | None = None, rows: int = 0) -> np.ndarray:
    """Singular values of the rows behind a Gram sum, float64 [d], descending; of the centred rows if `first` is given.

    Args:
        second: [d, d] symmetric sum of outer products; its lower triangle is read.
        first: [d] sum of the `rows` rows, to centre them.
    """
    gram = second.astype(np.float64)
    if first is not None and rows:
        mean = first.astype(np.float64) / rows
        gram = gram - rows * np.outer(mean, mean)
    if not np.isfinite(gram).all():
        return np.full(len(gram), np.nan)
    return np.sqrt(np.maximum(np.linalg.eigvalsh(gram)[::-1], 0.0))
