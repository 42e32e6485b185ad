"""What a training run has left in its folder, read for figures and page."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from spinal_jax.audit.trace import DepthTrace, load_trace
from spinal_jax.comparison.onset import detect
from spinal_jax.comparison.record import Comparison, load_comparison
from spinal_jax.comparison.sources import step_name
from spinal_jax.comparison.step_records import recall
from spinal_jax.errors import UserError
from spinal_jax.files import load_json_file, load_json_lines, malformed

SETTINGS, METRICS, ONSET, TRACES = "settings.json", "metrics.jsonl", "onset.json", "traces"


@dataclass(frozen=True, eq=False)
class TrainingRun:
    """A run as its files tell it.

    Attributes:
      settings: what the run was started with: "config", and hashes of what was read.
      metrics: one mapping a line of metrics.jsonl, by ascending step; a line holds what was known at its step.
      traces: the depth traces, by ascending step.
      comparisons: each of them compared with `origin`, which is the first unless a watched run had a reference.
      onset: what onset.json holds, found anew from the comparisons; its records belong to the traces.
    """

    settings: Mapping[str, Any]
    metrics: tuple[Mapping[str, Any], ...]
    traces: tuple[DepthTrace, ...]
    comparisons: tuple[Comparison, ...]
    onset: Mapping[str, Any]

    @property
    def records(self) -> list[Mapping[str, Any]]:
        """One mapping a trace: its step, Delta_align and terminal transport with their errors, what stood beside."""
        return list(self.onset["records"])

    @property
    def steps(self) -> np.ndarray:
        """[R] the steps of the traces."""
        return np.array([record["step"] for record in self.records])

    @property
    def config(self) -> Mapping[str, Any]:
        """The settings of `spinal train`."""
        return self.settings["config"]

    @property
    def is_watched(self) -> bool:
        """Whether the training was somebody else's, and its settings are not known."""
        return "objective" not in self.config

    @property
    def origin(self) -> str:
        """What every trace is compared with, in words: the first step, or the reference."""
        first = self.comparisons[0]
        return f"step {self.steps[0]}" if first.aligned["sha256"] == first.reference["sha256"] else "the reference"

    @property
    def last_step(self) -> int:
        """The last step of which anything is known."""
        return max(int(self.steps[-1]), *(int(line["step"]) for line in self.metrics[-1:]), 0)

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of a metric where it is a finite number; both empty where it never is."""
        found = [(line["step"], line[name]) for line in self.metrics if _is_number(line.get(name))]
        steps, values = zip(*found, strict=True) if found else ((), ())
        return np.array(steps), np.array(values, float)

    def recorded(self, name: str) -> np.ndarray:
        """[R] a number of each record, NaN where it is not known."""
        return np.array([r[name] if _is_number(r.get(name)) else math.nan for r in self.records], float)

    def block_norms(self) -> tuple[np.ndarray, np.ndarray]:
        """Steps [S] and the gradient's norms by block [S, D]; both empty where none was logged."""
        depth = self.traces[0].depth
        found = [(line["step"], line["block_grad_norms"]) for line in self.metrics if line.get("block_grad_norms")]
        steps = np.array([step for step, _ in found])
        return steps, np.array([norms for _, norms in found], float).reshape(len(found), depth)


def is_training_run(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a training run."""
    return (Path(folder) / ONSET).is_file()


def load_training_run(folder: str | os.PathLike[str]) -> TrainingRun:
    """The run of a folder.

    Raises:
      UserError: no training run there, or a file of it that cannot be read.
    """
    folder = Path(folder)
    if not is_training_run(folder):
        raise UserError(f"no training run at {folder}: give the folder of a run, which holds {ONSET} and {TRACES}")
    onset = load_json_file(folder / ONSET, finite=True)
    log = folder / METRICS
    lines = load_json_lines(log) if log.exists() else []
    with malformed(folder / ONSET):
        at = {int(record["step"]): folder / TRACES / step_name(record["step"]) for record in onset["records"]}
    if not at:
        raise UserError(f"{folder / ONSET} has no records, so there is nothing to draw")
    with malformed(log):
        lines.sort(key=lambda line: line["step"])
    traces = tuple(replace(load_trace(path), arrays={}) for path in at.values())  # large spectra, which are not drawn
    comparisons = tuple(load_comparison(path) for path in at.values())
    with malformed(folder / ONSET):
        told = detect(*recall(onset, at))
    return TrainingRun(load_json_file(folder / SETTINGS), tuple(lines), traces, comparisons, told)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
