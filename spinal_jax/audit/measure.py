"""The measurement of one checkpoint, alone or against a reference: two jitted steps for each batch.

`forward_step` runs the forward pass with a tap that accumulates the Gram matrix of each boundary and keeps the hidden
states at the positions of transport. `lens_step` computes their token distributions in one pass over the vocabulary.
Only sums by prompt group are kept, so memory does not grow with the number of prompts. All steps run on `Devices`.

Two models need not be in memory together. A `Reference` keeps its unembedding and, in a scratch file, its hidden states
at the measured positions; one pass over the vocabulary then processes both models.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import IO, TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from spinal_jax.audit.devices import Devices, OneDevice
from spinal_jax.audit.gram_store import FileStore, HostStore, OnDevices, fits_host
from spinal_jax.audit.lens_step import LensSums, PairSums, TransportSums, zero_lens_sums
from spinal_jax.audit.measurement import Measurement, build_measurement, policy_distance
from spinal_jax.audit.spectra import Spectra, all_spectra, boundaries_of, replicate_counts, spectra_count
from spinal_jax.config import MetricsConfig
from spinal_jax.data.ahead import ahead
from spinal_jax.data.packing import Plan, TokenBatch
from spinal_jax.errors import NotLeader, UserError
from spinal_jax.metrics import contraction
from spinal_jax.metrics.lens import Lens
from spinal_jax.models.decoder import Decoder
from spinal_jax.models.parts import take_apart
from spinal_jax.progress import Bar, no_bar

if TYPE_CHECKING:
    from spinal_jax.audit.resume import Progress

LENS_TOLERANCE = 1e-4  # largest difference in probability between the lens at boundary D and the output of the model


class Reference:
    """A model that others are compared with on the same batches, made by `keep_reference`. A context manager.

    Attributes:
        measured: whether its own measurement is done. It is deferred until the first model is measured against the
            reference, because one pass over the vocabulary processes both.
        measurement: its own measurement, in the leading process.
    """

    def __init__(self, lens: Lens, plan: Plan, settings: MetricsConfig, devices: Devices):
        self.devices = devices
        self.lens = jax.tree.map(jnp.copy, lens)  # a copy, so that the weights of the model can be donated or freed
        self.plan, self.settings = plan, settings
        self.spectra: Spectra | None = None
        self.measured = False
        self.measurement: Measurement | None = None
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `close`)
        self._records: list[tuple[int, np.dtype, tuple[int, ...]]] = []  # of each batch: offset, dtype, shape

    def __enter__(self) -> Reference:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Deletes the scratch file."""
        self._file.close()

    def append(self, batch: TokenBatch, x: Array) -> None:
        """Stores x [D + 1, M, d] of a batch, without padding."""
        rows = np.ascontiguousarray(self.devices.to_host(x)[:, np.asarray(batch.measured_weight) > 0])
        self._records.append((self._file.tell(), rows.dtype, rows.shape))
        self._file.write(rows.reshape(-1).view(np.uint8).data)

    def read(self, number: int, batch: TokenBatch) -> Array:
        """x [D + 1, M, d] of a batch, with padding."""
        begin, dtype, shape = self._records[number]
        self._file.seek(begin)
        rows = np.frombuffer(self._file.read(math.prod(shape) * dtype.itemsize), dtype).reshape(shape)
        x = np.zeros((shape[0], len(batch.measured_weight), shape[2]), dtype)
        x[:, np.asarray(batch.measured_weight) > 0] = rows
        return self.devices.from_host(x)

    def check(self, model: Decoder, plan: Plan, settings: MetricsConfig) -> None:
        """Raises ValueError unless the model, the batches and the settings match the reference."""
        same = plan is self.plan or (
            plan.batches == self.plan.batches
            and all(np.array_equal(a.ids, b.ids) for a, b in zip(plan.sequences, self.plan.sequences, strict=True))
        )
        if not same or settings != self.settings:
            raise ValueError("the reference was kept on other batches or settings")
        ours = (model.config.depth + 1, _lens(model, plan, settings).vocab_size)
        if ours != (theirs := (self._records[0][2][0], self.lens.vocab_size)):
            raise ValueError(f"the model has {ours} boundaries and tokens, the reference {theirs}")
        over = [each.vocabulary.sha256 if each.vocabulary else None for each in (plan, self.plan)]
        if over[0] != over[1]:
            raise ValueError("the reference was kept over another vocabulary")


