"""Definition of every column of a result: unit, weighting, display, equation and source.

The sections of JSON and CSV files, the units and titles of tables and figures, the jackknife weights and the list of
columns that a comparison subtracts are derived from these definitions. To add a column to the depth trace, add an entry
to TRACE and compute its value in `audit.measurement.depth_curve`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Counted = Literal["rows", "positions", "pairs", "both"]
ColumnKind = Literal["state", "step", "turn", "block"]
Colour = Literal["blue", "vermillion", "green", "purple"]

SPINAL = "SPINAL, arXiv 2601.06238"


@dataclass(frozen=True)
class Column:
    """A quantity with one value per boundary, or one value per curve.

    Attributes:
        name: key in JSON, CSV and `arrays`.
        label: text in tables and on axes.
        unit: "rad", "nats", or "" for a dimensionless number.
        counted_by: weight of a group of prompts: number of hidden states ("rows"), of lens positions ("positions"), of
            preference pairs ("pairs"), or "both" for a mean of one number of each of the first two.
        equation: definition, in the notation of docs/method.md.
        source: where the definition comes from.
        error: whether it has a jackknife standard error, NAME_se, and replicates, "groups/NAME".
        compared: whether a comparison subtracts it.
        kind: how it is resampled over depth. A "state" belongs to a boundary and is interpolated between two. A "step"
            is a length that ends at a boundary; resampling keeps the total length. A "turn" depends on the spacing of
            the boundaries and is not resampled. A "block" belongs to the block that ends at the boundary.
        colour: in figures.
        bounds: smallest and largest value that the definition allows; intervals are clipped to them.
        decimals: in tables; None chooses by the size of the values.
    """

    name: str
    label: str
    unit: str
    counted_by: Counted
    equation: str
    source: str
    error: bool = True
    compared: bool = False
    kind: ColumnKind = "state"
    colour: Colour = "blue"
    bounds: tuple[float, float] = (-math.inf, math.inf)
    decimals: int | None = None


# One checkpoint, by boundary, in the order of files and tables.
TRACE = (
    Column(
        name="contraction",
        label="contraction α",
        unit="",
        counted_by="rows",
        equation="alpha_l = -slope of log s_k(H_l) on log k, k in the fitted ranks",
        source=SPINAL,
        compared=True,
    ),
    Column(
        name="fit_r2",
        label="R² of fit",
        unit="",
        counted_by="rows",
        equation="1 - residual / total sum of squares of log s_k over the fitted ranks",
        source="ordinary least squares",
        error=False,
    ),
    Column(
        name="fit_quadratic",
        label="quadratic",
        unit="",
        counted_by="rows",
        equation="coefficient of (log k)^2 when a parabola is fitted instead; 0 for a straight line",
        source="ordinary least squares",
        error=False,
    ),
    Column(
        name="resolved",
        label="resolved ranks",
        unit="",
        counted_by="rows",
        equation="number of s_k > max(sqrt(eps), eps32) s_1, eps that of the Gram sum",
        source="this project",
        error=False,
        decimals=0,
    ),
    Column(
        name="contraction_half",
        label="α of half",
        unit="",
        counted_by="rows",
        equation="mean of alpha_l of two halves of the groups, over the same ranks",
        source="this project",
        error=False,
    ),
    Column(
        name="spike",
        label="spike log s₁/s₂",
        unit="",
        counted_by="rows",
        equation="log(s_1 / s_2)",
        source="this project",
        compared=True,
        colour="vermillion",
        bounds=(0.0, math.inf),
    ),
    Column(
        name="effective_rank",
        label="effective rank",
        unit="",
        counted_by="rows",
        equation="exp(entropy of s_k / sum s)",
        source="Roy and Vetterli 2007; RankMe, arXiv 2210.02885",
        compared=True,
        bounds=(1.0, math.inf),
    ),
    Column(
        name="transport",
        label="transport L",
        unit="rad",
        counted_by="positions",
        equation="L_l = mean of 2 arccos sum_v sqrt(p_{l-1}(v) p_l(v))",
        source=SPINAL,
        compared=True,
        kind="step",
        colour="vermillion",
        bounds=(0.0, math.pi),
    ),
    Column(
        name="entropy",
        label="entropy",
        unit="nats",
        counted_by="positions",
        equation="mean of -sum_v p_l(v) log p_l(v)",
        source="Shannon 1948",
        compared=True,
        colour="green",
        bounds=(0.0, math.inf),
    ),
    Column(
        name="curvature",
        label="curvature",
        unit="rad",
        counted_by="positions",
        equation="mean turning angle at p_l of the geodesic path p_{l-1}, p_l, p_{l+1}",
        source="spherical law of cosines",
        compared=True,
        kind="turn",
        colour="purple",
        bounds=(0.0, math.pi),
    ),
)

# One checkpoint, one number per curve; T is the terminal block.
SUMMARY = (
    Column(
        name="contraction",
        label="contraction α",
        unit="",
        counted_by="rows",
        equation="mean of alpha_l over T",
        source=SPINAL,
    ),
    Column(
        name="transport",
        label="transport L",
        unit="rad",
        counted_by="positions",
        equation="mean of L_l over T",
        source=SPINAL,
        bounds=(0.0, math.pi),
    ),
    Column(
        name="coherence",
        label="coherence",
        unit="",
        counted_by="both",
        equation="mean over z = alpha, L of 1 - sum|second differences| / (2 sum|first differences|) of z over T",
        source="this project",
        bounds=(0.0, 1.0),
    ),
    Column(
        name="directness",
        label="directness",
        unit="",
        counted_by="positions",
        equation="distance from the boundary before T to boundary D, over the sum of the steps between",
        source="this project",
        bounds=(0.0, 1.0),
    ),
    Column(
        name="path_length",
        label="path length",
        unit="rad",
        counted_by="positions",
        equation="sum of L_l over all l",
        source=SPINAL,
        bounds=(0.0, math.inf),
    ),
)

# Two checkpoints that are measured together, by boundary.
PAIR = (
    Column(
        name="policy_distance",
        label="policy distance",
        unit="rad",
        counted_by="positions",
        equation="mean of 2 arccos sum_v sqrt(p_l(v) q_l(v)) between both checkpoints at the same position",
        source="Fisher-Rao distance",
        colour="purple",
        bounds=(0.0, math.pi),
    ),
    Column(
        name="gradient_norm",
        label="preference gradient",
        unit="",
        counted_by="pairs",
        equation="L2 norm over the parameters of block l of the gradient of the mean DPO loss",
        source="Rafailov et al. 2023, arXiv 2305.18290",
        kind="block",
        colour="green",
        bounds=(0.0, math.inf),
    ),
)


def names(columns: Iterable[Column], error: bool = True) -> tuple[str, ...]:
    """The keys of columns in order; a column with a standard error is followed by NAME_se."""
    return tuple(key for c in columns for key in (c.name, f"{c.name}_se")[: 2 if c.error and error else 1])


def compared() -> tuple[Column, ...]:
    """The columns that a comparison subtracts."""
    return tuple(column for column in TRACE if column.compared)


def column(name: str) -> Column:
    """The by-boundary column of this name. Raises KeyError for an unknown name."""
    return _BY_NAME[name]


_BY_NAME = {each.name: each for each in (*TRACE, *PAIR)}
