"""`measure` against docs/method.md done the slow way: a prompt at a time, every hidden state kept, float64."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spinal_jax.audit import measure as trace
from spinal_jax.audit.measure import measure
from spinal_jax.audit.measurement import Measurement
from spinal_jax.config import ContractionConfig, MetricsConfig, TransportConfig
from spinal_jax.config.positions import Positions
from spinal_jax.data.packing import TokenSequence, plan_batches
from spinal_jax.errors import UserError
from spinal_jax.metrics import contraction
from spinal_jax.models.decoder import Decoder, collect

GROUPS = 16
FULL = (2, 5, 7, 11)  # groups with rows and positions; 13 holds prompts of one token only, the others are empty
LONGEST = 48


def pool(seed: int = 0, count: int = 24) -> list[TokenSequence]:
    """Random prompts of 1 to LONGEST tokens."""
    rng = np.random.default_rng(seed)
    sizes = [1, 1, 2, *rng.integers(3, LONGEST + 1, size=count - 3)]
    groups = [*(FULL[number % len(FULL)] for number in range(count)), 13, 13, 13]
    return [
        TokenSequence(rng.integers(0, 301, size=size).astype(np.int32), group)
        for size, group in zip([*sizes, 1, 1, 1], groups, strict=True)
    ]


def config(
    *, groups: int = GROUPS, center: bool = False, window: tuple[float, float] = (0.1, 0.5), **transport: Any
) -> MetricsConfig:
    return MetricsConfig(ContractionConfig(window, center=center), TransportConfig(**transport), groups)


def audit(
    model: Decoder, sequences: Sequence[TokenSequence], settings: MetricsConfig | None = None, batch_tokens: int = 512
) -> Measurement:
    settings = settings or config()
    selector = Positions.parse(settings.transport.positions)
    return measure(model, plan_batches(sequences, selector, settings.contraction.skip, batch_tokens), settings)


@jax.jit
def hidden_states(model: Decoder, tokens: jax.Array) -> jax.Array:
    """[D + 1, B, T, d]"""
    return model.forward(tokens, tap=collect(lambda h: h))[1]


def residuals(model: Decoder, sequences: Sequence[TokenSequence]) -> list[np.ndarray]:
    """float64 [D + 1, T, d] of each sequence, which has a row of its own with padding behind it."""
    longest = max(LONGEST, *(len(s.ids) for s in sequences))
    found = []
    for s in sequences:
        row = np.zeros((1, longest), np.int32)
        row[0, : len(s.ids)] = s.ids
        found.append(np.asarray(hidden_states(model, jnp.asarray(row)))[:, 0, : len(s.ids)].astype(np.float64))
    return found


def logp_of(model: Decoder, h: np.ndarray, temperature: float) -> np.ndarray:
    """Log-probabilities [..., V] of the logit lens."""
    c = model.config
    scaled = h / np.sqrt(np.mean(h**2, axis=-1, keepdims=True) + c.norm_eps)
    weight, bias = model.unembed_weights()
    z = scaled * np.asarray(model.final_norm.weight[...], np.float64) @ np.asarray(weight, np.float64).T
    z = z if bias is None else z + np.asarray(bias, np.float64)
    z = z if c.final_softcap is None else c.final_softcap * np.tanh(z / c.final_softcap)
    z = z / temperature
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def fisher_rao(logp: np.ndarray, logq: np.ndarray) -> np.ndarray:
    return 4 * np.arcsin(np.minimum(np.linalg.norm(np.exp(logp / 2) - np.exp(logq / 2), axis=-1) / 2, 1))


def fit(rows: np.ndarray) -> dict[str, float]:
    s = np.linalg.svd(rows, compute_uv=False)
    p = s[s > 0] / s.sum()
    low, high = max(1, math.ceil(0.1 * min(rows.shape))), math.floor(0.5 * min(rows.shape))
    resolved = int(np.sum(s > np.finfo(np.float32).eps * s[0]))
    found = {"resolved": float(resolved), "spike": math.log(s[0] / s[1])}
    found["effective_rank"] = float(np.exp(-np.sum(p * np.log(p))))
    if high - low + 1 < 8 or high > resolved:
        return found | {"contraction": math.nan, "fit_r2": math.nan, "fit_quadratic": math.nan}
    x, y = np.log(np.arange(low, high + 1)), np.log(s[low - 1 : high])
    slope, cut = np.polyfit(x, y, 1)
    r2 = 1 - np.sum((y - slope * x - cut) ** 2) / np.sum((y - y.mean()) ** 2)
    return found | {"contraction": -slope, "fit_r2": r2, "fit_quadratic": np.polyfit(x, y, 2)[0]}


def coherence(z: np.ndarray) -> float:
    steps = np.diff(z)
    return 1 - np.abs(np.diff(steps)).sum() / (2 * np.abs(steps).sum()) if np.abs(steps).sum() else 1.0


def reference(
    model: Decoder, sequences: Sequence[TokenSequence], settings: MetricsConfig | None = None
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """(columns, summary), each number as docs/method.md defines it."""
    settings = settings or config()
    depth = model.config.depth
    streams = residuals(model, sequences)
    columns: dict[str, Any] = {}
    fits = []
    for boundary in range(depth + 1):
        rows = np.concatenate([h[boundary, settings.contraction.skip :] for h in streams])
        fits.append(fit(rows - rows.mean(axis=0) if settings.contraction.center else rows))
    for name in fits[0]:
        columns[name] = np.array([f[name] for f in fits])
    chosen = Positions.parse(settings.transport.positions)
    kept = [h[:, s.measured(chosen)] for h, s in zip(streams, sequences, strict=True)]
    logp = logp_of(model, np.concatenate(kept, axis=1), settings.transport.temperature)  # [D + 1, M, V]
    step = np.array([fisher_rao(logp[i - 1], logp[i]) for i in range(1, depth + 1)])
    columns["transport"] = np.array([math.nan, *step.mean(axis=1)])
    columns["entropy"] = -np.sum(np.exp(logp) * logp, axis=-1).mean(axis=1)
    turns = [math.nan]
    for i in range(1, depth):
        a, b, c = step[i - 1] / 2, step[i] / 2, fisher_rao(logp[i - 1], logp[i + 1]) / 2
        moved = (2 * a >= 1e-3) & (2 * b >= 1e-3)
        a, b, c = a[moved], b[moved], c[moved]
        cosine = (np.cos(c) - np.cos(a) * np.cos(b)) / (np.sin(a) * np.sin(b))
        turns.append(float(np.mean(math.pi - np.arccos(np.clip(cosine, -1, 1)))))
    columns["curvature"] = np.array([*turns, math.nan])
    first = depth - math.ceil(depth / 3) + 1
    alpha, steps = columns["contraction"][first:], columns["transport"][first:]
    summary = {
        "contraction": alpha.mean(),
        "transport": steps.mean(),
        "coherence": (coherence(alpha) + coherence(steps)) / 2,
        "directness": fisher_rao(logp[first - 1], logp[depth]).mean() / steps.sum(),
        "path_length": columns["transport"][1:].sum(),
    }
    return columns, summary


# Packing changes the order of float32 additions in the forward, and the lens rounds its logits: both some 1e-6. Fits
# amplify that a little, coherence as a ratio of differences some more, ranks are counts. Promised are 1e-3 for alpha
# and 1e-4 for L.
TOLERANCE = {
    "contraction": 2e-5,
    "fit_r2": 2e-5,
    "fit_quadratic": 2e-4,
    "resolved": 0.0,
    "spike": 2e-5,
    "effective_rank": 1e-3,  # out of 20 to 30
    "transport": 2e-5,
    "entropy": 2e-5,
    "curvature": 2e-4,
    "coherence": 2e-4,
    "directness": 2e-5,
    "path_length": 1e-4,
}


def compare(
    found: trace.DepthCurve, columns: dict[str, np.ndarray], summary: dict[str, float], times: float = 1
) -> None:
    assert found.columns.keys() == columns.keys()
    for name, values in columns.items():
        np.testing.assert_allclose(found.columns[name], values, atol=times * TOLERANCE[name], err_msg=name)
    assert found.summary.keys() == summary.keys()
    for name, value in summary.items():
        if name == "coherence" and math.isnan(found.summary[name]):
            continue  # flat within noise, or too few boundaries: tests/laws/test_summary.py
        np.testing.assert_allclose(found.summary[name], value, atol=times * TOLERANCE[name], err_msg=name)


@pytest.fixture(scope="module")
def model(make_decoder: Callable[..., Decoder]) -> Decoder:
    return make_decoder()


@pytest.fixture(scope="module")
def found(model: Decoder) -> Measurement:
    return audit(model, pool())


def test_all_prompts_give_what_the_method_says(model: Decoder, found: Measurement) -> None:
    """One-token prompts, whose only position is skipped, count for transport alone; empty groups for nothing."""
    compare(found.whole, *reference(model, pool()))
    assert math.isnan(found.whole.summary["coherence"])
    assert found.reasons == {"coherence": "the terminal block has 3 boundaries and coherence needs 4"}
    assert found.singular_values.shape == (8, 32)
    assert found.singular_values_without.shape == (4, 8, 32)
    sizes = {g: [len(s.ids) for s in pool() if s.group == g] for g in FULL}
    assert found.rows.tolist() == [sum(n - 1 for n in sizes[g]) for g in FULL]
    assert found.positions.tolist() == [sum(min(4, n) for n in sizes[g]) for g in FULL]


@pytest.mark.parametrize("group", FULL)
def test_without_a_group_means_an_audit_without_its_prompts(model: Decoder, found: Measurement, group: int) -> None:
    others = [s for s in pool() if s.group != group]
    assert len(found.without) == len(FULL)
    without = found.without[FULL.index(group)]
    compare(without, *reference(model, others))
    if group == FULL[0]:
        again = audit(model, others)
        # The same float64 arithmetic; the batches, and so the rounding of the forward, differ.
        compare(again.whole, without.columns, without.summary)


def test_the_standard_errors_are_the_jackknife_of_what_is_without(found: Measurement) -> None:
    lens = {"transport", "entropy", "curvature", "directness", "path_length"}
    for part in ("columns", "summary"):
        whole, errors = getattr(found.whole, part), getattr(found.errors, part)
        assert errors.keys() == whole.keys()
        for name in whole.keys() - {"coherence"}:
            sizes = found.positions if name in lens else found.rows
            h = sizes.sum() / sizes
            without = [np.asarray(getattr(c, part)[name]) for c in found.without]
            estimate = len(FULL) * whole[name] - sum((1 - 1 / k) * w for k, w in zip(h, without, strict=True))
            pseudo = [k * whole[name] - (k - 1) * w for k, w in zip(h, without, strict=True)]
            square = sum((p - estimate) ** 2 / (k - 1) for k, p in zip(h, pseudo, strict=True)) / len(FULL)
            np.testing.assert_allclose(errors[name], np.sqrt(square), rtol=1e-10, err_msg=name)


def test_how_prompts_are_batched_does_not_matter(model: Decoder, found: Measurement) -> None:
    compare(audit(model, pool(), batch_tokens=1).whole, found.whole.columns, found.whole.summary)


def test_the_order_of_prompts_does_not_matter(model: Decoder, found: Measurement) -> None:
    compare(audit(model, pool()[::-1]).whole, found.whole.columns, found.whole.summary)


def test_equal_audits_agree_to_the_byte(model: Decoder, found: Measurement) -> None:
    first, second = (jax.tree.leaves(dataclasses.asdict(m)) for m in (found, audit(model, pool())))
    assert [np.asarray(a).tobytes() for a in first] == [np.asarray(b).tobytes() for b in second]


@pytest.mark.parametrize(
    ("fields", "settings"),
    [
        (
            {"final_softcap": 2.0, "tied": True, "learned_positions": True, "ropes": (), "layer_rope": ()},
            config(temperature=0.7),
        ),
        ({"unembed_bias": True, "depth": 3, "windows": (8, 0, 8)}, config(positions="all", center=True)),
        ({"depth": 1}, config()),
    ],
)
def test_other_models_and_settings(
    make_decoder: Callable[..., Decoder], fields: dict[str, Any], settings: MetricsConfig
) -> None:
    model = make_decoder(1, **fields)
    compare(audit(model, pool(), settings).whole, *reference(model, pool(), settings))


def test_tokens_that_do_not_move_and_directions_that_are_not_resolved(make_decoder: Callable[..., Decoder]) -> None:
    """Steps of nothing have no turn, and the smallest singular values are not resolved."""
    model = make_decoder(windows=(1,) * 7)  # tokens see themselves alone, so that a zero stays one
    embedding = np.array(model.embedding[...]) * np.geomspace(1, 1e-8, 32, dtype=np.float32)
    embedding[:100] = 0
    model.embedding[...] = jnp.asarray(embedding)
    found = audit(model, pool())
    compare(found.whole, *reference(model, pool()))
    assert found.whole.columns["resolved"][0] < 32
    for group, without in zip(FULL, found.without, strict=True):
        compare(without, *reference(model, [s for s in pool() if s.group != group]))


def test_long_prompts_beside_short_ones(make_decoder: Callable[..., Decoder]) -> None:
    """Two length classes, so that each group is visited twice."""
    model = make_decoder(depth=3, windows=(100, 0, 100))
    rng = np.random.default_rng(0)
    sizes = [520, 30, 600, 25, 40, 7]
    sequences = [TokenSequence(rng.integers(0, 301, size=n).astype(np.int32), i % 2) for i, n in enumerate(sizes)]
    compare(audit(model, sequences).whole, *reference(model, sequences))


@pytest.fixture(scope="module")
def frugal(model: Decoder) -> Measurement:
    """The same audit with a float32 Gram sum, and of the likeliest tokens only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contraction, "gram_dtype", lambda: np.dtype(np.float32))
        return audit(model, pool(), config(top_k=20))


