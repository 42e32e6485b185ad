"""Table of runs: a row for each run with the settings that differ and the results."""

from __future__ import annotations

import importlib.util
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from spinal_jax.files import table, writable, write_whole
from spinal_jax.jsontypes import Json
from spinal_jax.runs.find import Run

KEYS = ("run", "command", "complete")  # the first columns
TableRow = Json


def swept(runs: Sequence[Run]) -> list[str]:
    """Settings whose values differ between runs, in order of definition."""
    seen: dict[str, set[str]] = {}
    for run in runs:
        for name, value in run.settings.items():
            seen.setdefault(name, set()).add(json.dumps(value))
    return [name for name, values in seen.items() if len(values) > 1]


def run_rows(runs: Sequence[Run], names: Mapping[Path, str]) -> list[TableRow]:
    """A mapping for each run with equal keys: run, differing settings, results; None or NaN if a run lacks one. A
    setting with the name of a result is called `setting:NAME`."""
    settings = swept(runs)
    results = list(dict.fromkeys(name for run in runs for name in run.results))
    titles = {name: f"setting:{name}" if name in (*results, *KEYS) else name for name in settings}
    return [
        {
            **dict(zip(KEYS, (names[run.folder], run.command, run.complete), strict=True)),
            **{titles[name]: _cell(run.settings.get(name)) for name in settings},
            **{name: run.results.get(name, math.nan) for name in results},
        }
        for run in runs
    ]


def _cell(value: object) -> object:
    return json.dumps(value) if isinstance(value, list) else value


def write_csv(rows: Sequence[TableRow], file: Path) -> None:
    """Writes the rows as CSV; unknown values are empty fields."""
    write_whole(file, table(rows).encode())


def has_parquet() -> bool:
    """Whether the package that writes Parquet is installed."""
    return importlib.util.find_spec("pyarrow") is not None


def write_parquet(rows: Sequence[TableRow], file: Path) -> None:
    """Writes the rows as Parquet; columns of mixed type are strings, unknown values null."""
    import pyarrow
    from pyarrow import parquet

    columns: dict[str, Sequence[object]] = {}
    for name in rows[0]:
        values = [None if isinstance(row[name], float) and math.isnan(row[name]) else row[name] for row in rows]
        kinds = {type(value) for value in values if value is not None}
        if kinds == {int, float}:
            values = [None if value is None else float(value) for value in values]
        elif len(kinds) > 1:
            values = [None if value is None else str(value) for value in values]
        columns[name] = [writable(value) if isinstance(value, str) else value for value in values]
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), buffer)
    write_whole(file, buffer.getvalue())
