"""The verdict on one pair of checkpoints: words, limits, and the checks of `assert`."""

from __future__ import annotations

import math

from spinal_jax.audit.trace import DepthTrace
from spinal_jax.comparison.record import Comparison
from spinal_jax.jsontypes import Json, ReadJson
from spinal_jax.stats.jackknife import Estimate
from spinal_jax.wording import number

TOWARD_CONTRACTION = "toward contraction"
TOWARD_EXPANSION = "toward expansion"
NOT_ROBUST = "differs, direction not robust"
NO_CHANGE = "no detectable change"
UNDETERMINED = "undetermined"
HOLDS = 0.8  # share of settings with the same sign that a direction needs
ROWS_PER_WIDTH = 4  # N / d that a verdict needs; below, the bias of a difference is up to 15 %


def verdict(low: float, high: float, holds: float, rows_per_width: float) -> str:
    """The verdict in words.

    Args:
        low, high: the 95 % interval of Delta_align.
        holds: share of the robustness grid in which the sign of Delta_align holds.
        rows_per_width: N / d, the smaller of both traces'.
    """
    if math.isnan(low) or math.isnan(high) or rows_per_width < ROWS_PER_WIDTH:
        return UNDETERMINED
    if not (low > 0 or high < 0):
        return NO_CHANGE
    if holds < HOLDS:
        return NOT_ROBUST
    return TOWARD_CONTRACTION if low > 0 else TOWARD_EXPANSION


def why_undetermined(aligned: DepthTrace, reference: DepthTrace, groups: int, value: float) -> str:
    """The reason for an undetermined verdict, in one sentence."""
    rows, width = min(((t.prompts["rows"], t.model["width"]) for t in (aligned, reference)), key=lambda n: n[0] / n[1])
    if rows < ROWS_PER_WIDTH * width:
        return (
            f"N = {rows:,} rows are {rows / width:.1f} d, fewer than {ROWS_PER_WIDTH} d = {ROWS_PER_WIDTH * width:,}, "
            f"and below that a difference of contraction is biased."
        )
    if groups < 2:
        return "All prompts fall into one group, so there is no interval."
    if math.isnan(value):
        return "Delta_align is not defined, because contraction or transport is not defined in the terminal block."
    return "There is no interval."


def driver(gained: float, moved: float) -> tuple[str, str]:
    """The larger part of Delta_align, "contraction" or "transport" ("" if neither changed), and a sentence on both.

    Args:
        gained: change of mean terminal contraction.
        moved: change of mean terminal transport, radians.
    """
    if math.isnan(gained) or math.isnan(moved):
        return "", ""
    if gained == 0 and moved == 0:
        return "", "Neither contraction nor transport changed."
    parts = {"contraction": (gained, ""), "transport": (moved, " rad")}
    larger = "contraction" if abs(gained) >= abs(moved) else "transport"
    smaller = "transport" if larger == "contraction" else "contraction"
    (change, unit), (other, other_unit) = parts[larger], parts[smaller]
    against = gained * moved > 0  # both rose or both fell: Delta_align is their difference
    how = "against it" if against else "in the same direction"
    rest = f"{smaller} {_moved(other, other_unit)}, {how}" if other else f"{smaller} did not change"
    return larger, f"Delta_align adds two units: {larger} {_moved(change, unit)} and drives it; {rest}."


def _moved(change: float, unit: str) -> str:
    return f"{'rose' if change > 0 else 'fell'} by {number(abs(change))}{unit}"


def limits(aligned: DepthTrace, reference: DepthTrace, groups: int) -> str:
    """Limits of the verdict on one pair, as a sentence."""
    lines = [
        f"One pair of checkpoints, an interval over {groups} groups of prompts: not attributable to alignment without "
        f"controls (spinal attribute)."
    ]
    if aligned.model["family"] != reference.model["family"]:
        lines.append(
            f"The two are of different families ({aligned.model['family']} and {reference.model['family']}), so that "
            f"they differ by more than training."
        )
    return " ".join(lines)


