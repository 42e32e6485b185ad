"""The SPINALScore of a pair, its gain over the reference against itself, and why a part of it may be undefined."""

from __future__ import annotations

import math
from typing import NamedTuple

from spinal_jax.audit.trace import DepthTrace
from spinal_jax.comparison.paired import replicates
from spinal_jax.stats.jackknife import Estimate, t_quantile
from spinal_jax.stats.summary import coherence_estimate


class Weights(NamedTuple):
    """Of the parts of the SPINALScore."""

    delta: float = 1 / 3
    coherence: float = 1 / 3
    gradient: float = 1 / 3


EQUAL = Weights()


class Part(NamedTuple):
    """A number with its error, and why it is undefined where it is NaN."""

    estimate: Estimate
    reason: str = ""

    @property
    def defined(self) -> bool:
        return not math.isnan(float(self.estimate.value))


class Scored(NamedTuple):
    """A sum of parts: the number, half of its 95 % interval, and why it is undefined."""

    value: float
    half: float
    reason: str


def coherence_of(trace: DepthTrace) -> Part:
    """S_coh of one checkpoint, and why it is undefined where it is."""
    columns = {name: replicates(trace, name) for name in ("contraction", "transport")}
    found = coherence_estimate(columns, trace.terminal)
    return Part(found.estimate, f"{trace.model['name']}: {found.reason}" if found.reason else "")


def combined(prompts: list[tuple[float, Part]], pairs: list[tuple[float, Part]]) -> Scored:
    """The weighted sum of parts, of which those with weight 0 are left out.

    Preference pairs are other texts than the prompts: their error is independent and its square adds; the fewer degrees
    of freedom of the two count.

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
