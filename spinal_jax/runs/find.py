"""Finds run folders of all commands and reads their settings and results."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from spinal_jax.audit.trace import DepthTrace, load_trace
from spinal_jax.comparison.record import load_comparison
from spinal_jax.comparison.sources import step_name
from spinal_jax.errors import UserError
from spinal_jax.files import SCRATCH, flat, load_json_file, load_json_lines, malformed
from spinal_jax.jsontypes import Json, ReadJson
from spinal_jax.runs.folder import MANIFEST, SCHEMA, without_free
from spinal_jax.runs.training_run import METRICS, ONSET, SETTINGS, TRACES

Value = float | str  # of a cell; a number that is not known is NaN
OF_TRACE = ("contraction", "contraction_se", "transport", "transport_se", "coherence", "directness")
OF_COMPARISON = (
    *("verdict", "delta_align", "delta_align_low", "delta_align_high", "p_value"),
    *("delta_contraction", "delta_transport", "coherence", "gradient_concentration", "spinal_score"),
)
OF_PLACE = ("centroid", "share")  # of each measure's localisation


@dataclass(frozen=True, eq=False)
class Run:
    """One run folder.

    Attributes:
        folder: where it lies.
        command: audit, compare or train.
        complete: whether it has finished. Results of incomplete runs are not read.
        settings: all settings by dotted name.
        results: numbers, and words such as the verdict.
        trace: the last depth trace, for a comparison that of the aligned model; None without one.
    """

    folder: Path
    command: str
    complete: bool
    settings: ReadJson
    results: Mapping[str, Value] = field(default_factory=dict)
    trace: DepthTrace | None = None


def find_runs(folders: Iterable[str | os.PathLike[str]]) -> list[Run]:
    """All runs in or below the folders, each once, sorted by path.

    Raises:
        UserError: a folder is not there, none holds a run, or a file of a complete run cannot be read.
    """
    places: dict[Path, Path] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder; give folders that hold runs")
        for path in _run_folders(folder):
            places.setdefault(path.resolve(), path)
    if not places:
        raise UserError(f"no run in or below {', '.join(map(str, folders))}: a run folder holds {MANIFEST}")
    return [read_run(path) for _, path in sorted(places.items())]


def _run_folders(folder: Path) -> Iterable[Path]:
    """Run folders in or below a folder. Run folders are not nested."""
    for path, below, files in os.walk(folder):
        killed = any(name.startswith(SCRATCH) for name in below)
        ours = _manifest(Path(path)) if MANIFEST in files else {}
        if ours or SETTINGS in files or killed:
            if ours.get("command") not in APART:
                yield Path(path)
            below.clear()


def _manifest(folder: Path) -> Json:
    """The manifest of a run; empty for files of other programs."""
    manifest = load_json_file(folder / MANIFEST)
    return manifest if manifest.get("schema") == SCHEMA else {}


def read_run(folder: Path) -> Run:
    """Reads a run folder. Raises UserError for an unreadable file of a complete run."""
    if not (folder / MANIFEST).exists():
        config = load_json_file(folder / SETTINGS).get("config", {}) if (folder / SETTINGS).exists() else {}
        if not isinstance(config, dict):
            raise UserError(f"{folder / SETTINGS} is malformed: its config is no object")
        return Run(folder, "train" if config else "", False, flat(without_free(config)))
    manifest = _manifest(folder)
    with malformed(folder / MANIFEST):
        command, settings = str(manifest["command"]), flat(without_free(dict(manifest["config"])))
    if command not in READERS:
        raise UserError(f"{folder} is a run of {command!r}; runs of {', '.join(READERS)} can be collected")
    with malformed(folder):
        results, trace = READERS[command](folder)
    return Run(folder, command, True, settings, results, None if trace is None else replace(trace, arrays={}))


def _audit(folder: Path) -> tuple[dict[str, Value], DepthTrace]:
    trace = load_trace(folder)
    return {name: trace.summary[name] for name in OF_TRACE}, trace


def _compare(folder: Path) -> tuple[dict[str, Value], DepthTrace | None]:
    aligned = folder / "aligned"
    return _comparison(folder), load_trace(aligned) if aligned.exists() else None


def _train(folder: Path) -> tuple[dict[str, Value], DepthTrace]:
    onset = load_json_file(folder / ONSET, finite=True)
    last = folder / TRACES / step_name(onset["records"][-1]["step"])
    trace = load_trace(last)
    lines = load_json_lines(folder / METRICS)
    logged: dict[str, Value] = {}
    for line in lines:
        logged |= {name: float(value) for name, value in line.items() if isinstance(value, float)}
    shares = [_share(line["block_grad_norms"], trace.terminal) for line in lines if line.get("block_grad_norms")]
    results: dict[str, Value] = {
        "steps": float(max(line["step"] for line in lines)),
        **_audit(last)[0],
        **_comparison(last),
        "kl": _number(onset["records"][-1].get("kl")),
        "gradient_share_first": shares[0] if shares else math.nan,
        "gradient_share_mean": float(np.mean(shares)) if shares else math.nan,
    }
    for name in ("onset", "destabilisation"):
        results[name] = float(onset[name]["step"]) if onset[name] else math.nan
    return {**results, **logged}, trace


def _comparison(folder: Path) -> dict[str, Value]:
    summary = load_comparison(folder).summary
    results: dict[str, Value] = {name: summary[name] for name in OF_COMPARISON}
    for measure, place in summary["localisation"].items():
        results |= {f"{measure}_{what}": _number(place[what]) for what in OF_PLACE}
    return results


def _share(norms: Sequence[float], terminal: tuple[int, int]) -> float:
    """Share of the terminal block in the gradient norms of blocks; block l ends at boundary l."""
    first, last = terminal
    return float(sum(norms[first - 1 : last]) / sum(norms)) if sum(norms) else math.nan


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


READERS: dict[str, Callable[[Path], tuple[dict[str, Value], DepthTrace | None]]] = {
    "audit": _audit,
    "compare": _compare,
    "train": _train,
}
APART = ("plan", "attribute")  # commands without results to collect
