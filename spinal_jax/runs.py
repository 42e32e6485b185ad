"""Run folders: everything is written beside its place and moved there last, the manifest after all else."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
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

from spinal_jax.errors import AlreadyDone, UserError
from spinal_jax.files import flat, plain
from spinal_jax.report.figures import figures, png_bytes
from spinal_jax.result import DepthTrace
from spinal_jax.verdict.comparison import Comparison

SCHEMA = "spinal-manifest/1"
MANIFEST = "manifest.json"  # a run folder without it is not complete
EVENTS = "events.out.tfevents.spinal"  # TensorBoard reads files with "tfevents" in their name
PARTS = (
    *("trace.json", "trace.csv", "spectra.safetensors", "figures", "report.html", EVENTS),
    *(
        "comparison.json",
        "comparison.csv",
        "comparison.safetensors",
        "ranking.json",
        "ranking.csv",
        "others",
        "summary.md",
        "plan.json",
    ),
)
SCRATCH = ".writing-"
PROGRESS = "progress"  # what an audit has saved on its way
# Settings that change nothing but where and how fast a run computes: it may go on with others.
FREE = {"parallel", "overwrite", "cache", "checkpoint_every"}
# Parts of the settings by which TensorBoard tells the runs of a sweep apart.
SWEPT = {
    *("model", "reference", "prompts", "metrics", "score"),
    *("objective", "preferences", "corpus", "optimizer", "lora", "steps", "epochs", "batch_size", "seed"),
}

REMEDY = "set overwrite=true to replace it, or choose another hydra.run.dir"


def check_free(folder: Path, overwrite: bool, config: Mapping[str, Any] | None = None) -> None:
    """Refuses a folder that cannot be written to or, unless `overwrite`, where something would be lost: UserError, or
    AlreadyDone where that is a run with the settings `config`."""
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder} cannot be written to; choose another hydra.run.dir")
    if overwrite:
        _parts_of(folder)
        return
    check_incomplete(folder, config)
    if there := next((name for name in PARTS if (folder / name).exists()), None):
        raise UserError(f"{folder} already holds {there}, though no complete run; {REMEDY}")


def check_incomplete(folder: Path, config: Mapping[str, Any] | None = None) -> None:
    """Refuses a folder that holds a complete run: UserError, or AlreadyDone where its settings are `config`."""
    if not (folder / MANIFEST).exists():
        return
    same = config is not None and without_free(_read(folder).get("config")) == without_free(_as_json(config))
    raise (AlreadyDone if same else UserError)(f"{folder} already holds a complete run; {REMEDY}")


def unfinished(folder: Path) -> bool:
    """Whether an audit was cut off in the folder that can go on: what else it has left there may be replaced."""
    return (folder / PROGRESS).exists() and not (folder / MANIFEST).exists()


def without_free(values: Any) -> Any:
    """The settings without those that may differ between equal runs, at any depth: FREE."""
    if not isinstance(values, Mapping):
        return values
    return {name: without_free(value) for name, value in values.items() if name not in FREE}


def hyperparameters(config: Mapping[str, Any]) -> dict[str, bool | float | str]:
    """The settings by which runs of a sweep differ, by the names under which they are given; lists as text."""
    found = {name: value for name, value in flat(config).items() if name.partition(".")[0] in SWEPT}
    texts = {name: json.dumps(value) for name, value in found.items() if isinstance(value, list | tuple)}
    return {name: value for name, value in (found | texts).items() if isinstance(value, bool | int | float | str)}


def _as_json(values: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(values))


def _read(folder: Path) -> dict[str, Any]:
    """The manifest in a folder; empty where what lies there is none."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) and manifest.get("schema") == SCHEMA else {}


