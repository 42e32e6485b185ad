"""Detection of the onset and the destabilisation of the alignment footprint over training (docs/method.md)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from spinal_jax.comparison.step_records import SCHEMA, SERIES, Rules, Series, StepRecord, wobble
from spinal_jax.files import write_whole
from spinal_jax.jsontypes import Json, ReadJson

NOISE_SE = 2.0  # a record counts beyond this many errors
MIN_RECORDS = 3  # records in a row that must count
STRONG_SE = 3.5  # errors that one of them exceeds: two-sided 5 % over 100 records, however correlated they are


class Stay(NamedTuple):
    """Consecutive records beyond the noise."""

    start: int
    stop: int  # first record after it
    known: int  # record at which it met the criteria


class Change(NamedTuple):
    """A detected change of a series."""

    series: Series
    what: str  # the evidence in words, without numbers
    start: int
    stop: int  # first record at which it no longer holds, or the number of records
    known: int  # record at which it was detectable
    size: float  # at `start`, in the unit of the series
    errors: float  # at `start`, in errors
    most: float  # maximum up to `stop`, in errors

    def sentence(self, steps: Sequence[int]) -> str:
        """The evidence in words; `steps`: training steps of the records."""
        return (
            f"{self.what} by {abs(self.size):.3g} ({self.errors:.1f} standard errors) at step {steps[self.start]}, and "
            f"did so in every trace up to step {steps[self.stop - 1]}, by at most {self.most:.1f} standard errors"
        )


def stays(errors: np.ndarray) -> list[Stay]:
    """Stays of MIN_RECORDS records or more beyond NOISE_SE errors, one of them beyond STRONG_SE; `errors` [n]."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], errors > NOISE_SE, [False]])))
    lasting = []
    for start, stop in edges.reshape(-1, 2).tolist():
        strong = np.flatnonzero(errors[start:stop] > STRONG_SE)
        if stop - start >= MIN_RECORDS and len(strong):
            lasting.append(Stay(start, stop, start + max(MIN_RECORDS - 1, int(strong[0]))))
    return lasting


class Course(NamedTuple):
    """The series of a run with their errors: `sqrt(SE^2 + w^2)`, SE the jackknife standard error of the difference to
    step 0 and w the `wobble`. Step 0 is compared with itself: both are 0 there."""

    steps: list[int]
    value: dict[Series, np.ndarray]  # [n] each, in the series' unit
    error: dict[Series, np.ndarray]  # [n]
    wobble: dict[Series, np.ndarray]  # [n]
    rules: Rules

    @classmethod
    def of(cls, records: Sequence[StepRecord], rules: Rules) -> Course:
        """The series of these records."""

        def column(name: str) -> np.ndarray:
            return np.array([getattr(record, name) for record in records], float)

        own: dict[Series, np.ndarray] = {name: wobble(records, name, rules) for name in SERIES}
        return cls(
            steps=[record.step for record in records],
            value={name: column(name) for name in SERIES},
            error={name: np.hypot(column(f"{name}_se"), own[name]) for name in SERIES},
            wobble=own,
            rules=rules,
        )


def onset(course: Course) -> Change | None:
    """The first record from which Delta_align stays outside the noise of step 0, on one side (see `stays`)."""
    value, error = course.value["delta_align"], course.error["delta_align"]
    sides = [(stay, side) for side in (1.0, -1.0) for stay in stays(_in_errors(side * value, error))[:1]]
    if not sides:
        return None
    stay, side = min(sides, key=lambda one: one[0].known)
    what = "Delta_align left the noise of step 0"
    return _change("delta_align", what, stay, value, _in_errors(side * value, error))


class Drawdown(NamedTuple):
    """The distance of each record below the level that its series had held."""

    series: Series
    what: str
    value: np.ndarray  # [n] in the unit of the series
    errors: np.ndarray  # [n] in errors of the difference of two records


def drawdowns(course: Course, after: Change | None) -> list[Drawdown]:
    """The drawdowns of Delta_align and of terminal transport, 0 up to the onset `after` and without one; and, where the
    rules have a largest distance, by how much the output is beyond it, whatever the footprint did.

    The direction of Delta_align is its side at the onset. Terminal transport has a direction of its own where a stay
    (see `stays`) outside the noise of step 0 is still going on at the record at which the onset is known; else it is
    down with contraction and up with expansion. The level held is the best that MIN_RECORDS records in a row have
    reached (step 0 before any), so that no single high record is a maximum to fall from. Its error and the record's are
    added in quadrature, and the wobble once more: over the three records of a stay, one that walks spreads by sqrt(3).
    """
    falls = []
    parts: tuple[tuple[Series, str], ...] = (("delta_align", "Delta_align"), ("transport", "terminal transport"))
    for name, words in parts:
        value, error = course.value[name], course.error[name]
        fall = errors = np.zeros(len(value))
        side = 0.0 if after is None else _side(value, error, after, name)
        if after is not None:
            level, level_error = _held(side * value, error)
            fall = level - side * value
            errors = _in_errors(fall, np.sqrt(error**2 + level_error**2 + course.wobble[name] ** 2))
            fall[: after.start + 1] = errors[: after.start + 1] = 0
        turned = "fell below" if side > 0 else "rose above"
        falls.append(Drawdown(name, f"{words} {turned} the level it had held", fall, errors))
    if course.rules.max_distance is not None:
        beyond = course.value["distance"] - course.rules.max_distance
        what = "the output's distance from step 0 exceeded pi/2"
        falls.append(Drawdown("distance", what, beyond, _in_errors(beyond, course.error["distance"])))
    return falls


