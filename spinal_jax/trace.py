"""The audit of one checkpoint: one jitted step over batches of prompts, then float64 arithmetic on the host.

The step runs the forward with a tap that sums each boundary's Gram matrix and keeps the few positions where transport
is measured, then reads their token distributions in one pass over the vocabulary. Only sums by prompt group stay: Gram
sums on the device for the groups being visited, all others in a scratch file, so memory does not grow with the number
of prompts.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import IO, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from threadpoolctl import threadpool_limits

from spinal_jax.batch import SLOTS, Plan, TokenBatch, Visit
from spinal_jax.config import MetricsConfig
from spinal_jax.errors import UserError
from spinal_jax.metrics import contraction, jackknife
from spinal_jax.metrics.depth import summary, terminal_block
from spinal_jax.metrics.transport import LensStats, Pair, lens_stats, turning_angle
from spinal_jax.models.decoder import Decoder, Tap

LENS_COLUMNS = frozenset({"transport", "entropy", "curvature", "directness", "path_length"})
LENS_TOLERANCE = 1e-4  # largest probability by which the lens at boundary D may differ from the model's output


class Sums(NamedTuple):
    """Transport by prompt group: sums over measured positions, to be divided last. float32."""

    positions: Array  # [G] how many were measured
    step: Array  # [G, D + 1] radians, of the step that arrives at a boundary; 0 at boundary 0
    entropy: Array  # [G, D + 1] nats
    turning: Array  # [G, D + 1] radians
    turned: Array  # [G, D + 1] positions that count for `turning`
    direct: Array  # [G] radians


class State(NamedTuple):
    """Everything the audit step carries."""

    grams: contraction.Grams
    sums: Sums
    lens_gap: Array  # largest difference seen between lens at D and model output, as a probability


@dataclass(frozen=True)
class Curve:
    """The numbers of one pool of prompts."""

    columns: dict[str, np.ndarray]  # [D + 1] each
    summary: dict[str, float]


@dataclass(frozen=True)
class Measurement:
    """An audit's numbers: of all prompts, without each group, and the jackknife standard errors from the two."""

    whole: Curve
    without: tuple[Curve, ...]  # G of them; groups without rows are left out
    errors: Curve
    singular_values: np.ndarray  # [D + 1, d]
    singular_values_without: np.ndarray  # [G, D + 1, d]
    rows: np.ndarray  # [G] contraction rows of each group
    positions: np.ndarray  # [G] transport positions of each group


def pairs_of(depth: int) -> tuple[Pair, Pair, Pair]:
    """Steps, two-block chords (for the turning angle) and the terminal chord (for directness)."""
    before = terminal_block(depth)[0] - 1
    return Pair(0, depth, 1), Pair(0, max(depth - 1, 0), 2), Pair(before, before + 1, depth - before)


def audit_step(
    model: Decoder, state: State, batch: TokenBatch, *, temperature: float, top_k: int | None, groups: int
) -> State:
    """Adds one batch to the sums. Pure."""
    config = model.config
    measured = batch.measured.shape[0]

    def init(h: jax.ShapeDtypeStruct, boundaries: int) -> tuple[contraction.Grams, Array]:
        return state.grams, jnp.zeros((boundaries, measured, config.width), h.dtype)

    def update(carry: tuple[contraction.Grams, Array], h: Array, index: Array) -> tuple[contraction.Grams, Array]:
        grams, kept = carry
        rows = h.reshape(-1, config.width)[batch.measured]
        grams = contraction.update(grams, h, batch.counted, batch.slots, index)
        return grams, kept.at[index].set(rows)

    last, (grams, kept) = model.forward(
        batch.tokens,
        tap=Tap(init, update),
        positions=batch.positions,
        segments=batch.segments,
        lengths=batch.lengths,
    )
    with model.precision():
        count = jnp.sum(batch.measured_weight > 0, dtype=jnp.int32)
        stats = lens_stats(model.head(temperature), model.final_norm(kept), pairs_of(config.depth), top_k, count)
    by_group = batch.measured_weight[:, None] * jax.nn.one_hot(batch.measured_group, groups, dtype=jnp.float32)
    sums = jax.tree.map(jnp.add, state.sums, group_sums(stats, by_group))
    # The model's own way to its output, at one position a batch: the last block's result, whole vocabulary at once.
    output = model.lens(last.reshape(-1, config.width)[batch.measured[0]]) / temperature
    logp = model.lens(kept[-1, 0]) / temperature - stats.log_normaliser[-1, 0]
    gap = jnp.max(jnp.abs(jax.nn.softmax(output) - jnp.exp(logp)))
    return State(grams, sums, jnp.maximum(state.lens_gap, jnp.where(count > 0, gap, 0.0)))


