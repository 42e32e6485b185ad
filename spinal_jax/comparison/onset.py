"""Over training: where the alignment footprint begins, and where it destabilises (docs/method.md, "Over training")."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spinal_jax.comparison.record import Comparison, load_comparison
from spinal_jax.errors import UserError
from spinal_jax.files import write_whole
from spinal_jax.stats.jackknife import t_quantile

BAND = 2.0  # standard errors beyond which a record counts
LASTING = 3  # records that must count in a row
SURE = 3.5  # standard errors that one of them exceeds: two-sided 5 % over 100 records, however alike they are
AWAY = math.pi / 2  # radians from step 0 beyond which the output is closer to having nothing in common with it


class Record(NamedTuple):
    """One trace of a run, compared with that of step 0."""

    step: int
    delta_align: float
    delta_align_se: float
    transport: float  # terminal transport less that of step 0, radians
    transport_se: float
    distance: float  # Fisher-Rao distance of what the model puts out from what that of step 0 does, radians
    distance_se: float


def record_of(step: int, comparison: Comparison) -> Record:
    """What detection needs of a comparison with step 0. UserError without intervals."""
    found = comparison.summary
    if math.isnan(found["delta_align_se"]):
        raise UserError("the prompts fall into one group only, so that nothing can be said of noise; give more prompts")
    quantile = t_quantile(found["degrees_of_freedom"])
    transport = (found["delta_transport_high"] - found["delta_transport_low"]) / 2 / quantile
    distance, low, high = (float(comparison.columns[f"policy_distance{end}"][-1]) for end in ("", "_low", "_high"))
    return Record(
        step,
        *(found["delta_align"], found["delta_align_se"], found["delta_transport"], transport),
        *(distance, (high - low) / 2 / quantile),
    )


def recall(told: Mapping[str, Any], folder_of: Mapping[int, Path]) -> tuple[list[Record], list[dict[str, float]]]:
    """The records of a run, anew from its saved comparisons, and what `told`, its onset.json, has beside them.

    Args:
        folder_of: where the comparison of each step is; a step that is not in here is left out.
    """
    entries = [entry for entry in told["records"] if entry["step"] in folder_of]
    beside = [{k: v for k, v in entry.items() if k not in Record._fields} for entry in entries]
    steps: Iterable[int] = (int(entry["step"]) for entry in entries)
    return [record_of(step, load_comparison(folder_of[step])) for step in steps], beside


class Stay(NamedTuple):
    """Records in a row that count."""

    start: int
    stop: int  # the first that counts no longer
    known: int  # the record by which it could be told


class Change(NamedTuple):
    """Something that began: at which record, over which series, by how much, and how long it lasted."""

    start: int
    stop: int  # the first record of which it is no longer true, or how many there are
    known: int  # the record by which it could be told
    series: str
    by: float  # the change at `start`, in the series' own unit
    errors: float  # the same in standard errors
    most: float  # the largest of the records up to `stop`, in standard errors

    def sentence(self, records: Sequence[Record]) -> str:
        """The evidence in words."""
        steps = [record.step for record in records]
        return (
            f"{self.series} by {abs(self.by):.3g} ({self.errors:.1f} standard errors) at step {steps[self.start]}, and "
            f"did so in every trace up to step {steps[self.stop - 1]}, by at most {self.most:.1f} standard errors"
        )


def lasting(errors: np.ndarray) -> Stay | None:
    """The first stay of 3 records or more above 2 standard errors, one of them above 3.5; `errors` [n]."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], errors > BAND, [False]])))
    for start, stop in edges.reshape(-1, 2).tolist():
        sure = np.flatnonzero(errors[start:stop] > SURE)
        if stop - start >= LASTING and len(sure):
            return Stay(start, stop, start + max(LASTING - 1, int(sure[0])))
    return None


def departure(value: np.ndarray, error: np.ndarray) -> tuple[Stay, float] | None:
    """Where a series [n] leaves the noise of step 0 lastingly, and to which side, 1 or -1."""
    sides = [(stay, side) for side in (1.0, -1.0) if (stay := lasting(_in_errors(side * value, error)))]
    return min(sides, default=None, key=lambda found: found[0].known)


def onset(records: Sequence[Record]) -> Change | None:
    """The first record from which Delta_align stays outside the noise of step 0, on one side (see `lasting`).

    The noise is the jackknife standard error of the difference to step 0.
    """
    value, error = _series(records, "delta_align")
    found = departure(value, error)
    if found is None:
        return None
    stay, side = found
    return _change(stay, "Delta_align left the noise of step 0", value, _in_errors(side * value, error))


class Loss(NamedTuple):
    """How far each record is behind what its series had held, towards step 0 or beyond it."""

    words: str
    value: np.ndarray  # [n] in the series' own unit
    errors: np.ndarray  # [n] the same in standard errors of the difference of two records


