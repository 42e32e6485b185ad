"""The audit of one checkpoint, alone or against a reference: two jitted steps a batch, then float64 on the host.

`forward_step` runs the forward with a tap that sums each boundary's Gram matrix and keeps the few positions where
transport is measured; `lens_step` takes their token distributions in one pass over the vocabulary. Only sums by prompt
group stay: Gram sums of all groups on the devices or wherever else there is room, so memory does not grow
with the number of prompts.

Every step runs on the `Devices` given.

Two models need not be in memory together: of a `Reference` stay its unembedding and, in a scratch file, its residuals
at the measured positions, and one pass over the vocabulary then reads both models.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import IO, TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from spinal_jax.audit.devices import Devices, OneDevice
from spinal_jax.audit.gram_store import FileStore, HostStore, OnDevices, fits_host
from spinal_jax.audit.lens_step import LensSums, PairSums, TransportSums, over_groups, zero_lens_sums
from spinal_jax.audit.spectra import Spectra, all_spectra, boundaries_of, replicate_counts, spectra_count
from spinal_jax.config import MetricsConfig
from spinal_jax.data.ahead import ahead
from spinal_jax.data.packing import Plan, TokenBatch
from spinal_jax.errors import NotLeader, UserError
from spinal_jax.metrics import columns, contraction
from spinal_jax.metrics.columns import Column
from spinal_jax.metrics.depth import summary, terminal_block
from spinal_jax.metrics.tail import MIN_RANKS, effective_rank, fitted_ranks, spike, tail_fit, tail_slopes
from spinal_jax.metrics.transport import Lens
from spinal_jax.models.decoder import Decoder
from spinal_jax.models.parts import take_apart
from spinal_jax.progress import Bar, no_bar
from spinal_jax.stats.groups import Groups
from spinal_jax.stats.jackknife import Estimate
from spinal_jax.stats.summary import Replicates, coherence_estimate

if TYPE_CHECKING:
    from spinal_jax.audit.resume import Progress

LENS_TOLERANCE = 1e-4  # largest probability by which the lens at boundary D may differ from the model's output


@dataclass(frozen=True)
class DepthCurve:
    """The numbers of one pool of prompts."""

    columns: dict[str, np.ndarray]  # [D + 1] each
    summary: dict[str, float]


@dataclass(frozen=True)
class PolicyDistance:
    """How far a model's distributions lie from a reference's at the same positions: means, and without each group."""

    distance: np.ndarray  # [D + 1] radians, Fisher-Rao
    distance_without: np.ndarray  # [G, D + 1]
    divergence: float  # nats, KL(model || reference) of what they put out
    divergence_without: np.ndarray  # [G]


@dataclass(frozen=True)
class Measurement:
    """An audit's numbers: of all prompts, without each group, and the jackknife standard errors from the two."""

    whole: DepthCurve
    reasons: Mapping[str, str]  # by name of a summary number that is NaN, why
    without: tuple[DepthCurve, ...]  # G of them; groups without rows are left out
    errors: DepthCurve
    singular_values: np.ndarray  # [D + 1, d]
    singular_values_without: np.ndarray  # [G, D + 1, d]
    contraction_half: np.ndarray  # [D + 1] mean alpha of two halves of the groups, NaN where there is but one group
    resolution: float  # part of s_1 that a singular value must exceed to be known
    rows: np.ndarray  # [G] contraction rows of each group
    positions: np.ndarray  # [G] transport positions of each group
    variants: Mapping[str, np.ndarray]  # other settings of the same pass, named as in docs/method.md
    policy: PolicyDistance | None = None  # where there is a reference


