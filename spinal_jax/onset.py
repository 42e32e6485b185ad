"""Over training: where the alignment footprint begins, and where it destabilises (docs/method.md, section 6)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

BAND = 2.0  # standard errors
LASTING = 3  # records


class Record(NamedTuple):
    """One trace of a run, compared with that of step 0."""

    step: int
    delta_align: float
    delta_align_se: float
    transport: float  # terminal transport less that of step 0, radians
    transport_se: float


class Change(NamedTuple):
    """Something that began: at which record, and by how many standard errors over which series."""

    index: int
    series: str
    by: float  # the change there, in the series' own unit
    errors: float  # the same in standard errors

    def sentence(self, records: Sequence[Record]) -> str:
        """The evidence in words."""
        last = records[min(self.index + LASTING, len(records)) - 1].step
        return (
            f"{self.series} by {self.by:.3g} ({self.errors:.1f} standard errors) at step {records[self.index].step}, "
            f"and stayed there to step {last}"
        )


def lasting(outside: np.ndarray) -> int | None:
    """The first index from which `outside` [n] holds for LASTING records."""
    for start in range(len(outside) - LASTING + 1):
        if outside[start : start + LASTING].all():
            return start
    return None


def onset(records: Sequence[Record]) -> Change | None:
    """The first record from which Delta_align stays outside the noise band of step 0, on one side, for 3 records.

    The band is 2 jackknife standard errors of the difference to step 0.
    """
    value, error = (np.array([getattr(r, name) for r in records]) for name in ("delta_align", "delta_align_se"))
    starts = [lasting(side * value > BAND * error) for side in (1.0, -1.0)]
    found = [start for start in starts if start is not None]
    if not found:
        return None
    start = min(found)
    errors = _ratio(value[start], error[start])
    return Change(start, "Delta_align left the noise of step 0", float(value[start]), errors)


def losses(records: Sequence[Record], after: Change | None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By series, how far each record is on the wrong side of the best before it, and whether that is more than 2
    standard errors: Delta_align below its running maximum, terminal transport above its running minimum. Nothing counts
    up to the onset `after`, and without one."""
    found = {}
    for words, name, side in (
        ("Delta_align fell below its maximum", "delta_align", 1.0),
        ("terminal transport rose above its minimum", "transport", -1.0),
    ):
        value, error = (np.array([getattr(r, n) for r in records]) for n in (name, f"{name}_se"))
        lost = np.maximum.accumulate(side * value) - side * value
        outside = lost > BAND * error
        outside[: len(records) if after is None else after.index + 1] = False
        found[words] = (lost, outside)
    return found


def destabilisation(records: Sequence[Record], after: Change | None) -> Change | None:
    """The first record after `after` from which, for 3 records, one of the `losses` is outside its band."""
    found: list[Change] = []
    for words, (lost, outside) in losses(records, after).items():
        if (start := lasting(outside)) is not None:
            name = "delta_align_se" if words.startswith("Delta") else "transport_se"
            error = getattr(records[start], name)
            found.append(Change(start, words, float(lost[start]), _ratio(lost[start], error)))
    return min(found, default=None, key=lambda change: change.index)


def healthy(records: Sequence[Record], after: Change | None) -> int:
    """The step of the last record that is in no loss: before those that are called a destabilisation, and before one
    that may be its beginning."""
    sound = ~np.any([outside for _, outside in losses(records, after).values()], axis=0)
    broke = destabilisation(records, after)
    last = len(records) if broke is None else broke.index
    return records[int(np.flatnonzero(sound[:last])[-1])].step


def _ratio(value: float, error: float) -> float:
    return abs(float(value)) / float(error) if error > 0 else float("inf")


def verdict(records: Sequence[Record], beside: Sequence[dict[str, float]]) -> dict[str, Any]:
    """What onset.json holds: the records, and for onset and destabilisation the step, the evidence and what is known
    `beside` it at that step (reward margin, accuracy, KL to the reference); null where nothing happened."""
    began = onset(records)
    broke = destabilisation(records, began)

    def told(change: Change | None) -> dict[str, Any] | None:
        if change is None:
            return None
        return {
            "step": records[change.index].step,
            "evidence": change.sentence(records),
            "change": change.by,
            "standard_errors": change.errors,
            **beside[change.index],
        }

    return {
        "schema": "spinal-onset/1",
        "band": BAND,
        "lasting": LASTING,
        "onset": told(began),
        "destabilisation": told(broke),
        "healthy": healthy(records, began) if records else 0,
        "records": [{**record._asdict(), **more} for record, more in zip(records, beside, strict=True)],
    }