@contextlib.contextmanager
def writing(folder: Path, overwrite: bool = False) -> Iterator[Path]:
    """A scratch folder inside `folder` for the parts of a run, its manifest among them.

    When the block ends well they move up. With `overwrite` they replace the run that is there: all that its manifest
    lists and what a killed one left, and nothing else. When the block does not, they vanish and `folder` is as it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=folder) as scratch:
        yield Path(scratch)
        check_free(folder, overwrite)  # again: another run may have ended here meanwhile
        with _uninterrupted():
            _move_up(Path(scratch), folder, overwrite)


def _move_up(scratch: Path, folder: Path, overwrite: bool) -> None:
    new = {part.name for part in scratch.iterdir()} - {MANIFEST}
    old = set()
    if overwrite:
        killed = {path.name for path in folder.glob(f"{SCRATCH}*") if path != scratch}
        old = {*new, *_parts_of(folder), *killed}
    (folder / MANIFEST).unlink(missing_ok=True)
    for path in (folder / name for name in old):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for name in (*sorted(new), MANIFEST):
        os.replace(scratch / name, folder / name)


def _parts_of(folder: Path) -> list[str]:
    """The files and folders of the complete run in `folder`, by its manifest; UserError if that is not ours."""
    path = folder / MANIFEST
    if not path.exists():
        return []
    names = _read(folder).get("files")
    # These will be deleted: names in the folder itself and nowhere else.
    if not isinstance(names, list) or not all(isinstance(n, str) and re.fullmatch(r"\w[\w.-]*", n) for n in names):
        raise UserError(f"{path} is not the manifest of a run, so nothing is replaced; choose another hydra.run.dir")
    return names


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Holds Ctrl-C and SIGTERM back until the block has ended."""
    if threading.current_thread() is not threading.main_thread():
        yield  # they only ever interrupt the main thread
        return
    held: list[int] = []
    before = {s: signal.signal(s, lambda number, _: held.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in held:
            signal.raise_signal(number)


def write_manifest(
    folder: Path, command: str, config: Mapping[str, Any], about: Mapping[str, Any], seconds: Mapping[str, float]
) -> None:
    """What ran: resolved configuration, versions and devices, hashes (`about`), the files of the run, and under `time`
    all that differs between equal runs: when it ended (UTC) and how many seconds each stage took."""
    manifest = {
        "schema": SCHEMA,
        "command": command,
        "config": config,
        **about,
        "files": sorted(path.name for path in folder.iterdir()),
        "time": {"ended": datetime.now(UTC).isoformat(timespec="seconds"), "seconds": dict(seconds)},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def about_trace(trace: DepthTrace) -> dict[str, Any]:
    """What a manifest says of a trace: versions and devices, hashes of weights, prompts and settings."""
    settings = json.dumps(trace.settings, sort_keys=True).encode()
    return {
        "environment": dict(trace.environment),
        "sha256": {
            "weights": trace.model["sha256"],
            "prompts": trace.prompts["sha256"],
            "settings": hashlib.sha256(settings).hexdigest(),
        },
        "prompts": {name: trace.prompts[name] for name in ("count", "skipped_empty")},
    }


def about_comparison(found: Comparison) -> dict[str, Any]:
    """What a manifest says of a comparison: hashes of both models' weights, the prompts and the settings."""
    settings = json.dumps(plain(found.settings), sort_keys=True).encode()
    return {
        "environment": {name: version(name) for name in ("spinal-jax", "numpy", "scipy")},
        "sha256": {
            "aligned": found.aligned["sha256"],
            "reference": found.reference["sha256"],
            "prompts": found.prompts["sha256"],
            "settings": hashlib.sha256(settings).hexdigest(),
        },
        "prompts": {name: found.prompts[name] for name in ("count", "skipped_empty")},
    }


class Events:
    """A TensorBoard event file."""

    def __init__(self, folder: Path, step: int = 0):
        """Opens a new file in `folder`; what older ones there hold at `step` and later no longer counts."""
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

    def add(self, step: int, summary: Any) -> None:
        """Adds a summary as it is."""
        self._write(Event(wall_time=time.time(), step=step, summary=summary))

    def scalar(self, step: int, tag: str, value: float) -> None:
        """Adds a number, if it is one."""
        if np.isfinite(value):
            self.add(step, Summary(value=[Summary.Value(tag=tag, simple_value=value)]))

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

    def _session(self, name: str, info: Any) -> None:
        content = HParamsPluginData(version=0, **{name: info}).SerializeToString()
        plugin = SummaryMetadata.PluginData(plugin_name="hparams", content=content)
        nothing = TensorProto(dtype=DT_FLOAT, tensor_shape=TensorShapeProto(), float_val=[0.0])
        metadata = SummaryMetadata(plugin_data=plugin, data_class=DATA_CLASS_TENSOR)
        self.add(0, Summary(value=[Summary.Value(tag=f"_hparams_/{name}", metadata=metadata, tensor=nothing)]))

    def close(self) -> None:
        """Writes the rest."""
        if self._in_session:
            self._session("session_end_info", SessionEndInfo(end_time_secs=time.time()))
        self._writer.close()


def write_events(trace: DepthTrace, folder: Path, config: Mapping[str, Any]) -> None:
    """TensorBoard: every column as a curve over boundaries, the summary as scalars, the figures as images, and the
    settings."""
    with contextlib.closing(Events(folder)) as events:
        events.hparams(hyperparameters(config))
        _write_numbers(events, trace.columns, trace.summary)
        for name, figure in figures(trace).items():
            events.image(0, f"spinal/{name}", png_bytes(figure, dpi=100))


def write_comparison_events(found: Comparison, folder: Path, config: Mapping[str, Any]) -> None:
    """TensorBoard: every column as a curve over boundaries, the summary as scalars, and the settings."""
    with contextlib.closing(Events(folder)) as events:
        events.hparams(hyperparameters(config))
        _write_numbers(events, found.columns, found.summary)


def _write_numbers(events: Events, columns: Mapping[str, np.ndarray], summary: Mapping[str, Any]) -> None:
    for name, values in columns.items():
        for boundary, value in enumerate(values.tolist()):
            events.scalar(boundary, f"spinal/by_boundary/{name}", value)
    for name, value in summary.items():
        if isinstance(value, float):
            events.scalar(0, f"spinal/summary/{name}", value)
