"""A model measured against a reference, and the variants that one pass keeps: against float64 and plain audits."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spinal_jax.audit.measure import keep_reference, measure
from spinal_jax.audit.measurement import Measurement, PolicyDistance
from spinal_jax.config import MetricsConfig
from spinal_jax.config.positions import Positions
from spinal_jax.data.packing import TokenSequence, plan_batches
from spinal_jax.models.decoder import Decoder

from .test_trace import FULL, config, fisher_rao, logp_of, pool, residuals

# Radians, and nats: packing rounds the forward and the lens rounds its logits, both some 1e-6. Promised for L is 1e-4.
CLOSE = 2e-5


def planned(sequences: list[TokenSequence], settings: MetricsConfig) -> Any:
    selector = Positions.parse(settings.transport.positions)
    return plan_batches(sequences, selector, settings.contraction.skip, 512)


def both(
    model: Decoder, reference: Decoder, sequences: list[TokenSequence], settings: MetricsConfig
) -> tuple[Measurement, Measurement]:
    work = planned(sequences, settings)
    with keep_reference(reference, work, settings) as kept:
        assert kept.measurement is None
        found = measure(model, work, settings, reference=kept)
        assert kept.measurement is not None
        return found, kept.measurement


def exact(
    model: Decoder, reference: Decoder, sequences: list[TokenSequence], settings: MetricsConfig
) -> tuple[np.ndarray, float]:
    """Mean distance [D + 1] and divergence, float64, every distribution kept."""
    chosen = Positions.parse(settings.transport.positions)
    logp, logq = (
        logp_of(
            each,
            np.concatenate(
                [h[:, s.measured(chosen)] for h, s in zip(residuals(each, sequences), sequences, strict=True)], axis=1
            ),
            settings.transport.temperature,
        )
        for each in (model, reference)
    )
    divergence = np.sum(np.exp(logp[-1]) * (logp[-1] - logq[-1]), axis=-1).mean()
    return fisher_rao(logp, logq).mean(axis=1), float(divergence)


def leaves(found: Measurement) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(dataclasses.asdict(found))]


@pytest.fixture(scope="module")
def models(make_decoder: Callable[..., Decoder]) -> tuple[Decoder, Decoder]:
    return make_decoder(0), make_decoder(1)


@pytest.fixture(scope="module")
def pair(models: tuple[Decoder, Decoder]) -> tuple[Measurement, Measurement]:
    return both(*models, pool(), config())


def policy(found: Measurement) -> PolicyDistance:
    assert found.policy is not None
    return found.policy


def test_distances_are_what_the_method_says(
    models: tuple[Decoder, Decoder], pair: tuple[Measurement, Measurement]
) -> None:
    distance, divergence = exact(*models, pool(), config())
    found = policy(pair[0])
    np.testing.assert_allclose(found.distance, distance, atol=CLOSE)
    assert found.divergence == pytest.approx(divergence, abs=CLOSE)
    assert (found.distance > 0.3).all()
    assert pair[1].policy is None
    for group, distance_without, divergence_without in zip(
        FULL, found.distance_without, found.divergence_without, strict=True
    ):
        distance, divergence = exact(*models, [s for s in pool() if s.group != group], config())
        np.testing.assert_allclose(distance_without, distance, atol=CLOSE)
        assert divergence_without == pytest.approx(divergence, abs=CLOSE)


def test_the_numbers_of_each_are_those_of_each_alone(
    models: tuple[Decoder, Decoder], pair: tuple[Measurement, Measurement]
) -> None:
    for model, found in zip(models, pair, strict=True):
        alone = measure(model, planned(pool(), config()), config())
        for name, values in alone.whole.columns.items():
            # The vocabulary is walked in other chunks: float32 sums of another order.
            np.testing.assert_allclose(found.whole.columns[name], values, atol=CLOSE, err_msg=name)
            np.testing.assert_allclose(found.errors.columns[name], alone.errors.columns[name], atol=CLOSE, err_msg=name)
        np.testing.assert_array_equal(found.singular_values, alone.singular_values)
        assert found.variants.keys() == alone.variants.keys()


def test_a_model_against_itself_is_exactly_nothing_apart(make_decoder: Callable[..., Decoder]) -> None:
    found, itself = both(make_decoder(0), make_decoder(0), pool(), config())
    assert not policy(found).distance.any()
    assert not policy(found).distance_without.any()
    assert policy(found).divergence == 0
    assert leaves(dataclasses.replace(found, policy=None)) == leaves(itself)


def test_a_close_relative_is_told_apart(make_decoder: Callable[..., Decoder]) -> None:
    model, reference = make_decoder(0), make_decoder(0)
    moved = np.array(model.stacks[0].mlp.down.weight[...])
    moved[3] *= 1.003  # block 4 alone, so that nothing before boundary 4 differs
    model.stacks[0].mlp.down.weight[...] = jnp.asarray(moved)
    found = policy(both(model, reference, pool(), config())[0])
    distance, divergence = exact(model, reference, pool(), config())
    assert not found.distance[:4].any()
    assert 1e-4 < distance[4] < 0.01
    np.testing.assert_allclose(found.distance, distance, atol=CLOSE)
    assert 0 < divergence < 1e-5
    assert found.divergence == pytest.approx(divergence, abs=2e-6)  # float32 logits, and log-sum-exps of about 10


@pytest.mark.parametrize(
    ("fields", "other", "settings"),
    [
        ({"final_softcap": 2.0, "tied": True}, {"unembed_bias": True, "width": 48}, config(temperature=0.7)),
        ({"depth": 1}, {"depth": 1}, config(positions="all")),
    ],
)
def test_models_of_another_make(
    make_decoder: Callable[..., Decoder], fields: dict[str, Any], other: dict[str, Any], settings: MetricsConfig
) -> None:
    """Width, ties, bias and soft-cap are each model's own."""
    model, reference = make_decoder(2, **fields), make_decoder(3, **other)
    distance, divergence = exact(model, reference, pool(), settings)
    found = policy(both(model, reference, pool(), settings)[0])
    np.testing.assert_allclose(found.distance, distance, atol=CLOSE)
    assert found.divergence == pytest.approx(divergence, abs=CLOSE)


