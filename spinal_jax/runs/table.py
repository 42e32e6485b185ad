"""The table of many runs: one row a run, with the settings in which they differ and what each came to."""

from __future__ import annotations

import importlib.util
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spinal_jax.files import table, writable, write_whole
from spinal_jax.runs.find import Run

KEYS = ("run", "command", "complete")  # the first columns
TableRow = dict[str, Any]


def swept(runs: Sequence[Run]) -> list[str]:
    """The settings that have different values in the runs that have them, in the order in which they are set."""
    seen: dict[str, set[str]] = {}
    for run in runs:
        for name, value in run.settings.items():
            seen.setdefault(name, set()).add(json.dumps(value))
    return [name for name, values in seen.items() if len(values) > 1]


def run_rows(runs: Sequence[Run], names: Mapping[Path, str]) -> list[TableRow]:
    """One mapping a run, all with the same keys: which run, the swept settings, and what it came to; None and NaN where
    a run does not have it. A setting and a number of one name are told apart as `setting:NAME`."""
    settings = swept(runs)
    found = list(dict.fromkeys(name for run in runs for name in run.found))
    titles = {name: f"setting:{name}" if name in (*found, *KEYS) else name for name in settings}
    return [
        {
            **dict(zip(KEYS, (names[run.folder], run.command, run.complete), strict=True)),
            **{titles[name]: _cell(run.settings.get(name)) for name in settings},
            **{name: run.found.get(name, math.nan) for name in found},
        }
        for run in runs
    ]


def _cell(value: object) -> Any:
    return json.dumps(value) if isinstance(value, list) else value


def write_csv(rows: Sequence[TableRow], file: Path) -> None:
    """The rows as CSV; what is not known is an empty field."""
    write_whole(file, table(rows).encode())


def has_parquet() -> bool:
    """Whether the package that writes Parquet is installed."""
    return importlib.util.find_spec("pyarrow") is not None


def write_parquet(rows: Sequence[TableRow], file: Path) -> None:
    """The rows as Parquet; a column of more than one type is one of texts, and what is not known is null."""
    import pyarrow
    from pyarrow import parquet

    columns: dict[str, list[Any]] = {}
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
