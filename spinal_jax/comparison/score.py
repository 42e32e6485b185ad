"""The SPINALScore of a pair, and its gain over the score of the reference against itself."""

from __future__ import annotations

import math
from typing import NamedTuple

from spinal_jax.audit.trace import DepthTrace
from spinal_jax.comparison.paired import replicates
from spinal_jax.stats.jackknife import Estimate, t_quantile
from spinal_jax.stats.summary import coherence_estimate


class Weights(NamedTuple):
    """Weights of the parts of the SPINALScore."""

    delta: float = 1 / 3
    coherence: float = 1 / 3
    gradient: float = 1 / 3


EQUAL = Weights()


class Part(NamedTuple):
    """An estimate; if it is NaN, `reason` says why."""

    estimate: Estimate
    reason: str = ""

    @property
    def defined(self) -> bool:
        return not math.isnan(float(self.estimate.value))


class Scored(NamedTuple):
    """A weighted sum of parts with the half-width of its 95 % interval; if it is NaN, `reason` says why."""

    value: float
    half: float
    reason: str


def coherence_of(trace: DepthTrace) -> Part:
    """S_coh of one checkpoint."""
    columns = {name: replicates(trace, name) for name in ("contraction", "transport")}
    estimate, reason = coherence_estimate(columns, trace.terminal)
    return Part(estimate, f"{trace.model['name']}: {reason}" if reason else "")


def combined(prompts: list[tuple[float, Part]], pairs: list[tuple[float, Part]]) -> Scored:
    """The weighted sum of parts; parts with weight 0 are left out.

    Prompts and preference pairs are different texts, so their errors are independent and add in quadrature. The smaller
    degrees of freedom apply.

    Args:
        prompts: (weight, part) of the parts whose error is over groups of prompts.
        pairs: (weight, part) of those whose error is over groups of preference pairs.
    """
    used = [[(weight, part) for weight, part in side if weight] for side in (prompts, pairs)]
    missing = [part.reason or "a part is undefined" for side in used for _, part in side if not part.defined]
    if missing or not (used[0] or used[1]):
        return Scored(math.nan, math.nan, "; ".join(dict.fromkeys(missing)) or "every weight is 0")
    value, squares, freedom = 0.0, 0.0, math.inf
    for side in filter(None, used):
        total = side[0][1].estimate.scaled(side[0][0])
        for weight, part in side[1:]:
            total = total + part.estimate.scaled(weight)
        value += float(total.value)
        squares += float(total.error) ** 2
        freedom = min(freedom, total.degrees_of_freedom)
    return Scored(value, t_quantile(freedom) * math.sqrt(squares), "")
