# ruff: noqa: RUF001 (typographic dashes and minus signs are meant)
"""The depth trace of one checkpoint as a frozen record, and its file forms: JSON, CSV and safetensors."""

from __future__ import annotations

import csv
import html
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save
from scipy.special import stdtrit

from spinal_jax.errors import UserError

SCHEMA = "spinal-trace/1"

# fmt: off
# The keys each section must hold, in the order in which they are written; further keys follow, sorted.
SECTIONS: dict[str, tuple[str, ...]] = {
    "model": ("name", "source", "revision", "family", "parameters", "layers", "width", "vocabulary", "dtype", "sha256"),
    "prompts": ("source", "format", "count", "skipped_empty", "groups", "tokens", "rows", "positions", "max_length",
                "chat_template", "sha256"),
    "settings": ("window", "skip", "center", "positions", "top_k", "temperature", "groups"),
    "columns": ("contraction", "contraction_se", "fit_r2", "fit_quadratic", "rank", "effective_rank",
                "effective_rank_se", "transport", "transport_se", "entropy", "entropy_se", "curvature", "curvature_se"),
    "summary": ("terminal", "contraction", "contraction_se", "transport", "transport_se", "coherence", "coherence_se",
                "directness", "directness_se", "path_length", "path_length_se", "degrees_of_freedom"),
    "environment": (),
}
# fmt: on
UNITS = {"transport": "rad", "entropy": "nats", "curvature": "rad", "path_length": "rad"}


