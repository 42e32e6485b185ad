"""Comparison of two traces on the same tokens: differences by boundary, their errors, localisation, and scores.

Float64 arithmetic on two saved traces, without a model: docs/method.md, "Two checkpoints" and "How sure".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from spinal_jax.audit.trace import DepthTrace
from spinal_jax.comparison import robustness
from spinal_jax.comparison.paired import Align, check, paired_difference, replicates, resampled
from spinal_jax.comparison.record import BOTH, METRICS, Comparison
from spinal_jax.comparison.score import EQUAL, Part, Weights, coherence_of, combined
from spinal_jax.comparison.verdict import NO_CHANGE, UNDETERMINED, summarised
from spinal_jax.jsontypes import Json
from spinal_jax.metrics.columns import column
from spinal_jax.stats import signflip
from spinal_jax.stats.jackknife import MAX_SHARE, Estimate, Replicates
from spinal_jax.stats.localisation import localise, localise_difference, share
from spinal_jax.wording import number

MODEL_KEYS = ("name", "source", "revision", "family", "layers", "width", "vocabulary", "dtype", "sha256")
NO_GRADIENT = "it needs both models and preference pairs (preferences=...)"
NO_REFERENCE_GRADIENT = "it needs the preference gradient of the reference too"
BOUNDED = {  # bounds of numbers of the summary
    **dict.fromkeys(("coherence", "coherence_reference", "reward_accuracy"), (0.0, 1.0)),
    **dict.fromkeys(("gradient_concentration", "gradient_concentration_reference"), (0.0, 1.0)),
    "output_distance": (0.0, math.pi),
    "kl": (0.0, math.inf),
}


@dataclass(frozen=True, eq=False)
class BothModels:
    """Quantities that need both models, with their delete-one-group replicates; None if not measured.

    Attributes:
      policy_distance: [D+1] mean Fisher-Rao distance between both models' p_l at the same position, radians.
      policy_distance_without: [G, D+1] without each group of prompts, in the order of the traces' "groups/positions".
      kl: KL(aligned || reference) of the output distributions, nats, mean over positions.
      kl_without: [G] without each group of prompts.
      gradient_norm: [D] L2 norm, block by block, of the gradient of the mean preference loss.
      gradient_norm_without: [G', D] without each group of preference pairs.
      reference_gradient_norm, reference_gradient_norm_without: the same with the reference as its own policy.
      pairs: [G'] preference pairs in each of these groups.
      gradient_apart: norms outside the blocks by name: embedding, final_norm, unembedding.
      reward_accuracy: share of pairs whose chosen response has the larger implicit reward.
      reward_accuracy_without: [G'] without each group of pairs.
      reward_margin: mean of chosen less rejected implicit reward, `beta (log p - log p_ref)`.
      reward_margin_without: [G'] without each group of pairs.
    """

    policy_distance: np.ndarray | None = None
    policy_distance_without: np.ndarray | None = None
    kl: float | None = None
    kl_without: np.ndarray | None = None
    gradient_norm: np.ndarray | None = None
    gradient_norm_without: np.ndarray | None = None
    reference_gradient_norm: np.ndarray | None = None
    reference_gradient_norm_without: np.ndarray | None = None
    pairs: np.ndarray | None = None
    gradient_apart: Mapping[str, float] = field(default_factory=dict)
    reward_accuracy: float | None = None
    reward_accuracy_without: np.ndarray | None = None
    reward_margin: float | None = None
    reward_margin_without: np.ndarray | None = None


def compare_traces(
    aligned: DepthTrace,
    reference: DepthTrace,
    extras: BothModels | None = None,
    *,
    align: Align = "equal",
    same_prompts: bool = True,
    weights: Weights = EQUAL,
    left_out: tuple[int, int] = (0, 0),
) -> Comparison:
    """Compares the trace of an aligned checkpoint with that of a reference.

    `Delta_align = mean over T of delta alpha - mean over T of delta L`, T the terminal block;
    `SPINALScore(A, R) = w_delta Delta_align + w_coherence S_coh(A) + w_gradient G_term`, G_term the share of T in the
    preference gradient; its gain is `SPINALScore(A, R) - SPINALScore(R, R)`. Intervals are 95 %, by the
    delete-one-group jackknife and Student's t; p-values by sign flips of the pseudo-values of
    groups, also with Holm's correction over boundaries. The verdict is from `spinal_jax.comparison.verdict`.

    Args:
        aligned, reference: traces of the same tokens, with their arrays.
        extras: quantities that need both models; without them, their columns and the score are NaN.
        align: "relative" interpolates the reference at the relative depths of the boundaries of the aligned model.
        same_prompts: False compares traces of different prompts with equally many groups, as a control. Groups are
            paired by number, which is arbitrary for independent groups.
        weights: of the score.
        left_out: number of tokens of the aligned model, and of the reference, that the other does not have.

    Raises:
        UserError: the settings or the inputs of the two traces differ.
    """
    warnings = check(aligned, reference, align, same_prompts)
    extras = extras or BothModels()
    first, last = aligned.terminal
    columns: dict[str, np.ndarray] = {}
    changes: dict[str, Estimate] = {}
    arrays: dict[str, np.ndarray] = {}
    localisations: dict[str, Json] = {}
    for name in METRICS:
        ours, theirs = replicates(aligned, name), resampled(replicates(reference, name), aligned.depth, name)
        _put(columns, f"aligned_{name}", ours.estimate, column(name).bounds)
        _put(columns, f"reference_{name}", theirs.estimate, column(name).bounds)
        changes[name] = delta = ours.estimate - theirs.estimate
        _put(columns, f"delta_{name}", delta)
        columns[f"delta_{name}_p"] = delta.p_value
        columns[f"delta_{name}_p_holm"] = signflip.holm(delta.p_value)
        arrays[f"groups/delta_{name}"] = delta.pseudo_values
        if name in ("contraction", "transport"):
            difference = paired_difference(ours, theirs)
            localisations[f"delta_{name}"] = localise_difference(
                difference.full[1:], difference.without[:, 1:], difference.sizes, (first, last)
            )
    gained, moved = changes["contraction"].mean(first, last), changes["transport"].mean(first, last)
    delta_align = gained - moved
    arrays["groups/delta_align"] = delta_align.pseudo_values
    groups = len(delta_align.share)

    policy, gradient = _policy(extras, aligned), _gradient(extras, aligned.depth)
    for name, by_boundary in zip(BOTH, (policy, gradient), strict=True):
        _put(columns, name, by_boundary.estimate, column(name).bounds)
        localisations[name] = localise(
            by_boundary.full[1:], by_boundary.without[:, 1:], by_boundary.sizes, (first, last)
        )
    parts = _parts(extras, aligned, reference, delta_align, (gained, moved), policy, gradient)
    concentration, at_reference = parts["gradient_concentration"], parts["gradient_concentration_reference"]
    level = combined(
        [(weights.delta, parts["delta_align"]), (weights.coherence, parts["coherence"])],
        [(weights.gradient, concentration)],
    )
    gain = combined(
        [
            (weights.delta, parts["delta_align"]),
            (weights.coherence, _less(parts["coherence"], parts["coherence_reference"])),
        ],
        [(weights.gradient, _less(concentration, at_reference))],
    )
    counts = robustness.sign_counts(robustness.robustness_grid(aligned, reference))
    words = summarised(aligned, reference, delta_align, (gained, moved), counts)
    p = float(delta_align.p_value)
    summary: Json = {
        **words,
        "terminal": [first, last],
        "delta_align_se": float(delta_align.error),
        "p_value": p,
        "p_value_by": signflip.sign_flip_method(groups),
        "delta_contraction_p": float(gained.p_value),
        "delta_transport_p": float(moved.p_value),
        **_interval("spinal_gain", gain.value, gain.half),
        **_interval("spinal_score", level.value, level.half),
        "degrees_of_freedom": groups - 1,
        "gradient_apart": dict(extras.gradient_apart),
        "localisation": localisations,
        "undefined": {
            **{name: part.reason for name, part in parts.items() if not part.defined},
            **({"spinal_gain": gain.reason} if gain.reason else {}),
            **({"spinal_score": level.reason} if level.reason else {}),
        },
        "family_wise": family_wise(columns),
        "vocabulary": {
            "tokens": aligned.model["vocabulary_tokens"],
            "left_out_aligned": left_out[0],
            "left_out_reference": left_out[1],
        },
    }
    for name, part in parts.items():
        bounds = BOUNDED.get(name)
        summary |= _interval(name, float(part.estimate.value), float(part.estimate.half), bounds)
    settings = {name: aligned.settings[name] for name in sorted(aligned.settings)}
    return Comparison(
        aligned={name: aligned.model[name] for name in MODEL_KEYS},
        reference={name: reference.model[name] for name in MODEL_KEYS},
        prompts=dict(aligned.prompts),
        settings={**settings, "align": align, "same_prompts": same_prompts, "weights": weights._asdict()},
        columns=columns,
        summary=summary,
        robustness=counts,
        warnings=(
            *warnings,
            *_vocabulary_words(aligned, reference, left_out),
            *_heavy(aligned, reference),
            *_caveats(extras, groups, words["verdict"], p),
        ),
        arrays=arrays,
    )


def family_wise(columns: Mapping[str, np.ndarray]) -> Json:
    """The family-wise error rate over columns, and a sentence on it.

    Holm's correction keeps each column at 5 %; over K independent columns the rate is `1 - 0.95^K`.
    """
    tested = [name for name in METRICS if np.isfinite(columns[f"delta_{name}_p_holm"]).any()]
    rate = 1 - 0.95 ** len(tested)
    names = ", ".join(name.replace("_", " ") for name in tested)
    sentence = (
        f"{len(tested)} columns are tested at once ({names}), each at 5 % after Holm's correction over boundaries: "
        f"where nothing changed, up to {rate:.0%} of comparisons mark some boundary in some column."
    )
    return {"columns": len(tested), "rate": rate, "sentence": sentence if tested else "No column is tested."}


def _parts(
    extras: BothModels,
    aligned: DepthTrace,
    reference: DepthTrace,
    delta_align: Estimate,
    parts: tuple[Estimate, Estimate],
    policy: Replicates,
    gradient: Replicates,
) -> dict[str, Part]:
    """The numbers of the summary by name, with their errors and the reasons why they are undefined."""
    terminal = aligned.terminal
    undefined = "contraction or transport is undefined in the terminal block"
    unmeasured = "it needs both models, not only their traces"
    no_pairs = "" if extras.gradient_norm is not None else NO_GRADIENT
    pairs = np.ones(2) if extras.pairs is None else np.asarray(extras.pairs, np.float64)
    positions = replicates(aligned, "transport").sizes
    reference_norm = _replicates(
        extras.reference_gradient_norm, extras.reference_gradient_norm_without, extras.pairs, aligned.depth
    )

    def of(value: float | None, without: np.ndarray | None, sizes: np.ndarray) -> Estimate:
        single = _replicates(None if value is None else np.array([value]), _column(without), sizes, 1)
        return single.apply(lambda x: x[..., 0])

    return {
        "delta_align": Part(delta_align, _unless(delta_align, undefined)),
        "delta_contraction": Part(parts[0], _unless(parts[0], undefined)),
        "delta_transport": Part(parts[1], _unless(parts[1], undefined)),
        "coherence": coherence_of(aligned),
        "coherence_reference": coherence_of(reference),
        "gradient_concentration": Part(gradient.apply(lambda norms: share(norms[..., 1:], terminal)), no_pairs),
        "gradient_concentration_reference": Part(
            reference_norm.apply(lambda norms: share(norms, terminal)),
            no_pairs or ("" if extras.reference_gradient_norm is not None else NO_REFERENCE_GRADIENT),
        ),
        "output_distance": Part(
            policy.apply(lambda distance: distance[..., -1]), "" if extras.policy_distance is not None else unmeasured
        ),
        "kl": Part(of(extras.kl, extras.kl_without, positions), "" if extras.kl is not None else unmeasured),
        "reward_accuracy": Part(
            of(extras.reward_accuracy, extras.reward_accuracy_without, pairs),
            "" if extras.reward_accuracy is not None else NO_GRADIENT,
        ),
        "reward_margin": Part(
            of(extras.reward_margin, extras.reward_margin_without, pairs),
            "" if extras.reward_margin is not None else NO_GRADIENT,
        ),
    }


def _unless(estimate: Estimate, reason: str) -> str:
    return reason if math.isnan(float(estimate.value)) else ""


def _less(one: Part, other: Part) -> Part:
    return Part(one.estimate - other.estimate, "; ".join(dict.fromkeys(filter(None, (one.reason, other.reason)))))


def _put(
    columns: dict[str, np.ndarray], name: str, estimate: Estimate, bounds: tuple[float, float] | None = None
) -> None:
    low, high = estimate.value - estimate.half, estimate.value + estimate.half
    if bounds is not None:
        low, high = np.maximum(low, bounds[0]), np.minimum(high, bounds[1])
    columns |= {name: estimate.value, f"{name}_low": low, f"{name}_high": high}


def _interval(name: str, value: float, half: float, bounds: tuple[float, float] | None = None) -> dict[str, float]:
    low, high = value - half, value + half
    if bounds is not None and not math.isnan(half):
        low, high = max(low, bounds[0]), min(high, bounds[1])
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def _policy(extras: BothModels, trace: DepthTrace) -> Replicates:
    sizes = replicates(trace, "transport").sizes
    return _replicates(extras.policy_distance, extras.policy_distance_without, sizes, trace.boundaries)


def _gradient(extras: BothModels, depth: int) -> Replicates:
    """Gradient norms by boundary: block l at boundary l, NaN at 0."""
    by_block = _replicates(extras.gradient_norm, extras.gradient_norm_without, extras.pairs, depth)
    full, without = (np.concatenate([np.full_like(x[..., :1], np.nan), x], axis=-1) for x in by_block[:2])
    return Replicates(full, without, by_block.sizes)


def _column(without: np.ndarray | None) -> np.ndarray | None:
    return None if without is None else np.asarray(without, np.float64).reshape(-1, 1)


def _replicates(
    full: np.ndarray | None, without: np.ndarray | None, sizes: np.ndarray | None, length: int
) -> Replicates:
    """Replicates of a measured quantity, NaN if it was not measured. Raises ValueError for wrong shapes."""
    sizes = np.ones(2) if sizes is None else np.asarray(sizes, np.float64)
    full = np.full(length, np.nan) if full is None else np.asarray(full, np.float64)
    if without is None or not len(without):  # not measured, or a single group
        without = np.full((len(sizes), length), np.nan)
    if full.shape != (length,) or without.shape != (len(sizes), length):
        raise ValueError(f"shapes {full.shape} and {without.shape} do not fit {len(sizes)} groups and {length} values")
    return Replicates(full, np.asarray(without, np.float64), sizes)


def _vocabulary_words(aligned: DepthTrace, reference: DepthTrace, left_out: tuple[int, int]) -> list[str]:
    if not any(left_out):
        return []
    return [
        f"Token distributions are over the {aligned.model['vocabulary_tokens']:,} tokens that both vocabularies share: "
        f"{left_out[0]:,} of {aligned.model['name']} and {left_out[1]:,} of {reference.model['name']} are left out."
    ]


def _heavy(aligned: DepthTrace, reference: DepthTrace) -> list[str]:
    """A warning if one group of prompts has more than MAX_SHARE of the rows of a trace."""
    lines = []
    for trace in (aligned, reference):
        rows = trace.arrays["groups/rows"].astype(np.float64)
        heaviest = float(rows.max() / rows.sum())
        if len(rows) > 1 and heaviest > MAX_SHARE:
            lines.append(
                f"One of {len(rows)} groups of prompts holds {heaviest:.0%} of the rows, so that the intervals rest on "
                f"it and are too narrow; give more prompts of similar length."
            )
    return list(dict.fromkeys(lines))


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
    elif groups < signflip.MIN_GROUPS:
        lines.append(
            f"Only {groups} groups of prompts: no p-value could be below {2.0 ** (1 - groups):.2g}, so none is given; "
            f"{signflip.MIN_GROUPS} groups or more have one."
        )
    if not math.isnan(p) and word != UNDETERMINED and (p < 0.05) == (word == NO_CHANGE):
        lines.append(f"The interval and the sign-flip test (p = {number(p, 2)}) disagree: this is a borderline case.")
    return lines
