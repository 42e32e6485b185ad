"""Warnings of a trace: number of rows, resolution, quality of fit, size of groups."""

from __future__ import annotations

import math

import numpy as np

from spinal_jax.audit.measurement import Measurement
from spinal_jax.data.packing import Plan
from spinal_jax.metrics.tail import EPS32, fitted_ranks, resolved_ranks
from spinal_jax.stats.jackknife import MAX_SHARE

WEAK_FIT = 0.95  # R^2 below which the tail is not a clean power law


def trace_warnings(measurement: Measurement, plan: Plan, width: int, window: tuple[float, float]) -> list[str]:
    """Warnings about a measurement, one sentence each."""
    lines = list(plan.notes)
    if plan.rows < 4 * width:
        lines.append(
            f"N = {plan.rows:,} rows are fewer than 4 d = {4 * width:,} (d = {width:,}): sampling then steepens the "
            "tail, contraction reads high, and a comparison gives no verdict. More or longer prompts help."
        )
    lines += _unresolved(measurement, plan, width, window)
    lines += _depends_on_rows(measurement, plan)
    lines += [f"No {name}: {reason}." for name, reason in measurement.reasons.items()]
    worst = float(np.nanmin(measurement.whole.columns["fit_r2"], initial=math.inf))
    if worst < WEAK_FIT:
        at = int(np.nanargmin(measurement.whole.columns["fit_r2"]))
        lines.append(f"The tail is not a clean power law everywhere: R^2 falls to {worst:.3f} at boundary {at}.")
    if (share := plan.largest_prompt_share) > MAX_SHARE:
        lines.append(
            f"One prompt holds {share:.0%} of the rows: above {MAX_SHARE:.0%} the intervals are far too narrow. Lower "
            "prompts.max_length, or leave the longest prompts out."
        )
    elif (share := plan.groups.largest_share) > MAX_SHARE:
        lines.append(
            f"One group of prompts holds {share:.0%} of the rows: above {MAX_SHARE:.0%} the intervals are far too "
            f"narrow. Of {len(plan.sequences)} prompts {plan.counts.get('largest_component', 1)} are near-duplicates "
            f"in one component, and metrics.groups is {plan.group_count}."
        )
    if len(measurement.rows) < 8:
        lines.append(f"Only {len(measurement.rows)} groups of prompts: the intervals are rough.")
    return lines


def _unresolved(measurement: Measurement, plan: Plan, width: int, window: tuple[float, float]) -> list[str]:
    """A warning for each boundary whose fit window is not resolved."""
    lines = []
    high = fitted_ranks(plan.rows, width, window)[1]
    for at in np.flatnonzero(np.isnan(measurement.whole.columns["contraction"])):
        spectra = np.concatenate([measurement.singular_values[None, at], measurement.singular_values_without[:, at]])
        last = int(resolved_ranks(spectra, measurement.resolution).min())
        least = f"{measurement.resolution:.1e} s_1"
        helps = (
            "model.dtype=float32, whose Gram sums are multiplied in float64,"
            if measurement.resolution > EPS32
            else f"a window that ends at rank {last} or before"
        )
        lines.append(
            f"No contraction at boundary {at}: s_1 is {spectra[0, 0]:.4g} and the last rank that is resolved, above "
            f"{least}, is {last}, but the fit window ends at rank {high}; {helps} helps."
        )
    return lines


def _depends_on_rows(measurement: Measurement, plan: Plan) -> list[str]:
    """A warning if alpha of half of the groups differs from alpha of all by more than 2 standard errors."""
    change = measurement.whole.columns["contraction"] - measurement.contraction_half
    beyond = np.flatnonzero(np.abs(change) > 2 * measurement.errors.columns["contraction"])
    if not len(beyond):
        return []
    at = beyond[np.argmax(np.abs(change[beyond]))]
    return [
        f"Contraction still depends on N at {len(beyond)} of {len(change)} boundaries: from N / 2 to N = {plan.rows:,} "
        f"it moves by more than 2 standard errors, most at boundary {at}, from "
        f"{measurement.contraction_half[at]:.4f} to {measurement.whole.columns['contraction'][at]:.4f}. "
        "Only traces of equal N compare."
    ]
