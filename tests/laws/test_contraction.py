"""Contraction from streamed Gram sums, against a float64 SVD of the same float32 rows; and the laws of its sums."""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spinal_jax.metrics import contraction
from spinal_jax.metrics.contraction import gram_dtype, init, resolution, singular_values, update
from spinal_jax.metrics.tail import EPS32, effective_rank, spike, tail_fit

WINDOW = (0.10, 0.50)
BATCH = 512  # rows streamed at a time
STEP = jax.jit(update)


class Matrices(NamedTuple):
    """`contraction.Grams` with whole matrices in place of stripes."""

    second: np.ndarray  # [slots, D + 1, d, d], of which the lower triangle is filled
    first: np.ndarray  # [slots, D + 1, d]


def matrices(grams: contraction.Grams) -> Matrices:
    with jax.enable_x64(True):
        return Matrices(np.asarray(contraction.lower_triangle(grams.second)), np.asarray(grams.first))


def gram(rows: np.ndarray, dtype: np.dtype | None = None) -> Matrices:
    """The sums [1, 1, ...] of float32 rows [N, d], streamed in batches padded with rows that must not count."""
    dtype = gram_dtype() if dtype is None else dtype
    missing = -len(rows) % BATCH
    padded = np.concatenate([rows, np.full((missing, rows.shape[1]), 1e6, np.float32)])
    counted = (np.arange(len(padded)) < len(rows)).astype(np.float32)
    with jax.enable_x64(True) if dtype == np.float64 else contextlib.nullcontext():
        grams = init(1, 1, rows.shape[1], dtype)
        for start in range(0, len(padded), BATCH):
            span = slice(start, start + BATCH)
            h, weight = (jnp.asarray(x.reshape(2, BATCH // 2, *x.shape[1:])) for x in (padded[span], counted[span]))
            grams = STEP(grams, h, weight, jnp.zeros(2, jnp.int32), jnp.int32(0))
    found = matrices(grams)
    assert found.second.dtype == dtype
    return found


def spectrum(rows: np.ndarray, dtype: np.dtype | None = None) -> np.ndarray:
    return singular_values(gram(rows, dtype).second[0, 0])


def orthonormal(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    return np.linalg.qr(rng.normal(size=(n, d)))[0]


def rows_of(s: np.ndarray, count: int, rotated: bool, seed: int = 0) -> np.ndarray:
    """float32 [count, d] whose singular values are, up to rounding, the first min(count, d) of `s` [d]."""
    rng = np.random.default_rng(seed)
    width, rank = len(s), min(count, len(s))
    basis = orthonormal(rng, width, width) if rotated else np.eye(width)
    return (orthonormal(rng, count, rank) * s[:rank] @ basis[:rank]).astype(np.float32)


def power_law(width: int, alpha: float, ratio: float) -> np.ndarray:
    """k ** -alpha, its first two values raised until s_1 / s_r is `ratio`: a few features of a few tokens explode."""
    s = np.arange(1, width + 1.0) ** -alpha
    s[:2] *= ratio / width**alpha
    return s


def compare(rows: np.ndarray, tolerance: float, dtype: np.dtype | None = None) -> None:
    """The fit of the streamed spectrum is that of a float64 SVD of the same rows."""
    found = spectrum(rows, dtype)
    exact = np.linalg.svd(rows.astype(np.float64), compute_uv=False)
    ours, theirs = tail_fit(found, len(rows), WINDOW), tail_fit(padded(exact, len(found)), len(rows), WINDOW)
    assert (ours.resolved, ours.low, ours.high) == (theirs.resolved, theirs.low, theirs.high)
    assert not math.isnan(theirs.alpha)
    assert ours.alpha == pytest.approx(theirs.alpha, abs=tolerance)
    assert ours.r2 == pytest.approx(theirs.r2, abs=20 * tolerance)  # noise in s_k lowers a fit more than it turns it
    assert ours.intercept == pytest.approx(theirs.intercept, abs=10 * tolerance)  # log s_1 lies outside the window
    assert ours.quadratic == pytest.approx(theirs.quadratic, abs=10 * tolerance)  # a second difference of log s
    # What a zero becomes, the root of the rounding of s_1^2, is 1e-8 s_1 in float64 and counts for a rank a little.
    assert effective_rank(found) == pytest.approx(effective_rank(exact), rel=max(tolerance, 1e-5))


def padded(s: np.ndarray, width: int) -> np.ndarray:
    return np.concatenate([s, np.zeros(width - len(s))])


# A float64 sum rounds s_k^2 by eps64 (s_1 / s_k)^2, 2e-8 at a ratio of 1e4 over the fitted ranks.
FLOAT64 = 1e-7


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("count", [60, 128, 512, 8192])  # N < d, N = d, N = 4 d, 64 d
@pytest.mark.parametrize(("alpha", "ratio"), [(0.5, 100), (1.5, 1500), (0.3, 1e3), (0.3, 1e4)])
def test_the_streamed_spectrum_is_that_of_the_rows(count: int, alpha: float, ratio: float, rotated: bool) -> None:
    compare(rows_of(power_law(128, alpha, ratio), count, rotated), FLOAT64)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [500, 16384])
def test_massive_activations_of_few_tokens(count: int, seed: int) -> None:
    """Two features of 1 % of the tokens hold thousands of times what the others do, as in trained models."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(count, 80)) * np.arange(1, 81.0) ** -0.6
    rows[::100, [3, 17]] += 2e4
    compare((rows @ orthonormal(rng, 80, 80)).astype(np.float32), 1e-5)


def test_a_float32_sum_says_where_it_resolves_nothing() -> None:
    """At a ratio of 1e4 a float32 sum gives no number, and at one that it resolves the right one."""
    float32 = np.dtype(np.float32)
    assert resolution(float32) == pytest.approx(math.sqrt(EPS32))
    assert resolution(np.dtype(np.float64)) == EPS32
    for ratio, known in ((1e2, True), (1e4, False)):
        rows = rows_of(power_law(64, 0.5, ratio), 8192, True)
        exact = tail_fit(np.linalg.svd(rows.astype(np.float64), compute_uv=False), len(rows), WINDOW)
        found = tail_fit(spectrum(rows, float32), len(rows), WINDOW, resolution(float32))
        assert (found.low, found.high) == (exact.low, exact.high)
        assert math.isnan(found.alpha) != known
        if known:
            assert found.alpha == pytest.approx(exact.alpha, abs=1e-3)
        assert not math.isnan(exact.alpha)


@pytest.mark.parametrize("factor", [0.25, 0.8, 1.25, 4.0])
def test_the_largest_singular_value_alone_moves_no_alpha(factor: float) -> None:
    """A spectrum with a massive direction; nothing but s_1 is scaled, so nothing in the window moves."""
    rows = rows_of(power_law(128, 0.7, 3000), 512, True)
    left, s, right = np.linalg.svd(rows.astype(np.float64), full_matrices=False)
    alphas = []
    for scale in (1.0, factor):
        s_scaled = s * np.where(np.arange(len(s)) == 0, scale, 1)
        gram = (left * s_scaled @ right).T @ (left * s_scaled @ right)
        alphas.append(tail_fit(singular_values(gram), len(rows), WINDOW).alpha)
    assert alphas[1] == pytest.approx(alphas[0], abs=1e-9)


@pytest.mark.parametrize("times", [2, 3, 16])
@pytest.mark.parametrize("count", [128, 500])  # N = d, and 4 d
def test_repeating_all_rows_moves_no_alpha(count: int, times: int) -> None:
    rows = rows_of(power_law(128, 0.7, 1000), count, True)
    once, often = (tail_fit(spectrum(np.tile(rows, (n, 1))), n * len(rows), WINDOW) for n in (1, times))
    assert (often.low, often.high, often.resolved) == (once.low, once.high, once.resolved)
    assert often.alpha == pytest.approx(once.alpha, abs=1e-9)


@pytest.mark.parametrize("massive", [1.0, 100.0])
def test_a_million_rows_give_a_number(massive: float) -> None:
    """N = 1e6 through the Gram matrix itself, a massive direction 100 times the rest."""
    rng, width = np.random.default_rng(0), 256
    s = math.sqrt(1e6) * np.arange(1, width + 1.0) ** -0.8
    s[0] *= massive
    basis = orthonormal(rng, width, width)
    gram = (basis.T * s**2) @ basis
    found = tail_fit(singular_values(gram), 10**6, WINDOW)
    assert found.alpha == pytest.approx(0.8, abs=1e-6)
    assert found.resolved == width
    assert spike(singular_values(gram)) == pytest.approx(math.log(massive * 2**0.8), abs=1e-9)


@pytest.mark.parametrize("count", [40, 4096])
def test_centring_gives_the_spectrum_of_the_centred_rows(count: int) -> None:
    rng = np.random.default_rng(0)
    rows = (rng.normal(size=(count, 64)) * np.arange(1, 65.0) ** -0.5 + 3 * rng.normal(size=64)).astype(np.float32)
    sums = gram(rows)
    found = singular_values(sums.second[0, 0], sums.first[0, 0], count)
    exact = np.linalg.svd(rows - rows.astype(np.float64).mean(axis=0), compute_uv=False)
    kept = min(count - 1, 64)  # centring takes one rank away where there are not more rows than features
    # The mean's s_1 is 200 times the smallest spread, so rounding s_1^2 in float32 moves that one's square by 2e-3.
    np.testing.assert_allclose(found[:kept], exact[:kept], rtol=1e-3 if sums.second.dtype == np.float32 else 1e-8)
    assert tail_fit(found, count, WINDOW).alpha != tail_fit(singular_values(sums.second[0, 0]), count, WINDOW).alpha


def test_only_the_lower_triangle_is_read() -> None:
    rows = rows_of(power_law(40, 0.5, 50), 200, True)
    second = gram(rows).second[0, 0]
    np.testing.assert_array_equal(singular_values(np.tril(second)), singular_values(second))


def blocks(seed: int = 0, batch: int = 4, length: int = 16, width: int = 12) -> tuple[jax.Array, jax.Array, jax.Array]:
    """h [B, T, d], counted, slots."""
    rng = np.random.default_rng(seed)
    h = jnp.asarray(rng.normal(size=(batch, length, width)), jnp.float32)
    return h, jnp.asarray(rng.integers(0, 2, size=(batch, length)), jnp.float32), jnp.zeros(batch, jnp.int32)


def summed(*parts: tuple[jax.Array, jax.Array, jax.Array], boundary: int = 0, slots: int = 2) -> Matrices:
    """float64 sums of the parts, two boundaries."""
    with jax.enable_x64(True):
        grams = init(slots, 2, parts[0][0].shape[-1], np.dtype(np.float64))
        for h, counted, slot in parts:
            grams = STEP(grams, h, counted, slot, jnp.int32(boundary))
    return matrices(grams)


def close(a: Matrices, b: Matrices) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-12), a, b)  # float64 sums of some 60 numbers


def equal(a: Matrices, b: Matrices) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_two_halves_are_the_whole_whether_streamed_or_merged() -> None:
    h, counted, slots = blocks()
    whole = summed((h, counted, slots))
    first, second = (h[:2], counted[:2], slots[:2]), (h[2:], counted[2:], slots[2:])
    close(whole, summed(first, second))
    close(whole, jax.tree.map(np.add, summed(first), summed(second)))
    rows = np.asarray(h, np.float64)[np.asarray(counted) > 0]
    np.testing.assert_allclose(np.tril(whole.second[0, 0]), np.tril(rows.T @ rows), atol=1e-12)
    np.testing.assert_allclose(whole.first[0, 0], rows.sum(axis=0), atol=1e-12)


def test_rows_without_weight_change_nothing_whatever_they_hold() -> None:
    h, counted, slots = blocks()
    before = summed((h, counted, slots))
    for content in (0.0, 1e30, math.inf, math.nan):
        equal(before, summed((jnp.where(counted[..., None] > 0, h, content), counted, slots)))
    equal(before, summed((h, counted, slots), (h, 0 * counted, slots)))


def test_the_order_of_rows_does_not_matter() -> None:
    h, counted, slots = blocks()
    flat, weight = h.reshape(-1, 12), counted.reshape(-1)
    order = np.random.default_rng(1).permutation(len(flat))
    shuffled = flat[order].reshape(h.shape), weight[order].reshape(counted.shape), slots
    close(summed((h, counted, slots)), summed(shuffled))


def test_slots_and_boundaries_do_not_see_each_other() -> None:
    (h, counted, _), (other, weight, _) = blocks(0), blocks(1)
    zero, one = jnp.zeros(4, jnp.int32), jnp.ones(4, jnp.int32)
    alone, both = summed((h, counted, zero)), summed((h, counted, zero), (other, weight, one))
    np.testing.assert_array_equal(both.second[0], alone.second[0])
    np.testing.assert_array_equal(both.second[1, 0], summed((other, weight, zero)).second[0, 0])
    assert not alone.second[1].any()
    assert not alone.second[0, 1].any()  # the other boundary
    np.testing.assert_array_equal(summed((h, counted, zero), boundary=1).second[0, 1], alone.second[0, 0])
    mixed = summed((h, counted, jnp.array([0, 1, 0, 1], jnp.int32)))
    close(
        jax.tree.map(lambda x: x[0] + x[1], mixed),
        jax.tree.map(lambda x: x[0], alone),
    )
    close(jax.tree.map(lambda x: x[1], mixed), jax.tree.map(lambda x: x[0], summed((h[1::2], counted[1::2], zero[:2]))))


def test_bfloat16_hidden_states_are_summed_in_float32() -> None:
    h, counted, slots = blocks()
    narrow = h.astype(jnp.bfloat16)
    grams = matrices(STEP(init(2, 2, 12, np.dtype(np.float32)), narrow, counted, slots, jnp.int32(0)))
    rows = np.asarray(narrow, np.float64)[np.asarray(counted) > 0]
    # float32 sums of about 30 products of numbers near 1.
    np.testing.assert_allclose(np.tril(grams.second[0, 0]), np.tril(rows.T @ rows), atol=1e-5)


def test_many_devices_divide_the_height_of_a_stripe() -> None:
    """Of widths of published models: Llama 3 8B and 70B, DeepSeek-V3, Qwen2 7B, Gemma 3 27B, Qwen2.5 32B."""
    heights = {width: width // contraction.stripe_count(width) for width in (4096, 8192, 7168, 3584, 5376, 5120)}
    assert heights == {4096: 512, 8192: 1024, 7168: 1024, 3584: 512, 5376: 768, 5120: 640}


@pytest.mark.parametrize(("width", "stripes", "length"), [(1024, 8, 480), (896, 7, 205), (256, 2, 1024)])
def test_stripes_hold_the_lower_triangle_and_rows_of_a_slot_are_multiplied_together(
    width: int, stripes: int, length: int
) -> None:
    """Runs of rows longer and shorter than one product takes, float64 and bfloat16 states on a GPU; there partial sums
    cover unequally many rows in the second case. In the third, a row is longer than one product takes on a CPU."""
    batch = 13
    rng = np.random.default_rng(0)
    h = jnp.asarray(rng.normal(size=(batch, length, width)), jnp.bfloat16)
    counted = jnp.asarray(rng.integers(0, 2, size=(batch, length)), jnp.float32)
    slots = jnp.asarray([0] * 9 + [2] + [1] * 3, jnp.int32)
    assert contraction.stripe_count(width) == stripes
    assert contraction.triangle_size(width) == width**2 * (stripes + 1) / (2 * stripes)
    with jax.enable_x64(True):
        empty = init(3, 1, width, np.dtype(np.float64))
        found = {kind: matrices(update(empty, h, counted, slots, jnp.int32(0), kind)) for kind in ("cpu", "gpu")}
    for slot in range(3):
        rows = np.asarray(h, np.float64)[np.asarray(slots) == slot].reshape(-1, width)
        rows = rows[np.asarray(counted)[np.asarray(slots) == slot].reshape(-1) > 0]
        exact = np.tril(rows.T @ rows)
        np.testing.assert_allclose(np.tril(found["cpu"].second[slot, 0]), exact, atol=1e-10)
        # Products of bfloat16 are exact, and their float32 sums are of at most 1,024 rows.
        np.testing.assert_allclose(np.tril(found["gpu"].second[slot, 0]), exact, atol=1e-3)
        np.testing.assert_allclose(found["gpu"].first[slot, 0], rows.sum(axis=0), atol=1e-10)


@pytest.mark.parametrize(
    ("states", "sums", "backend", "products"),
    [
        ("float32", "float64", "cpu", "float64"),
        ("bfloat16", "float64", "cpu", "float64"),
        ("float32", "float64", "gpu", "float64"),
        ("bfloat16", "float64", "gpu", "float32"),
        ("float32", "float64", "tpu", "float64"),
        ("bfloat16", "float64", "tpu", "float32"),
    ],
)
def test_products_are_float64_but_where_tensor_cores_are_exact(
    states: str, sums: str, backend: str, products: str
) -> None:
    found = contraction.product_dtype(jnp.dtype(states), np.dtype(sums), backend)
    assert found == np.dtype(products)
    assert resolution(found) == (EPS32 if products == "float64" else math.sqrt(EPS32))


@pytest.mark.parametrize("ratio", [1e2, 1e4])
def test_exact_pieces_give_the_spectrum_where_float64_products_are_not_to_be_had(ratio: float) -> None:
    """As on a TPU: a massive direction of s_1 and massive activations of single tokens, 2,500 rows of one group."""
    rng = np.random.default_rng(0)
    rows = rows_of(power_law(96, 0.5, ratio), 2500, True)
    rows[::500, 3] += 100 * np.abs(rows).max()
    h = jnp.asarray(rows[None])
    counted = jnp.asarray(rng.random((1, 2500)) < 0.9, jnp.float32)
    rows = np.asarray(h[0], np.float64)[np.asarray(counted[0]) > 0]
    exact = np.linalg.svd(rows, compute_uv=False)
    with jax.enable_x64(True):
        empty = init(1, 1, 96, np.dtype(np.float64))
        found = matrices(update(empty, h, counted, jnp.zeros(1, jnp.int32), jnp.int32(0), "tpu"))
    s = contraction.singular_values(np.asarray(found.second[0, 0]))
    limit = resolution(np.dtype(np.float64), "tpu")
    assert np.abs(s - exact).max() < limit * exact[0]
    one, other = (tail_fit(each, len(rows), WINDOW, limit) for each in (s, exact))
    assert one.alpha == pytest.approx(other.alpha, abs=1e-6)


def test_pieces_are_whole_numbers_that_make_up_the_states() -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1024, 40)) * 10.0 ** rng.integers(-6, 6, 40), jnp.float32).at[:, 7].set(0)
    pieces, scale = contraction._pieces(x)
    values = [np.asarray(piece, np.float64) for piece in pieces]
    assert all(np.array_equal(each, np.round(each)) and np.abs(each).max() <= 128 for each in values)
    whole = np.asarray(scale, np.float64) * sum(each / 2 ** (7 + 8 * at) for at, each in enumerate(values))
    assert (np.abs(whole - np.asarray(x)) <= 2.0**-24 * np.asarray(scale)).all()
    largest = np.abs(np.asarray(x)).max(axis=0)
    assert ((scale > largest) & (scale <= 2 * largest) | (largest == 0)).all()


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(20, 300), st.floats(0, 0.3), st.floats(0.4, 1.0))
def test_the_fit_is_that_of_polyfit(seed: int, width: int, low: float, high: float) -> None:
    rng = np.random.default_rng(seed)
    s = np.sort(np.exp(rng.normal(size=width)))[::-1]
    fit = tail_fit(s, width, (low, high))
    first, last = max(1, math.ceil(low * width)), math.floor(high * width)
    resolved = int(np.sum(s > EPS32 * s[0]))
    assert (fit.resolved, fit.low, fit.high) == (resolved, first, last)
    if last - first + 1 < 8 or last > resolved:
        assert math.isnan(fit.alpha)
        return
    x, y = np.log(np.arange(first, last + 1)), np.log(s[first - 1 : last])
    slope, cut = np.polyfit(x, y, 1)
    r2 = 1 - np.sum((y - slope * x - cut) ** 2) / np.sum((y - y.mean()) ** 2)
    # Both are float64 least squares; polyfit's Vandermonde matrix in log k is worse conditioned than centred sums, its
    # quadratic most of all over a short window far out.
    assert fit.alpha == pytest.approx(-slope, rel=1e-8, abs=1e-10)
    assert fit.intercept == pytest.approx(cut, rel=1e-8, abs=1e-8)
    assert fit.r2 == pytest.approx(r2, abs=1e-9)
    assert fit.quadratic == pytest.approx(np.polyfit(x, y, 2)[0], rel=1e-6, abs=1e-7)


def test_a_straight_line_is_found_exactly() -> None:
    fit = tail_fit(5 * np.arange(1, 101.0) ** -0.75, 100, WINDOW)
    # 41 logarithms, each rounded once.
    assert fit.alpha == pytest.approx(0.75, abs=1e-13)
    assert fit.intercept == pytest.approx(math.log(5), abs=1e-12)
    assert fit.r2 == pytest.approx(1, abs=1e-12)
    assert fit.quadratic == pytest.approx(0, abs=1e-11)


def test_a_parabola_shows_its_quadratic_coefficient() -> None:
    x = np.log(np.arange(1, 101.0))
    fit = tail_fit(np.exp(1 - 0.5 * x - 0.2 * x**2), 100, WINDOW)
    assert fit.quadratic == pytest.approx(-0.2, abs=1e-11)


def test_a_flat_spectrum_has_no_slope_and_no_r2() -> None:
    fit = tail_fit(np.ones(100), 100, WINDOW)
    assert fit.alpha == 0
    assert math.isnan(fit.r2)


@pytest.mark.parametrize(
    ("width", "window", "edges"),
    [
        (100, (0.1, 0.5), (10, 50)),
        (101, (0.1, 0.5), (11, 50)),
        (99, (0.1, 0.5), (10, 49)),
        (100, (0.0, 0.5), (1, 50)),
        (100, (0.5, 1.0), (50, 100)),
        (20, (0.1, 0.5), (2, 10)),
        (18, (0.1, 0.5), (2, 9)),
    ],
)
def test_the_edges_of_the_window(width: int, window: tuple[float, float], edges: tuple[int, int]) -> None:
    s = np.exp(-np.arange(width) / width)
    fit = tail_fit(s, width, window)
    assert (fit.low, fit.high) == edges
    assert not math.isnan(fit.alpha)
    outside = s.copy()
    outside[: edges[0] - 1] *= 2  # what is not in the window is not fitted
    outside[edges[1] :] /= 2
    assert tail_fit(outside, width, window).alpha == fit.alpha
    for inside in (edges[0] - 1, edges[1] - 1):
        moved = s.copy()
        moved[inside] *= 1.01
        assert tail_fit(moved, width, window).alpha != fit.alpha


def test_fewer_than_eight_ranks_give_no_number() -> None:
    assert not math.isnan(tail_fit(np.arange(18, 0, -1.0), 18, WINDOW).alpha)  # 2..9
    fit = tail_fit(np.arange(17, 0, -1.0), 17, WINDOW)  # 2..8
    assert (fit.resolved, fit.low, fit.high) == (17, 2, 8)
    assert all(math.isnan(x) for x in (fit.alpha, fit.r2, fit.quadratic, fit.intercept))
    nothing = tail_fit(np.zeros(100), 100, WINDOW)
    assert nothing.resolved == 0
    assert math.isnan(nothing.alpha)


@pytest.mark.parametrize("rows", [50, 100, 10**6])
def test_what_is_not_resolved_moves_no_window(rows: int) -> None:
    """The window keeps its ranks, and gives no number where its last one is not resolved, whatever N is."""
    s = np.full(100, 0.5)
    s[0], s[20:] = 1.0, 1.01 * EPS32
    low, high = (10, 50) if rows > 50 else (5, 25)
    for below in range(20, 100):
        lost = s.copy()
        lost[below:] = 0.99 * EPS32
        fit = tail_fit(lost, rows, WINDOW)
        assert (fit.resolved, fit.low, fit.high) == (below, low, high)
        assert math.isnan(fit.alpha) == (below < high)


def test_fitting_is_pure() -> None:
    s = np.exp(-np.arange(64) / 9)
    kept = s.copy()
    fits = [tail_fit(s, 100, (0.1, 0.5)) for _ in range(3)]
    assert fits[0] == fits[1] == fits[2]
    np.testing.assert_array_equal(s, kept)
    second = gram(rows_of(power_law(20, 1.0, 50), 50, True)).second[0, 0]
    before = second.copy()
    singular_values(second, second[0], 50)
    np.testing.assert_array_equal(second, before)


def test_scaling_the_rows_changes_no_alpha() -> None:
    s = np.exp(-np.arange(64) / 9)
    assert tail_fit(1e3 * s, 100, WINDOW).alpha == pytest.approx(tail_fit(s, 100, WINDOW).alpha, abs=1e-12)


@pytest.mark.parametrize(("ratio", "expected", "spread"), [(1, 1.12, 0.02), (4, 1.02, 0.01), (8, 1.01, 0.01)])
def test_a_planted_alpha_is_found_as_the_method_says(ratio: int, expected: float, spread: float) -> None:
    """Gaussian rows of true alpha 1.0: docs/method.md reads 1.12 at N = d and 1.02 at N = 4 d; 8 d is within 2 %."""
    width, found = 256, []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        rows = rng.normal(size=(ratio * width, width)) * np.arange(1, width + 1.0) ** -1.0
        found.append(tail_fit(spectrum(rows.astype(np.float32)), len(rows), WINDOW).alpha)
    assert np.mean(found) == pytest.approx(expected, abs=spread)  # sampling moves the mean of four by some 0.005


def test_effective_rank() -> None:
    assert effective_rank(np.ones(37)) == pytest.approx(37, rel=1e-12)
    assert effective_rank(np.array([2.0, 2, 2, 0, 0])) == pytest.approx(3, rel=1e-12)
    assert effective_rank(np.array([5.0, 0])) == pytest.approx(1, rel=1e-12)
    p = np.array([0.5, 0.25, 0.25])
    assert effective_rank(8 * p) == pytest.approx(math.exp(1.5 * math.log(2)), rel=1e-12)
    with np.errstate(invalid="ignore"):
        assert math.isnan(effective_rank(np.zeros(5)))
