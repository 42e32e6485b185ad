"""Whatever devices share an audit, and however, the numbers are those of one device."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spinal_jax.audit import gram_store, pipeline, spectra
from spinal_jax.audit import measure as measuring
from spinal_jax.audit.abstract import abstract_arguments, lower_steps
from spinal_jax.audit.devices import Devices, OneDevice, OnMesh, OnReplicas
from spinal_jax.audit.forward_step import _add, gram_shardings
from spinal_jax.audit.gram_store import OnDevices, gram_bytes, gram_home
from spinal_jax.audit.measure import keep_reference, measure
from spinal_jax.audit.measurement import Measurement
from spinal_jax.audit.spectra import dealt_out
from spinal_jax.config import (
    AuditConfig,
    AuditParallelConfig,
    ContractionConfig,
    MetricsConfig,
    ParallelConfig,
    TransportConfig,
    VariantsConfig,
    build,
)
from spinal_jax.config.positions import Positions
from spinal_jax.data.packing import Plan, plan_batches
from spinal_jax.errors import UserError
from spinal_jax.metrics import contraction
from spinal_jax.models.config import ClampedSwiGLU, Experts, LatentAttention
from spinal_jax.models.decoder import Decoder
from spinal_jax.models.families import read_model
from spinal_jax.models.formats.open import open_checkpoint
from spinal_jax.models.formats.safetensors import SafetensorsFolder
from spinal_jax.models.parts import take_apart
from spinal_jax.models.rope import Rope
from spinal_jax.models.translate import load_decoder
from spinal_jax.parallel import placement
from spinal_jax.parallel.mesh import make_mesh
from spinal_jax.parallel.placement import Replicas, Shards, choose

from .converting import converted, write_model
from .test_trace import pool

# Sums over devices come in another order: roundings of float32, of which fits keep what a ratio of them does.
CLOSE = 1e-5
WHOLE = ("resolved",)  # counts


def on(*sizes: int, vocabulary: tuple[str, ...] = ("tensor",)) -> Devices:
    return OnMesh(Shards(make_mesh(ParallelConfig(*sizes)), vocabulary))


def planned(devices: Devices, settings: MetricsConfig, count: int = 24, tokens: int = 96) -> Plan:
    """Batches of `tokens` for each device that shares rows; the last one is uneven."""
    selector = Positions.parse(settings.transport.positions)
    return plan_batches(pool(count=count), selector, 1, tokens * devices.rows, devices.rows)


def same(found: Measurement, alone: Measurement) -> None:
    for some, other in zip(
        (found.whole, found.errors, *found.without), (alone.whole, alone.errors, *alone.without), strict=True
    ):
        for name, values in {**other.columns, **other.summary}.items():
            got = {**some.columns, **some.summary}[name]
            np.testing.assert_allclose(got, values, rtol=CLOSE, atol=0 if name in WHOLE else CLOSE, err_msg=name)
    top = alone.singular_values.max()
    np.testing.assert_allclose(found.singular_values_without, alone.singular_values_without, atol=CLOSE * top)
    assert found.variants.keys() == alone.variants.keys()
    for name, values in alone.variants.items():
        np.testing.assert_allclose(found.variants[name], values, rtol=CLOSE, atol=CLOSE * np.nanmax(np.abs(values)))


@pytest.fixture(scope="module")
def models(make_decoder: Callable[..., Decoder]) -> tuple[Decoder, Decoder]:
    """Three blocks and 301 tokens, which no axis divides."""
    return make_decoder(0, depth=3, unembed_bias=True), make_decoder(1, depth=3)


SETTINGS = MetricsConfig(ContractionConfig(), TransportConfig(top_k=None), 16, VariantsConfig(skip=(2,)))


@pytest.fixture(scope="module")
def alone(models: tuple[Decoder, Decoder]) -> tuple[Measurement, Measurement]:
    """(the model measured against the reference, the reference), on one device."""
    return joint(models, OneDevice(), SETTINGS)


def joint(
    models: tuple[Decoder, Decoder], devices: Devices, settings: MetricsConfig, count: int = 24
) -> tuple[Measurement, Measurement]:
    work = planned(devices, settings, count)
    with keep_reference(models[1], work, settings, devices=devices) as kept:
        found = measure(models[0], work, settings, reference=kept)
        assert kept.measurement is not None
        return found, kept.measurement


@pytest.mark.parametrize("where", ["8x1x1", "2x2x2", "1x4x2", "1x1x8", "1x4x2 all", "pmap"])
def test_the_trace_is_the_same_on_any_devices(
    models: tuple[Decoder, Decoder], alone: tuple[Measurement, Measurement], where: str
) -> None:
    """Two models in one pass over the vocabulary, a vocabulary and a depth that nothing divides, uneven batches."""
    if where == "pmap":
        devices: Devices = OnReplicas(Replicas.all())
    else:
        shape, _, everything = where.partition(" ")
        vocabulary = ("tensor", "fsdp") if everything else ("tensor",)
        devices = on(*map(int, shape.split("x")), vocabulary=vocabulary)
    found, reference = joint(models, devices, SETTINGS)
    same(found, alone[0])
    same(reference, alone[1])
    assert found.policy is not None
    assert alone[0].policy is not None
    np.testing.assert_allclose(found.policy.distance, alone[0].policy.distance, atol=CLOSE)
    np.testing.assert_allclose(found.policy.distance_without, alone[0].policy.distance_without, atol=CLOSE)
    assert found.policy.divergence == pytest.approx(alone[0].policy.divergence, abs=CLOSE)


SPARSE: dict[str, dict[str, Any]] = {
    "gpt-oss": {
        "experts": Experts(count=6, per_token=2, width=48, bias=True),
        "activation": ClampedSwiGLU(1.702, 0.05),
        "sinks": True,
    },
    "deepseek": {
        "kv_heads": 4,
        "head_dim": 12,
        "ropes": (Rope(4, 1e4),),
        "latent": LatentAttention(query_rank=16, key_value_rank=20, nope_dim=8, rope_dim=4, value_dim=8),
        "expert_layers": (False, True, True),
        "experts": Experts(
            count=8,
            per_token=3,
            width=20,
            shared_width=24,
            scoring="sigmoid",
            scale=2.5,
            groups=4,
            groups_kept=2,
            group_top=2,
            correction_bias=True,
        ),
    },
}


@pytest.mark.parametrize("kind", SPARSE)
def test_a_mixture_of_experts_is_the_same_on_a_mesh(kind: str, make_decoder: Callable[..., Decoder]) -> None:
    """Tokens go to the same experts, and experts take other numbers of them, whatever devices split both."""
    model = make_decoder(2, depth=3, **SPARSE[kind])
    found = []
    for devices in (OneDevice(), on(2, 2, 2)):
        found.append(measure(model, planned(devices, SETTINGS), SETTINGS, devices=devices))
    same(found[1], found[0])


@pytest.mark.parametrize("where", ["2x2x2", "pmap"])
def test_fewer_prompts_than_devices_and_only_the_likeliest_tokens(models: tuple[Decoder, Decoder], where: str) -> None:
    settings = MetricsConfig(ContractionConfig((0.0, 1.0)), TransportConfig(top_k=7), 16)
    devices = OnReplicas(Replicas.all()) if where == "pmap" else on(2, 2, 2)
    few = [sequence for sequence in pool() if len(sequence.ids) > 30][:3]
    found = []
    for each in (OneDevice(), devices):
        work = plan_batches(few, Positions.parse("last:4"), 1, 64 * each.rows, each.rows)
        found.append(measure(models[0], work, settings, devices=each))
    same(found[1], found[0])


def test_the_command_takes_a_mesh_and_says_so() -> None:
    settings = {
        "model": {"source": "random:0.3m"},
        "prompts": {"limit": 40, "max_length": 64},
        "metrics": {"groups": 4},
    }
    lines: list[str] = []
    one, many = (
        pipeline.run_audit(build(AuditConfig, settings | parallel), say=lines.append)
        for parallel in ({}, {"parallel": {"data": 2, "fsdp": -1, "tensor": 2}})
    )
    assert "cpu x 8, mesh 1 x 1 x 1 (8 CPU devices share one processor)" in lines[0]
    assert "cpu x 8, mesh 2 x 2 x 2, Gram sums on the devices (0.0 of" in lines[1]
    for name, values in one.columns.items():
        np.testing.assert_allclose(many.columns[name], values, rtol=CLOSE, atol=CLOSE, err_msg=name)


def test_what_is_left_to_choose_is_chosen_by_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    auto, table = AuditParallelConfig(), 1000
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(placement, "device_memory", lambda: 80 << 30)
    fits, large, huge = (choose(auto, size << 30, 1, table) for size in (30, 100, 10_000))
    assert str(fits) == "pmap x 8 (the model and its sums are 30.0 GiB, which each device has room for)"
    assert str(large) == "mesh 4 x 2 x 1 (the model and its sums are 100.0 GiB, shared by 2)"
    assert str(huge).startswith("mesh 1 x 8 x 1 (")
    assert str(choose(auto, 100 << 30, 6, table)).startswith("mesh 4 x 1 x 2 (")
    assert str(choose(auto, 300 << 30, 6, table)).startswith("mesh 1 x 4 x 2 (")
    assert str(choose(auto, 100 << 30, 32, table)).startswith("mesh 1 x 1 x 8 (")
    assert str(choose(AuditParallelConfig(2, 2, 2), 30 << 30, 1, table)) == "mesh 2 x 2 x 2"
    assert str(choose(AuditParallelConfig(backend="mesh"), 30 << 30, 1, table)) == "mesh 8 x 1 x 1"
    assert str(choose(AuditParallelConfig(1, 1, 1), 30 << 30, 1, table)) == "mesh 1 x 1 x 1"
    with pytest.raises(UserError, match=r"parallel.data is 4 and parallel.backend pmap, but there are 8 devices"):
        choose(AuditParallelConfig(4, backend="pmap"), 1, 1, table)
    with pytest.raises(UserError, match=r"parallel.backend is 'pmap'; it takes mesh where"):
        AuditParallelConfig(tensor=2, backend="pmap")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert str(choose(auto, 30 << 30, 1, table)) == "mesh 1 x 1 x 1"


def test_gram_sums_lie_on_the_devices_else_in_host_memory_else_in_a_file(
    models: tuple[Decoder, Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, one = models[0].config, OneDevice()
    size = gram_bytes(config, SETTINGS)
    assert size == 8 * 2 * 16 * 4 * (32 * 32 + 32)  # kinds of sums, groups, boundaries

    def home(device: int | None, host: int, devices: Devices = one) -> str:
        monkeypatch.setattr(gram_store, "device_memory", lambda: device)
        monkeypatch.setattr(gram_store, "host_memory", lambda: host)
        found = gram_home(config, SETTINGS, 0, devices)
        assert (found.slots is None) == (found.where == "devices")
        return found.where

    assert home(2 * size, 0) == "devices"
    assert home(size, 4 * size) == "host"
    assert home(size, 4 * size - 1) == "file"
    assert home(size, 0, on(2, 2, 2)) == "devices"  # each has an eighth
    assert home(None, 4 * size) == "devices"  # of a CPU, whose memory that is
    assert home(None, 4 * size - 1) == "file"


@pytest.mark.parametrize("where", ["host", "file"])
def test_sums_that_leave_the_devices_give_the_same_numbers(
    where: str, models: tuple[Decoder, Decoder], alone: tuple[Measurement, Measurement], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "fits_host", lambda *_: where == "host")
    for devices in (OneDevice(), on(2, 2, 2)):
        work = plan_batches(pool(), Positions.parse("last:4"), 1, 96 * devices.rows, devices.rows, slots=1)
        assert max(len(set(batch.runs)) for batch in work.batches) == 1
        same(measure(models[1], work, SETTINGS, devices=devices), alone[1])


def test_an_audit_needs_no_scratch_file(models: tuple[Decoder, Decoder], monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError("the folder for temporary files cannot be written to")

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    one = OneDevice()
    assert np.isfinite(measure(models[0], planned(one, SETTINGS), SETTINGS, devices=one).whole.columns["spike"]).all()


def test_every_spectrum_is_taken_once_by_one_device_and_the_work_is_even() -> None:
    for boundaries, replicates, workers in ((4, 19, 8), (33, 19, 8), (2, 1, 8), (5, 3, 1)):
        work = dealt_out(boundaries, replicates, workers)
        items = [(at, one) for part in work for at, some in part for one in some]
        assert sorted(items) == [(at, one) for at in range(boundaries) for one in range(replicates)]
        counts = [sum(len(some) for _, some in part) for part in work]
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("where", ["2x2x2", "pmap"])
@pytest.mark.parametrize("on_device", [True, False], ids=["eigvalsh of JAX", "LAPACK"])
def test_spectra_of_the_same_sums_are_shared_by_all_devices(
    where: str, on_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted by device, and equal to those of one device to 1e-9."""
    settings, work = MetricsConfig(variants=VariantsConfig(groups=True)), planned(OneDevice(), SETTINGS)
    rng, boundaries, width = np.random.default_rng(0), 3, 32
    rows = rng.normal(size=(8, work.group_count, boundaries, 64, width)) * np.arange(1, width + 1.0) ** -0.7
    second = np.einsum("pgbni,pgbnj->pgbij", rows, rows)  # of 8 parts, as replicas have them
    first = rows.sum(axis=3)
    devices: Devices = OnReplicas(Replicas.all()) if where == "pmap" else on(2, 2, 2)
    with jax.enable_x64(True):
        whole = contraction.Grams(second=(jnp.asarray(second.sum(axis=0)),), first=jnp.asarray(first.sum(axis=0)))
        if isinstance(devices, OnReplicas):
            each = devices.replicas.each
            parts = contraction.Grams(second=(jax.device_put(second, each),), first=jax.device_put(first, each))
        else:
            assert isinstance(devices, OnMesh)
            parts = jax.tree.map(jax.device_put, whole, gram_shardings(width, devices.places))
        taken: list[int] = []
        solve = spectra._on_device if on_device else spectra._on_host

        def counted(sums: spectra.BoundarySums, keep_reference: np.ndarray, *rest: Any) -> np.ndarray:
            taken.append(len(np.atleast_2d(keep_reference)))
            return solve(sums, keep_reference, *rest)

        monkeypatch.setattr(spectra, solve.__name__, counted)

        def take(devices: Devices, grams: contraction.Grams) -> spectra.Spectra:
            source = OnDevices(devices, grams)
            return spectra.all_spectra(
                [source], work, settings, boundaries, width, devices.workers, lambda n: None, 1e-7, on_device
            )

        alone = take(OneDevice(), whole)
        before = len(taken)
        found = take(devices, parts)
    replicates = 1 + len(work.groups.drops) + len(work.groups.halves)
    assert sum(taken) == 2 * sum(taken[:before]) == 2 * boundaries * (replicates + 1 + len(work.groups.drops))
    if on_device:
        assert len(taken) - before > 8  # every device some
    top = alone.whole.max()
    for one, other in ((found.whole, alone.whole), (found.without, alone.without), (found.halves, alone.halves)):
        np.testing.assert_allclose(one, other, atol=1e-9 * top)
    for name, values in alone.variants.items():
        np.testing.assert_allclose(found.variants[name], values, atol=1e-9 * np.max(values), err_msg=name)


