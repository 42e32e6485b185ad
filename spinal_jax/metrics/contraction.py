"""Contraction: how fast the tail of a layer's singular spectrum decays.

`alpha_l = - d log s_k / d log k`, the negative slope of the least-squares line through the middle of the log-log
spectrum of `H_l` [N, d], whose rows are the hidden states at the measured positions. `H_l` is never stored: its Gram
matrix is accumulated batch by batch, and its eigenvalues are computed in float64.

An eigenvalue of a Gram sum has an error of about `eps s_1^2`, where eps belongs to the dtype of the sum, so a singular
value is resolved above `sqrt(eps) s_1`: 1.5e-8 s_1 for a float64 sum, 3.5e-4 s_1 for a float32 sum. The hidden states
are float32, which resolves 1.2e-7 s_1 (`resolution`). Massive directions of trained models are 10 to 1,000 times the
middle of the spectrum. A float32 sum does not resolve that safely, so sums are float64 (`gram_dtype`). TPUs have no
float64 multiplication; there, float32 states are split into bfloat16 pieces whose products float32 sums exactly
(`_exact_product`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from spinal_jax.metrics.tail import EPS32
from spinal_jax.parallel.device_defaults import gram_rows, stripes_at_once

MIN_STRIPE_HEIGHT = 128  # rows of a stripe, if a Gram matrix is split into several
EXACT_ROWS = 1024  # maximum rows in one float32 product: float32 sums 2^10 products of 2^7 by 2^7 exactly


def gram_dtype() -> np.dtype:
    """The dtype of Gram sums: float64 for any number of rows and on every platform.

    Measured cost: on CPUs a float64 sum adds 21 % to a forward pass; on H100 and H200 it is as fast as a float32 sum
    at full precision. On TPUs XLA emulates a float64 addition with about twenty float32 operations.
    """
    return np.dtype(np.float64)


def resolution(dtype: np.dtype, backend: str = "cpu") -> float:
    """The fraction of s_1 above which a singular value is resolved: `max(sqrt(eps), eps32)`, with eps of the dtype of
    the products and eps32 of the hidden states.

    On a TPU 1.9e-6 replaces eps32: `_exact_product` rounds a number by up to eps32 / 2 of the largest number in its
    column of EXACT_ROWS rows, which changes the column by up to `sqrt(EXACT_ROWS) eps32 / 2` of its norm.
    """
    states = EPS32 / 2 * math.sqrt(EXACT_ROWS) if backend == "tpu" else EPS32
    return max(math.sqrt(float(np.finfo(dtype).eps)), states)


class Grams(NamedTuple):
    """Gram sums for each slot and boundary. The sum of two `Grams` covers the rows of both.

    Only the lower triangle of each symmetric matrix is stored, in stripes of equal height that end at the diagonal.
    """

    second: tuple[Array, ...]  # S stripes [slots, D + 1, d / S, end]: sums of outer products
    first: Array  # [slots, D + 1, d]: sums of rows


def stripe_count(width: int) -> int:
    """S, the number of stripes of a Gram matrix: 7 and 8 stripes need 57 and 56 % of the full matrix, 4 need 62 %.

    A width of 7 * 2^n is split by 7: devices then share heights of 2^n.
    """
    return next(n for n in (7, 8, 4, 2, 1) if n == 1 or (width % n == 0 and width // n >= MIN_STRIPE_HEIGHT))


def stripe_ends(width: int) -> range:
    """The end of each stripe, equal in rows and columns."""
    height = width // stripe_count(width)
    return range(height, width + 1, height)


def triangle_size(width: int) -> int:
    """Number of elements in the stripes of one matrix."""
    return sum(stripe_ends(width)) * (width // stripe_count(width))


def init(slots: int, boundaries: int, width: int, dtype: np.dtype) -> Grams:
    """Sums of zero rows."""
    height = width // stripe_count(width)
    return Grams(
        second=tuple(jnp.zeros((slots, boundaries, height, end), dtype) for end in stripe_ends(width)),
        first=jnp.zeros((slots, boundaries, width), dtype),
    )


def product_dtype(states: np.dtype, sums: np.dtype, backend: str) -> np.dtype:
    """The dtype in which hidden states are multiplied.

    It is the dtype of the sums (on TPUs through `_exact_product`), except for bfloat16 states on accelerators, which
    use float32: products of bfloat16 numbers are exact in float32, and partial sums of at most EXACT_ROWS rows are
    added in the dtype of the sums.
    """
    narrow = backend in ("gpu", "tpu") and np.dtype(states).itemsize < 4
    return np.dtype(np.float32) if narrow else np.dtype(sums)


def stripes_together(states: np.dtype, sums: np.dtype, backend: str) -> int:
    """Number of stripes in one product."""
    return 1 if product_dtype(states, sums, backend) == sums else stripes_at_once(backend)


def product_size(width: int, states: np.dtype, backend: str) -> int:
    """Number of elements of one matrix that products compute: those of `triangle_size`, and with several stripes in a
    product some above the diagonal."""
    ends, together = stripe_ends(width), stripes_together(states, gram_dtype(), backend)
    some = (ends[at : at + together] for at in range(0, len(ends), together))
    return width // len(ends) * sum(len(each) * each[-1] for each in some)


def update(grams: Grams, h: Array, counted: Array, slots: Array, boundary: Array, backend: str | None = None) -> Grams:
    """Adds the rows of one boundary.

    Args:
        h: [B, T, d] residual stream.
        counted: [B, T] 1 for positions that count, else 0.
        slots: int [B] the slot of each row of the batch. Adjacent rows of one slot are multiplied together.
        boundary: scalar int.
        backend: kind of device to compile for; None is JAX's default.
    """
    backend = backend or jax.default_backend()
    h, counted, slots = _short_rows(h, counted, slots, backend)
    pieces = _pieces_of(h, slots, backend)

    def one(number: Array, grams: Grams) -> Grams:
        rows = pieces.rows(h, counted, number)
        return _add(grams, rows, slots[pieces.begin[number]], boundary, backend=backend)

    return jax.lax.fori_loop(0, pieces.total, one, grams)


class Pieces(NamedTuple):
    """Neighbouring rows of a batch that belong to one slot and are multiplied together."""

    begin: Array  # int [B] the first row of each piece; B behind the last piece
    stop: Array  # int [B]
    total: Array  # how many there are
    height: int  # rows of a piece at most

    def rows(self, h: Array, counted: Array, number: Array) -> Array:
        """[n, d] of one piece: those that count, and zeros in place of the others."""
        batch, length, width = h.shape
        at = jnp.minimum(self.begin[number], batch - self.height)
        here = at + jnp.arange(self.height, dtype=jnp.int32)
        inside = (here >= self.begin[number]) & (here < self.stop[number])
        keep = inside[:, None] & (jax.lax.dynamic_slice_in_dim(counted, at, self.height) > 0)
        rows = jnp.where(keep[..., None], jax.lax.dynamic_slice_in_dim(h, at, self.height), 0)
        return rows.reshape(self.height * length, width)


def _short_rows(h: Array, counted: Array, slots: Array, backend: str) -> tuple[Array, Array, Array]:
    """On a CPU, long rows of a batch are cut into shorter ones, so that their float64 copies are small."""
    most = gram_rows(backend)
    if backend != "cpu" or h.shape[1] % most:
        return h, counted, slots
    return h.reshape(-1, most, h.shape[2]), counted.reshape(-1, most), jnp.repeat(slots, h.shape[1] // most)


def _pieces_of(h: Array, slots: Array, backend: str) -> Pieces:
    batch, length, _ = h.shape
    height = max(1, min(batch, gram_rows(backend) // length))
    number = jnp.arange(batch, dtype=jnp.int32)
    changes = jnp.concatenate([jnp.ones(1, bool), slots[1:] != slots[:-1]])
    run = jax.lax.cummax(jnp.where(changes, number, 0))  # where the run of one slot begins that a row belongs to
    begins = (number - run) % height == 0
    begin = jnp.nonzero(begins, size=batch, fill_value=batch)[0].astype(jnp.int32)
    return Pieces(
        begin=begin,
        stop=jnp.append(begin[1:], jnp.int32(batch)),
        total=jnp.sum(begins, dtype=jnp.int32),
        height=height,
    )


def _add(
    grams: Grams, x: Array, slot: Array, boundary: Array, part: Array | int = 0, parts: int = 1, *, backend: str
) -> Grams:
    """Adds the rows x [n, d]; `grams` holds the `part`-th of `parts` equal parts of the rows of each stripe."""
    sums, ends = grams.first.dtype, tuple(stripe_ends(x.shape[1]))
    products = product_dtype(x.dtype, sums, backend)
    height, together = grams.second[0].shape[2], stripes_together(x.dtype, sums, backend)
    corner = (slot, jnp.int32(boundary), jnp.int32(0), jnp.int32(0))
    transposed = x.T
    if backend == "cpu":  # XLA would otherwise convert and transpose the operands of every stripe again
        x, transposed = jax.lax.optimization_barrier((x.astype(sums), transposed.astype(sums)))

    def columns(begin: Array | int) -> Array:
        if backend == "cpu":
            return jax.lax.dynamic_slice_in_dim(transposed, begin, height).T
        return jax.lax.dynamic_slice_in_dim(x, begin, height, axis=1)

    second: list[Array] = []
    for some in (ends[at : at + together] for at in range(0, len(ends), together)):
        begins = [end - height * parts + part * height for end in some]
        left = jnp.concatenate([columns(begin) for begin in begins], axis=1)
        addends = _outer(left, x[:, : some[-1]], products, sums, backend)
        for begin, end in zip(range(0, left.shape[1], height), some, strict=True):
            stripe = grams.second[len(second)]
            outer = functools.reduce(jnp.add, (each[begin : begin + height, :end].astype(sums) for each in addends))
            so_far = jax.lax.dynamic_slice(stripe, corner, (1, 1, *outer.shape))
            second.append(jax.lax.dynamic_update_slice(stripe, so_far + outer, corner))
    first = grams.first.at[slot, boundary].add(jnp.sum(x, axis=0, dtype=sums))
    return Grams(second=tuple(second), first=first)


def _outer(left: Array, right: Array, products: np.dtype, sums: np.dtype, backend: str) -> list[Array]:
    """Addends of `left.T @ right` of left [n, a], right [n, b], multiplied in the dtype `products`.

    They are to be added in `sums`. Where the two dtypes differ, each covers at most EXACT_ROWS rows.
    """
    if backend == "tpu" and products == np.float64:
        product = _exact_product
    else:
        product = _dot
        if products == np.float64 or left.dtype.itemsize == 4 or backend == "cpu":
            left, right = left.astype(products), right.astype(products)
        # Else products of bfloat16 numbers are exact in float32.
    rows = len(left)
    count = 1 if product is _dot and products == sums else -(-rows // EXACT_ROWS)
    if backend == "gpu" and count > 1 and rows % count == 0:  # one kernel
        shape = (count, rows // count, -1)
        return list(jax.vmap(lambda a, b: product(a, b, products))(left.reshape(shape), right.reshape(shape)))
    step = -(-rows // count)
    return [product(left[at : at + step], right[at : at + step], products) for at in range(0, rows, step)]


def _dot(left: Array, right: Array, products: np.dtype) -> Array:
    rows = (((0,), (0,)), ((), ()))
    precision = jax.lax.Precision.DEFAULT if left.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    return jax.lax.dot_general(left, right, rows, precision=precision, preferred_element_type=products)


def _exact_product(left: Array, right: Array, products: np.dtype) -> Array:
    """`left.T @ right` in float64 for at most EXACT_ROWS rows, on units that multiply bfloat16 and add in float32.

    Each column is rounded to multiples of 2^-24 of its largest power of two and split into three pieces: integers of at
    most 2^7, which bfloat16 represents. A product of two pieces sums to at most 2^24, which is exact in float32. The
    nine products are added in float64 (Ozaki et al. 2012, Numerical Algorithms 59).
    """
    (ours, tall), (theirs, wide) = _pieces(left), _pieces(right)
    total = jnp.zeros((left.shape[1], right.shape[1]), products)
    for order in (4, 3, 2, 1, 0):  # the smallest first
        for at in range(max(0, order - 2), min(order, 2) + 1):
            whole = _dot(ours[at], theirs[order - at], np.dtype(np.float32))
            total += (whole * (tall[:, None] * (wide * 2.0 ** (-14 - 8 * order)))).astype(products)
    return total


def _pieces(x: Array) -> tuple[list[Array], Array]:
    """Three bfloat16 arrays [n, a] of integers in [-128, 128] and a power of two for each column, `scale` [a]: x equals
    `scale (pieces[0] / 2^7 + pieces[1] / 2^15 + pieces[2] / 2^23)` to within 2^-24 of the scale."""
    x = x.astype(jnp.float32)
    exponent = jnp.frexp(jnp.max(jnp.abs(x), axis=0))[1]
    left, pieces = jnp.ldexp(x, 7 - exponent), []
    for _ in range(3):
        piece = jnp.round(left)
        pieces.append(piece.astype(jnp.bfloat16))
        left = (left - piece) * 256
    return pieces, jnp.ldexp(jnp.ones_like(x[0]), exponent)


class GramAxes(NamedTuple):
    """Mesh axes over which a Gram sum is split, inside a `jax.shard_map`."""

    rows: tuple[str, ...]  # split the hidden states
    features: tuple[str, ...]  # split the rows of each stripe; every device has all features of its hidden states
    scattered: tuple[str, ...]  # subset of `rows` over which the result is reduce-scattered


def update_shards(
    grams: Grams,
    h: Array,
    counted: Array,
    slots: Array,
    boundary: Array,
    present: Array,
    *,
    split: GramAxes,
    backend: str | None = None,
) -> Grams:
    """`update` by all devices, within a `jax.shard_map`.

    Each device sums its own rows of one slot, what all of them have is exchanged and added, and then comes the next
    slot: no more than the sum of one slot is there beside `grams`.

    Args:
        grams: what this device keeps: its rows of each stripe [slots, D + 1, d / (S n), end], and [slots, D + 1, d].
        h, counted, slots, boundary, backend: as `update` takes them, of this device's rows.
        present: int [n] the slots that rows of any device have, ascending, and then any number beyond the last slot.
        split: how the work is shared.
    """
    backend = backend or jax.default_backend()
    width = h.shape[-1]
    height = width // stripe_count(width)
    parts = jax.lax.axis_size(split.features) if split.features else 1
    part = jax.lax.axis_index(split.features) if split.features else 0
    h, counted, slots = _short_rows(h, counted, slots, backend)
    pieces = _pieces_of(h, slots, backend)
    # Pieces in the order of their slots; those of present[i] are order[ends[i] : ends[i + 1]].
    there = jnp.arange(len(slots), dtype=jnp.int32) < pieces.total
    owner = jnp.searchsorted(present, slots[jnp.where(there, pieces.begin, 0)]).astype(jnp.int32)
    owner = jnp.where(there, owner, len(present))
    order = jnp.argsort(owner, stable=True).astype(jnp.int32)
    ends = jnp.searchsorted(owner[order], jnp.arange(len(present) + 1, dtype=jnp.int32)).astype(jnp.int32)
    whole = tuple(axis for axis in split.rows if axis not in split.scattered)

    def over_devices(stripe: Array) -> Array:
        if backend == "tpu":
            for axis in split.scattered:
                stripe = _scatter_around(stripe, axis)
        elif split.scattered:  # along the first axis: along another XLA for GPUs lays out all sums anew, in a copy
            stripe = jax.lax.psum_scatter(stripe[0, 0], split.scattered, tiled=True)[None, None]
        return jax.lax.psum(stripe, whole)

    def one(number: Array, grams: Grams) -> Grams:
        def more(place: Array, own: Grams) -> Grams:
            rows = pieces.rows(h, counted, order[place])
            return _add(own, rows, jnp.int32(0), jnp.int32(0), part, parts, backend=backend)

        empty = Grams(
            second=tuple(jnp.zeros((1, 1, height // parts, end), grams.first.dtype) for end in stripe_ends(width)),
            first=jnp.zeros((1, 1, width), grams.first.dtype),
        )
        own = jax.lax.fori_loop(ends[number], ends[number + 1], more, empty)
        together = Grams(second=tuple(map(over_devices, own.second)), first=jax.lax.psum(own.first, split.rows))
        slot = jnp.minimum(present[number], grams.first.shape[0] - 1)  # nothing is added for a slot that is not there

        def into(total: Array, sums: Array) -> Array:
            at = (slot, boundary, *(jnp.int32(0) for _ in sums.shape[2:]))
            return jax.lax.dynamic_update_slice(total, sums + jax.lax.dynamic_slice(total, at, sums.shape), at)

        return jax.tree.map(into, grams, together)

    return jax.lax.fori_loop(0, len(present), one, grams)


def _scatter_around(stripe: Array, axis: str) -> Array:
    """`jax.lax.psum_scatter` of [1, 1, rows, end] along `axis` by its rows, for TPUs, which have none in float64: each
    part goes once around the ring of devices, and each device adds its own. (An all-to-all of 256 devices compiles for
    minutes, and takes the memory of what is exchanged twice.)"""
    count, here = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    parts = stripe.reshape(count, 1, 1, -1, stripe.shape[-1])
    onward = [(device, (device + 1) % count) for device in range(count)]

    def own(turn: Array | int) -> Array:
        return jax.lax.dynamic_index_in_dim(parts, (here + 2 * count - 1 - turn) % count, keepdims=False)

    def step(turn: Array, so_far: Array) -> Array:
        return jax.lax.ppermute(so_far, axis, onward) + own(turn.astype(jnp.int32))

    return jax.lax.fori_loop(1, count, step, own(0))


def lower_triangle(stripes: Sequence[Array]) -> Array:
    """[..., d, d] lower-triangular matrices from stripes [..., d / S, end], padded with zeros."""
    width = stripes[-1].shape[-1]
    pads = [(0, 0)] * (stripes[0].ndim - 1)
    return jnp.concatenate([jnp.pad(x, (*pads, (0, width - x.shape[-1]))) for x in stripes], axis=-2)


def singular_values(second: np.ndarray, first: np.ndarray | None = None, rows: int = 0) -> np.ndarray:
    """Singular values of the rows of a Gram sum, float64 [d], descending; of the centred rows if `first` is given.

    Args:
        second: [d, d] symmetric sum of outer products; only the lower triangle is read.
        first: [d] sum of the rows, for centring.
        rows: number of rows.
    """
    gram = second.astype(np.float64)
    if first is not None and rows:
        mean = first.astype(np.float64) / rows
        gram = gram - rows * np.outer(mean, mean)
    if not np.isfinite(gram).all():
        return np.full(len(gram), np.nan)
    return np.sqrt(np.maximum(np.linalg.eigvalsh(gram)[::-1], 0.0))