def test_the_float32_sum_agrees_with_the_float64_sum(found: Measurement, frugal: Measurement) -> None:
    for name in ("contraction", "fit_r2", "fit_quadratic", "spike", "effective_rank"):
        # eps32 (s_1 / s_k)^2 with a ratio of 10 over the window: 1e-5 on s_k^2 at most.
        np.testing.assert_allclose(frugal.whole.columns[name], found.whole.columns[name], atol=TOLERANCE[name])
    # The lens is float32 whatever the sum is.
    np.testing.assert_array_equal(frugal.whole.columns["entropy"], found.whole.columns["entropy"])


def test_the_likeliest_tokens_alone_move_less(found: Measurement, frugal: Measurement) -> None:
    some, every = (m.whole.columns["transport"][1:] for m in (frugal, found))
    assert (some < every).all()
    assert (some > every / 2).all()


def test_groups_without_a_measured_position_count_for_contraction(model: Decoder) -> None:
    settings = config(positions="stride:30", center=True)
    short = [TokenSequence(np.arange(20 + i, dtype=np.int32), 14) for i in range(3)]
    found = audit(model, [*pool(), *short], settings)
    compare(found.whole, *reference(model, [*pool(), *short], settings))
    others = [s for s in pool() if s.group != FULL[0]] + short
    compare(found.without[0], *reference(model, others, settings))


