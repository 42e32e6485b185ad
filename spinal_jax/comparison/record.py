"""The comparison of two checkpoints as a frozen record, and its files: JSON, CSV and safetensors."""

from __future__ import annotations

import html
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from spinal_jax.errors import UserError
from spinal_jax.files import (
    Document,
    check_boundaries,
    document,
    floats,
    load_json_file,
    load_record,
    malformed,
    plain,
    read,
    save_record,
    undefined,
    write_whole,
)
from spinal_jax.jsontypes import Json, ReadJson
from spinal_jax.metrics.columns import PAIR, TRACE, compared
from spinal_jax.wording import number, plus_minus, sparkline

SCHEMA = "spinal-comparison/2"
ARRAYS = "comparison.safetensors"
MOVED, MOVED_SCHEMA = "prompts.json", "spinal-prompts/1"
METRICS = tuple(column.name for column in compared())  # columns of a trace that a comparison subtracts
BOTH = tuple(column.name for column in PAIR)  # columns that need both models
LOCALISED = ("delta_contraction", "delta_transport", *BOTH)  # columns that are localised over depth
UNITS = {column.name: column.unit for column in (*TRACE, *PAIR) if column.unit}
# Lines of a comparison's text: (label, number of the summary, unit).
SHOWN = {
    "output": (("policy distance", "output_distance", "rad"), ("KL", "kl", "nats")),
    "score": (
        ("SPINALScore gained", "spinal_gain", ""),
        ("level", "spinal_score", ""),
        ("coherence", "coherence", ""),
        ("gradient share", "gradient_concentration", ""),
    ),
    "rewards": (("accuracy", "reward_accuracy", ""), ("margin", "reward_margin", "")),
}

_PROMPT = {"number": int, "text": str, "tokens": int, "positions": int, "delta_transport": float, "share": float}
_PLACE = {
    "position": int,
    "token": str,
    "before": str,
    "after": str,
    "boundary": int,
    "aligned": float,
    "reference": float,
}

# fmt: off
_WITH_INTERVAL = ("delta_align", "delta_contraction", "delta_transport", "spinal_gain", "spinal_score", "coherence",
                  "coherence_reference", "gradient_concentration", "gradient_concentration_reference",
                  "output_distance", "kl", "reward_accuracy", "reward_margin")
SECTIONS: dict[str, tuple[str, ...]] = {
    "aligned": ("name", "source", "revision", "family", "layers", "width", "vocabulary", "dtype", "sha256"),
    "reference": ("name", "source", "revision", "family", "layers", "width", "vocabulary", "dtype", "sha256"),
    "prompts": ("source", "count", "groups", "rows", "positions", "sha256"),
    "settings": ("align", "same_prompts", "weights"),
    "columns": (*(f"delta_{name}{end}" for name in METRICS for end in ("", "_low", "_high", "_p", "_p_holm")),
                *(f"{name}{end}" for name in BOTH for end in ("", "_low", "_high")),
                *(f"{side}_{name}{end}" for side in ("aligned", "reference") for name in METRICS
                  for end in ("", "_low", "_high"))),
    "summary": ("verdict", "sentence", "headline", "because", "driver", "driver_sentence", "limits", "rows_per_width",
                "terminal", "delta_align", "delta_align_se", "delta_align_low", "delta_align_high", "p_value",
                "p_value_by",
                *(f"{name}{end}" for name in _WITH_INTERVAL[1:] for end in ("", "_low", "_high")),
                "degrees_of_freedom", "undefined", "family_wise", "vocabulary", "gradient_apart", "localisation"),
    "robustness": ("sentence", "holds", "of", "sure", "opposite", "bounded", "settings"),
}
# fmt: on