def test_the_likeliest_tokens_alone_bound_the_distance(
    models: tuple[Decoder, Decoder], pair: tuple[Measurement, Measurement]
) -> None:
    found = policy(both(*models, pool(), config(top_k=20))[0])
    assert (found.distance < policy(pair[0]).distance).all()
    assert (found.distance > policy(pair[0]).distance / 2).all()
    assert found.divergence == policy(pair[0]).divergence


def test_a_reference_measured_at_once_serves_many(
    models: tuple[Decoder, Decoder], pair: tuple[Measurement, Measurement]
) -> None:
    """And it keeps nothing of the weights that it came from."""
    model, reference = models
    passing = jax.tree.map(jnp.copy, reference)
    work = planned(pool(), config())
    with keep_reference(passing, work, config(), alone=True) as kept:
        assert leaves(kept.measurement) == leaves(measure(reference, work, config()))  # type: ignore[arg-type]
        for leaf in jax.tree.leaves(passing):
            leaf.delete()
        before = kept.measurement
        for _ in range(2):
            found = measure(model, planned(pool(), config()), config(), reference=kept)
            np.testing.assert_array_equal(policy(found).distance, policy(pair[0]).distance)
            assert leaves(dataclasses.replace(found, policy=None)) == leaves(dataclasses.replace(pair[0], policy=None))
        assert kept.measurement is before


