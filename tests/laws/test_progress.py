"""An audit that was cut off goes on from what it saved, and ends in the numbers of one that was not."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from spinal_jax.audit.devices import Devices, OneDevice, OnMesh, OnReplicas
from spinal_jax.audit.measure import Measurement, measure
from spinal_jax.audit.resume import Progress
from spinal_jax.config import MetricsConfig, ParallelConfig, VariantsConfig
from spinal_jax.data.packing import Positions, plan
from spinal_jax.errors import UserError
from spinal_jax.models.decoder import Decoder
from spinal_jax.parallel.mesh import make_mesh
from spinal_jax.parallel.placement import Replicas, Shards

from .test_trace import pool

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
    model: Decoder, devices: Devices, folder: Path | None = None, bar: object = None, slots: int | None = None
) -> Measurement:
    """`slots`: as many groups have their sums on the devices at once, all others in a file."""
    work = plan(
        pool(count=80 * devices.rows), Positions.parse("last:4"), 1, 96 * devices.rows, devices.rows, slots, groups=16
    )
    assert len(work.batches) > 4
    progress = None if folder is None else Progress(folder, 2, {"devices": type(devices).__name__})
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
    assert Progress(tmp_path, 2, {"devices": type(devices).__name__}).begun == 4
    equal(run(model, devices, tmp_path, slots=slots), whole)


def test_another_audit_does_not_go_on(tmp_path: Path) -> None:
    Progress(tmp_path, 2, {"model": {"sha256": "a"}})
    with pytest.raises(UserError, match=r"unfinished audit with model.sha256 = 'a', but this one has 'b'"):
        Progress(tmp_path, 2, {"model": {"sha256": "b"}})
    Progress(tmp_path, 2, {"model": {"sha256": "b"}}, overwrite=True)
