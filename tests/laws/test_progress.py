"""An audit that was cut off goes on from what it saved, and ends in the numbers of one that was not."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from spinal_jax.audit.devices import Devices, OneDevice, OnMesh, OnReplicas
from spinal_jax.audit.measure import measure
from spinal_jax.audit.measurement import Measurement
from spinal_jax.audit.resume import Leg, Saved
from spinal_jax.config import MetricsConfig, ParallelConfig, VariantsConfig
from spinal_jax.config.positions import Positions
from spinal_jax.data.packing import Plan, plan_batches
from spinal_jax.errors import UserError
from spinal_jax.models.decoder import Decoder
from spinal_jax.parallel.mesh import make_mesh
from spinal_jax.parallel.placement import Replicas, Shards

from .test_trace import pool

ABOUT = {"model": {"sha256": "a"}}
SETTINGS = MetricsConfig(variants=VariantsConfig(skip=(2,)))


class Cut(Exception):
    """What ends an audit here."""


def cutting(after: int, end: Callable[[], None]) -> Callable[..., contextlib.AbstractContextManager[Callable]]:
    """A progress bar that calls `end` once so many batches are done."""

    @contextlib.contextmanager
    def bar(what: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        seen = 0

        def advance(amount: int) -> None:
            nonlocal seen
            seen += 1
            if what == "audit" and seen == after:
                end()

        yield advance

    return bar


def raise_cut(*_: object) -> None:
    raise Cut


def run(
    model: Decoder,
    devices: Devices,
    folder: Path | None = None,
    bar: object = None,
    slots: int | None = None,
    count: int = 0,
) -> Measurement:
    """`slots`: as many groups have their sums on the devices at once, all others in a file."""
    sequences = pool(count=80 * (count or devices.rows))

    def pack(batch_tokens: int, rows: int, slots: int | None, among: Sequence[int] | None = None) -> Plan:
        return plan_batches(sequences, Positions.parse("last:4"), 1, batch_tokens, rows, slots, groups=16, among=among)

    if folder is None:
        work, progress = pack(96 * devices.rows, devices.rows, slots), None
    else:
        saved = Saved(folder)
        saved.check(ABOUT)
        leg = Leg(
            devices=type(devices).__name__,
            processes=1,
            replicas=devices.rows if isinstance(devices, OnReplicas) else None,
            batch_tokens=96 * devices.rows,
            rows=devices.rows,
            slots=slots,
        )
        work = saved.plan(leg, pack)
        progress = saved.begin(ABOUT, 2)
    return measure(model, work, SETTINGS, bar, devices=devices, progress=progress)  # type: ignore[arg-type]


def equal(some: Measurement, other: Measurement) -> None:
    for one, two in zip(
        (some.whole, some.errors, *some.without), (other.whole, other.errors, *other.without), strict=True
    ):
        jax.tree.map(np.testing.assert_array_equal, (one.columns, one.summary), (two.columns, two.summary))
    np.testing.assert_array_equal(some.singular_values_without, other.singular_values_without)
    jax.tree.map(np.testing.assert_array_equal, dict(some.variants), dict(other.variants))


@pytest.mark.parametrize("slots", [None, 2])
@pytest.mark.parametrize(
    "make",
    [
        OneDevice,
        lambda: OnMesh(Shards(make_mesh(ParallelConfig(2, 2, 2)))),
        lambda: OnReplicas(Replicas.all()),
    ],
    ids=["one", "mesh", "pmap"],
)
def test_an_audit_goes_on_where_it_was_cut_off(
    make: Callable[[], Devices], slots: int | None, make_decoder: Callable[..., Decoder], tmp_path: Path
) -> None:
    if slots and make is not OneDevice:
        return  # what leaves the devices is the same whatever they are
    devices, model = make(), make_decoder(0, depth=3)
    whole = run(model, devices, slots=slots)
    for after in (3, 1):  # saved at 2 batches, then ended before the next save
        with pytest.raises(Cut):
            run(model, devices, tmp_path, cutting(after, raise_cut), slots)
    before = signal.signal(signal.SIGTERM, raise_cut)
    try:
        with pytest.raises(Cut):  # at the end of a batch, which is saved
            run(model, devices, tmp_path, cutting(1, lambda: signal.raise_signal(signal.SIGTERM)), slots)
        assert signal.getsignal(signal.SIGTERM) is raise_cut
    finally:
        signal.signal(signal.SIGTERM, before)
    assert {path.name for path in (tmp_path / "progress" / "0" / "saved").iterdir()} >= {"4"}
    equal(run(model, devices, tmp_path, slots=slots), whole)


def one() -> Devices:
    return OneDevice()


def mesh(*sizes: int) -> Callable[[], Devices]:
    return lambda: OnMesh(Shards(make_mesh(ParallelConfig(*sizes))))


@pytest.mark.parametrize("slots", [None, 2])
def test_an_audit_goes_on_on_other_devices(
    slots: int | None, make_decoder: Callable[..., Decoder], tmp_path: Path
) -> None:
    """From one device to meshes and back, each leg cut off: in the end every prompt is in the sums once."""
    model = make_decoder(0, depth=3)
    whole = run(model, one(), slots=slots, count=4)
    for number, make in enumerate((one, mesh(2, 2, 2), mesh(1, 2, 4))):
        with pytest.raises(Cut):
            run(model, make(), tmp_path, cutting(3, raise_cut), slots, count=4)
        (leg,) = (path.name for path in (tmp_path / "progress").iterdir() if path.is_dir())
        assert leg == str(number)
    said = json.loads((tmp_path / "progress" / "settings.json").read_text())
    assert [leg["batches"] for leg in said["legs"]] == [2, 2, 0]
    found = run(model, one(), tmp_path, slots=slots, count=4)
    for name, values in whole.whole.columns.items():
        np.testing.assert_allclose(found.whole.columns[name], values, rtol=1e-5, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(found.singular_values, whole.singular_values, rtol=1e-6)
    for name, values in whole.variants.items():
        np.testing.assert_allclose(found.variants[name], values, rtol=1e-5, atol=1e-5, err_msg=name)
    # Nothing is left to do, and other devices still make the trace of what was saved.
    last = run(model, mesh(8, 1, 1)(), tmp_path, slots=slots, count=4)
    np.testing.assert_allclose(last.singular_values, found.singular_values, rtol=1e-12)


def test_another_audit_does_not_go_on(tmp_path: Path) -> None:
    def begin(digest: str, overwrite: bool = False, batch_tokens: int = 64, **changed: Any) -> None:
        leg = {"devices": "mesh", "processes": 1, "replicas": None, "batch_tokens": 64, "rows": 1, "slots": None}
        saved = Saved(tmp_path)
        saved.check({"model": {"sha256": digest}}, overwrite)
        saved.plan(
            Leg(**{**leg, **changed}),
            lambda *_: plan_batches(pool(), Positions.parse("last:4"), 1, batch_tokens, groups=16),
            overwrite,
        )
        saved.begin({"model": {"sha256": digest}}, 2)

    begin("a")
    with pytest.raises(UserError, match=r"unfinished audit with model.sha256 = 'a', but this one has 'b'"):
        begin("b")
    begin("b", overwrite=True)
    (tmp_path / "progress" / "0" / "saved" / "2").mkdir(parents=True)
    with pytest.raises(UserError, match=r"ran without jax.pmap, whose sums cannot go on on pmap x 8"):
        begin("b", devices="pmap x 8", replicas=8)
    with pytest.raises(UserError, match=r"Gram sums were on its devices, mesh; one has no room for them: use more"):
        begin("b", devices="one", processes=2, slots=2)
    with pytest.raises(UserError, match=r"unfinished audit of another version of spinal_jax, whose batches differ"):
        begin("b", batch_tokens=512)
    begin("b")
    begin("b", overwrite=True, batch_tokens=512)
    assert not (tmp_path / "progress" / "0" / "saved" / "2").exists()
    (tmp_path / "progress" / "0" / "saved" / "2").mkdir(parents=True)
    begin("b", overwrite=True, devices="pmap x 8", replicas=8, batch_tokens=512)
    assert not (tmp_path / "progress" / "0" / "saved" / "2").exists()