def group_sums(stats: LensStats, by_group: Array) -> Sums:
    """Sums over the measured positions of each group, `by_group` [M, G] being 1 where a position belongs."""
    step, chord, terminal = stats.distances  # [D, M], [D - 1, M], [1, M]
    angle, counts = turning_angle(step[:-1], step[1:], chord)  # [D - 1, M]

    def total(values: Array, before: int = 0, behind: int = 0) -> Array:  # [l, M] -> [G, before + l + behind]
        padded = jnp.pad(values, ((before, behind), (0, 0)))
        return jnp.einsum("lm,mg->gl", padded, by_group, precision=jax.lax.Precision.HIGHEST)

    return Sums(
        jnp.sum(by_group, axis=0),
        total(step, before=1),
        total(stats.entropy),
        total(angle, before=1, behind=1),
        total(counts.astype(jnp.float32), before=1, behind=1),
        total(terminal)[:, 0],
    )


# Compiled once for the shapes of a model and a batch, however often `measure` is called; `state` is donated.
_audit_step = jax.jit(audit_step, static_argnames=("temperature", "top_k", "groups"), donate_argnames="state")


@partial(jax.jit, donate_argnames="grams")
def _clear(grams: contraction.Grams, slot: int) -> contraction.Grams:
    return jax.tree.map(lambda x: x.at[slot].set(0), grams)


class GramSpool:
    """Gram sums that have left the device: a scratch file of lower triangles, read back boundary by boundary."""

    def __init__(self, file: IO[bytes], boundaries: int, width: int, dtype: np.dtype):
        self.file, self.boundaries, self.width, self.dtype = file, boundaries, width, dtype
        self.triangle = np.tril_indices(width)
        self.groups: list[int] = []  # of each record
        self.first: dict[int, np.ndarray] = {}  # group -> [D + 1, d]

    def append(self, group: int, grams: contraction.Grams, slot: int) -> None:
        """Stores the sums of one visit to a group, a boundary at a time."""
        for boundary in range(self.boundaries):
            self.file.write(np.asarray(grams.second[slot, boundary])[self.triangle].data)
        self.groups.append(group)
        first = np.asarray(grams.first[slot]).astype(np.float64)
        self.first[group] = self.first.get(group, 0) + first

    def read(self, boundary: int) -> dict[int, np.ndarray]:
        """group -> Gram sum of its rows at a boundary, float64 [d, d], lower triangle."""
        size = len(self.triangle[0])
        sums: dict[int, np.ndarray] = {}
        for record, group in enumerate(self.groups):
            self.file.seek((record * self.boundaries + boundary) * size * self.dtype.itemsize)
            flat = np.frombuffer(self.file.read(size * self.dtype.itemsize), self.dtype)
            if group not in sums:
                sums[group] = np.zeros((self.width, self.width))
            sums[group][self.triangle] += flat
        return sums


def measure(
    model: Decoder,
    plan: Plan,
    settings: MetricsConfig,
    bar: Callable[[str, int, str], contextlib.AbstractContextManager[Callable[[int], None]]] | None = None,
) -> Measurement:
    """Runs the audit over a planned pool of prompts.

    Args:
        model: the checkpoint.
        plan: the batches (`spinal_jax.batch.plan`).
        settings: what to measure.
        bar: opens a progress bar for (what, how much, unit) and gives the function that advances it.

    Raises:
        UserError: the pool has too few rows for a fit at any boundary.
        AssertionError: the lens at the last boundary is not the model's own output.
    """
    bar = bar or (lambda what, total, unit: contextlib.nullcontext(lambda amount: None))
    config = model.config
    dtype = contraction.gram_dtype(plan.rows, config.width)
    wide = jax.enable_x64(True) if dtype == np.float64 else contextlib.nullcontext()
    with tempfile.TemporaryFile() as scratch, wide:
        spool = GramSpool(scratch, config.depth + 1, config.width, dtype)
        with bar("audit", plan.tokens, "tok") as advance:
            sums, gap = _run(model, plan, settings, spool, advance)
        if not gap < LENS_TOLERANCE:
            raise AssertionError(
                f"the lens at the last boundary differs from the model's output by a probability of {gap:.2g}"
            )
        with bar("spectra", config.depth + 1, "boundary") as advance:
            return _finish(spool, sums, plan, settings, advance)


def _run(
    model: Decoder, plan: Plan, settings: MetricsConfig, spool: GramSpool, advance: Callable[[int], None]
) -> tuple[Sums, float]:
    """All batches through the step; Gram sums go to the spool, the rest comes back as float64 [G, ...]."""
    config = model.config
    boundaries, groups = config.depth + 1, settings.groups
    zeros = partial(jnp.zeros, dtype=jnp.float32)
    by = (groups, boundaries)
    state = State(
        contraction.init(SLOTS, boundaries, config.width, spool.dtype),
        Sums(zeros(groups), zeros(by), zeros(by), zeros(by), zeros(by), zeros(groups)),
        zeros(()),
    )
    transport = settings.transport
    complete: dict[int, list[Visit]] = defaultdict(list)
    for visit in plan.visits:
        complete[visit.last_batch].append(visit)
    for number, batch in enumerate(plan):
        state = _audit_step(
            model, state, batch, temperature=transport.temperature, top_k=transport.top_k, groups=groups
        )
        jax.block_until_ready(state.lens_gap)
        for visit in complete[number]:
            spool.append(visit.group, state.grams, visit.slot)
            state = state._replace(grams=_clear(state.grams, visit.slot))
        advance(int((batch.segments > 0).sum()))
    return jax.tree.map(lambda x: np.asarray(x, np.float64), state.sums), float(state.lens_gap)


