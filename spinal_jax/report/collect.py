"""`spinal collect`: table and page of the runs in folders."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spinal_jax.errors import UserError
from spinal_jax.files import writable, write_whole
from spinal_jax.report.collect_page import render_index
from spinal_jax.runs.find import Run, find_runs
from spinal_jax.runs.table import KEYS, has_parquet, run_rows, write_csv, write_parquet

INDEX, TABLE, PARQUET = "index.html", "runs.csv", "runs.parquet"
OURS = {INDEX: 'name="generator" content="spinal_jax"', TABLE: ",".join(KEYS)}  # what such a file of ours holds


@dataclass(frozen=True)
class Collected:
    """The runs and the written files."""

    runs: list[Run]
    files: list[Path]

    def __str__(self) -> str:
        incomplete = [run.folder for run in self.runs if not run.complete]
        kinds = {run.command for run in self.runs if run.command}
        count = f"{len(self.runs)} run{'' if len(self.runs) == 1 else 's'}"
        lines = [f"{count} ({', '.join(sorted(kinds))}), {len(incomplete)} of them incomplete"]
        lines += [f"  incomplete  {folder}" for folder in incomplete]
        return "\n".join([*lines, *(f"  {'page' if f.name == INDEX else 'table':<10}  {f}" for f in self.files)])


def collect_runs(folders: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str] | None = None) -> Collected:
    """Writes runs.csv, index.html and, where pyarrow is installed, runs.parquet of all runs in or below the folders.

    Args:
        folders: with runs.
        out: output folder; None is the single given folder.

    Raises:
        UserError: no run there, a file that cannot be read, no output folder, or a file of another program there.
    """
    if out is None and len(folders) != 1:
        raise UserError(f"{len(folders)} folders are given, so say where the table goes: out=DIR")
    target = Path(folders[0] if out is None else out)
    runs = find_runs(folders)
    for name, words in OURS.items():
        there = target / name
        if there.exists() and not (there.is_file() and _begins_with(there, words)):
            raise UserError(f"{there} is not of spinal collect, so it is not replaced; choose another out=DIR")
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {target} cannot be made: {error.strerror}") from error
    base = Path(os.path.commonpath([run.folder.resolve().parent for run in runs]))
    names = {run.folder: writable(run.folder.resolve().relative_to(base).as_posix()) for run in runs}
    table = run_rows(runs, names)
    write_csv(table, target / TABLE)
    files = [target / TABLE]
    if has_parquet():
        write_parquet(table, target / PARQUET)
        files.append(target / PARQUET)
    page = render_index(runs, names, target.resolve())
    write_whole(target / INDEX, page.encode("utf-8", errors="xmlcharrefreplace"))
    return Collected(runs, [*files, target / INDEX])


def _begins_with(file: Path, words: str) -> bool:
    """Whether some words are among the first of a file."""
    with file.open("rb") as opened:
        return words.encode() in opened.read(2000)