def test_other_batches_settings_or_shapes_are_refused(make_decoder: Callable[..., Decoder]) -> None:
    model = make_decoder(0)
    work = planned(pool(), config())
    with keep_reference(model, work, config(), alone=True) as kept:
        with pytest.raises(ValueError, match="other batches"):
            measure(model, planned(pool(1), config()), config(), reference=kept)
        with pytest.raises(ValueError, match="other batches or settings"):
            measure(model, work, config(window=(0.2, 0.6)), reference=kept)
        with pytest.raises(ValueError, match=r"\(9, 301\).*\(8, 301\)"):
            measure(make_decoder(0, depth=8), work, config(), reference=kept)


def test_the_scratch_file_goes_with_it(
    models: tuple[Decoder, Decoder], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    opened, really = [], tempfile.TemporaryFile

    def noted(*args: Any, **kwargs: Any) -> Any:
        opened.append(really(*args, **kwargs))
        return opened[-1]

    monkeypatch.setattr(tempfile, "TemporaryFile", noted)
    kept = keep_reference(models[0], planned(pool(), config()), config())
    assert not all(file.closed for file in opened)
    kept.close()
    assert all(file.closed for file in opened)
    opened.clear()
    with pytest.raises(RuntimeError, match="on purpose"):
        keep_reference(models[0], planned(pool(), config()), config(), failing)
    assert opened
    assert all(file.closed for file in opened)


def failing(what: str, total: int, unit: str) -> Any:
    raise RuntimeError("on purpose")


@pytest.fixture(scope="module")
def varied(models: tuple[Decoder, Decoder]) -> Measurement:
    return measure(models[0], planned(pool(), VARIED), VARIED)


def with_variants(settings: MetricsConfig, **variants: Any) -> MetricsConfig:
    return dataclasses.replace(settings, variants=dataclasses.replace(settings.variants, **variants))


VARIED = with_variants(config(), skip=(0, 4), groups=True)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("center", config(center=True)),
        *(
            (f"skip={k}", dataclasses.replace(config(), contraction=dataclasses.replace(config().contraction, skip=k)))
            for k in (0, 4)
        ),
        *((f"positions=last:{k}", config(positions=f"last:{k}")) for k in (1, 2)),
    ],
)
def test_a_variant_is_an_audit_under_that_setting(
    models: tuple[Decoder, Decoder], varied: Measurement, name: str, settings: MetricsConfig
) -> None:
    alone = measure(models[0], planned(pool(), settings), settings)
    kept = {k.removeprefix(f"{name}/"): v for k, v in varied.variants.items() if k.startswith(f"{name}/")}
    if name.startswith("positions"):
        np.testing.assert_allclose(kept["transport"], alone.whole.columns["transport"], atol=CLOSE)
        without = [c.columns["transport"] for c in alone.without]
        np.testing.assert_allclose(kept["groups/transport"], without, atol=CLOSE)
        assert kept["groups/positions"].tolist() == alone.positions.tolist()
    else:
        np.testing.assert_allclose(kept["singular_values"], alone.singular_values, atol=1e-4)  # out of 10 to 100
        # With skip=0 the prompts of one token count too, and they are a group of their own, the last.
        without = alone.singular_values_without[: len(FULL)]
        np.testing.assert_allclose(kept["groups/singular_values"], without, atol=1e-4)
        assert kept["groups/rows"].tolist() == alone.rows[: len(FULL)].tolist()
        assert kept["rows"] == alone.rows.sum()


def test_variants_by_default_are_those_that_cost_little(
    models: tuple[Decoder, Decoder], pair: tuple[Measurement, Measurement], varied: Measurement
) -> None:
    names = {name.rpartition("/groups/")[0] or name.rpartition("/")[0] for name in pair[0].variants}
    assert names == {"center", "positions=last:1", "positions=last:2"}
    assert "center/groups/singular_values" not in pair[0].variants
    np.testing.assert_array_equal(pair[0].variants["center/singular_values"], varied.variants["center/singular_values"])
    few = measure(
        models[0], planned(pool(), config(positions="stride:5", center=True)), config(positions="stride:5", center=True)
    )
    assert not few.variants
