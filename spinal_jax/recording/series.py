"""A series of traces in one folder, each compared with the first."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from spinal_jax.audit.measurement import PolicyDistance
from spinal_jax.audit.trace import DepthTrace, save_trace
from spinal_jax.comparison.compare import BothModels, compare_traces
from spinal_jax.comparison.onset import detect, save_onset
from spinal_jax.comparison.record import save_comparison
from spinal_jax.comparison.sources import step_folders, step_name
from spinal_jax.comparison.step_records import Rules, StepRecord, recall, record_of
from spinal_jax.errors import UserError
from spinal_jax.files import load_json_file, load_json_lines, malformed, read_text, write_whole
from spinal_jax.jsontypes import Json, ReadJson
from spinal_jax.report.training import write_training_report
from spinal_jax.report.training_figures import trace_figure
from spinal_jax.runs.tensorboard import Events
from spinal_jax.runs.training_run import METRICS, ONSET, SETTINGS, TRACES

SCALARS = ("delta_align", "delta_contraction", "delta_transport", "coherence")


class TraceSeries:
    """Writes `traces/step_N/`, `onset.json`, `metrics.jsonl`, `report.html` and TensorBoard events, each file
    atomically."""

    def __init__(self, folder: Path, config: ReadJson, rules: Rules):
        """Opens a new folder, or continues one with the same settings.

        Args:
            folder: created if it does not exist.
            config: the settings, written to settings.json.
            rules: of onset detection.

        Raises:
            UserError: the folder holds something else, or a run with other settings.
        """
        self.folder, self.rules = folder, rules
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"config": config}, indent=1) + "\n"
        settings = folder / SETTINGS
        if settings.exists():
            if read_text(settings) != text:
                raise UserError(f"{folder} holds a run with other settings; choose another folder")
        elif (folder / TRACES).exists() or (folder / "trace.json").exists():
            raise UserError(f"{folder} already holds another run; choose another folder")
        else:
            write_whole(settings, text.encode())
        (folder / TRACES).mkdir(exist_ok=True)
        self.records: list[StepRecord] = []
        self.beside: list[dict[str, float]] = []
        if (folder / ONSET).exists():
            with malformed(folder / ONSET):
                self.records, self.beside, _ = recall(load_json_file(folder / ONSET, finite=True), step_folders(folder))
        for step, cut_off in step_folders(folder).items():  # what no onset.json knows was cut off while it was written
            if step not in self.steps:
                shutil.rmtree(cut_off)
        self.detected = detect(self.records, self.beside, rules)
        self._events = Events(folder, self.steps[-1] + 1 if self.records else 0)

    @property
    def steps(self) -> list[int]:
        """Steps with a trace, ascending."""
        return [record.step for record in self.records]

    def trace_folder(self, step: int) -> Path:
        """The folder of the trace of a step."""
        return self.folder / TRACES / step_name(step)

    def add(
        self, step: int, trace: DepthTrace, first: DepthTrace, policy: PolicyDistance, beside: Mapping[str, float]
    ) -> Json:
        """Writes the trace of the next step and returns the content of onset.json.

        Args:
            step: optimiser step, larger than all before.
            trace: of the checkpoint.
            first: trace of the reference; the same object at the first step.
            policy: distance from the reference.
            beside: metrics of this step.
        """
        both = BothModels(
            policy_distance=policy.distance,
            policy_distance_without=policy.distance_without,
            kl=policy.divergence,
            kl_without=policy.divergence_without,
        )
        comparison = compare_traces(trace, first, both)
        target = self.trace_folder(step)
        save_trace(trace, target, step)
        save_comparison(comparison, target)
        self.records.append(record_of(step, comparison))
        self.beside.append({**beside, "kl": policy.divergence})
        self.detected = detect(self.records, self.beside, self.rules)
        scalars = {name: float(comparison.summary[name]) for name in SCALARS} | {"kl": policy.divergence}
        for name, value in (*trace.summary.items(), *scalars.items()):
            if isinstance(value, float):
                self._events.scalar(step, f"spinal/{name}", value)
        self._events.image(step, "spinal/depth_trace", trace_figure(trace, first))
        save_onset(self.detected, self.folder / ONSET)
        return self.detected

    def logged(self) -> list[Json]:
        """The lines of an existing metrics.jsonl."""
        file = self.folder / METRICS
        return load_json_lines(file) if file.exists() else []

    def metrics(self, lines: list[Json]) -> None:
        """Rewrites metrics.jsonl, one line for each mapping."""
        write_whole(self.folder / METRICS, "".join(json.dumps(line) + "\n" for line in lines).encode())

    def report(self) -> None:
        """Redraws report.html and its figures."""
        write_training_report(self.folder)

    def close(self) -> None:
        """Closes TensorBoard's file."""
        self._events.close()
