"""The records of a training run that onset detection reads, and the noise of the optimiser in them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from spinal_jax.comparison.record import Comparison, load_comparison
from spinal_jax.errors import UserError
from spinal_jax.files import load_json_file, malformed
from spinal_jax.jsontypes import ReadJson
from spinal_jax.stats.jackknife import t_quantile

SCHEMA = "spinal-onset/2"
MAX_DISTANCE = math.pi / 2  # radians from step 0; beyond it the output has moved more than half of the way to disjoint
MIN_DIFFERENCES = 3  # below, a single step changes the median
MAD_TO_SD = 1.4826  # standard deviation of a normal distribution by its median absolute deviation
Series = Literal["delta_align", "transport", "distance"]
SERIES: tuple[Series, ...] = ("delta_align", "transport", "distance")


class StepRecord(NamedTuple):
    """A trace of a training run compared with that of step 0."""

    step: int
    delta_align: float
    delta_align_se: float
    transport: float  # terminal transport minus that of step 0, radians
    transport_se: float
    distance: float  # mean Fisher-Rao distance between the output and that of step 0, radians
    distance_se: float


@dataclass(frozen=True)
class Rules:
    """Parameters of the detection.

    Attributes:
      warmup_steps: records before this step do not enter the estimate of the optimiser's wobble.
      control: the wobble of each series in a matched control run (`control_wobble`); None estimates it from the run.
      max_distance: distance of the output from step 0, in radians, that counts as destabilisation; None disables the
        rule, for references without a useful output (`objective=lm`, random weights).
    """

    warmup_steps: int = 0
    control: Mapping[Series, float] | None = None
    max_distance: float | None = MAX_DISTANCE

    @classmethod
    def from_mapping(cls, saved: ReadJson) -> Rules:
        """The rules of a saved onset.json. Raises UserError for another version."""
        if saved.get("schema") != SCHEMA:
            raise UserError(f"onset.json is of schema {saved.get('schema')!r}, not {SCHEMA}; run the training again")
        return cls(saved["warmup_steps"], saved["control"], saved["max_distance"])


def record_of(step: int, comparison: Comparison) -> StepRecord:
    """The record of a comparison with step 0. Raises UserError without intervals."""
    summary = comparison.summary
    if math.isnan(summary["delta_align_se"]):
        raise UserError("the prompts fall into one group only, so that nothing can be said of noise; give more prompts")
    quantile = t_quantile(summary["degrees_of_freedom"])
    distance, low, high = (float(comparison.columns[f"policy_distance{end}"][-1]) for end in ("", "_low", "_high"))
    return StepRecord(
        step=step,
        delta_align=summary["delta_align"],
        delta_align_se=summary["delta_align_se"],
        transport=summary["delta_transport"],
        transport_se=(summary["delta_transport_high"] - summary["delta_transport_low"]) / 2 / quantile,
        distance=distance,
        distance_se=(high - low) / 2 / quantile,
    )


def recall(saved: ReadJson, folder_of: Mapping[int, Path]) -> tuple[list[StepRecord], list[dict[str, float]], Rules]:
    """Reads the records of a run from its saved comparisons, with the metrics and the rules of its onset.json.

    Args:
        saved: the content of onset.json.
        folder_of: folder with the comparison of each step; other steps are left out.
    """
    entries = [entry for entry in saved["records"] if entry["step"] in folder_of]
    beside = [{k: v for k, v in entry.items() if k not in StepRecord._fields} for entry in entries]
    steps = [int(entry["step"]) for entry in entries]
    records = [record_of(step, load_comparison(folder_of[step])) for step in steps]
    return records, beside, Rules.from_mapping(saved)


def expanding_sd(values: np.ndarray) -> np.ndarray:
    """[n + 1] the robust standard deviation of the first 0, 1, ... n values: 1.4826 times the median absolute deviation
    from the median. Values that are not finite are ignored, and of an even number of values the oldest. 0 for
    fewer than MIN_DIFFERENCES values."""
    finite = np.isfinite(values)
    values = values[finite]
    rows, place = np.arange(len(values) + 1), np.arange(len(values))
    if len(values) < MIN_DIFFERENCES:
        return np.zeros(len(finite) + 1)
    first = 1 - rows % 2
    seen = (place < rows[:, None]) & (place >= first[:, None])  # [n + 1, n]

    def medians(x: np.ndarray) -> np.ndarray:  # [n + 1, n], unseen values infinite -> [n + 1]
        return np.sort(x, axis=1)[rows, np.maximum(rows - first - 1, 0) // 2]

    middle = medians(np.where(seen, values, np.inf))
    deviation = np.where(seen, np.abs(values - np.where(rows, middle, 0.0)[:, None]), np.inf)
    spread = np.where(rows < MIN_DIFFERENCES, 0.0, MAD_TO_SD * medians(deviation))
    return spread[np.concatenate([[0], np.cumsum(finite)])]


def wobble(records: Sequence[StepRecord], name: Series, rules: Rules) -> np.ndarray:
    """[n] the wobble of the optimiser at each record: the robust standard deviation of first differences.

    With a control run, its differences are used. Otherwise they are those of the run itself after step 0 and the
    warm-up and up to each record, so that later traces do not change earlier results. The median difference, a steady
    drift, is subtracted. With fewer than 3 differences the wobble is 0.
    """
    if rules.control is not None:
        return np.full(len(records), float(rules.control[name]))
    before = sum(record.step < max(1, rules.warmup_steps) for record in records)
    own = expanding_sd(np.diff([getattr(record, name) for record in records[before:]]))
    return np.concatenate([np.zeros(before), own])[: len(records)]


def control_wobble(records: Sequence[StepRecord], warmup_steps: int) -> dict[Series, float]:
    """The wobble of each series of a control run, from its records after step 0 and the warm-up.

    Raises:
      UserError: fewer than 3 differences between such records.
    """
    after = sum(record.step >= max(1, warmup_steps) for record in records)
    if after <= MIN_DIFFERENCES:
        raise UserError(
            f"the control run has {after} traces after step 0 and its warm-up; estimating its wobble takes "
            f"{MIN_DIFFERENCES + 1} or more"
        )
    return {name: float(wobble(records, name, Rules(warmup_steps))[-1]) for name in SERIES}


def load_control(folder: Path) -> tuple[list[StepRecord], int]:
    """The records of a control run and the steps of its warm-up, from its onset.json. Raises UserError without
    one."""
    file = folder / "onset.json"
    try:
        saved = load_json_file(file, finite=True)
        with malformed(file):
            rules = Rules.from_mapping(saved)
            records = [
                StepRecord(int(entry["step"]), *(float(_or_nan(entry[name])) for name in StepRecord._fields[1:]))
                for entry in saved["records"]
            ]
    except UserError as error:
        raise UserError(f"onset.control={folder} is no training run that can be used: {error}") from error
    return records, rules.warmup_steps


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