class Reference:
    """A model that others are measured against on the same batches (`keep_reference`); to be closed.

    Attributes:
        measured: whether its own numbers are known. Not until a first model is measured against it, because one pass
            over the vocabulary reads both.
        measurement: its own numbers, in the process that leads.
    """

    def __init__(self, lens: Lens, plan: Plan, settings: MetricsConfig, devices: Devices):
        self.devices = devices
        self.lens = jax.tree.map(jnp.copy, lens)  # so that the model's own weights may be donated or freed
        self.plan, self.settings = plan, settings
        self.spectra: Spectra | None = None
        self.measured = False
        self.measurement: Measurement | None = None
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as this)
        self._records: list[tuple[int, np.dtype, tuple[int, ...]]] = []  # where each batch begins, and what it is

    def __enter__(self) -> Reference:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the scratch file."""
        self._file.close()

    def append(self, batch: TokenBatch, x: Array) -> None:
        """Keeps x [D + 1, M, d] of a batch, at its real positions."""
        rows = np.ascontiguousarray(self.devices.to_host(x)[:, np.asarray(batch.measured_weight) > 0])
        self._records.append((self._file.tell(), rows.dtype, rows.shape))
        self._file.write(rows.reshape(-1).view(np.uint8).data)

    def read(self, number: int, batch: TokenBatch) -> Array:
        """x [D + 1, M, d] of a batch."""
        begin, dtype, shape = self._records[number]
        self._file.seek(begin)
        rows = np.frombuffer(self._file.read(math.prod(shape) * dtype.itemsize), dtype).reshape(shape)
        x = np.zeros((shape[0], len(batch.measured_weight), shape[2]), dtype)
        x[:, np.asarray(batch.measured_weight) > 0] = rows
        return self.devices.from_host(x)

    def check(self, model: Decoder, plan: Plan, settings: MetricsConfig) -> None:
        """ValueError unless the model and what it is to read fit."""
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
    """Runs the audit over a planned pool of prompts.

    Args:
        model: the checkpoint.
        plan: the batches (`spinal_jax.data.packing.plan_batches`).
        settings: what to measure.
        bar: opens a progress bar for (what, how much, unit) and gives the function that advances it.
        reference: also measure the distance from this model; if its own measurement is missing, it is made here.
        devices: what it runs on, the plan's rows being a multiple of `devices.rows`; those of `reference` with one.
        progress: goes on where it stands, and saves there; None: nothing is saved.
        watch: gets the number of each batch and the transport at its measured positions, [D, m] of the model and of the
            reference, padding left out. It costs one more walk through the vocabulary.

    Raises:
        UserError: the window has too few ranks, weights or hidden states are not finite, or the lens at the last
            boundary is not the model's own output.
        NotLeader: several processes share the audit, and this one does not lead.
        ValueError: `reference` was kept on other batches or settings, or has another depth or vocabulary.
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
        reference.measurement = _finish(reference.spectra, own[1], plan, settings)
    return replace(_finish(spectra, own[0], plan, settings), policy=_policy(across, plan.groups))


def keep_reference(
    model: Decoder,
    plan: Plan,
    settings: MetricsConfig,
    bar: Bar | None = None,
    *,
    alone: bool = False,
    devices: Devices | None = None,
) -> Reference:
    """Runs a model whose numbers, and distances from it, are to be measured: a `Reference`, which is to be closed.

    Only its unembedding stays on the device. The scratch file holds (D + 1) d numbers for each measured position.

    Args:
        model, plan, settings, bar, devices: as `measure`.
        alone: measure it now, by itself. Otherwise that waits for the first model measured against it, and costs less.
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
            kept.measurement = _finish(kept.spectra, _read_out(sums, devices)[0][0], plan, settings)
    except BaseException:
        kept.close()
        raise
    return kept


def _lens(model: Decoder, plan: Plan, settings: MetricsConfig) -> Lens:
    """What reads distributions over the tokens of the plan's vocabulary."""
    lens, vocabulary = model.head(settings.transport.temperature), plan.vocabulary
    return lens if vocabulary is None else lens.over(vocabulary.ids, vocabulary.rows)


def _read_out(sums: LensSums, devices: Devices) -> tuple[tuple[TransportSums, ...], PairSums | None]:
    """The sums as float64, once they are known to be of the model's own distributions."""
    _check_lens(devices.largest(sums.lens_error))
    return devices.totals(sums)


def _check_lens(error: float, model: Decoder | None = None) -> None:
    """UserError unless the lens at the last boundary gives the model's own output."""
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
    """All batches through the forward, what is kept of each handed to `read(sums, number, host batch, batch, x)`;
    then the spectra, in the process that leads, and what was read."""
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


