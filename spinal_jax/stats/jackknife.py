"""How sure: the delete-one-group jackknife.

Groups of prompts differ in size, so this is the delete-m_j jackknife of Busing, Meijer and van der Leeden (1999),
"Delete-m jackknife for unequal m"; with equal groups it is the ordinary one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float, Num
from scipy.special import stdtrit

from spinal_jax.stats.signflip import FEWEST_GROUPS, sign_flip_p

if TYPE_CHECKING:
    Numbers = np.ndarray
else:
    Numbers = np.ndarray | np.float64  # NumPy makes the latter of what has no axis left


def pseudo_values(
    full: Num[Numbers, "*n"] | float, without: Num[np.ndarray, " G *n"], sizes: Num[np.ndarray, " G"]
) -> Float[np.ndarray, " G *n"]:
    """[G, ...] what each group by itself says of the number: `h_j full - (h_j - 1) without_j`, `h_j = n / m_j`.

    Args:
        full: [...] the number from all groups.
        without: [G, ...] the number refitted without each group.
        sizes: [G] measured positions in each group, all above 0.
    """
    h = (sizes.sum() / sizes).reshape(-1, *(1,) * np.ndim(full))
    return h * full - (h - 1) * without


@dataclass(frozen=True, eq=False)
class Estimate:
    """A number, or an array of them, with what each group of prompts contributes to it.

    `influence_j = (1 - s_j) (value - value without group j)`, `s_j` the group's share of what was measured, is the
    part of a linear number's error that comes from group j, and `value + influence_j / s_j` the pseudo-value. Errors
    add where numbers add. Contraction counts rows and transport counts positions, so a group has one share of each;
    a sum or difference adds influences that were each formed with their own share, and so is right to first order
    whatever the shares. Only the scale at which groups are compared, `h_j = 1 / s_j` of the variance formula, needs
    one share a group: the mean of both, since either alone would call a group noisy that merely has many positions
    for its rows.

    Attributes:
        value: [...].
        influence: [G, ...].
        share: [G], sums to 1.
    """

    value: Float[Numbers, "*n"]
    influence: Float[np.ndarray, " G *n"]
    share: Float[np.ndarray, " G"]

    @classmethod
    def of(
        cls,
        full: Num[Numbers, "*n"] | float,
        without: Num[np.ndarray, " G *n"],
        sizes: Num[np.ndarray, " G"],
    ) -> Estimate:
        """From the number [...], the number refitted without each group [G, ...], and the groups' sizes [G]."""
        full, share = np.asarray(full, np.float64), sizes / sizes.sum()
        keep = (1 - share).reshape(-1, *(1,) * full.ndim)
        return cls(full, keep * (full - without), share)

    def __add__(self, other: Estimate) -> Estimate:
        """Of two numbers of the same groups."""
        return Estimate(self.value + other.value, self.influence + other.influence, (self.share + other.share) / 2)

    def __sub__(self, other: Estimate) -> Estimate:
        """Of two numbers of the same groups. Swapping them changes every sign and nothing else, to the last bit."""
        return Estimate(self.value - other.value, self.influence - other.influence, (self.share + other.share) / 2)

    def scaled(self, factor: float) -> Estimate:
        return Estimate(factor * self.value, factor * self.influence, self.share)

    def mean(self, first: int, last: int) -> Estimate:
        """Of the boundaries first..last, both included, along the last axis."""
        span = (..., slice(first, last + 1))
        return Estimate(self.value[span].mean(axis=-1), self.influence[span].mean(axis=-1), self.share)

    @property
    def degrees_of_freedom(self) -> int:
        return len(self.share) - 1

    @property
    def error(self) -> Float[Numbers, " ..."]:
        """[...] delete-m_j jackknife standard error; NaN with fewer than two groups."""
        if self.degrees_of_freedom < 1:
            return np.full(np.shape(self.value), np.nan)
        h = (1 / self.share).reshape(-1, *(1,) * np.ndim(self.value))
        return np.sqrt(np.mean((h * self.influence - self.influence.sum(axis=0)) ** 2 / (h - 1), axis=0))

    @property
    def half(self) -> Float[Numbers, " ..."]:
        """[...] half of the 95 % interval, by Student's t with G - 1 degrees of freedom."""
        return t_quantile(self.degrees_of_freedom) * self.error

    @property
    def pseudo_values(self) -> Float[np.ndarray, " G ..."]:
        """[G, ...] what each group by itself says of the number."""
        return self.value + self.influence / self.share.reshape(-1, *(1,) * np.ndim(self.value))

    @property
    def p_value(self) -> Float[Numbers, " ..."]:
        """[...] two-sided p-value of 0 by sign flips of the groups' pseudo-values, each weighted with its share.

        NaN with fewer than FEWEST_GROUPS groups, where no p-value could be below 0.05.

        Pseudo-values average to the number less the jackknife's guess of its bias. They are moved to average to the
        number itself, as the interval is about: for a tail exponent that guess is mostly noise, and null pairs of
        N = 2d came out significant at 5 % in 9 % of 4000 trials with it, in 3 % without.
        """
        if len(self.share) < FEWEST_GROUPS:
            return np.full(np.shape(self.value), np.nan)
        share = self.share.reshape(-1, *(1,) * np.ndim(self.value))
        return sign_flip_p(share * (self.value - self.influence.sum(axis=0)) + self.influence)


class Replicates(NamedTuple):
    """A column by boundary, from all groups of prompts and refitted without each group."""

    full: Float[np.ndarray, " boundaries"]
    without: Float[np.ndarray, "G boundaries"]  # NaN if there is only one group
    sizes: Float[np.ndarray, " G"]  # rows, positions or pairs of each group

    @property
    def estimate(self) -> Estimate:
        return Estimate.of(self.full, self.without, self.sizes)

    def apply(self, number: Callable[[np.ndarray], np.ndarray]) -> Estimate:
        """The estimate of `number(column)`, a function of [..., boundaries] that returns [...]."""
        return Estimate.of(number(self.full), number(self.without), self.sizes)


def t_quantile(degrees_of_freedom: int | float) -> float:
    """The 0.975 quantile of Student's t; NaN below one degree of freedom."""
    return float(stdtrit(degrees_of_freedom, 0.975)) if degrees_of_freedom >= 1 else math.nan
