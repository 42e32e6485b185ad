"""The depth trace of one checkpoint as a frozen record, and its files: JSON, CSV and safetensors."""

from __future__ import annotations

import html
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy.special import stdtrit

from spinal_jax.errors import UserError
from spinal_jax.files import Document, check_boundaries, document, floats, load_record, read, save_record
from spinal_jax.jsontypes import Json, ReadJson
from spinal_jax.metrics import columns
from spinal_jax.wording import number, plus_minus, sparkline

SCHEMA = "spinal-trace/2"
SUPERSEDED = {
    "spinal-trace/1": "its contraction was fitted over ranks that depend on N and on the largest singular value, so it "
    "compares with no trace of this version; measure again with spinal audit on the same checkpoint and prompts"
}
ARRAYS = "spectra.safetensors"

# fmt: off
# Required keys of each section, in the order of the file; other keys follow, sorted.
SECTIONS: dict[str, tuple[str, ...]] = {
    "model": ("name", "source", "revision", "family", "parameters", "layers", "width", "vocabulary",
              "vocabulary_tokens", "vocabulary_sha256", "dtype", "sha256"),
    "prompts": ("source", "format", "count", "skipped_empty", "groups", "tokens", "rows", "positions", "max_length",
                "chat_template", "sha256"),
    "settings": ("window", "skip", "center", "positions", "top_k", "temperature", "groups", "ranks", "resolution",
                 "terminal"),
    "columns": columns.names(columns.TRACE),
    "summary": ("terminal", *columns.names(columns.SUMMARY), "degrees_of_freedom"),
    "environment": (),
}
# fmt: on
BOUNDS = {column.name: column.bounds for column in columns.TRACE}
SUMMARY_BOUNDS = {column.name: column.bounds for column in columns.SUMMARY}
UNITS = {column.name: column.unit for column in (*columns.SUMMARY, *columns.TRACE) if column.unit}