def losses(records: Sequence[Record], after: Change | None) -> list[Loss]:
    """The losses of Delta_align and of terminal transport, 0 up to the onset `after` and without one; and how far the
    output is beyond half of the way to having nothing in common with that of step 0, whatever the footprint did.

    Progress is the way that the footprint took at its onset: Delta_align's side, and for terminal transport the side to
    which it had by then left the noise of step 0, else down with contraction and up with expansion. What is held is the
    best level that 3 records in a row have reached (step 0 before any), so that no single high record is a maximum to
    fall from. Its standard error and the record's own are added in quadrature.
    """
    found = []
    for name, words in (("delta_align", "Delta_align"), ("transport", "terminal transport")):
        value, error = _series(records, name)
        lost = errors = np.zeros(len(records))
        side = 0.0 if after is None else _side(records, after, name)
        if after is not None:
            level, level_error = _held(side * value, error)
            lost = level - side * value
            errors = _in_errors(lost, np.hypot(error, level_error))
            lost[: after.start + 1] = errors[: after.start + 1] = 0
        turned = "fell below" if side > 0 else "rose above"
        found.append(Loss(f"{words} {turned} what it had held", lost, errors))
    distance, error = _series(records, "distance")
    beyond = distance - AWAY
    found.append(Loss("the output's distance from step 0 exceeded pi/2", beyond, _in_errors(beyond, error)))
    return found


def destabilisation(records: Sequence[Record], after: Change | None) -> Change | None:
    """The first record from which one of the `losses` lasts (see `lasting`)."""
    found = []
    for words, lost, errors in losses(records, after):
        if (stay := lasting(errors)) is not None:
            found.append(_change(stay, words, lost, errors))
    return min(found, default=None, key=lambda change: (change.known, change.start))


def healthy(records: Sequence[Record], after: Change | None) -> int:
    """The step of the last record that is in no loss: before those that are called a destabilisation, and before one
    that may be its beginning."""
    sound = ~np.any([loss.errors > BAND for loss in losses(records, after)], axis=0)
    broke = destabilisation(records, after)
    last = len(records) if broke is None else broke.start
    return records[int(np.flatnonzero(sound[:last])[-1])].step


def verdict(records: Sequence[Record], beside: Sequence[dict[str, float]]) -> dict[str, Any]:
    """What onset.json holds: the records, and for onset and destabilisation the step, the evidence and what is known
    `beside` it at that step (reward margin, accuracy, KL to the reference); null where nothing happened."""
    began = onset(records)
    broke = destabilisation(records, began)

    def told(change: Change | None) -> dict[str, Any] | None:
        if change is None:
            return None
        return {
            "step": records[change.start].step,
            "evidence": change.sentence(records),
            "change": change.by,
            "standard_errors": change.errors,
            **beside[change.start],
        }

    return {
        "schema": "spinal-onset/1",
        "band": BAND,
        "lasting": LASTING,
        "sure": SURE,
        "away": AWAY,
        "onset": told(began),
        "destabilisation": told(broke),
        "healthy": healthy(records, began) if records else 0,
        "records": [{**record._asdict(), **more} for record, more in zip(records, beside, strict=True)],
    }


def save_verdict(told: Mapping[str, Any], file: Path) -> None:
    """Writes onset.json; NaN and infinity are null in it."""
    write_whole(file, (json.dumps(_plain(told), indent=1) + "\n").encode())


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _series(records: Sequence[Record], name: str) -> tuple[np.ndarray, np.ndarray]:
    value, error = (np.array([getattr(r, n) for r in records], float) for n in (name, f"{name}_se"))
    return value, error


def _in_errors(value: np.ndarray, error: np.ndarray) -> np.ndarray:
    """[n] as many standard errors; infinite where a change has no error, 0 where nothing changed, NaN if unknown."""
    sure = np.where(np.isnan(value) | (value == 0), value, np.copysign(np.inf, value))
    return np.divide(value, error, out=sure, where=error > 0)


def _held(progress: np.ndarray, error: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By record, the best level that LASTING records in a row have held up to it, 0 at the least, and its error."""
    level, level_error = np.zeros_like(progress), np.zeros_like(progress)
    best, best_error = 0.0, 0.0
    for at in range(len(progress)):
        window = range(max(0, at - LASTING + 1), at + 1)
        least = min(window, key=lambda i: progress[i])
        if len(window) == LASTING and progress[least] > best:
            best, best_error = float(progress[least]), float(error[least])
        level[at], level_error[at] = best, best_error
    return level, level_error


def _side(records: Sequence[Record], after: Change, name: str) -> float:
    side = float(np.sign(after.by))
    if name == "delta_align":
        return side
    value, error = _series(records[: after.known + 1], name)
    own = departure(value, error)
    return -side if own is None else own[1]


def _change(stay: Stay, series: str, value: np.ndarray, errors: np.ndarray) -> Change:
    start, stop, known = stay
    most = float(errors[start:stop].max())
    return Change(start, stop, known, series, float(value[start]), float(errors[start]), most)