@dataclass(frozen=True, eq=False, repr=False)
class Comparison(Document):
    """Result of `spinal_jax.compare`, by boundary 0..D and for the terminal block (docs/method.md).

    Attributes:
      aligned, reference: the two models, as in their traces. prompts, settings: of both measurements.
      columns: name -> float64 [D+1], NaN where undefined. `delta_X` is X of the aligned model minus X of the
        reference, `_low` and `_high` its 95 % interval, `_p` its p-value by sign flips, `_p_holm` the same after
        Holm's correction over boundaries. `policy_distance` in radians; `gradient_norm` of block l at boundary l.
        `aligned_X` and `reference_X` are the two depth traces.
      summary: numbers of the terminal block with their intervals, and the verdict: "toward contraction", "toward
        expansion", "differs, direction not robust", "no detectable change" or "undetermined". `undefined` gives the
        reason for each number that is NaN.
      robustness: Delta_align under other settings of the measurement; `settings` is a list of records.
      warnings: one sentence each.
      arrays: pseudo-values of groups, "groups/delta_align" [G] and "groups/delta_X" [G, D+1].
      moved: groups, prompts and tokens with the largest changes (`prompt_steps.PromptSteps.moved`), if `keep_prompts`
        is set. They are saved in prompts.json, separately because they contain text of the prompts.

    Raises:
      ValueError: a section lacks a key, or columns differ in length.
    """

    aligned: ReadJson
    reference: ReadJson
    prompts: ReadJson
    settings: ReadJson
    columns: Mapping[str, np.ndarray]
    summary: ReadJson
    robustness: ReadJson
    warnings: tuple[str, ...] = ()
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    moved: tuple[ReadJson, ...] = ()

    def __post_init__(self) -> None:
        for section, keys in SECTIONS.items():
            missing = [key for key in keys if key not in getattr(self, section)]
            if missing:
                raise ValueError(f"{section} has no {', '.join(missing)}")
        columns = {name: np.array(values, np.float64) for name, values in self.columns.items()}
        shape = columns["delta_contraction"].shape
        for name, values in columns.items():
            values.flags.writeable = False
            if values.ndim != 1 or len(values) < 2 or values.shape != shape:
                raise ValueError(
                    f"column {name} has shape {values.shape}; every column has one value per boundary, {shape}"
                )
        object.__setattr__(self, "columns", columns)
        object.__setattr__(self, "warnings", tuple(self.warnings))

    @property
    def verdict(self) -> str:
        return str(self.summary["verdict"])

    def to_json(self) -> str:
        """The text of comparison.json: equal comparisons give equal bytes; NaN is null; `arrays` are not in it."""
        return document(SCHEMA, SECTIONS, self)

    @classmethod
    def from_json(cls, text: str, arrays: Mapping[str, np.ndarray] | None = None) -> Comparison:
        """The inverse of `to_json`.

        Raises:
          UserError: not JSON, another schema version, or a section, key or length that does not fit the schema.
        """
        with read(text, "comparison", SCHEMA) as found:
            sections: Json = {name: dict(found[name]) for name in SECTIONS}
            sections["columns"] = {name: floats(name, values) for name, values in sections["columns"].items()}
            for name in ("summary", "robustness"):
                sections[name] = undefined(sections[name])
            comparison = cls(**sections, warnings=tuple(found["warnings"]), arrays=arrays or {})
            check_boundaries(found, comparison.boundaries)
            return comparison

    def rows(self) -> list[Json]:
        """Long form: one dict per metric and boundary; NaN without an interval or p-value."""
        nothing = np.full(self.boundaries, math.nan)
        ends = ("low", "high", "p", "p_holm")
        rows = []
        for metric, values in self.columns.items():
            if metric.endswith(tuple(f"_{end}" for end in ends)):
                continue
            beside = {end: self.columns.get(f"{metric}_{end}", nothing) for end in ends}
            for at in range(self.boundaries):
                row = {"boundary": at, "relative_depth": at / self.depth, "metric": metric, "value": float(values[at])}
                rows.append(row | {end: float(column[at]) for end, column in beside.items()})
        return rows

    def __repr__(self) -> str:
        first, last = self.terminal
        lines = [
            f"Comparison of {self.aligned['name']} with {self.reference['name']}: {self.verdict}",
            f"  {self.summary['sentence']}",
            f"  parts     means of boundaries {first}..{last}: contraction {self.shown('delta_contraction')}, "
            f"transport {self.shown('delta_transport')} rad",
            *(f"  {title:<9} {said}" for title in SHOWN if (said := self._known(title))),
            f"  where     {self._where()}",
            f"  tests     {self.summary['family_wise']['sentence']}",
        ]
        if reason := self.summary["undefined"].get("spinal_gain"):
            lines.append(f"  undefined the gain of the SPINALScore: {reason}")
        return "\n".join(lines + [f"  warning   {warning}" for warning in self.warnings])

    def _known(self, title: str) -> str:
        """The numbers of a line of SHOWN that are defined."""
        known = [line for line in SHOWN[title] if math.isfinite(self.summary[line[1]])]
        return ", ".join(f"{label} {self.shown(name)} {unit}".rstrip() for label, name, unit in known)

    def _where(self) -> str:
        parts = []
        for name in LOCALISED:
            at, label = self.summary["localisation"][name], name.replace("_", " ")
            if name in BOTH and np.isnan(self.columns[name]).all():
                continue  # not measured
            if at["reason"]:
                parts.append(f"{label}: {at['reason']}")
            else:
                run = f"{at['run'][0]}..{at['run'][1]}"
                parts.append(
                    f"{label} {at['share']:.0%} in the terminal block (even {at['share_even']:.0%}), run {run}"
                )
        return "; ".join(parts)

    def shown(self, name: str) -> str:
        """A number of the summary with the half-width of its 95 % interval (the longer side if clipped), as text."""
        value, low, high = (float(self.summary[f"{name}{end}"]) for end in ("", "_low", "_high"))
        return plus_minus(value, max(value - low, high - value))

    def _repr_html_(self) -> str:
        first, last = self.terminal
        body = []
        for name in (*(f"delta_{metric}" for metric in METRICS), *BOTH):
            values, unit = self.columns[name], UNITS.get(name.removeprefix("delta_"), "")
            if np.isnan(values).all():
                continue  # not measured
            inside = values[first : last + 1]
            inside = inside[np.isfinite(inside)]
            mean = f"{number(inside.mean())} {unit}".rstrip() if len(inside) else "–"
            p = self.columns.get(f"{name}_p_holm")
            sure = "" if p is None else f"{int(np.sum(p < 0.05))} of {int(np.isfinite(p).sum())}"
            label = name.replace("_", " ")
            body.append(f"<tr><th>{label}</th><td>{sparkline(values, first)}</td><td>{mean}</td><td>{sure}</td></tr>")
        notes = "".join(f"<div>⚠ {html.escape(warning)}</div>" for warning in self.warnings)
        names = html.escape(f"{self.aligned['name']} − {self.reference['name']}")
        return (
            f"<div><b>{names}: {html.escape(self.verdict)}</b><div>{html.escape(self.summary['sentence'])}</div>"
            f"<table><thead><tr><th></th><th>boundary 0 to {self.depth}</th><th>mean of {first}..{last}</th>"
            f"<th>p &lt; 0.05 (Holm)</th></tr></thead><tbody>{''.join(body)}</tbody></table>{notes}</div>"
        )