def measure(
    model: Decoder,
    plan: Plan,
    settings: MetricsConfig,
    bar: Bar | None = None,
    reference: Reference | None = None,
    devices: Devices | None = None,
    progress: Progress | None = None,
    watch: Callable[[int, tuple[np.ndarray, ...]], None] | None = None,
) -> Measurement:
    """Measures a model on the batches of a plan.

    Args:
        model: the checkpoint.
        plan: batches from `spinal_jax.data.packing.plan_batches`.
        settings: what to measure.
        bar: opens progress bars.
        reference: model to which distances are measured; also completes its own measurement if that is pending.
        devices: devices to run on; `devices.rows` must divide the rows of a batch. The default is the devices of
            `reference`, or one device.
        progress: saved state to resume from and to save to; None saves nothing.
        watch: called with the number of each batch and the transport at its measured positions, [D, m] for the model
            and for the reference, without padding. It costs another pass over the vocabulary.

    Raises:
        UserError: the window has too few ranks, weights or hidden states are not finite, or the lens at the last
            boundary differs from the output of the model.
        NotLeader: several processes share the audit and this is not the leading one.
        ValueError: `reference` has other batches, settings, depth or vocabulary.
    """
    devices = devices or (OneDevice() if reference is None else reference.devices)
    model = devices.model(model)
    lens = devices.lens(_lens(model, plan, settings))
    if reference is None:
        lenses, known = (lens,), True
    else:
        reference.check(model, plan, settings)
        lenses, known = (lens, reference.lens), reference.measured
    models = 1 if known else 2
    sums = devices.lens_sums(zero_lens_sums(model.config.depth + 1, settings, models, reference is not None))

    def read(sums: LensSums, number: int, host: TokenBatch, batch: TokenBatch, x: Array) -> LensSums:
        both = (x,) if reference is None else (x, reference.read(number, host))
        if watch is not None:
            real = np.asarray(host.measured_weight) > 0
            steps = devices.position_steps(lenses, both, batch, settings.transport.top_k)
            watch(number, tuple(each[:, real] for each in steps))
        return jax.block_until_ready(devices.lens_step(lenses, sums, both, batch, settings))

    spectra, sums = _run(model, plan, settings, bar or no_bar, sums, read, devices, progress)
    own, across = _read_out(sums, devices)
    if reference is not None:
        reference.measured = True
    if spectra is None:
        raise NotLeader
    if reference is not None and not known:
        assert reference.spectra is not None
        reference.measurement = build_measurement(reference.spectra, own[1], plan, settings)
    return replace(build_measurement(spectra, own[0], plan, settings), policy=policy_distance(across, plan.groups))


def keep_reference(
    model: Decoder,
    plan: Plan,
    settings: MetricsConfig,
    bar: Bar | None = None,
    *,
    alone: bool = False,
    devices: Devices | None = None,
) -> Reference:
    """Runs the forward pass of a reference model and keeps what distances to it need.

    Only the unembedding stays on the device. The scratch file holds (D + 1) d numbers for each measured position.

    Args:
        model, plan, settings, bar, devices: as in `measure`.
        alone: complete the measurement of the reference now. By default it is deferred to the first model that is
            measured against the reference, which is cheaper.

    Returns:
        The reference, to be closed by the caller.
    """
    devices = devices or OneDevice()
    model = devices.model(model)
    lens = devices.lens(_lens(model, plan, settings))
    kept = Reference(lens, plan, settings, devices)
    sums = devices.lens_sums(zero_lens_sums(model.config.depth + 1, settings, 1, False))

    def read(sums: LensSums, number: int, host: TokenBatch, batch: TokenBatch, x: Array) -> LensSums:
        kept.append(host, x)
        return jax.block_until_ready(devices.lens_step((lens,), sums, (x,), batch, settings)) if alone else sums

    try:
        kept.spectra, sums = _run(model, plan, settings, bar or no_bar, sums, read, devices)
        kept.measured = alone
        if alone and kept.spectra is not None:
            kept.measurement = build_measurement(kept.spectra, _read_out(sums, devices)[0][0], plan, settings)
    except BaseException:
        kept.close()
        raise
    return kept


def _lens(model: Decoder, plan: Plan, settings: MetricsConfig) -> Lens:
    """The logit lens over the vocabulary of the plan."""
    lens, vocabulary = model.head(settings.transport.temperature), plan.vocabulary
    return lens if vocabulary is None else lens.over(vocabulary.ids, vocabulary.rows)