@dataclass(frozen=True, eq=False, repr=False)
class DepthTrace(Document):
    """Result of an audit, by boundary 0..D (docs/method.md).

    Attributes:
      model, prompts, settings, environment: descriptions of the inputs. `prompts["rows"]` is N, the number of rows of
        contraction; `prompts["positions"]` is the number of positions of transport.
      columns: name -> float64 [D+1], NaN where undefined. `X_se` is the jackknife standard error of `X`. Transport and
        curvature are in radians, entropy in nats, the rest has no unit.
      summary: numbers of the terminal block and of the whole path with their standard errors, NaN where undefined.
      warnings: one sentence each.
      arrays: saved in spectra.safetensors. "singular_values" [D+1, d], descending, zero padded;
        "groups/singular_values" [G, D+1, d] and other "groups/NAME" [G, ...]: without each group.

    Raises:
      ValueError: a section lacks a key, columns differ in length, or singular values do not match the boundaries.
    """

    model: ReadJson
    prompts: ReadJson
    settings: ReadJson
    columns: Mapping[str, np.ndarray]
    summary: ReadJson
    environment: ReadJson
    warnings: tuple[str, ...] = ()
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for section, keys in SECTIONS.items():
            missing = [key for key in keys if key not in getattr(self, section)]
            if missing:
                raise ValueError(f"{section} has no {', '.join(missing)}")
        by_name = {name: _frozen(np.array(values, np.float64)) for name, values in self.columns.items()}
        shape = by_name["contraction"].shape
        for name, values in by_name.items():
            if values.ndim != 1 or len(values) < 2 or values.shape != shape:
                raise ValueError(
                    f"column {name} has shape {values.shape}; every column has one value per boundary, {shape}"
                )
        arrays = {name: _frozen(np.asarray(values)) for name, values in self.arrays.items()}
        for name, axis in (("singular_values", 0), ("groups/singular_values", 1)):
            if name in arrays and (arrays[name].ndim != axis + 2 or arrays[name].shape[axis] != shape[0]):
                raise ValueError(f"{name} has shape {arrays[name].shape}, which does not fit {shape[0]} boundaries")
        first, last = self.summary["terminal"]
        if not 1 <= first <= last < shape[0]:
            raise ValueError(f"the terminal block {first}..{last} does not lie within boundaries 1..{shape[0] - 1}")
        object.__setattr__(self, "columns", by_name)
        object.__setattr__(self, "arrays", arrays)
        object.__setattr__(self, "warnings", tuple(self.warnings))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes trace.json, trace.csv and spectra.safetensors into a folder, which `load_trace` reads."""
        save_trace(self, folder)

    @property
    def singular_values(self) -> np.ndarray | None:
        """[D+1, d], descending and zero padded, or None for a trace without arrays."""
        return self.arrays.get("singular_values")

    @property
    def group_singular_values(self) -> np.ndarray | None:
        """[G, D+1, d] without each group, or None for a trace without arrays."""
        return self.arrays.get("groups/singular_values")

    @property
    def t_quantile(self) -> float:
        """The 0.975 quantile of Student's t, the half-width of intervals in standard errors; NaN without groups."""
        freedom = self.summary["degrees_of_freedom"]
        return float(stdtrit(freedom, 0.975)) if freedom >= 1 else math.nan

    def interval(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        """95 % interval (low, high), each [D+1], of a column with a standard error, clipped to the
        bounds of the column."""
        if column not in self.columns or f"{column}_se" not in self.columns:
            known = [name for name in self.columns if f"{name}_se" in self.columns]
            raise UserError(f"column {column!r} has no standard error; the columns that have one: {', '.join(known)}")
        half = self.t_quantile * self.columns[f"{column}_se"]
        least, most = BOUNDS.get(column, (-math.inf, math.inf))
        low, high = self.columns[column] - half, self.columns[column] + half
        return np.clip(low, least, None), np.clip(high, None, most)

    def summary_interval(self, name: str) -> tuple[float, float]:
        """95 % interval (low, high) of a number of the summary, clipped to its bounds; NaN without a standard
        error."""
        if f"{name}_se" not in self.summary:
            known = [key for key in self.summary if f"{key}_se" in self.summary]
            raise UserError(f"{name!r} has no standard error in the summary; what has one: {', '.join(known)}")
        half = self.t_quantile * self.summary[f"{name}_se"]
        least, most = SUMMARY_BOUNDS[name]
        low, high = self.summary[name] - half, self.summary[name] + half
        return (math.nan, math.nan) if math.isnan(half) else (max(low, least), min(high, most))

    def to_json(self) -> str:
        """The text of trace.json: equal traces give equal bytes; NaN is null; `arrays` are not in it."""
        return document(SCHEMA, SECTIONS, self)

    @classmethod
    def from_json(cls, text: str, arrays: Mapping[str, np.ndarray] | None = None) -> DepthTrace:
        """The inverse of `to_json`.

        Raises:
          UserError: not JSON, another schema version, or a section, key or length that does not fit the schema.
        """
        with read(text, "trace", SCHEMA, SUPERSEDED) as content:
            sections = {name: dict(content[name]) for name in SECTIONS}
            sections["columns"] = {name: floats(name, values) for name, values in sections["columns"].items()}
            sections["summary"] = {name: _number(name, value) for name, value in sections["summary"].items()}
            trace = cls(**sections, warnings=tuple(content["warnings"]), arrays=arrays or {})
            check_boundaries(content, trace.boundaries)
            return trace

    def rows(self, step: int = 0) -> list[Json]:
        """Long form: one dict per metric and boundary; `low` and `high` are NaN without an interval."""
        nothing = np.full(self.boundaries, math.nan)
        rows = []
        for metric, values in self.columns.items():
            if metric.endswith("_se"):
                continue
            low, high = self.interval(metric) if f"{metric}_se" in self.columns else (nothing, nothing)
            for at in range(self.boundaries):
                row = {"step": step, "boundary": at, "relative_depth": at / self.depth, "metric": metric}
                rows.append(row | {"value": float(values[at]), "low": float(low[at]), "high": float(high[at])})
        return rows

    def __repr__(self) -> str:
        model, prompts = self.model, self.prompts
        first, last = self.terminal
        lines = [
            f"DepthTrace of {model['name']}: {model['family']}, {self.depth} blocks, width {model['width']:,}",
            f"  prompts   {prompts['count']:,} from {prompts['source']}: {prompts['rows']:,} rows for contraction, "
            f"{prompts['positions']:,} positions for transport",
            f"  terminal  boundaries {first}..{last}: contraction {self._with_half('contraction')}, "
            f"transport {self._with_half('transport')}",
            f"  path      coherence {self._with_half('coherence')}, directness {self._with_half('directness')}, "
            f"length {self._with_half('path_length')}",
        ]
        return "\n".join(lines + [f"  warning   {warning}" for warning in self.warnings])

    def _repr_html_(self) -> str:
        first, last = self.terminal
        body = []
        for name in (column.name for column in columns.compared()):
            values, unit = self.columns[name], UNITS.get(name, "")
            seen = values[np.isfinite(values)]
            span = f"{number(seen.min())} to {number(seen.max())} {unit}".rstrip() if len(seen) else "not defined"
            inside = values[first : last + 1]
            inside = inside[np.isfinite(inside)]
            mean = number(inside.mean()) if len(inside) else "–"
            mean = self._with_half(name) if name in self.summary else f"{mean} {unit}".rstrip()
            label = name.replace("_", " ")
            body.append(f"<tr><th>{label}</th><td>{sparkline(values, first)}</td><td>{mean}</td><td>{span}</td></tr>")
        model, prompts = self.model, self.prompts
        heading = f"{model['name']} · {self.depth} blocks · {prompts['count']:,} prompts · {prompts['rows']:,} rows"
        path = ", ".join(
            f"{label} {self._with_half(name)}"
            for label, name in (("coherence", "coherence"), ("directness", "directness"), ("path", "path_length"))
        )
        notes = "".join(f"<div>⚠ {html.escape(warning)}</div>" for warning in self.warnings)
        return (
            f"<div><b>{html.escape(heading)}</b><table><thead><tr><th></th><th>boundary 0 to {self.depth}</th>"
            f"<th>mean of {first}..{last}</th><th>range</th></tr></thead><tbody>{''.join(body)}</tbody></table>"
            f"<div>{path} (± half of the 95 % interval)</div>{notes}</div>"
        )

    def _with_half(self, name: str) -> str:
        value = float(self.summary[name])
        half = self.t_quantile * self.summary[f"{name}_se"]
        return f"{plus_minus(value, half)} {UNITS.get(name, '')}".rstrip()


def load_trace(path: str | os.PathLike[str]) -> DepthTrace:
    """Loads the trace of a run folder or a trace.json, with spectra.safetensors if it exists.

    Raises:
      UserError: nothing there, another schema version, or a file that cannot be read.
    """
    return load_record(Path(path), "trace", ARRAYS, DepthTrace.from_json)


def save_trace(trace: DepthTrace, folder: str | os.PathLike[str], step: int = 0) -> None:
    """Writes spectra.safetensors (if there are arrays), trace.csv and, last, trace.json; each file atomically."""
    save_record(Path(folder), "trace", trace.to_json(), trace.rows(step), ARRAYS, trace.arrays)


def _frozen(values: np.ndarray) -> np.ndarray:
    view = values.view()
    view.flags.writeable = False
    return view


def _number(name: str, value: object) -> object:
    if name == "terminal":
        return value
    if type(value) not in (float, int, type(None)):
        raise ValueError(f"summary {name} is not a number or null")
    return math.nan if value is None else value