def load_comparison(path: str | os.PathLike[str]) -> Comparison:
    """Loads the comparison of a run folder or a comparison.json, with comparison.safetensors and prompts.json.

    Raises:
      UserError: nothing there, another schema version, or a file that cannot be read.
    """
    path = Path(path)
    found = load_record(path, "comparison", ARRAYS, Comparison.from_json)
    file = (path if path.is_dir() else path.parent) / MOVED
    if not file.is_file():
        return found
    content = load_json_file(file, finite=True)
    if (said := content.get("schema")) != MOVED_SCHEMA:
        raise UserError(f"{file} says schema {said!r}; this version of spinal_jax reads {MOVED_SCHEMA!r}")
    with malformed(file):
        return replace(found, moved=tuple(map(_checked, content["groups"])))


def save_comparison(comparison: Comparison, folder: str | os.PathLike[str]) -> None:
    """Writes comparison.safetensors (when there are arrays), comparison.csv, prompts.json (when prompts were kept) and,
    last, comparison.json; each whole."""
    rows, folder = comparison.rows(), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if comparison.moved:
        content = {"schema": MOVED_SCHEMA, "groups": plain(comparison.moved)}
        write_whole(folder / MOVED, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
    else:
        (folder / MOVED).unlink(missing_ok=True)
    save_record(folder, "comparison", comparison.to_json(), rows, ARRAYS, comparison.arrays)


def _checked(group: ReadJson) -> ReadJson:
    """A group of `moved`, validated. Raises ValueError, TypeError or KeyError."""
    return {
        "group": int(group["group"]),
        "delta_align": float(group["delta_align"]),
        "prompts": [
            {name: kind(prompt[name]) for name, kind in _PROMPT.items()}
            | {"places": [{name: kind(place[name]) for name, kind in _PLACE.items()} for place in prompt["places"]]}
            for prompt in group["prompts"]
        ],
    }
