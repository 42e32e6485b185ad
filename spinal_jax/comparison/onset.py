"""Over training: where the alignment footprint begins, and where it destabilises (docs/method.md, "Over training")."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from spinal_jax.comparison.record import Comparison, load_comparison
from spinal_jax.errors import UserError
from spinal_jax.files import load_json_file, malformed, write_whole
from spinal_jax.stats.jackknife import t_quantile

SCHEMA = "spinal-onset/2"
NOISE_SE = 2.0  # a record counts beyond this many errors
MIN_RECORDS = 3  # records in a row that must count
STRONG_SE = 3.5  # errors that one of them exceeds: two-sided 5 % over 100 records, however correlated they are
MAX_DISTANCE = math.pi / 2  # radians from step 0; beyond it the output has moved more than half of the way to disjoint
MIN_DIFFERENCES = 3  # from which one step among them does not change the median
MAD_TO_SD = 1.4826  # of a normal distribution

Series = Literal["delta_align", "transport", "distance"]
SERIES: tuple[Series, ...] = ("delta_align", "transport", "distance")


class StepRecord(NamedTuple):
    """One trace of a run, compared with that of step 0."""

    step: int
    delta_align: float
    delta_align_se: float
    transport: float  # terminal transport minus that of step 0, radians
    transport_se: float
    distance: float  # mean Fisher-Rao distance between the output and that of step 0, radians
    distance_se: float


@dataclass(frozen=True)
class Rules:
    """What detection depends on besides the records.

    Attributes:
      warmup_steps: records before this step do not enter the estimate of the optimiser's wobble.
      control: the wobble of each series in a matched control run (`control_wobble`); None estimates it from the run.
      max_distance: radians beyond which the output's distance from step 0 counts as destabilisation; None: no such
        rule, for a reference that is not worth staying near (`objective=lm`, random weights).
    """

    warmup_steps: int = 0
    control: Mapping[Series, float] | None = None
    max_distance: float | None = MAX_DISTANCE

    @classmethod
    def from_mapping(cls, saved: Mapping[str, Any]) -> Rules:
        """The rules of a saved onset.json. UserError for one of another version."""
        if saved.get("schema") != SCHEMA:
            raise UserError(f"onset.json is of schema {saved.get('schema')!r}, not {SCHEMA}; run the training again")
        return cls(saved["warmup_steps"], saved["control"], saved["max_distance"])


def record_of(step: int, comparison: Comparison) -> StepRecord:
    """What detection needs of a comparison with step 0. UserError without intervals."""
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


def recall(
    saved: Mapping[str, Any], folder_of: Mapping[int, Path]
) -> tuple[list[StepRecord], list[dict[str, float]], Rules]:
    """The records of a run, read again from its saved comparisons; what its onset.json, `saved`, holds beside them; and
    the rules they were judged by.

    Args:
        saved: the content of onset.json.
        folder_of: where the comparison of each step is; a step that is not in here is left out.
    """
    entries = [entry for entry in saved["records"] if entry["step"] in folder_of]
    beside = [{k: v for k, v in entry.items() if k not in StepRecord._fields} for entry in entries]
    steps = [int(entry["step"]) for entry in entries]
    records = [record_of(step, load_comparison(folder_of[step])) for step in steps]
    return records, beside, Rules.from_mapping(saved)


class Stay(NamedTuple):
    """Consecutive records that count."""

    start: int
    stop: int  # the first record after it
    known: int  # the record at which it became long and strong enough


class Change(NamedTuple):
    """Something that began: at which record, in which series, by how much, and how long it lasted."""

    series: Series
    what: str  # the evidence in words, without its size
    start: int
    stop: int  # the first record at which it no longer holds, or the number of records
    known: int  # the record at which it could be detected
    size: float  # of the change at `start`, in the series' unit
    errors: float  # the same in errors
    most: float  # the largest of the records up to `stop`, in errors

    def sentence(self, steps: Sequence[int]) -> str:
        """The evidence in words; `steps` are those of the records."""
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


def expanding_sd(values: np.ndarray) -> np.ndarray:
    """[n + 1] the robust standard deviation of the first 0, 1, ... n values: 1.4826 times the median absolute deviation
    from the median. Values that are not finite are ignored, and of an even number of values the oldest. 0 below
    MIN_DIFFERENCES values."""
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
    """[n] the optimiser's wobble at each record: the robust standard deviation of first differences.

    Differences are those of the control run where there is one, else those of the run itself, between records after
    step 0 and the warm-up and up to the record in question, so that a later trace never changes what was said of an
    earlier one. The median of the differences, a steady drift, is no wobble. Below 3 differences a single step cannot
    be told from wobble, which is then 0.
    """
    if rules.control is not None:
        return np.full(len(records), float(rules.control[name]))
    before = sum(record.step < max(1, rules.warmup_steps) for record in records)
    own = expanding_sd(np.diff([getattr(record, name) for record in records[before:]]))
    return np.concatenate([np.zeros(before), own])[: len(records)]


def control_wobble(records: Sequence[StepRecord], warmup_steps: int) -> dict[Series, float]:
    """The wobble of each series of a control run, from all its records after step 0 and the warm-up.

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
    """The records of a control run and the steps of its warm-up, from its onset.json. UserError without one."""
    file = folder / "onset.json"
    try:
        saved = load_json_file(file)
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
    """How far each record is behind the level its series had held, towards step 0 or beyond it."""

    series: Series
    what: str
    value: np.ndarray  # [n] in the series' unit
    errors: np.ndarray  # [n] the same in errors of the difference between two records


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
    """The step of the last record without a drawdown beyond NOISE_SE errors, before a destabilisation if there is one;
    None where there is no such record, as where the first checkpoint of a watched run is already broken."""
    sound = ~np.any([fall.errors > NOISE_SE for fall in drawdowns(course, after)], axis=0)
    broke = destabilisation(course, after)
    last = len(course.steps) if broke is None else broke.start
    healthy = np.flatnonzero(sound[:last])
    return course.steps[int(healthy[-1])] if len(healthy) else None


