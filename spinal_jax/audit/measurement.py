"""The numbers of an audit in float64: fits, means, and their jackknife standard errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jax import Array

from spinal_jax.audit.lens_step import PairSums, TransportSums, over_groups
from spinal_jax.audit.spectra import Spectra
from spinal_jax.config import MetricsConfig
from spinal_jax.data.packing import Plan
from spinal_jax.errors import UserError
from spinal_jax.metrics import columns
from spinal_jax.metrics.columns import Column
from spinal_jax.metrics.depth import summary, terminal_block
from spinal_jax.metrics.tail import MIN_RANKS, effective_rank, fitted_ranks, spike, tail_fit, tail_slopes
from spinal_jax.stats.groups import Groups
from spinal_jax.stats.jackknife import Estimate
from spinal_jax.stats.summary import Replicates, coherence_estimate


@dataclass(frozen=True)
class DepthCurve:
    """The depth curve of a set of prompts."""

    columns: dict[str, np.ndarray]  # [D + 1] each
    summary: dict[str, float]


@dataclass(frozen=True)
class PolicyDistance:
    """Distance of the token distributions of a model from those of a reference at the same positions."""

    distance: np.ndarray  # [D + 1] radians, Fisher-Rao
    distance_without: np.ndarray  # [G, D + 1] without each group
    divergence: float  # nats, KL(model || reference) of the output distributions
    divergence_without: np.ndarray  # [G]


@dataclass(frozen=True)
class Measurement:
    """Results of an audit: from all prompts, without each group, and jackknife standard errors."""

    whole: DepthCurve
    reasons: Mapping[str, str]  # summary number that is NaN -> reason
    without: tuple[DepthCurve, ...]  # one for each group with rows
    errors: DepthCurve
    singular_values: np.ndarray  # [D + 1, d]
    singular_values_without: np.ndarray  # [G, D + 1, d]
    contraction_half: np.ndarray  # [D + 1] mean alpha of two halves of the groups; NaN for a single group
    resolution: float  # smallest resolved fraction of s_1
    rows: np.ndarray  # [G] contraction rows of each group
    positions: np.ndarray  # [G] transport positions of each group
    variants: Mapping[str, np.ndarray]  # results under other settings, named as in docs/method.md
    policy: PolicyDistance | None = None  # with a reference


def build_measurement(spectra: Spectra, sums: TransportSums, plan: Plan, settings: MetricsConfig) -> Measurement:
    """Computes fits, means and jackknife errors in float64."""
    groups = plan.groups
    used, drops, total = groups.used, groups.drops, groups.rows.sum()
    rows, positions = groups.rows[used], groups.positions[used]
    terminal = terminal_block(len(spectra.whole) - 1, settings.terminal)
    window = settings.contraction.window
    lost = np.flatnonzero(~(spectra.whole <= np.finfo(np.float32).max).all(axis=-1))  # traces store float32
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
    for name in (
        "contraction",
        "fit_r2",
        "fit_quadratic",
    ):  # undefined where a replicate is, so that every number has an error
        whole.columns[name][unresolved] = np.nan
    whole.summary["contraction"] = float(np.mean(whole.columns["contraction"][terminal[0] : terminal[1] + 1]))
    halves = tail_slopes(spectra.halves, int(total), [window], resolution)[0]
    half = halves.mean(axis=0) if len(halves) else np.full(len(spectra.whole), np.nan)

    sizes = {"rows": rows, "positions": positions}

    def estimate(column: Column, full: np.ndarray | float, replicates: Sequence[np.ndarray | float]) -> Estimate:
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
    for index, last in enumerate(settings.lasts):
        name, step = f"positions=last:{last}", sums.last_step[index]
        count = np.asarray(sums.last_positions[index])
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
    """[D + 1] mean step that ends at each boundary, NaN at 0."""
    transport = np.asarray(step / positions)
    transport[0] = np.nan
    return transport


def policy_distance(across: PairSums | None, groups: Groups) -> PolicyDistance | None:
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
    """The depth curve of all groups of prompts, or of some of them.

    Args:
        spectra: [D + 1, d] singular values.
        rows: N over all prompts, which sets the fitted ranks.
        sums: transport sums of these groups.
        window, resolution: as in `tail_fit`.
        terminal: (first, last) block of the terminal block.
    """
    fits = [tail_fit(s, rows, window, resolution) for s in spectra]
    with np.errstate(invalid="ignore", divide="ignore"):  # NaN at boundaries without turning angles
        turning = np.where(sums.turned > 0, sums.turning / sums.turned, np.nan)
    transport = _means(sums.step, float(sums.positions))
    columns = {
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
    return DepthCurve(columns, summary(columns["contraction"], columns["transport"], direct, terminal))
