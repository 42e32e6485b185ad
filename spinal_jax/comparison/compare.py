"""Two checkpoints on the same tokens: what alignment changed, where, how much, and how sure that is.

Float64 arithmetic on two saved traces, no model: docs/method.md, sections 4 and 5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from spinal_jax.audit.trace import DepthTrace
from spinal_jax.comparison import robustness
from spinal_jax.comparison.paired import Align, Curve, check, curve, difference, resampled
from spinal_jax.comparison.record import BOTH, LOCALISED, METRICS, Comparison
from spinal_jax.metrics.depth import coherence
from spinal_jax.stats import signflip
from spinal_jax.stats.jackknife import Estimate, t_quantile
from spinal_jax.stats.localisation import localise, share
from spinal_jax.wording import number

MODEL_KEYS = ("name", "source", "revision", "family", "layers", "width", "vocabulary", "dtype", "sha256")


@dataclass(frozen=True, eq=False)
class BothModels:
    """What only both models together give, with its delete-one-group replicates; None where it was not measured.

    Attributes:
      policy_distance: [D+1] mean Fisher-Rao distance between both models' p_l at the same position, radians.
      policy_distance_without: [G, D+1] without each group of prompts, in the order of the traces' "groups/positions".
      gradient_norm: [D] L2 norm, block by block, of the gradient of the mean preference loss.
      gradient_norm_without: [G', D] without each group of preference pairs.
      pairs: [G'] preference pairs in each of these groups.
      gradient_apart: norms outside the blocks by name: embedding, final_norm, unembedding.
    """

    policy_distance: np.ndarray | None = None
    policy_distance_without: np.ndarray | None = None
    gradient_norm: np.ndarray | None = None
    gradient_norm_without: np.ndarray | None = None
    pairs: np.ndarray | None = None
    gradient_apart: Mapping[str, float] = field(default_factory=dict)


class Weights(NamedTuple):
    """Of the parts of the SPINALScore."""

    delta: float = 1 / 3
    coherence: float = 1 / 3
    gradient: float = 1 / 3


EQUAL = Weights()


def compare(
    aligned: DepthTrace,
    reference: DepthTrace,
    extras: BothModels | None = None,
    *,
    align: Align = "equal",
    same_prompts: bool = True,
    weights: Weights = EQUAL,
) -> Comparison:
    """What the aligned checkpoint's trace has that the reference's has not.

    `Delta_align = mean over T of delta alpha - mean over T of delta L`, T the last ceil(D / 3) blocks;
    `SPINALScore = w_delta Delta_align + w_coherence S_coh(aligned) + w_gradient G_term`, G_term the share of T in the
    preference gradient. Intervals are 95 %, by the delete-one-group jackknife and Student's t; p-values by sign flips
    of the groups' pseudo-values (Holm over boundaries beside them). The verdict is that of Delta_align's interval:
    "contraction" above 0, "expansion" below, else "no detectable change"; "undetermined" without an interval.

    Args:
        aligned, reference: traces of the same tokens, with their arrays.
        extras: what both models in memory give; without it those columns and the score are NaN.
        align: "relative" reads the reference at the relative depths of the aligned model's boundaries.
        same_prompts: False compares traces of different prompts with equally many groups: a control. Group g of one is
            then set against group g of the other, which is as good as any pairing of independent groups.
        weights: of the score.

    Raises:
        UserError: the traces were not measured alike; it says what differs.
    """
    warnings = check(aligned, reference, align, same_prompts)
    extras = extras or BothModels()
    first, last = aligned.terminal
    columns: dict[str, np.ndarray] = {}
    changes: dict[str, Estimate] = {}
    arrays: dict[str, np.ndarray] = {}
    masses: dict[str, Curve] = {}
    for name in METRICS:
        ours, theirs = curve(aligned, name), resampled(curve(reference, name), aligned.depth, name)
        _put(columns, f"aligned_{name}", ours.estimate)
        _put(columns, f"reference_{name}", theirs.estimate)
        changes[name] = delta = ours.estimate - theirs.estimate
        _put(columns, f"delta_{name}", delta)
        columns[f"delta_{name}_p"] = delta.p_value
        columns[f"delta_{name}_p_holm"] = signflip.holm(delta.p_value)
        arrays[f"groups/delta_{name}"] = delta.pseudo_values
        masses[f"delta_{name}"] = difference(ours, theirs)
    gained, moved = changes["contraction"].mean(first, last), changes["transport"].mean(first, last)
    delta_align = gained - moved
    arrays["groups/delta_align"] = delta_align.pseudo_values
    groups = len(delta_align.share)

    policy, gradient = _policy(extras, aligned), _gradient(extras, aligned.depth)
    for name, found in zip(BOTH, (policy, gradient), strict=True):
        _put(columns, name, found.estimate)
        masses[name] = found
    here = coherence_of(aligned)
    concentration = gradient.of(lambda norms: share(norms[..., 1:]))
    score = _score(delta_align, here, concentration, weights)

    value, half, p = float(delta_align.value), float(delta_align.half), float(delta_align.p_value)
    word = verdict(value - half, value + half)
    summary: dict[str, Any] = {
        "verdict": word,
        "sentence": _sentence(word, aligned, reference, value, half, p, groups),
        "terminal": [first, last],
        "delta_align_se": float(delta_align.error),
        "p_value": p,
        "p_value_by": signflip.method(groups),
        "delta_contraction_p": float(gained.p_value),
        "delta_transport_p": float(moved.p_value),
        **_interval("spinal_score", *score),
        "degrees_of_freedom": groups - 1,
        "gradient_apart": dict(extras.gradient_apart),
        "localisation": {
            name: localise(np.abs(masses[name].full[1:]), np.abs(masses[name].without[:, 1:]), masses[name].sizes)
            for name in LOCALISED
        },
    }
    for name, found in (
        ("delta_align", delta_align),
        ("delta_contraction", gained),
        ("delta_transport", moved),
        ("coherence", here),
        ("coherence_reference", coherence_of(reference)),
        ("gradient_concentration", concentration),
    ):
        summary |= _interval(name, float(found.value), float(found.half))
    settings = {name: aligned.settings[name] for name in sorted(aligned.settings)}
    return Comparison(
        aligned={name: aligned.model[name] for name in MODEL_KEYS},
        reference={name: reference.model[name] for name in MODEL_KEYS},
        prompts=dict(aligned.prompts),
        settings={**settings, "align": align, "same_prompts": same_prompts, "weights": weights._asdict()},
        columns=columns,
        summary=summary,
        robustness=robustness.verdict_of(robustness.grid(aligned, reference)),
        warnings=(*warnings, *_caveats(extras, groups, word, p)),
        arrays=arrays,
    )


def shortfalls(
    found: Comparison,
    *,
    verdict: str | None = None,
    delta_align_low: float | None = None,
    delta_align_high: float | None = None,
    p_value: float | None = None,
    spinal_score_low: float | None = None,
    holds: float | None = None,
) -> list[str]:
    """Where the evidence falls short of what was asked for, a phrase each; a number that is not defined falls short.

    Args:
        found: the comparison.
        verdict: which it must be.
        delta_align_low, spinal_score_low: the 95 % interval of that number must begin here or above.
        delta_align_high: the 95 % interval must end here or below.
        p_value: at most this.
        holds: the sign of Delta_align must hold in at least this share of the settings.
    """
    lines = []
    if verdict is not None and found.verdict != verdict:
        lines.append(f"the verdict is {found.verdict!r}, not {verdict!r}")
    for name, least in (("delta_align_low", delta_align_low), ("spinal_score_low", spinal_score_low)):
        if least is not None and not found.summary[name] >= least:
            label = "Delta_align" if name == "delta_align_low" else "the SPINALScore"
            lines.append(f"the interval of {label} begins at {number(found.summary[name])}, not at {least} or above")
    if delta_align_high is not None and not found.summary["delta_align_high"] <= delta_align_high:
        end = number(found.summary["delta_align_high"])
        lines.append(f"the interval of Delta_align ends at {end}, not at {delta_align_high} or below")
    if p_value is not None and not found.summary["p_value"] <= p_value:
        lines.append(f"the p-value is {number(found.summary['p_value'], 2)}, not at most {p_value}")
    there, of = found.robustness["holds"], found.robustness["of"]
    if holds is not None and not there / of >= holds:
        lines.append(f"the sign of Delta_align holds in {there} of {of} settings, not in at least {holds:.0%}")
    return lines


def coherence_of(trace: DepthTrace) -> Estimate:
    """S_coh of one checkpoint: the mean of the coherences of alpha and of L over the terminal block."""
    first, last = trace.terminal

    def of(name: str) -> Estimate:
        return curve(trace, name).of(lambda x: np.apply_along_axis(coherence, -1, x[..., first : last + 1]))

    return (of("contraction") + of("transport")).scaled(0.5)


def verdict(low: float, high: float) -> str:
    """In words, from the 95 % interval of Delta_align."""
    if math.isnan(low) or math.isnan(high):
        return "undetermined"
    return "contraction" if low > 0 else "expansion" if high < 0 else "no detectable change"


def _sentence(
    word: str, aligned: DepthTrace, reference: DepthTrace, value: float, half: float, p: float, groups: int
) -> str:
    first, last = aligned.terminal
    sure = f"95 % interval {number(value - half)} to {number(value + half)}, p = {number(p, 2)}"
    return (
        f"{word.capitalize()} in the terminal block (boundaries {first} to {last}) of {aligned.model['name']} against "
        f"{reference.model['name']}: Delta_align = {number(value)}, {sure}, {groups} groups of prompts."
    )


def _put(columns: dict[str, np.ndarray], name: str, found: Estimate) -> None:
    columns |= {name: found.value, f"{name}_low": found.value - found.half, f"{name}_high": found.value + found.half}


def _interval(name: str, value: float, half: float) -> dict[str, float]:
    return {name: value, f"{name}_low": value - half, f"{name}_high": value + half}


def _policy(extras: BothModels, trace: DepthTrace) -> Curve:
    sizes = curve(trace, "transport").sizes
    return _curve(extras.policy_distance, extras.policy_distance_without, sizes, trace.boundaries)


def _gradient(extras: BothModels, depth: int) -> Curve:
    """By boundary: that of block l at boundary l, NaN at 0."""
    found = _curve(extras.gradient_norm, extras.gradient_norm_without, extras.pairs, depth)
    full, without = (np.concatenate([np.full_like(x[..., :1], np.nan), x], axis=-1) for x in found[:2])
    return Curve(full, without, found.sizes)


def _curve(full: np.ndarray | None, without: np.ndarray | None, sizes: np.ndarray | None, length: int) -> Curve:
    """What was measured, NaN where nothing was; ValueError where it does not fit the traces."""
    sizes = np.ones(2) if sizes is None else np.asarray(sizes, np.float64)
    full = np.full(length, np.nan) if full is None else np.asarray(full, np.float64)
    if without is None or not len(without):  # nothing measured, or an only group
        without = np.full((len(sizes), length), np.nan)
    if full.shape != (length,) or without.shape != (len(sizes), length):
        raise ValueError(f"shapes {full.shape} and {without.shape} do not fit {len(sizes)} groups and {length} values")
    return Curve(full, np.asarray(without, np.float64), sizes)


def _score(delta_align: Estimate, here: Estimate, concentration: Estimate, weights: Weights) -> tuple[float, float]:
    """SPINALScore and half of its interval. Preference pairs are other texts than the prompts: their error is
    independent and its square adds; the fewer degrees of freedom of the two count."""
    prompts = delta_align.scaled(weights.delta) + here.scaled(weights.coherence)
    pairs = concentration.scaled(weights.gradient)
    freedom = min(prompts.degrees_of_freedom, pairs.degrees_of_freedom)
    half = t_quantile(freedom) * math.hypot(float(prompts.error), float(pairs.error))
    return float(prompts.value + pairs.value), half


def _caveats(extras: BothModels, groups: int, word: str, p: float) -> list[str]:
    lines = []
    if extras.policy_distance is None:
        lines.append("No policy distance: it needs both models, not only their traces.")
    if extras.gradient_norm is None:
        lines.append(
            "No preference gradient, so no gradient share and no SPINALScore: they need both models and preference "
            "pairs."
        )
    if groups < 2:
        lines.append("Only one group of prompts: there are no intervals and no p-values.")
    if groups > 1 and word != "undetermined" and (p < 0.05) == (word == "no detectable change"):
        lines.append(f"The interval and the sign-flip test (p = {number(p, 2)}) disagree: this is a borderline case.")
    return lines