def detect(records: Sequence[StepRecord], beside: Sequence[Mapping[str, float]], rules: Rules) -> dict[str, Any]:
    """The content of onset.json: the rules and the records; and for onset and destabilisation the step, the series, the
    evidence and what is known `beside` it at that step (reward margin, accuracy, KL to the reference), null where
    nothing happened."""
    course = Course.of(records, rules)
    began = onset(course)
    broke = destabilisation(course, began)

    def described(change: Change | None) -> dict[str, Any] | None:
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


def no_onset_sentence(detected: Mapping[str, Any]) -> str:
    """What is said where no onset lasted: with Delta_align of the last record, which an interval may well tell from 0
    although it has not stayed away from 0 for long enough."""
    records = detected["records"]
    if len(records) < 2:
        return "No onset can be detected in a single trace"
    last = records[-1]
    return (
        f"No lasting onset by the {detected['min_records']}-record rule in {len(records)} traces up to step "
        f"{last['step']}; Delta_align there is {last['delta_align']:.3g}, standard error {last['delta_align_se']:.2g}"
    )


def save_onset(detected: Mapping[str, Any], file: Path) -> None:
    """Writes onset.json; NaN and infinity are null in it."""
    write_whole(file, (json.dumps(_plain(detected), indent=1) + "\n").encode())


def _plain(value: object) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _in_errors(value: np.ndarray, error: np.ndarray) -> np.ndarray:
    """[n] as many errors; infinite where a change has no error, 0 where nothing changed, NaN if unknown."""
    sure = np.where(np.isnan(value) | (value == 0), value, np.copysign(np.inf, value))
    return np.divide(value, error, out=sure, where=error > 0)


def _held(progress: np.ndarray, error: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By record, the best level that MIN_RECORDS records in a row have held up to it, at least 0, and its error."""
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