def _finish(spectra: Spectra, sums: TransportSums, plan: Plan, settings: MetricsConfig) -> Measurement:
    """Fits, means and their jackknife, float64."""
    groups = plan.groups
    used, drops, total = groups.used, groups.drops, groups.rows.sum()
    rows, positions = groups.rows[used], groups.positions[used]
    terminal = terminal_block(len(spectra.whole) - 1, settings.terminal)
    window = settings.contraction.window
    lost = np.flatnonzero(~(spectra.whole <= np.finfo(np.float32).max).all(axis=-1))  # traces hold them as float32
    if len(lost):
        raise UserError(
            f"the hidden states at boundary {lost[0]} are not finite: they overflow; model.dtype=float32 may help"
        )
    flat = np.flatnonzero(~(spectra.whole[..., 0] > 0))
    if len(flat):
        equal = "all equal" if settings.contraction.center else "all 0"
        raise UserError(f"the hidden states at boundary {flat[0]} are {equal}, so they have no spectrum to measure")
    resolution = spectra.resolution
    everything = over_groups(sums)
    whole = depth_curve(spectra.whole, int(total), everything, window, resolution, terminal)
    without = tuple(
        depth_curve(s, int(total), over_groups(sums, g), window, resolution, terminal)
        for s, g in zip(spectra.without, drops, strict=True)
    )
    low, high = fitted_ranks(int(total), spectra.whole.shape[-1], window)
    if high - low + 1 < MIN_RANKS:
        raise UserError(
            f"the window {list(window)} of {min(int(total), spectra.whole.shape[-1])} singular values has fewer than "
            f"{MIN_RANKS} ranks; choose a wider metrics.contraction.window, or give more prompts"
        )
    unresolved = np.isnan([c.columns["contraction"] for c in (whole, *without)]).any(axis=0)
    for name in ("contraction", "fit_r2", "fit_quadratic"):  # a number has an error, or there is none
        whole.columns[name][unresolved] = np.nan
    whole.summary["contraction"] = float(np.mean(whole.columns["contraction"][terminal[0] : terminal[1] + 1]))
    halves = tail_slopes(spectra.halves, int(total), [window], resolution)[0]
    half = halves.mean(axis=0) if len(halves) else np.full(len(spectra.whole), np.nan)

    sizes = {"rows": rows, "positions": positions}

    def estimate(column: Column, full: np.ndarray | float, replicates: list[Any]) -> Estimate:
        full = np.asarray(full)
        each = np.array(replicates) if replicates else np.full((len(rows), *full.shape), np.nan)
        return Estimate.of(full, each, sizes[column.counted_by])

    def replicates(name: str) -> Replicates:
        full = whole.columns[name]
        each = np.array([c.columns[name] for c in without]) if without else np.full((len(rows), len(full)), np.nan)
        return Replicates(full, each, sizes[columns.column(name).counted_by])

    smooth = coherence_estimate({name: replicates(name) for name in ("contraction", "transport")}, terminal)
    whole.summary["coherence"] = float(smooth.estimate.value)
    errors = DepthCurve(
        {k: estimate(columns.column(k), v, [c.columns[k] for c in without]).error for k, v in whole.columns.items()},
        {
            column.name: float(
                estimate(column, whole.summary[column.name], [c.summary[column.name] for c in without]).error
            )
            for column in columns.SUMMARY
            if column.counted_by in sizes
        }
        | {"coherence": float(smooth.estimate.error)},
    )
    variants = dict(spectra.variants)
    for place, last in enumerate(settings.lasts):
        name, step = f"positions=last:{last}", sums.last_step[place]
        count = np.asarray(sums.last_positions[place])
        variants[f"{name}/transport"] = _means(step.sum(axis=0), count.sum())
        variants[f"{name}/groups/positions"] = count[used]
        variants[f"{name}/groups/transport"] = np.array(
            [_means(step.sum(axis=0) - step[g], count.sum() - count[g]) for g in drops]
        ).reshape(len(drops), step.shape[-1])
    return Measurement(
        whole=whole,
        reasons={"coherence": smooth.reason} if smooth.reason else {},
        without=without,
        errors=errors,
        singular_values=spectra.whole,
        singular_values_without=spectra.without,
        contraction_half=half,
        resolution=resolution,
        rows=rows,
        positions=positions,
        variants=variants,
    )


def _means(step: np.ndarray | Array, positions: float) -> np.ndarray:
    """[D + 1] mean step arriving at each boundary, NaN at 0."""
    transport = np.asarray(step / positions)
    transport[0] = np.nan
    return transport


def _policy(across: PairSums | None, groups: Groups) -> PolicyDistance | None:
    if across is None:
        return None
    distance, divergence, count = across.distance.sum(axis=0), across.divergence.sum(), groups.positions.sum()
    left = count - groups.positions[groups.drops]
    return PolicyDistance(
        np.asarray(distance / count),
        np.asarray((distance - across.distance[groups.drops]) / left[:, None]),
        float(divergence / count),
        np.asarray((divergence - across.divergence[groups.drops]) / left),
    )


def depth_curve(
    spectra: np.ndarray,
    rows: int,
    sums: TransportSums,
    window: tuple[float, float],
    resolution: float,
    terminal: tuple[int, int],
) -> DepthCurve:
    """The depth curve of a pool of prompts, or of some of its groups.

    Args:
        spectra: [D + 1, d].
        rows: N of the whole pool, which says what ranks are fitted.
        sums: of its groups.
        window, resolution: as `tail_fit` takes them.
        terminal: (first, last) block of the terminal block.
    """
    fits = [tail_fit(s, rows, window, resolution) for s in spectra]
    with np.errstate(invalid="ignore", divide="ignore"):  # a boundary without a turning angle is NaN
        turning = np.where(sums.turned > 0, sums.turning / sums.turned, np.nan)
    transport = _means(sums.step, float(sums.positions))
    found = {
        "contraction": np.array([fit.alpha for fit in fits]),
        "fit_r2": np.array([fit.r2 for fit in fits]),
        "fit_quadratic": np.array([fit.quadratic for fit in fits]),
        "resolved": np.array([float(fit.resolved) for fit in fits]),
        "spike": spike(spectra),
        "effective_rank": np.array([effective_rank(s) for s in spectra]),
        "transport": transport,
        "entropy": np.asarray(sums.entropy / sums.positions),
        "curvature": turning,
    }
    direct = float(sums.direct / sums.positions)
    return DepthCurve(found, summary(found["contraction"], found["transport"], direct, terminal))


keep = keep_reference  # benchmarks/train.py uses it