def summarised(
    aligned: DepthTrace,
    reference: DepthTrace,
    delta_align: Estimate,
    parts: tuple[Estimate, Estimate],
    robustness: ReadJson,
) -> Json:
    """The text entries of the summary: verdict, sentence, headline, because, driver, driver_sentence and limits.

    The sentence joins headline, because, driver_sentence, the counts of the robustness grid and limits.

    Args:
        delta_align: of the pair.
        parts: change of mean terminal contraction, and of mean terminal transport.
        robustness: `spinal_jax.comparison.robustness.sign_counts` of the grid.
    """
    value, half, p = float(delta_align.value), float(delta_align.half), float(delta_align.p_value)
    groups = len(delta_align.share)
    per_width = min(trace.prompts["rows"] / trace.model["width"] for trace in (aligned, reference))
    holds = robustness["holds"] / robustness["of"]
    word = verdict(value - half, value + half, holds, per_width)
    larger, driven = driver(float(parts[0].value), float(parts[1].value))
    first, last = aligned.terminal
    test = "" if math.isnan(p) else f", p = {number(p, 2)}"
    interval = "no interval" if math.isnan(half) else f"95 % interval {number(value - half)} to {number(value + half)}"
    said = limits(aligned, reference, groups)
    lines = [
        f"{aligned.model['name']} against {reference.model['name']}, boundaries {first} to {last}: {word}.",
        f"Delta_align = {number(value)} ({interval}{test}).",
    ]
    because = why_undetermined(aligned, reference, groups, value) if word == UNDETERMINED else ""
    shown = driven if word != NO_CHANGE else ""
    rest = [line for line in (because, shown, robustness["sentence"], said) if line]
    return {
        "verdict": word,
        "sentence": " ".join([*lines, *rest]),
        "headline": " ".join(lines),
        "because": because,
        "driver": larger,
        "driver_sentence": driven,
        "limits": said,
        "rows_per_width": per_width,
    }


def comparison_shortfalls(
    comparison: Comparison,
    *,
    verdict: str | None = None,
    delta_align_low: float | None = None,
    delta_align_high: float | None = None,
    p_value: float | None = None,
    spinal_score_low: float | None = None,
    spinal_gain_low: float | None = None,
    holds: float | None = None,
) -> list[str]:
    """The requirements of `assert` that the comparison does not meet, a phrase each. NaN meets no requirement.

    Args:
        comparison: the comparison.
        verdict: which it must be.
        delta_align_low, spinal_score_low, spinal_gain_low: the 95 % interval of that number must begin here or above.
        delta_align_high: the 95 % interval must end here or below.
        p_value: at most this.
        holds: the sign of Delta_align must hold in at least this share of the settings.
    """
    lines = []
    if verdict is not None and comparison.verdict != verdict:
        lines.append(f"the verdict is {comparison.verdict!r}, not {verdict!r}")
    for name, label, least in (
        ("delta_align_low", "Delta_align", delta_align_low),
        ("spinal_score_low", "the SPINALScore", spinal_score_low),
        ("spinal_gain_low", "the gain of the SPINALScore", spinal_gain_low),
    ):
        if least is not None and not comparison.summary[name] >= least:
            lines.append(
                f"the interval of {label} begins at {number(comparison.summary[name])}, not at {least} or above"
            )
    if delta_align_high is not None and not comparison.summary["delta_align_high"] <= delta_align_high:
        end = number(comparison.summary["delta_align_high"])
        lines.append(f"the interval of Delta_align ends at {end}, not at {delta_align_high} or below")
    if p_value is not None and not comparison.summary["p_value"] <= p_value:
        lines.append(f"the p-value is {number(comparison.summary['p_value'], 2)}, not at most {p_value}")
    there, of = comparison.robustness["holds"], comparison.robustness["of"]
    if holds is not None and not there / of >= holds:
        lines.append(f"the sign of Delta_align holds in {there} of {of} settings, not in at least {holds:.0%}")
    return lines