def _read_out(sums: LensSums, devices: Devices) -> tuple[tuple[TransportSums, ...], PairSums | None]:
    """The sums in float64, after a check of the lens."""
    _check_lens(devices.largest(sums.lens_error))
    return devices.totals(sums)


def _check_lens(error: float, model: Decoder | None = None) -> None:
    """Raises UserError unless the lens at the last boundary equals the output of the model."""
    if error < LENS_TOLERANCE:
        return
    if model is not None and math.isnan(error):
        for name, x in sorted(take_apart(model)[1].items()):
            if jnp.issubdtype(x.dtype, jnp.floating) and not bool(jnp.isfinite(x).all()):
                raise UserError(f"the weights are not finite: {name} holds NaN or infinity; the checkpoint is damaged")
        raise UserError(
            "the model's output is not finite although its weights are: a hidden state overflows; "
            "model.dtype=float32 may help"
        )
    raise UserError(
        f"the lens at the last boundary differs from the model's output by a probability of {error:.2g}, which must be "
        f"below {LENS_TOLERANCE:g}: this model is read wrongly; spinal verify compares it with PyTorch"
    )


def _run(
    model: Decoder,
    plan: Plan,
    settings: MetricsConfig,
    bar: Bar,
    sums: LensSums,
    read: Callable[[LensSums, int, TokenBatch, TokenBatch, Array], LensSums],
    devices: Devices,
    progress: Progress | None = None,
) -> tuple[Spectra | None, LensSums]:
    """Runs the forward pass of all batches and `read(sums, number, host batch, batch, x)` for each.

    Returns:
        The spectra, in the leading process, and the sums of `read`.
    """
    config, skips = model.config, settings.variants.skip
    boundaries = config.depth + 1
    dtype = contraction.gram_dtype()
    wide = jax.enable_x64(True) if dtype == np.float64 else contextlib.nullcontext()
    with contextlib.ExitStack() as stack, wide:
        workers = devices.workers
        stores: list[HostStore | FileStore] = []
        files: list[IO[bytes]] = []
        if plan.leaves:
            work = boundaries_of(boundaries, replicate_counts(plan, settings), len(workers))
            for number in range(1 + len(skips)):
                if progress is None and fits_host(config, settings):
                    stores.append(HostStore(plan.group_count, work, workers, config.width))
                else:
                    file = tempfile.TemporaryFile() if progress is None else progress.file(number)  # noqa: SIM115
                    files.append(stack.enter_context(file))
                    stores.append(FileStore(file, plan.group_count, work, workers, config.width))
        grams = devices.grams(1 + len(skips), plan.slots, boundaries, config.width, dtype)
        lens_error = devices.lens_error()
        begin = 0
        if progress is not None:
            kept = [store for store in stores if isinstance(store, FileStore)]
            (grams, lens_error, sums), begin = progress.restore((grams, lens_error, sums), kept, plan, devices)
        with (
            progress or contextlib.nullcontext(),
            bar("audit", plan.tokens, "token") as advance,
            ahead(plan.filled(devices.own, begin)) as batches,
        ):
            for number, host in enumerate(batches, start=begin):
                batch = devices.batch(host)
                grams, x, lens_error = devices.forward_step(model, grams, lens_error, batch, skips, plan.groups_at_once)
                sums = read(sums, number, host, batch, x)
                for done in plan.complete(number) if plan.leaves else ():
                    for store, each in zip(stores, grams, strict=True):
                        store.add(done.group, partial(devices.of_slot, each, done.slot), config.depth)
                    grams = tuple(devices.clear(each, done.slot) for each in grams)
                if progress is not None:
                    progress.after(number + 1, len(plan.batches), (grams, lens_error, sums), files)
                advance(plan.batch_tokens(number))
        _check_lens(devices.largest(lens_error), model)
        sources = stores if plan.leaves else [OnDevices(devices, each) for each in grams]
        with bar("spectra", spectra_count(boundaries, settings), "boundary") as advance:
            backend = jax.default_backend()
            products = contraction.product_dtype(model.dtype, dtype, backend)
            resolution = contraction.resolution(products, backend)
            spectra = all_spectra(sources, plan, settings, boundaries, config.width, workers, advance, resolution)
        return spectra if devices.leads else None, sums
