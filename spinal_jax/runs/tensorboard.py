"""TensorBoard event files."""

from __future__ import annotations

import contextlib
import json
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[attr-defined]
from tensorboard.compat.proto.summary_pb2 import (
    DATA_CLASS_TENSOR,  # type: ignore[attr-defined]
    Summary,  # type: ignore[attr-defined]
    SummaryMetadata,  # type: ignore[attr-defined]
)
from tensorboard.compat.proto.tensor_pb2 import TensorProto  # type: ignore[attr-defined]
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto  # type: ignore[attr-defined]
from tensorboard.compat.proto.types_pb2 import DT_FLOAT  # type: ignore[attr-defined]
from tensorboard.plugins.hparams.plugin_data_pb2 import (
    HParamsPluginData,  # type: ignore[attr-defined]
    SessionEndInfo,  # type: ignore[attr-defined]
    SessionStartInfo,  # type: ignore[attr-defined]
)
from tensorboard.summary.writer.record_writer import RecordWriter

from spinal_jax.audit.trace import DepthTrace
from spinal_jax.comparison.record import Comparison
from spinal_jax.files import flat
from spinal_jax.runs.sinks import Sink

EVENTS = "events.out.tfevents.spinal"  # TensorBoard reads files with "tfevents" in their name
# Parts of the settings by which TensorBoard tells the runs of a sweep apart.
SWEPT = {
    *("model", "reference", "prompts", "metrics", "score"),
    *("objective", "preferences", "corpus", "optimizer", "lora", "steps", "epochs", "batch_size", "seed"),
}


def hyperparameters(config: Mapping[str, object]) -> dict[str, bool | float | str]:
    """Settings for the HParams page, by name; lists as text."""
    found = {name: value for name, value in flat(config).items() if name.partition(".")[0] in SWEPT}
    texts = {name: json.dumps(value) for name, value in found.items() if isinstance(value, list | tuple)}
    return {name: value for name, value in (found | texts).items() if isinstance(value, bool | int | float | str)}


class Events:
    """A TensorBoard event file, and an optional tracker that receives the same scalars."""

    def __init__(self, folder: Path, step: int = 0, sink: Sink | None = None):
        """Opens a new file in `folder`; events of older files at `step` and later are superseded."""
        self._sink = sink
        count = len(list(folder.glob(f"{EVENTS}*")))
        # TensorBoard reads the files of a folder in order of name.
        self._file = (folder / (EVENTS if not count else f"{EVENTS}.{count:03}")).open("wb")
        self._writer = RecordWriter(self._file)
        self._in_session = False
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if count:
            start = SessionLog(status=SessionLog.START)
            self._write(Event(wall_time=time.time(), step=step, session_log=start))

    def _write(self, event: Any) -> None:
        self._writer.write(event.SerializeToString())
        self._writer.flush()

    def add(self, step: int, summary: object) -> None:
        """Adds a summary as it is."""
        self._write(Event(wall_time=time.time(), step=step, summary=summary))

    def scalar(self, step: int, tag: str, value: float) -> None:
        """Adds a number, unless it is NaN."""
        if np.isfinite(value):
            self.add(step, Summary(value=[Summary.Value(tag=tag, simple_value=value)]))
            self._send(step, tag, value)

    def _send(self, step: int, tag: str, value: float) -> None:
        """Sends a scalar to the tracker; an error of the tracker does not end the run."""
        if self._sink is None:
            return
        try:
            self._sink.scalar(step, tag, float(value))
        except Exception as error:
            self._sink = None
            warnings.warn(f"the tracker of logging= failed at step {step} and gets no more: {error}", stacklevel=3)

    def image(self, step: int, tag: str, png: bytes) -> None:
        """Adds a picture."""
        self.add(step, Summary(value=[Summary.Value(tag=tag, image=Summary.Image(encoded_image_string=png))]))

    def hparams(self, values: Mapping[str, bool | float | str]) -> None:
        """Adds the settings by which TensorBoard's HParams page tells the runs of a sweep apart; `close` then adds
        that the session ended. TensorBoard's own writer of these needs TensorFlow."""
        start = SessionStartInfo(start_time_secs=time.time())
        for name, value in values.items():
            kind = {bool: "bool_value", str: "string_value"}.get(type(value), "number_value")
            setattr(start.hparams[name], kind, value)
        self._session("session_start_info", start)
        self._in_session = True

    def _session(self, name: str, info: object) -> None:
        content = HParamsPluginData(version=0, **{name: info}).SerializeToString()
        plugin = SummaryMetadata.PluginData(plugin_name="hparams", content=content)
        nothing = TensorProto(dtype=DT_FLOAT, tensor_shape=TensorShapeProto(), float_val=[0.0])
        metadata = SummaryMetadata(plugin_data=plugin, data_class=DATA_CLASS_TENSOR)
        self.add(0, Summary(value=[Summary.Value(tag=f"_hparams_/{name}", metadata=metadata, tensor=nothing)]))

    def close(self) -> None:
        """Writes pending events."""
        if self._in_session:
            self._session("session_end_info", SessionEndInfo(end_time_secs=time.time()))
        self._writer.close()
        if self._sink is not None:
            self._sink.close()


def write_events(trace: DepthTrace, folder: Path, config: Mapping[str, object], images: Mapping[str, bytes]) -> None:
    """TensorBoard: every column as a curve over boundaries, the summary as scalars, figures (PNG by name) as images,
    and the settings."""
    with contextlib.closing(Events(folder)) as events:
        events.hparams(hyperparameters(config))
        _write_numbers(events, trace.columns, trace.summary)
        for name, png in images.items():
            events.image(0, f"spinal/{name}", png)


def write_comparison_events(comparison: Comparison, folder: Path, config: Mapping[str, object]) -> None:
    """TensorBoard: every column as a curve over boundaries, the summary as scalars, and the settings."""
    with contextlib.closing(Events(folder)) as events:
        events.hparams(hyperparameters(config))
        _write_numbers(events, comparison.columns, comparison.summary)


def _write_numbers(events: Events, columns: Mapping[str, np.ndarray], summary: Mapping[str, object]) -> None:
    for name, values in columns.items():
        for boundary, value in enumerate(values.tolist()):
            events.scalar(boundary, f"spinal/by_boundary/{name}", value)
    for name, value in summary.items():
        if isinstance(value, float):
            events.scalar(0, f"spinal/summary/{name}", value)