def _finish(
    spool: GramSpool, sums: Sums, plan: Plan, settings: MetricsConfig, advance: Callable[[int], None]
) -> Measurement:
    """Spectra, fits, means and their jackknife, float64."""
    by_group = np.zeros(settings.groups)
    for sequence in plan.sequences:
        by_group[sequence.group] += max(0, len(sequence.ids) - plan.skip)
    used = np.flatnonzero((np.asarray(sums.positions) > 0) & (by_group > 0))
    drops = used if len(used) > 1 else used[:0]  # without the only group there is nothing
    rows, total = by_group[used], by_group.sum()
    window = settings.contraction.window
    spectra, spectra_without = _spectra(spool, drops, by_group, settings.contraction.center, advance)
    everything = jax.tree.map(lambda x: x.sum(axis=0), sums)
    whole = curve(spectra, int(total), everything, window)
    without = tuple(
        curve(s, int(total - by_group[g]), jax.tree.map(lambda x, y, g=g: x - y[g], everything, sums), window)
        for s, g in zip(spectra_without, drops, strict=True)
    )
    if np.isnan(whole.columns["contraction"]).all():
        raise UserError(
            f"at every boundary fewer than {contraction.MIN_RANKS} singular values lie above the noise floor, "
            f"max(N, d) eps32 s_1 with N = {int(total)}, and in the window {list(window)}; choose a wider "
            "metrics.contraction.window"
        )
    positions = np.asarray(sums.positions)[used]

    def error(name: str, full: np.ndarray | float, replicates: list[Any]) -> np.ndarray:
        sizes = positions if name in LENS_COLUMNS else rows
        return jackknife.standard_error(np.asarray(full), np.array(replicates), sizes)

    errors = Curve(
        {k: error(k, v, [c.columns[k] for c in without]) for k, v in whole.columns.items()},
        {k: float(error(k, v, [c.summary[k] for c in without])) for k, v in whole.summary.items()},
    )
    return Measurement(whole, without, errors, spectra, spectra_without, rows, positions)


def curve(spectra: np.ndarray, rows: int, sums: Sums, window: tuple[float, float]) -> Curve:
    """The depth curve of a pool, from the spectra [D + 1, d] of its `rows` hidden states and its sums over groups."""
    fits = [contraction.tail_fit(s, rows, window) for s in spectra]
    with np.errstate(invalid="ignore", divide="ignore"):  # a boundary without a turning angle is NaN
        turning = np.where(sums.turned > 0, sums.turning / sums.turned, np.nan)
    transport = np.asarray(sums.step / sums.positions)
    transport[0] = np.nan
    columns = {
        "contraction": np.array([fit.alpha for fit in fits]),
        "fit_r2": np.array([fit.r2 for fit in fits]),
        "fit_quadratic": np.array([fit.quadratic for fit in fits]),
        "rank": np.array([float(fit.rank) for fit in fits]),
        "effective_rank": np.array([contraction.effective_rank(s) for s in spectra]),
        "transport": transport,
        "entropy": np.asarray(sums.entropy / sums.positions),
        "curvature": turning,
    }
    direct = float(sums.direct / sums.positions)
    return Curve(columns, summary(columns["contraction"], columns["transport"], direct))


def _spectra(
    spool: GramSpool, drops: np.ndarray, rows: np.ndarray, center: bool, advance: Callable[[int], None]
) -> tuple[np.ndarray, np.ndarray]:
    """Singular values of all rows [D + 1, d], and without each of the groups `drops` [len(drops), D + 1, d]; `rows` is
    how many each group has."""
    whole = np.zeros((spool.boundaries, spool.width))
    without = np.zeros((len(drops), spool.boundaries, spool.width))

    def one(boundary: int, grams: dict[int, np.ndarray], total: np.ndarray, drop: int | None) -> np.ndarray:
        second = total if drop is None else total - grams[drop]
        count = rows.sum() - (0 if drop is None else rows[drop])
        first = sum((f[boundary] for g, f in spool.first.items() if g != drop), np.zeros(spool.width))
        return contraction.singular_values(second, first if center else None, int(count))

    # LAPACK's symmetric eigensolver gains little from threads of its own: one matrix a core instead.
    with threadpool_limits(1, "blas"), ThreadPoolExecutor() as pool:
        for boundary in range(spool.boundaries):
            grams = spool.read(boundary)
            total = sum(grams.values(), np.zeros((spool.width, spool.width)))
            spectra = np.stack(list(pool.map(partial(one, boundary, grams, total), [None, *drops])))
            whole[boundary], without[:, boundary] = spectra[0], spectra[1:]
            advance(1)
    return whole, without
