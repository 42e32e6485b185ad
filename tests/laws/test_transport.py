"""Transport from one pass over the vocabulary, against float64 over whole distributions and geometry on the sphere."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spinal_jax.metrics.lens import Lens
from spinal_jax.metrics.transport import LensStats, Pair, lens_stats, turning_angle

RADIANS = 1e-4  # docs/method.md: the largest absolute error of L, anywhere in [0, pi]
ENTROPY = 1e-6  # nats for each unit of the largest logit: the difference of two sums that are rounded at that size
NOTHING = -200.0  # a logit whose token has no mass in float32
STEP = (Pair(0, 1, 1),)


@partial(jax.jit, static_argnames=("pairs", "cap", "temperature", "top_k"))
def _stats(
    x: jax.Array,
    unembed: jax.Array,
    bias: jax.Array | None,
    pairs: tuple[Pair, ...],
    cap: float | None,
    temperature: float,
    top_k: int | None,
) -> LensStats:
    with jax.default_matmul_precision("highest"):
        return lens_stats((Lens(unembed, bias, cap, temperature),), (x,), pairs, top_k=top_k)


def stats(
    x: Any,
    unembed: Any,
    pairs: tuple[Pair, ...] = STEP,
    *,
    bias: Any = None,
    cap: float | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> LensStats:
    """What the library says of x [L, M, d]."""
    given_bias = None if bias is None else jnp.asarray(bias)
    found = _stats(jnp.asarray(x), jnp.asarray(unembed), given_bias, pairs, cap, temperature, top_k)
    assert {a.dtype for a in jax.tree.leaves(found)} == {np.dtype(np.float32)}
    return jax.tree.map(lambda a: np.asarray(a, np.float64), found)


def of_logits(z: Any, pairs: tuple[Pair, ...] = STEP, **how: Any) -> LensStats:
    """The same, of logits [L, M, V]: through an unembedding that passes them on as they are."""
    z = np.asarray(z, np.float32)
    return stats(z, np.eye(z.shape[-1], dtype=np.float32), pairs, **how)


def log_softmax(z: np.ndarray) -> np.ndarray:
    top = z.max(axis=-1, keepdims=True)
    return z - top - np.log(np.exp(z - top).sum(axis=-1, keepdims=True))


def distance(logp: np.ndarray, logq: np.ndarray) -> np.ndarray:
    """Fisher-Rao, float64, by the chord: twice the angle between the vectors of square roots."""
    chord = np.sqrt(np.sum((np.exp(logp / 2) - np.exp(logq / 2)) ** 2, axis=-1))
    return 4 * np.arcsin(np.minimum(chord / 2, 1))


def compare(x: np.ndarray, unembed: np.ndarray, pairs: tuple[Pair, ...], **how: Any) -> None:
    """Distances, entropy and normaliser against float64, a boundary at a time."""
    bias, cap, temperature = how.get("bias"), how.get("cap"), how.get("temperature", 1.0)

    def logits(boundary: int) -> np.ndarray:
        z = x[boundary].astype(np.float64) @ unembed.astype(np.float64).T
        z = z + (0 if bias is None else np.asarray(bias, np.float64))
        return (z if cap is None else cap * np.tanh(z / cap)) / temperature

    found = stats(x, unembed, pairs, **how)
    z = [logits(boundary) for boundary in range(len(x))]
    logp = [log_softmax(part) for part in z]
    for pair, distances in zip(pairs, found.distances, strict=True):
        exact = [distance(logp[i], logp[i + pair.offset]) for i in range(pair.start, pair.stop)]
        np.testing.assert_allclose(distances, np.reshape(exact, distances.shape), atol=RADIANS / 2)
    entropy = [-np.sum(np.exp(p) * p, axis=-1) for p in logp]
    np.testing.assert_allclose(found.entropy, entropy, atol=ENTROPY * 30)
    normaliser = [part[:, 0] - p[:, 0] for part, p in zip(z, logp, strict=True)]
    np.testing.assert_allclose(found.log_normaliser, normaliser, rtol=2e-6, atol=2e-6)  # some ulps of float32


def pair_at(angles: np.ndarray, vocab: int, disjoint: bool, seed: int = 0) -> np.ndarray:
    """Logits [2, M, V] of two distributions whose square roots are turned by angles / 2, so that L = angles [M]."""
    rng = np.random.default_rng(seed)
    first = np.sqrt(rng.dirichlet(np.ones(vocab)))
    other = rng.normal(size=vocab)
    if disjoint:  # the two ends share no token: L can reach pi
        first[vocab // 2 :], other[: vocab // 2] = 0, 0
        other = np.abs(other)
    first /= np.linalg.norm(first)
    other -= first * (first @ other)
    other /= np.linalg.norm(other)
    half = angles[:, None] / 2
    turned = np.cos(half) * first + np.sin(half) * other
    with np.errstate(divide="ignore"):
        both = np.stack([np.broadcast_to(2 * np.log(first), turned.shape), 2 * np.log(np.abs(turned))])
    return np.maximum(both, NOTHING)


@pytest.mark.parametrize("vocab", [64, 997])
def test_known_angles_from_a_millionth_to_pi(vocab: int) -> None:
    angles = np.append(np.geomspace(1e-6, 3.14, 60), math.pi)
    found = of_logits(pair_at(angles, vocab, disjoint=True)).distances[0][0]
    np.testing.assert_allclose(found, angles, atol=RADIANS)
    large = angles > 1e-3  # where arccos of a float32 sum is off by 20 %
    np.testing.assert_allclose(found[large], angles[large], rtol=0.01)


@pytest.mark.parametrize("vocab", [64, 997])
def test_known_small_angles_between_distributions_of_one_support(vocab: int) -> None:
    angles = np.geomspace(1e-6, 1e-2, 40)
    z = pair_at(angles, vocab, disjoint=False)
    found = of_logits(z).distances[0][0]
    np.testing.assert_allclose(found, angles, atol=RADIANS / 20)
    exact = distance(*log_softmax(z.astype(np.float32).astype(np.float64)))  # of the logits as float32 has them
    np.testing.assert_allclose(found, exact, atol=RADIANS / 20)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("vocab", [1, 2, 33, 1009])
def test_equal_distributions_are_exactly_nothing_apart(vocab: int, scale: float) -> None:
    z = (scale * np.random.default_rng(0).normal(size=(1, 11, vocab))).astype(np.float32)
    assert not of_logits(np.concatenate([z, z])).distances[0].any()


def test_constants_added_to_logits_change_nothing() -> None:
    rng = np.random.default_rng(0)
    z = np.round(64 * rng.normal(0, 4, size=(2, 30, 257))) / 64  # so that adding 4096 rounds nothing away
    shift = rng.choice([-4096.0, -100.0, 0.0, 1.0, 4096.0], size=(2, 30, 1))
    plain, shifted = of_logits(z), of_logits(z + shift)
    np.testing.assert_array_equal(plain.distances, shifted.distances)
    np.testing.assert_allclose(plain.entropy, shifted.entropy, atol=ENTROPY * 4096)
    np.testing.assert_allclose(shifted.log_normaliser, plain.log_normaliser + shift[..., 0], rtol=2e-7)
    apart = of_logits(np.stack([z[0], z[0] + shift[1]]))
    assert not apart.distances[0].any()


def test_huge_logits() -> None:
    rng = np.random.default_rng(0)
    z = (1e4 * rng.normal(size=(3, 50, 300))).astype(np.float32)
    z[2] = z[1] + rng.normal(0, 0.5, size=z[1].shape)  # all mass on one token, mostly the same one
    pairs = (Pair(0, 2, 1), Pair(0, 1, 2))
    found, logp = of_logits(z, pairs), log_softmax(z.astype(np.float64))
    np.testing.assert_allclose(found.distances[0], [distance(logp[i], logp[i + 1]) for i in (0, 1)], atol=RADIANS)
    np.testing.assert_allclose(found.distances[1][0], distance(logp[0], logp[2]), atol=RADIANS)
    np.testing.assert_allclose(found.entropy, -np.sum(np.exp(logp) * logp, axis=-1), atol=2e-5)
    assert found.distances[0][0] == pytest.approx(np.full(50, math.pi), abs=RADIANS)  # no token in common


def test_one_token_against_another() -> None:
    z = np.full((3, 2, 40), -1e4)
    z[0, :, 3] = z[1, 0, 3] = z[1, 1, 7] = 0
    z[2] = 0  # uniform: BC = sqrt(1 / 40)
    found = of_logits(z, (Pair(0, 2, 1),))
    assert found.distances[0][0].tolist() == pytest.approx([0, math.pi], abs=RADIANS)
    assert found.distances[0][1] == pytest.approx(2 * math.acos(40**-0.5), abs=RADIANS)
    np.testing.assert_allclose(found.entropy, np.repeat([[0], [0], [math.log(40)]], 2, axis=1), atol=1e-6)


@pytest.mark.parametrize(
    ("boundaries", "count", "vocab"),
    [
        (2, 1, 1),  # one block: no two steps in a row
        (3, 5, 2),
        (4, 9, 127),
        (7, 65, 513),
        (5, 3, 49152),
        (31, 300, 2711),  # a prime: many tiles of positions, many chunks of vocabulary, both with a rest
        (4, 37, 20011),
    ],
)
def test_random_models_of_every_shape(boundaries: int, count: int, vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    x = rng.normal(size=(boundaries, count, 16)).astype(np.float32)
    steps = rng.choice([1e-4, 1e-2, 0.3, 1.0], size=(boundaries, count, 1))  # far and near neighbours
    x = np.cumsum(x * steps, axis=0, dtype=np.float32)
    unembed = rng.normal(size=(vocab, 16)).astype(np.float32)
    last = boundaries - 1
    compare(x, unembed, (Pair(0, last, 1), Pair(0, last - 1, 2), Pair(last // 2, last // 2 + 1, last - last // 2)))


@pytest.mark.parametrize(
    "how",
    [
        {"cap": 5.0},
        {"temperature": 0.3},
        {"temperature": 4.0},
        {"bias": 2.0},
        {"cap": 3.0, "temperature": 2.0, "bias": 1.0},
    ],
)
def test_soft_cap_temperature_and_bias(how: dict[str, float]) -> None:
    rng = np.random.default_rng(0)
    x, unembed = (rng.normal(size=shape).astype(np.float32) for shape in ((5, 20, 24), (1031, 24)))
    settings: dict[str, Any] = dict(how)
    if "bias" in how:
        settings["bias"] = (how["bias"] * rng.normal(size=1031)).astype(np.float32)
    compare(x, unembed, (Pair(0, 4, 1), Pair(0, 3, 2), Pair(1, 2, 3)), **settings)


def test_bfloat16_weights_are_summed_in_float32() -> None:
    rng = np.random.default_rng(0)
    x, unembed = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((4, 20, 24), (1031, 24)))
    bias = jnp.asarray(rng.normal(size=1031), jnp.bfloat16)
    compare(np.asarray(x), np.asarray(unembed), (Pair(0, 3, 1),), bias=np.asarray(bias))


def test_a_position_does_not_depend_on_how_many_there_are() -> None:
    rng = np.random.default_rng(0)
    x, unembed = (rng.normal(size=shape).astype(np.float32) for shape in ((6, 300, 16), (3001, 16)))
    pairs = (Pair(0, 5, 1), Pair(0, 4, 2))
    whole = stats(x, unembed, pairs)
    for count in (1, 129):
        part = stats(x[:, :count], unembed, pairs)
        for a, b in zip(jax.tree.leaves(part), jax.tree.leaves(whole), strict=True):
            assert a.shape[1] == count
            np.testing.assert_allclose(a, b[:, :count], atol=ENTROPY * 30)  # the vocabulary is summed in other chunks


def two_models(x: Any, unembed: Any, top_k: int | None = None, backend: str = "cpu") -> LensStats:
    """Two models read in one walk: x and unembed have an entry for each; distances within the first and across."""
    last = len(x[0]) - 1
    pairs = (Pair(0, last, 1), Pair(last + 1, 2 * last + 1, 1), Pair(0, last + 1, last + 1))
    lenses = tuple(Lens(jnp.asarray(u), None, None, 1.0) for u in unembed)
    divergences = tuple((i, i + last + 1) for i in range(last + 1))

    @jax.jit
    def walk(lenses: tuple[Lens, ...], x: tuple[jax.Array, ...]) -> LensStats:
        with jax.default_matmul_precision("highest"):
            return lens_stats(lenses, x, pairs, divergences, top_k, backend=backend)

    return jax.tree.map(lambda a: np.asarray(a, np.float64), walk(lenses, tuple(map(jnp.asarray, x))))


@pytest.mark.parametrize("backend", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize(("vocab", "widths"), [(2, (3, 5)), (997, (16, 16)), (20011, (8, 24))])
def test_two_models_in_one_walk(vocab: int, widths: tuple[int, int], backend: str) -> None:
    """The second near the first in some positions and far in others; the walk has chunks and tiles with rests."""
    rng = np.random.default_rng(vocab)
    shape = (5, 37)
    x = [(3 * rng.normal(size=(*shape, w)) / w**0.5).astype(np.float32) for w in widths]
    unembed = [rng.normal(size=(vocab, w)).astype(np.float32) for w in widths]
    far = rng.choice([0.0, 1e-3, 0.1, 1.0], size=(*shape, 1))
    if widths[0] == widths[1]:
        unembed[1] = unembed[0]
        x[1] = (x[0] + far * x[1]).astype(np.float32)
    found = two_models(x, unembed, backend=backend)
    logp = [log_softmax(a.astype(np.float64) @ u.astype(np.float64).T) for a, u in zip(x, unembed, strict=True)]
    for model in (0, 1):
        np.testing.assert_allclose(
            found.distances[model], distance(logp[model][:-1], logp[model][1:]), atol=RADIANS / 2
        )
    np.testing.assert_allclose(found.distances[2], distance(*logp), atol=RADIANS / 2)
    divergence = np.sum(np.exp(logp[0]) * (logp[0] - logp[1]), axis=-1)
    np.testing.assert_allclose(found.divergences, divergence, atol=ENTROPY * 30, rtol=2e-6)
    assert (found.divergences >= 0).all()
    entropy = [-np.sum(np.exp(p) * p, axis=-1) for p in logp]
    np.testing.assert_allclose(found.entropy, np.concatenate(entropy), atol=ENTROPY * 30)
    if widths[0] == widths[1]:
        same = far[..., 0] == 0
        assert same.any()
        assert not found.distances[2][same].any()
        assert not found.divergences[same].any()


def test_divergence_of_huge_logits_and_of_tokens_that_one_model_never_says() -> None:
    z = np.full((2, 3, 40), -1e4, np.float32)
    z[0, 0, 3] = z[1, 0, 3] = 1e4  # the same token
    z[0, 1, 3] = z[1, 1, 7] = 1e4  # another: 2e4 nats
    z[:, 2] = 0
    z[1, 2, :20] = -30.0
    eye = np.eye(40, dtype=np.float32)
    found = two_models((z[:1], z[1:]), (eye, eye))
    logp, logq = log_softmax(z.astype(np.float64))
    np.testing.assert_allclose(found.divergences[0], np.sum(np.exp(logp) * (logp - logq), axis=-1), rtol=1e-6)


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.floats(-3, 1))
def test_a_metric(seed: int, log_scale: float) -> None:
    """Symmetry, triangle inequality, range and zero, of 16 triples of distributions at a time."""
    rng = np.random.default_rng(seed)
    z = rng.normal(0, 3, size=(1, 16, 40)) + 10**log_scale * rng.normal(size=(3, 16, 40))
    (near, across), *_ = of_logits(z, (Pair(0, 2, 1), Pair(0, 1, 2)))
    (back, back_across), *_ = of_logits(z[::-1], (Pair(0, 2, 1), Pair(0, 1, 2)))
    np.testing.assert_allclose(near, back[::-1], atol=RADIANS / 20)
    np.testing.assert_allclose(across, back_across, atol=RADIANS / 20)
    assert (near > 0).all()
    assert (near <= math.pi + 1e-6).all()
    a, b, c = near[0], near[1], across[0]
    for one, two, three in ((a, b, c), (b, c, a), (c, a, b)):
        assert (one <= two + three + RADIANS / 10).all()


def coarse(logp: np.ndarray, logq: np.ndarray, top_k: int) -> np.ndarray:
    """[M] of [M, V], float64: the K likeliest tokens of each of the two told apart, the rest in one bucket."""
    found = []
    for p, q in zip(np.exp(logp), np.exp(logq), strict=True):
        kept = np.union1d(np.argsort(-p)[:top_k], np.argsort(-q)[:top_k])
        left = np.setdiff1d(np.arange(len(p)), kept)
        p, q = np.append(p[kept], p[left].sum()), np.append(q[kept], q[left].sum())
        found.append(4 * np.arcsin(min(1.0, float(np.linalg.norm(np.sqrt(p) - np.sqrt(q))) / 2)))
    return np.array(found)


@pytest.mark.parametrize("top_k", [1, 5, 100, 1031])
def test_the_likeliest_tokens_alone_bound_the_distance_from_below(top_k: int) -> None:
    rng = np.random.default_rng(0)
    x, unembed = (rng.normal(size=shape).astype(np.float32) for shape in ((4, 20, 16), (1031, 16)))
    x[3] = x[2] + 1e-3 * x[1]
    pairs = (Pair(0, 3, 1), Pair(0, 2, 2))
    exact, found = stats(x, unembed, pairs), stats(x, unembed, pairs, top_k=top_k)
    logp = log_softmax(x.astype(np.float64) @ unembed.astype(np.float64).T)
    for pair, distances, whole in zip(pairs, found.distances, exact.distances, strict=True):
        for i in range(pair.start, pair.stop):
            np.testing.assert_allclose(distances[i], coarse(logp[i], logp[i + pair.offset], top_k), atol=RADIANS)
        assert (distances <= whole + RADIANS).all()
        if top_k == 1031:
            np.testing.assert_allclose(distances, whole, atol=RADIANS)
    np.testing.assert_array_equal(found.entropy, exact.entropy)


def test_more_likeliest_tokens_than_there_are_give_the_exact_distance() -> None:
    z = np.random.default_rng(0).normal(0, 2, size=(2, 9, 20))
    np.testing.assert_allclose(of_logits(z, top_k=50).distances[0], of_logits(z).distances[0], atol=RADIANS)


def sphere(rng: np.random.Generator, count: int, vocab: int = 30) -> np.ndarray:
    """[count, V] points of the unit sphere with no negative coordinate: square roots of distributions."""
    return np.sqrt(rng.dirichlet(np.full(vocab, 0.7), size=count))


def angle_between(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return 2 * np.arctan2(np.linalg.norm(a - b, axis=-1), np.linalg.norm(a + b, axis=-1))


def turning(p: np.ndarray, q: np.ndarray, r: np.ndarray) -> np.ndarray:
    """The turn at q, from the tangents there of the great circles to p and to r."""
    back, on = (x - q * np.sum(q * x, axis=-1, keepdims=True) for x in (p, r))
    unit = [t / np.linalg.norm(t, axis=-1, keepdims=True) for t in (back, on)]
    return math.pi - angle_between(*unit)


def turned(p: np.ndarray, q: np.ndarray, r: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The library's turn, from float32 Fisher-Rao distances."""
    sides = (2 * angle_between(p, q), 2 * angle_between(q, r), 2 * angle_between(p, r))
    angle, counts = turning_angle(*(jnp.asarray(side, jnp.float32) for side in sides))
    return np.asarray(angle, np.float64), np.asarray(counts)


