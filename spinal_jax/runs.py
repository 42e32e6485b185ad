"""Run folders: everything is written beside its place and moved there last, the manifest after all else."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from spinal_jax.errors import UserError
from spinal_jax.report.figures import figures, png_bytes
from spinal_jax.result import DepthTrace

MANIFEST = "manifest.json"  # a run folder without it is not complete


def check_free(folder: Path, overwrite: bool) -> None:
    """Refuses a folder that holds a complete run, unless it may be replaced."""
    if (folder / MANIFEST).exists() and not overwrite:
        raise UserError(
            f"{folder} already holds a complete run; set overwrite=true to replace it, or another hydra.run.dir"
        )


@contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """A scratch folder inside `folder`; its content moves up when the block ends well and vanishes when it does not."""
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / f".writing-{os.getpid()}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        yield scratch
        (folder / MANIFEST).unlink(missing_ok=True)
        for part in sorted(scratch.iterdir(), key=lambda path: path.name == MANIFEST):
            place = folder / part.name
            if place.is_dir():
                shutil.rmtree(place)
            os.replace(part, place)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_manifest(
    folder: Path, command: str, config: Mapping[str, Any], trace: DepthTrace, seconds: Mapping[str, float]
) -> None:
    """What ran: resolved configuration, versions and devices, hashes, wall time in seconds."""
    manifest = {
        "command": command,
        "config": config,
        "environment": dict(trace.environment),
        "sha256": {"weights": trace.model["sha256"], "prompts": trace.prompts["sha256"]},
        "prompts": {"count": trace.prompts["count"], "skipped_empty": trace.prompts["skipped_empty"]},
        "seconds": dict(seconds),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def write_events(trace: DepthTrace, folder: Path) -> None:
    """TensorBoard: every column as a curve over boundaries, the summary as scalars, the figures as images."""
    writer = EventFileWriter(str(folder))

    def add(step: int, **value: Any) -> None:
        event = event_pb2.Event(step=step, summary=summary_pb2.Summary(value=[summary_pb2.Summary.Value(**value)]))
        writer.add_event(event)

    for name, values in trace.columns.items():
        for boundary in np.flatnonzero(np.isfinite(values)):
            add(int(boundary), tag=f"spinal/by_boundary/{name}", simple_value=float(values[boundary]))
    for name, value in trace.summary.items():
        if isinstance(value, float) and np.isfinite(value):
            add(0, tag=f"spinal/summary/{name}", simple_value=value)
    for name, figure in figures(trace).items():
        image = summary_pb2.Summary.Image(encoded_image_string=png_bytes(figure, dpi=100))
        add(0, tag=f"spinal/{name}", image=image)
    writer.close()