@dataclass(frozen=True, eq=False, repr=False)
class DepthTrace:
    """What one audit measured, by boundary 0..D (docs/method.md).

    Attributes:
      model, prompts, settings, environment: plain records of what was measured, on what, how and where;
        `prompts["rows"]` is N, the rows behind the contraction, `prompts["positions"]` the positions behind transport.
      columns: name -> float64 [D+1], NaN where undefined. `X_se` is the jackknife standard error of `X`. Transport and
        curvature are in radians, entropy in nats, the rest has no unit.
      summary: numbers of the terminal block and of the whole path with their standard errors, NaN where undefined.
      warnings: sentences that a reader of the numbers must know.
      arrays: what trace.json is too small for. "singular_values" [D+1, d], descending, zero padded;
        "groups/singular_values" [G, D+1, d] and any other "groups/NAME" [G, ...]: the same without group g.

    Raises:
      ValueError: a section lacks a key, columns differ in length, or singular values do not match the boundaries.
    """

    model: Mapping[str, Any]
    prompts: Mapping[str, Any]
    settings: Mapping[str, Any]
    columns: Mapping[str, np.ndarray]
    summary: Mapping[str, Any]
    environment: Mapping[str, Any]
    warnings: tuple[str, ...] = ()
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for section, keys in SECTIONS.items():
            missing = [key for key in keys if key not in getattr(self, section)]
            if missing:
                raise ValueError(f"{section} has no {', '.join(missing)}")
        columns = {name: _frozen(np.array(values, np.float64)) for name, values in self.columns.items()}
        shape = columns["contraction"].shape
        for name, values in columns.items():
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
        object.__setattr__(self, "columns", columns)
        object.__setattr__(self, "arrays", arrays)
        object.__setattr__(self, "warnings", tuple(self.warnings))

    @property
    def boundaries(self) -> int:
        """D + 1."""
        return len(self.columns["contraction"])

    @property
    def depth(self) -> int:
        """D, the number of decoder blocks."""
        return self.boundaries - 1

    @property
    def terminal(self) -> tuple[int, int]:
        """First and last boundary of the terminal block, both included."""
        first, last = self.summary["terminal"]
        return int(first), int(last)

    @property
    def singular_values(self) -> np.ndarray | None:
        """[D+1, d], descending and zero padded, or None for a trace without its arrays."""
        return self.arrays.get("singular_values")

    @property
    def group_singular_values(self) -> np.ndarray | None:
        """[G, D+1, d], of the pool without group g, or None for a trace without its arrays."""
        return self.arrays.get("groups/singular_values")

    @property
    def t_quantile(self) -> float:
        """How many standard errors half a 95 % interval is: the 0.975 quantile of Student's t; NaN without groups."""
        freedom = self.summary["degrees_of_freedom"]
        return float(stdtrit(freedom, 0.975)) if freedom >= 1 else math.nan

    def interval(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        """95 % interval (low, high), each [D+1], of a column that has a standard error; NaN where there is none."""
        if column not in self.columns or f"{column}_se" not in self.columns:
            known = [name for name in self.columns if f"{name}_se" in self.columns]
            raise UserError(f"column {column!r} has no standard error; the columns that have one: {', '.join(known)}")
        half = self.t_quantile * self.columns[f"{column}_se"]
        return self.columns[column] - half, self.columns[column] + half

    def summary_interval(self, name: str) -> tuple[float, float]:
        """95 % interval (low, high) of a number of the summary; NaN where there is none."""
        if f"{name}_se" not in self.summary:
            known = [key for key in self.summary if f"{key}_se" in self.summary]
            raise UserError(f"{name!r} has no standard error in the summary; what has one: {', '.join(known)}")
        half = self.t_quantile * self.summary[f"{name}_se"]
        return self.summary[name] - half, self.summary[name] + half

    def to_json(self) -> str:
        """The text of trace.json: equal traces give equal bytes; NaN is null; `arrays` are not in it."""
        sections = {name: ordered(getattr(self, name), keys) for name, keys in SECTIONS.items()}
        document: dict[str, Any] = {"schema": SCHEMA}
        for name in ("model", "prompts", "settings"):
            document[name] = sections[name]
        document["boundaries"] = self.boundaries
        for name in ("columns", "summary", "environment"):
            document[name] = sections[name]
        document["warnings"] = list(self.warnings)
        lines = ",\n".join(f"  {json.dumps(key)}: {two_levels(value)}" for key, value in document.items())
        return "{\n" + lines + "\n}\n"

    @classmethod
    def from_json(cls, text: str, arrays: Mapping[str, np.ndarray] | None = None) -> DepthTrace:
        """The inverse of `to_json`.

        Raises:
          UserError: not JSON, another schema version, or a section, key or length that does not fit the schema.
        """
        try:
            document = json.loads(text)
        except ValueError as error:
            raise UserError(f"the trace is not valid JSON: {error}") from error
        schema = document.get("schema") if isinstance(document, dict) else None
        if schema != SCHEMA:
            raise UserError(f"the trace says schema {schema!r}; this version of spinal_jax reads {SCHEMA!r}")
        try:
            sections = {name: dict(document[name]) for name in SECTIONS}
            sections["columns"] = {name: floats(name, values) for name, values in sections["columns"].items()}
            sections["summary"] = {name: _number(name, value) for name, value in sections["summary"].items()}
            trace = cls(**sections, warnings=tuple(document["warnings"]), arrays=arrays or {})
        except KeyError as error:
            raise UserError(f"the trace is malformed: it has no {error.args[0]}") from error
        except (TypeError, ValueError) as error:
            raise UserError(f"the trace is malformed: {error}") from error
        if (said := document.get("boundaries")) != trace.boundaries:
            raise UserError(f"the trace is malformed: it says {said} boundaries, its columns have {trace.boundaries}")
        return trace

    def rows(self, step: int = 0) -> list[dict[str, Any]]:
        """Long form: one dict per metric and boundary; `low` and `high` are NaN where a metric has no interval."""
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
        for name in ("contraction", "transport", "entropy", "curvature", "effective_rank"):
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
    """The trace of a run folder, or of a trace.json; its arrays come from spectra.safetensors beside it, if there.

    Raises:
      UserError: nothing there, another schema version, or a file that cannot be read.
    """
    path = Path(path)
    file = path / "trace.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"no trace at {path}: give a run folder that holds trace.json, or the path of a trace.json")
    spectra = file.with_name("spectra.safetensors")
    try:
        text = file.read_text(encoding="utf-8")
        arrays = load(spectra.read_bytes()) if spectra.is_file() else {}
        return DepthTrace.from_json(text, arrays)
    except SafetensorError as error:
        raise UserError(f"{spectra} cannot be read: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def save_trace(trace: DepthTrace, folder: str | os.PathLike[str], step: int = 0) -> None:
    """Writes spectra.safetensors (when there are arrays), trace.csv and, last, trace.json; each appears whole."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    spectra = folder / "spectra.safetensors"
    if trace.arrays:
        # safetensors writes the buffer as it lies in memory, so a strided view would come back scrambled.
        write_whole(spectra, save({name: np.ascontiguousarray(a) for name, a in trace.arrays.items()}))
    else:
        spectra.unlink(missing_ok=True)
    rows = trace.rows(step)
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()})
    write_whole(folder / "trace.csv", table.getvalue().encode())
    write_whole(folder / "trace.json", trace.to_json().encode())


def write_whole(path: Path, data: bytes) -> None:
    """Writes the file under a temporary name, then renames it, so that nobody ever sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def decimals(value: float, digits: int = 3) -> int:
    """How many decimals show `value` to `digits` significant digits."""
    if value == 0 or not math.isfinite(value):
        return digits - 1
    return max(0, digits - 1 - math.floor(math.log10(abs(value))))


def number(value: float, digits: int = 3) -> str:
    """`value` to `digits` significant digits, in plain notation unless it is tiny; an en dash for NaN."""
    if not math.isfinite(value):
        return "–"
    if 0 < abs(value) < 1e-4:
        return f"{value:.{digits - 1}e}".replace("-", "−")
    return f"{value:,.{decimals(value, digits)}f}".replace("-", "−")


def plus_minus(value: float, half: float) -> str:
    """`value ± half` with equal decimals: three significant digits of the value, at least one of the half."""
    if not math.isfinite(value) or not math.isfinite(half):
        return number(value)
    places = min(max(decimals(value), decimals(half, 1) if half else 0), 6)
    return f"{value:,.{places}f} ± {half:.{places}f}".replace("-", "−")


def _frozen(values: np.ndarray) -> np.ndarray:
    view = values.view()
    view.flags.writeable = False
    return view


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: NaN -> None, arrays and tuples -> lists, mappings by sorted key."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(value[key]) for key in sorted(value)}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def ordered(section: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: plain(section[key]) for key in (*keys, *sorted(set(section) - set(keys)))}


def two_levels(value: Any) -> str:
    """JSON with one line per key of a section, so that a trace diffs well and a column stays on its line."""
    if not isinstance(value, dict) or not value:
        return json.dumps(value, allow_nan=False)
    lines = ",\n".join(f"    {json.dumps(k)}: {json.dumps(v, allow_nan=False)}" for k, v in value.items())
    return "{\n" + lines + "\n  }"


def floats(name: str, values: Any) -> np.ndarray:
    known = isinstance(values, list) and all(type(value) in (float, int, type(None)) for value in values)
    if not known:
        raise ValueError(f"column {name} is not a list of numbers and nulls")
    return np.array([math.nan if value is None else value for value in values], np.float64)


def _number(name: str, value: Any) -> Any:
    if name == "terminal":
        return value
    if type(value) not in (float, int, type(None)):
        raise ValueError(f"summary {name} is not a number or null")
    return math.nan if value is None else value


def sparkline(values: np.ndarray, first: int, width: int = 180, height: int = 30) -> str:
    """A column over depth as a small inline SVG in the text's colour, the terminal block shaded."""
    seen = values[np.isfinite(values)]
    if not len(seen):
        return ""
    step = width / len(values)
    low, span = seen.min(), np.ptp(seen) or 1.0
    points = [
        f"{(at + 0.5) * step:.1f},{height - 3 - (v - low) / span * (height - 6):.1f}"
        for at, v in enumerate(values)
        if np.isfinite(v)
    ]
    return (
        f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" aria-label="over depth">'
        f'<rect x="{first * step:.1f}" width="{width - first * step:.1f}" height="{height}" fill="currentColor" '
        f'opacity="0.1"/><polyline points="{" ".join(points)}" fill="none" stroke="currentColor"/></svg>'
    )