def test_turns_are_those_of_the_sphere() -> None:
    rng = np.random.default_rng(0)
    p, q, r = (sphere(rng, 500) for _ in range(3))
    angle, counts = turned(p, q, r)
    assert counts.all()
    # The sides come rounded to float32; d angle / d side is about 1 / (side sin angle), here below 20.
    np.testing.assert_allclose(angle, turning(p, q, r), atol=5e-6)


def test_turns_of_short_steps() -> None:
    rng = np.random.default_rng(1)
    q = sphere(rng, 300)

    def near(length: float) -> np.ndarray:
        way = rng.normal(size=q.shape)
        way -= q * np.sum(q * way, axis=-1, keepdims=True)
        way /= np.linalg.norm(way, axis=-1, keepdims=True)
        return math.cos(length / 2) * q + math.sin(length / 2) * way

    for length in (0.002, 0.01, 0.1):
        p, r = near(length), near(1.5 * length)
        angle, counts = turned(p, q, r)
        assert counts.all()
        exact = turning(p, q, r)
        assert 0.5 < exact.min() < exact.max() < 2.7
        # Relative rounding of the sides turns the angle by as much over its sine, so short steps lose nothing.
        np.testing.assert_allclose(angle, exact, atol=2e-6)


@pytest.mark.parametrize(("before", "after"), [(0.25, 0.5), (0.001, 0.001), (1.5, 1.5), (2.0, 1.125)])
def test_a_straight_path_turns_by_nothing_and_a_reversal_by_pi(before: float, after: float) -> None:
    a, b = jnp.float32(before), jnp.float32(after)
    # Rounding in the sum of the sides is a fraction 1e-7 of them, and the angle goes with its root.
    assert turning_angle(a, b, a + b)[0] == pytest.approx(0, abs=1e-3)
    assert turning_angle(a, b, jnp.abs(a - b))[0] == pytest.approx(math.pi, abs=1e-3)
    assert turning_angle(a, a, jnp.zeros_like(a))[0] == pytest.approx(math.pi, abs=1e-6)


def test_a_right_angle() -> None:
    p, q, r = np.eye(3)  # an octant of the sphere: three sides and three angles of 90 degrees
    angle, _ = turned(p, q, r)
    assert angle == pytest.approx(math.pi / 2, abs=1e-6)


def test_distances_that_contradict_the_triangle_inequality_a_little_give_its_limits() -> None:
    a, b, beyond = jnp.float32(0.5), jnp.float32(0.25), jnp.float32(1e-6)
    assert turning_angle(a, b, a + b + beyond)[0] == pytest.approx(0, abs=1e-6)
    assert turning_angle(a, b, a - b - beyond)[0] == pytest.approx(math.pi, abs=1e-6)


def test_short_steps_have_no_direction() -> None:
    least = np.float32(1e-3)
    under = np.nextafter(least, np.float32(0))
    before, after = jnp.array([least, under, least, 0.0]), jnp.array([least, least, under, 0.0])
    angle, counts = turning_angle(before, after, jnp.full(4, 1e-3))
    assert counts.tolist() == [True, False, False, False]
    assert angle[0] == pytest.approx(2 * math.pi / 3, abs=1e-5)  # equal sides: a flat triangle of 60 degrees
    assert angle[1:].tolist() == [0, 0, 0]
