"""Definitions of the quantities for the pages, in a sentence each."""

from __future__ import annotations

from markupsafe import Markup

from spinal_jax.report.sections import Definitions, Section, Text

_FORMULAS = {
    "contraction": (
        "Contraction α",
        Markup(
            "Minus the least-squares slope of log σ<sub>k</sub> on log k over the fit window, for the singular values "
            "σ<sub>1</sub> ≥ σ<sub>2</sub> ≥ … of the N × d matrix of residual-stream vectors at a boundary. Higher: "
            "small modes vanish faster. R² and the quadratic coefficient say how straight the spectrum is there."
        ),
    ),
    "effective_rank": (
        "Effective rank",
        Markup(
            "The exponential of the entropy of σ<sub>k</sub> / Σσ: about how many directions carry the activations."
        ),
    ),
    "transport": (
        "Transport L",
        Markup(
            "2 arccos Σ<sub>v</sub> √(p<sub>v</sub> q<sub>v</sub>), the Fisher–Rao distance in radians, 0 (equal) to π "
            "(disjoint), between the next-token distributions read at a boundary and at the one before; the mean over "
            "positions."
        ),
    ),
    "entropy": ("Entropy", "Of the distribution read at the boundary, in nats; the mean over positions."),
    "curvature": (
        "Curvature",
        "The turning angle, 0 to π, of the path of distributions at the boundary, on the sphere on which L measures; "
        "positions that move less than 0.001 rad in either step are left out.",
    ),
    "delta_align": (
        "Δ align",
        "Mean of Δα minus mean of ΔL over the terminal block: contraction gained plus transport saved.",
    ),
    "policy_distance": (
        "Policy distance",
        "The Fisher–Rao distance between both models’ distributions at the same boundary and position; the mean over "
        "positions.",
    ),
    "gradient_share": (
        "Gradient share",
        "The terminal block’s part of the sum over blocks of the norm of the preference loss’s gradient. Embedding, "
        "final norm and unembedding are apart.",
    ),
    "coherence": (
        "Coherence",
        "1 − Σ|second differences| / (2 Σ|first differences|) over the terminal block, the mean of α’s and L’s: 1 for "
        "a straight ramp, 0 for a zigzag.",
    ),
    "directness": (
        "Directness",
        "The distance between the distributions before and after the terminal block, over the sum of its steps: 1 for "
        "a path that never turns.",
    ),
    "intervals": (
        "Intervals",
        "Every number is measured again without each group of prompts in turn (delete-one-group jackknife, α "
        "refitted); Student’s t. In a comparison the two models are paired by group.",
    ),
    "p_values": (
        "p-values",
        "By flipping the signs of the groups’ pseudo-values; over boundaries, Holm’s correction.",
    ),
}


def method_section(names: tuple[str, ...], *more: tuple[str, str | Markup]) -> Section:
    """The section with the definitions of these quantities, and further definitions of the page."""
    note = Text(
        "After SPINAL (arXiv 2601.06238). What its abstract leaves open, such as the fit window, the positions, the "
        "terminal block and the groups, is this tool’s choice, listed on this page and recorded in its files.",
        "note",
    )
    return Section("Method in brief", [Definitions([*(_FORMULAS[name] for name in names), *more]), note])
