"""What a reader of a trace must know: sentences on rows, resolution, fit and groups."""

from __future__ import annotations

import math

import numpy as np

from spinal_jax.audit.measure import Measurement
from spinal_jax.data.packing import Plan
from spinal_jax.metrics.tail import EPS32, fitted_ranks, resolved_ranks

HEAVY = 0.25  # share of the rows of one prompt or one group above which intervals are too narrow
WEAK_FIT = 0.95  # R^2 below which a trace says that the tail is not a power law


def trace_warnings(found: Measurement, work: Plan, width: int, window: tuple[float, float]) -> list[str]:
    """Sentences that a reader of the numbers must know."""
    lines = list(work.notes)
    if work.rows < 4 * width:
        lines.append(
            f"N = {work.rows:,} rows are fewer than 4 d = {4 * width:,} (d = {width:,}): sampling then steepens the "
            "tail, contraction reads high, and a comparison gives no verdict. More or longer prompts help."
        )
    lines += _unresolved(found, work, width, window)
    lines += _depends_on_rows(found, work)
    lines += [f"No {name}: {reason}." for name, reason in found.reasons.items()]
    worst = float(np.nanmin(found.whole.columns["fit_r2"], initial=math.inf))
    if worst < WEAK_FIT:
        at = int(np.nanargmin(found.whole.columns["fit_r2"]))
        lines.append(f"The tail is not a clean power law everywhere: R^2 falls to {worst:.3f} at boundary {at}.")
    if (share := work.largest_prompt_share) > HEAVY:
        lines.append(
            f"One prompt holds {share:.0%} of the rows: above {HEAVY:.0%} the intervals are far too narrow. Lower "
            "prompts.max_length, or leave the longest prompts out."
        )
    elif (share := work.groups.largest_share) > HEAVY:
        lines.append(
            f"One group of prompts holds {share:.0%} of the rows: above {HEAVY:.0%} the intervals are far too narrow. "
            f"Of {len(work.sequences)} prompts {work.counts.get('largest_component', 1)} are near-duplicates in one "
            f"component, and metrics.groups is {work.group_count}."
        )
    if len(found.rows) < 8:
        lines.append(f"Only {len(found.rows)} groups of prompts: the intervals are rough.")
    return lines


def _unresolved(found: Measurement, work: Plan, width: int, window: tuple[float, float]) -> list[str]:
    """Where the window reaches below what is resolved, a sentence a boundary."""
    lines = []
    high = fitted_ranks(work.rows, width, window)[1]
    for at in np.flatnonzero(np.isnan(found.whole.columns["contraction"])):
        spectra = np.concatenate([found.singular_values[None, at], found.singular_values_without[:, at]])
        last = int(resolved_ranks(spectra, found.resolution).min())
        least = f"{found.resolution:.1e} s_1"
        helps = (
            "model.dtype=float32, whose Gram sums are multiplied in float64,"
            if found.resolution > EPS32
            else f"a window that ends at rank {last} or before"
        )
        lines.append(
            f"No contraction at boundary {at}: s_1 is {spectra[0, 0]:.4g} and the last rank that is resolved, above "
            f"{least}, is {last}, but the fit window ends at rank {high}; {helps} helps."
        )
    return lines


def _depends_on_rows(found: Measurement, work: Plan) -> list[str]:
    """A sentence where alpha of half of the groups lies further from that of all than 2 standard errors."""
    change = found.whole.columns["contraction"] - found.contraction_half
    beyond = np.flatnonzero(np.abs(change) > 2 * found.errors.columns["contraction"])
    if not len(beyond):
        return []
    at = beyond[np.argmax(np.abs(change[beyond]))]
    return [
        f"Contraction still depends on N at {len(beyond)} of {len(change)} boundaries: from N / 2 to N = {work.rows:,} "
        f"it moves by more than 2 standard errors, most at boundary {at}, from {found.contraction_half[at]:.4f} to "
        f"{found.whole.columns['contraction'][at]:.4f}. Only traces of equal N compare."
    ]