@pytest.mark.parametrize("backend", ["cpu", "tpu"])
@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("groups", [[0, 5, 9], [3, 9, 7], [2]])
def test_gram_sums_of_a_mesh_are_those_of_one_device(
    groups: list[int], sizes: tuple[int, int, int], backend: str
) -> None:
    """Of every slot, where a batch has fewer groups than the largest; TPUs exchange in a way of their own."""
    shards = Shards(make_mesh(ParallelConfig(*sizes)))
    width, most, slots, boundaries = 64, 8, 10, 2
    rng = np.random.default_rng(0)
    h = jnp.asarray(rng.normal(size=(16, 8, width)), jnp.float32)
    counted = jnp.asarray(rng.random((16, 8)) < 0.8, jnp.float32)
    owner = jnp.asarray(rng.permutation(np.arange(16) % len(groups)), jnp.int32)
    rows = h, counted, jnp.asarray(groups, jnp.int32)[owner]
    with jax.enable_x64(True):
        zeros = contraction.init(slots, boundaries, width, np.dtype(np.float64))
        wanted = contraction.update(zeros, *rows, jnp.int32(1))
        add = partial(_add, boundary=jnp.int32(1), groups=most, shards=shards, backend=backend)
        on_mesh = jax.jit(lambda sums, *rows: add(sums, *rows))
        found = on_mesh(jax.tree.map(jax.device_put, zeros, gram_shardings(width, shards)), *rows)
        for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            # Pieces of float32 states on a TPU are rounded to 2^-24 of the largest in a column.
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-11 if backend == "cpu" else 1e-5)
        assert np.abs(wanted.first).max() > 1


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 2, 4)])
def test_bfloat16_gram_sums_of_a_mesh_of_gpus(sizes: tuple[int, int, int]) -> None:
    """Two stripes are multiplied at once; each device has its part of the rows of both."""
    shards = Shards(make_mesh(ParallelConfig(*sizes)))
    width = 512
    rng = np.random.default_rng(0)
    h = jnp.asarray(rng.normal(size=(16, 8, width)), jnp.bfloat16)
    counted = jnp.asarray(rng.random((16, 8)) < 0.8, jnp.float32)
    rows = h, counted, jnp.asarray(rng.permutation(np.arange(16) % 3), jnp.int32)
    assert contraction.stripe_count(width) == 4
    with jax.enable_x64(True):
        zeros = contraction.init(3, 1, width, np.dtype(np.float64))
        wanted = contraction.update(zeros, *rows, jnp.int32(0), "cpu")
        add = partial(_add, boundary=jnp.int32(0), groups=3, shards=shards, backend="gpu")
        on_mesh = jax.jit(lambda sums, *rows: add(sums, *rows))
        found = on_mesh(jax.tree.map(jax.device_put, zeros, gram_shardings(width, shards)), *rows)
        for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)  # float32 sums of 50 products
        assert np.abs(wanted.second[-1]).max() > 1


