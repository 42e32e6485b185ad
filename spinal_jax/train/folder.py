"""The folder of a training run, written during the run, from which an interrupted run is resumed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spinal_jax.audit.trace import DepthTrace, save_trace
from spinal_jax.comparison.sources import step_folders, step_name
from spinal_jax.errors import UserError
from spinal_jax.files import flat, load_json_file, load_json_lines, malformed, write_whole
from spinal_jax.jsontypes import Json, ReadJson
from spinal_jax.report.training_figures import trace_figure
from spinal_jax.runs import folder as run_folder
from spinal_jax.runs.folder import MANIFEST, check_incomplete, without_free
from spinal_jax.runs.sinks import open_sink
from spinal_jax.runs.tensorboard import Events, hyperparameters

SETTINGS, METRICS, TRACES, CHECKPOINTS, MODEL, ONSET = (
    "settings.json",  # settings and inputs at the start
    "metrics.jsonl",
    "traces",
    "checkpoints",
    "model",
    "onset.json",
)
PARTS = (SETTINGS, METRICS, TRACES, CHECKPOINTS, MODEL, ONSET, MANIFEST, "figures", "report.html")
# Groups of settings, and settings, by which the runs of a sweep differ.


class TrainingFolder:
    """Writes the files of a run. Files appear atomically; metrics.jsonl grows by whole lines."""

    def __init__(self, folder: Path, started_with: ReadJson, overwrite: bool):
        """Opens the folder of a new run, or of an interrupted run with the same settings.

        Args:
            folder: of the run.
            started_with: resolved configuration and hashes of what was read.
            overwrite: remove the run that is there.

        Raises:
            UserError: the folder holds a complete run, or one that was started with other settings.
        """
        self._service = started_with["config"].get("logging")
        self.folder, self.started_with = folder, without_free(json.loads(json.dumps(started_with)))
        settings = folder / SETTINGS
        before = load_json_file(settings) if settings.exists() else None
        # A run of the same settings that was cut off goes on, whatever may be overwritten.
        if overwrite and ((folder / MANIFEST).exists() or before is None or self._differs(before)):
            self._clear()
            before = None
        check_incomplete(folder)
        there = [name for name in (*PARTS, *run_folder.PARTS) if (folder / name).exists()]
        if there and before is None:
            raise UserError(f"{folder} already holds {there[0]}, though no training run; choose another hydra.run.dir")
        if before is not None and (differs := self._differs(before)):
            raise UserError(
                f"{folder} holds an unfinished run with {differs}: make them equal to go on, set overwrite=true, or "
                "choose another hydra.run.dir"
            )
        if before is None:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(settings, (json.dumps(started_with, indent=1) + "\n").encode())
        (folder / TRACES).mkdir(exist_ok=True)
        self._events: Events | None = None
        self._log: Any = None
        self.before: Json = {}

    def _differs(self, before: ReadJson) -> str:
        """The first setting in which a run that was started with `before` differs from this one, in words; or ""."""
        with malformed(self.folder / SETTINGS):
            one, other = flat(without_free(before)), flat(self.started_with)
        for name in sorted(one.keys() | other.keys()):
            if one.get(name) != other.get(name):
                return f"{name} = {one.get(name)!r}, but this one has {other.get(name)!r}"
        return ""

    def _clear(self) -> None:
        for name in (*PARTS, *(path.name for path in self.folder.glob("events.out.tfevents.*"))):
            path = self.folder / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def go_on(self, step: int) -> None:
        """Deletes what was written at `step` and later, which is repeated, and opens the logs. The metrics of the step
        before are then in `before`."""
        log = self.folder / METRICS
        with malformed(log):
            kept = [line for line in load_json_lines(log) if line["step"] < step] if log.exists() else []
        write_whole(log, "".join(f"{json.dumps(line)}\n" for line in kept).encode())
        self.before = kept[-1] if kept else {}
        for traced, later in step_folders(self.folder).items():
            if traced >= step:
                shutil.rmtree(later)
        self._log = log.open("a", encoding="utf-8")
        settings = hyperparameters(self.started_with["config"])
        self._events = Events(self.folder, step, open_sink(self._service, self.folder, settings))
        self._events.hparams(settings)

    @property
    def events(self) -> Events:
        """The TensorBoard file of this run."""
        assert self._events is not None, "go_on opens it"
        return self._events

    def metrics(self, step: int, values: ReadJson) -> None:
        """Adds a line to metrics.jsonl, and scalars to TensorBoard with the tags of TRL."""
        self._log.write(json.dumps({"step": step, **values}) + "\n")
        self._log.flush()
        for name, value in values.items():
            if isinstance(value, float):
                held_out = name.startswith("eval_")
                self.events.scalar(step, f"{'eval' if held_out else 'train'}/{name.removeprefix('eval_')}", value)

    def trace(self, step: int, trace: DepthTrace, first: DepthTrace, beside: Mapping[str, float]) -> None:
        """Adds a trace to the folder, and to TensorBoard its summary, the numbers of `beside`, and a figure with the
        `first` trace."""
        save_trace(trace, self.folder / TRACES / step_name(step), step)
        for name, value in (*trace.summary.items(), *beside.items()):
            if isinstance(value, float):
                self.events.scalar(step, f"spinal/{name}", value)
        self.events.image(step, "spinal/depth_trace", trace_figure(trace, first))

    def close(self) -> None:
        """Closes the logs."""
        if self._log is not None:
            self._log.close()
            self.events.close()