def test_a_single_group_has_no_error(model: Decoder) -> None:
    found = audit(model, [dataclasses.replace(s, group=1) for s in pool()])
    assert all(np.isnan(v).all() for v in found.errors.columns.values())
    assert all(math.isnan(v) for v in found.errors.summary.values())
    compare(found.whole, *reference(model, pool()))


def test_too_few_tokens_for_any_fit_are_refused(model: Decoder) -> None:
    with pytest.raises(UserError, match=r"window"):
        audit(model, pool(), config(window=(0.4, 0.6)))  # 7 of 32 ranks


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The temporary files opened from here on, in a folder of their own."""
    opened, really = [], tempfile.TemporaryFile

    def noted(*args: Any, **kwargs: Any) -> Any:
        opened.append(really(*args, **kwargs))
        return opened[-1]

    monkeypatch.setattr(tempfile, "TemporaryFile", noted)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return opened


def test_sums_that_fit_the_device_need_no_scratch_file(model: Decoder, scratch: list[Any], tmp_path: Path) -> None:
    audit(model, pool())
    assert not scratch
    assert not list(tmp_path.iterdir())


def test_a_lens_that_is_not_the_models_output_stops_the_audit(
    make_decoder: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch, scratch: list[Any], tmp_path: Path
) -> None:
    model = make_decoder(final_softcap=2.5)  # a cap of its own, because the step stays compiled
    original = Decoder.lens

    def uncapped(self: Decoder, h: jax.Array) -> jax.Array:
        """The head of a model whose cap was forgotten."""
        z = original(self, h)
        return self.config.final_softcap * jnp.arctanh(z / self.config.final_softcap)

    monkeypatch.setattr(Decoder, "lens", uncapped)
    with pytest.raises(UserError, match="differs from the model's output"):
        audit(model, pool())
    assert all(file.closed for file in scratch)
    assert not list(tmp_path.iterdir())


def test_parameters_that_are_not_numbers_stop_the_audit(make_decoder: Callable[..., Decoder]) -> None:
    model = make_decoder()  # one of its own, to be spoilt
    model.embedding[...] = model.embedding[...].at[:].set(jnp.nan)
    with pytest.raises(UserError, match="the weights are not finite: embedding holds NaN"):
        audit(model, pool())


def test_a_second_audit_of_equal_shapes_compiles_nothing(
    make_decoder: Callable[..., Decoder], caplog: pytest.LogCaptureFixture
) -> None:
    def compiled(seed: int) -> list[str]:
        model = make_decoder(seed, depth=4)
        caplog.clear()
        with jax.log_compiles():
            audit(model, pool())
        return [r.message for r in caplog.records if r.message.startswith("Compiling")]

    first = compiled(0)
    assert any("jit(forward_step)" in line for line in first)
    assert any("jit(lens_step)" in line for line in first)
    assert not compiled(1)


def test_progress_counts_every_token_and_boundary(model: Decoder) -> None:
    seen: dict[str, list[int]] = {}

    @contextlib.contextmanager
    def bar(what: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        seen[what] = [total, 0]

        def advance(amount: int) -> None:
            seen[what][1] += amount

        yield advance

    measure(model, plan_batches(pool(), Positions.parse("last:4"), 1, 512), config(), bar)
    assert seen
    for total, done in seen.values():
        assert total == done
    assert seen["audit"][0] == sum(len(s.ids) for s in pool())