def destabilisation(course: Course, after: Change | None) -> Change | None:
    """The first record from which one of the `drawdowns` lasts (see `stays`)."""
    changes = [
        _change(fall.series, fall.what, stay, fall.value, fall.errors)
        for fall in drawdowns(course, after)
        for stay in stays(fall.errors)[:1]
    ]
    return min(changes, default=None, key=lambda change: (change.known, change.start))


def last_healthy(course: Course, after: Change | None) -> int | None:
    """The step of the last record before a destabilisation without a drawdown beyond NOISE_SE errors. None without such
    a record, for example if the first checkpoint of a watched run is already broken."""
    sound = ~np.any([fall.errors > NOISE_SE for fall in drawdowns(course, after)], axis=0)
    broke = destabilisation(course, after)
    last = len(course.steps) if broke is None else broke.start
    healthy = np.flatnonzero(sound[:last])
    return course.steps[int(healthy[-1])] if len(healthy) else None


def detect(records: Sequence[StepRecord], beside: Sequence[Mapping[str, float]], rules: Rules) -> Json:
    """The content of onset.json: the rules, the records, and for onset and destabilisation the step, the series, the
    evidence and the metrics of `beside` at that step (reward margin, accuracy, KL to the reference), or null."""
    course = Course.of(records, rules)
    began = onset(course)
    broke = destabilisation(course, began)

    def described(change: Change | None) -> Json | None:
        if change is None:
            return None
        return {
            "step": records[change.start].step,
            "series": change.series,
            "evidence": change.sentence(course.steps),
            "change": change.size,
            "standard_errors": change.errors,
            **beside[change.start],
        }

    return {
        "schema": SCHEMA,
        "noise_se": NOISE_SE,
        "min_records": MIN_RECORDS,
        "strong_se": STRONG_SE,
        "max_distance": rules.max_distance,
        "warmup_steps": rules.warmup_steps,
        "control": None if rules.control is None else dict(rules.control),
        "wobble": {name: float(values[-1]) if records else 0.0 for name, values in course.wobble.items()},
        "onset": described(began),
        "destabilisation": described(broke),
        "healthy": last_healthy(course, began) if records else 0,
        "records": [{**record._asdict(), **more} for record, more in zip(records, beside, strict=True)],
    }


def no_onset_sentence(detected: ReadJson) -> str:
    """The sentence for runs without a lasting onset, with Delta_align of the last record, which may be significant
    although it has not lasted long enough."""
    records = detected["records"]
    if len(records) < 2:
        return "No onset can be detected in a single trace"
    last = records[-1]
    return (
        f"No lasting onset by the {detected['min_records']}-record rule in {len(records)} traces up to step "
        f"{last['step']}; Delta_align there is {last['delta_align']:.3g}, standard error {last['delta_align_se']:.2g}"
    )


def save_onset(detected: ReadJson, file: Path) -> None:
    """Writes onset.json; NaN and infinity are null in it."""
    write_whole(file, (json.dumps(_plain(detected), indent=1) + "\n").encode())


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _in_errors(value: np.ndarray, error: np.ndarray) -> np.ndarray:
    """[n] values in units of their errors; infinite for a change without error, 0 for no change, NaN if unknown."""
    sure = np.where(np.isnan(value) | (value == 0), value, np.copysign(np.inf, value))
    return np.divide(value, error, out=sure, where=error > 0)


def _held(progress: np.ndarray, error: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[n] the best level, at least 0, that MIN_RECORDS consecutive records have held so far, and its error."""
    level, level_error = np.zeros_like(progress), np.zeros_like(progress)
    best, best_error = 0.0, 0.0
    for at in range(len(progress)):
        window = range(max(0, at - MIN_RECORDS + 1), at + 1)
        least = min(window, key=lambda i: progress[i])
        if len(window) == MIN_RECORDS and progress[least] > best:
            best, best_error = float(progress[least]), float(error[least])
        level[at], level_error[at] = best, best_error
    return level, level_error


def _side(value: np.ndarray, error: np.ndarray, after: Change, name: Series) -> float:
    side = float(np.sign(after.size))
    if name == "delta_align":
        return side
    now = after.known + 1
    for own in (1.0, -1.0):
        if any(stay.stop == now for stay in stays(_in_errors(own * value[:now], error[:now]))):
            return own
    return -side


def _change(series: Series, what: str, stay: Stay, value: np.ndarray, errors: np.ndarray) -> Change:
    start, stop, known = stay
    return Change(
        series=series,
        what=what,
        start=start,
        stop=stop,
        known=known,
        size=float(value[start]),
        errors=float(errors[start]),
        most=float(errors[start:stop].max()),
    )