@pytest.mark.parametrize("table", [1, 1 << 40])
def test_a_large_unembedding_is_split_along_fsdp_too(table: int) -> None:
    shards = Shards.of(make_mesh(ParallelConfig(2, 2, 2)), table)
    assert shards.vocabulary == (("tensor",) if table == 1 else ("tensor", "fsdp"))


@pytest.mark.parametrize("kind", ["huggingface", "orbax"])
def test_weights_load_into_their_places_and_are_read_once(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that has every device reads every byte of a tensor that rows split once, and no tensor whole."""
    source = write_model(tmp_path / "model", vocab_size=56)
    family, config = read_model(json.loads((source / "config.json").read_text()))
    wanted = take_apart(load_decoder(open_checkpoint(str(source)), family, config, jnp.dtype(jnp.float32)))[1]
    checkpoint = open_checkpoint(str(source if kind == "huggingface" else converted(source, tmp_path / "orbax")))
    assert checkpoint.kind == kind
    read: list[int] = []
    shards = Shards(make_mesh(ParallelConfig(2, 1, 4)))
    if kind == "huggingface":
        rows = SafetensorsFolder._rows

        def counted(self: SafetensorsFolder, name: str, start: int, stop: int) -> np.ndarray:
            found = rows(self, name, start, stop)
            if name.endswith(("up_proj.weight", "embed_tokens.weight")):
                read.append(found.shape[0])
            return found

        monkeypatch.setattr(SafetensorsFolder, "_rows", counted)
    progress: list[int] = []
    model = load_decoder(checkpoint, family, config, jnp.dtype(jnp.float32), progress.append, shards.parameter)
    for path, array in take_apart(model)[1].items():
        assert array.sharding == shards.parameter(path, array.shape)
        np.testing.assert_array_equal(array, wanted[path])
    assert sum(progress) == sum(array.nbytes for array in wanted.values())
    if kind == "huggingface":
        assert sorted(read) == [24 // 4] * 4 * 3 + [56 // 4] * 4


def test_nothing_split_is_gathered_by_the_walk_through_the_vocabulary(models: tuple[Decoder, Decoder]) -> None:
    """On a mesh that splits the vocabulary, and one that splits rows and positions: only sums cross."""
    settings, config = MetricsConfig(), models[0].config
    for sizes in ((1, 1, 8), (2, 4, 1)):
        shards = Shards(make_mesh(ParallelConfig(*sizes)))
        some = abstract_arguments(
            config, jnp.dtype(jnp.float32), settings, (8, 48, 64), np.dtype(np.float32), shards=shards, slots=2
        )
        compiled = lower_steps(some, settings, 2, shards)[1].compile()
        text = compiled.as_text() or ""
        assert "all-reduce" in text
        for collective in ("all-gather", "all-to-all", "collective-permute"):
            assert f" {collective}(" not in text, f"{sizes} {collective}"
