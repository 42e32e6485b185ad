"""The traces of a training run that somebody else runs: each compared with the first, in one folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spinal_jax.audit.measure import PolicyDistance
from spinal_jax.audit.trace import DepthTrace, save_trace
from spinal_jax.comparison.compare import BothModels, compare_traces
from spinal_jax.comparison.onset import Rules, StepRecord, detect, recall, record_of, save_onset
from spinal_jax.comparison.record import save_comparison
from spinal_jax.errors import UserError
from spinal_jax.files import load_json_file, load_json_lines, malformed, read_text, write_whole
from spinal_jax.report.training import write_training_report
from spinal_jax.report.training_figures import trace_figure
from spinal_jax.runs.tensorboard import Events
from spinal_jax.runs.training_run import METRICS, ONSET, SETTINGS, TRACES

SCALARS = ("delta_align", "delta_contraction", "delta_transport", "coherence")


class TraceSeries:
    """Writes `traces/step_N/`, `onset.json`, `metrics.jsonl`, `report.html` and TensorBoard events, each file whole."""

    def __init__(self, folder: Path, config: Mapping[str, Any], rules: Rules):
        """Opens the folder, or goes on where a run with the same settings stopped.

        Args:
            folder: is made where it does not exist.
            config: the settings, written to settings.json.
            rules: by which onset and destabilisation are detected.

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
                folder_of = {step: self.trace_folder(step) for step in self._steps_on_disk()}
                self.records, self.beside, _ = recall(load_json_file(folder / ONSET), folder_of)
        for step in self._steps_on_disk():  # a trace that no onset.json knows was cut off while it was written
            if step not in self.steps:
                shutil.rmtree(self.trace_folder(step))
        self.detected = detect(self.records, self.beside, rules)
        self._events = Events(folder, self.steps[-1] + 1 if self.records else 0)

    @property
    def steps(self) -> list[int]:
        """Steps that have a trace, ascending."""
        return [record.step for record in self.records]

    def _steps_on_disk(self) -> list[int]:
        return sorted(int(path.name.rpartition("_")[2]) for path in (self.folder / TRACES).glob("step_*"))

    def trace_folder(self, step: int) -> Path:
        """The folder of the trace of a step."""
        return self.folder / TRACES / f"step_{step:06}"

    def add(
        self, step: int, trace: DepthTrace, first: DepthTrace, policy: PolicyDistance, beside: Mapping[str, float]
    ) -> dict[str, Any]:
        """Writes the trace of a step that is later than all before, and returns the content of onset.json.

        Args:
            step: of the optimiser.
            trace: the checkpoint's.
            first: the reference's, the same object at the first step.
            policy: distance and divergence of the outputs from those of the reference.
            beside: metrics known at that step.
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

    def logged(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, as an earlier run left them."""
        file = self.folder / METRICS
        return load_json_lines(file) if file.exists() else []

    def metrics(self, lines: list[dict[str, Any]]) -> None:
        """Writes metrics.jsonl anew, a line for each mapping."""
        write_whole(self.folder / METRICS, "".join(json.dumps(line) + "\n" for line in lines).encode())

    def report(self) -> None:
        """Draws report.html and its figures anew."""
        write_training_report(self.folder)

    def close(self) -> None:
        """Closes TensorBoard's file."""
        self._events.close()
