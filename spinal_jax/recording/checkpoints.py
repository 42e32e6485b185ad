"""Checkpoints in the output folder of a trainer: complete ones, and the metrics that the trainer logged."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import struct
import time
from collections.abc import Sequence
from pathlib import Path

from spinal_jax.errors import UserError
from spinal_jax.files import MALFORMED, load_json_file, load_json_lines
from spinal_jax.jsontypes import Json, ReadJson

STEP = re.compile(r"(?:checkpoint|step|global_step)?[-_]?([0-9]{1,18})")  # within 64 bits
STATE = "trainer_state.json"  # Hugging Face's Trainer writes it after the weights
INDEXES = ("model.safetensors.index.json",)
SINGLE = ("model.safetensors", "adapter_model.safetensors")
CONFIGS = ("config.json", "adapter_config.json")
LONGEST_HEADER = 100_000_000  # bytes of the header of a safetensors file, by its format
ORBAX = "_CHECKPOINT_METADATA"  # Orbax renames a step when it is complete


def step_of(folder: Path) -> int | None:
    """The optimiser step in the name of a checkpoint's folder (`checkpoint-500`, `step_500`, `500`), or None."""
    found = STEP.fullmatch(folder.name)
    return None if found is None else int(found[1])


def checkpoints(root: Path, settle: float) -> list[tuple[int, Path]]:
    """(step, folder) of the complete checkpoints in `root`, by ascending step.

    Args:
        root: the trainer's output folder.
        settle: seconds without changes after which a folder without trainer_state.json is complete.

    Raises:
        UserError: two checkpoints have the same step.
    """
    steps = [(step, path) for path in root.iterdir() if path.is_dir() and (step := step_of(path)) is not None]
    found = [(step, path) for step, path in sorted(steps) if is_complete(path, settle)]
    for (step, one), (same, other) in itertools.pairwise(found):
        if step == same:
            raise UserError(f"{one} and {other.name} are both checkpoints of step {step}; keep one of them there")
    return found


def is_complete(folder: Path, settle: float) -> bool:
    """Whether a checkpoint is complete: its config exists, and every safetensors file has the length that its header
    states."""
    try:
        if (folder / ORBAX).exists():
            return True
        if not any((folder / name).exists() for name in CONFIGS):
            return False
        index = next((folder / name for name in INDEXES if (folder / name).exists()), None)
        if index is None:
            files = [folder / name for name in SINGLE if (folder / name).exists()]
        else:
            shards = load_json_file(index)["weight_map"]
            files = [folder / name for name in sorted(set(shards.values()))]
        if not files or not all(map(_is_whole, files)):
            return False
        newest = max(path.stat().st_mtime for path in folder.iterdir())
        return (folder / STATE).exists() or time.time() - newest >= settle
    except (OSError, UserError, *MALFORMED):  # it is being written, or deleted
        return False


def _is_whole(file: Path) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8).ljust(8, b"\0"))
        size = file.stat().st_size
        if not 0 < length <= min(size - 8, LONGEST_HEADER):
            return False
        header = json.loads(opened.read(length))
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return size == 8 + length + max(ends, default=0)


def trainer_metrics(root: Path) -> list[Json]:
    """Metrics of the trainer: for each step a mapping of finite numbers with the names of TRL. Read from metrics.jsonl
    in `root`, else the latest trainer_state.json, else TensorBoard event files. Empty without any."""
    by_step: dict[int, Json] = {}
    for line in _logged(root):
        step = line.get("step")
        if isinstance(step, int):
            numbers = {name: value for name, value in line.items() if _is_number(value) and name != "step"}
            by_step.setdefault(step, {"step": step}).update(numbers)
    return [by_step[step] for step in sorted(by_step)]


def _logged(root: Path) -> Sequence[ReadJson]:
    log = root / "metrics.jsonl"
    if log.exists():
        return load_json_lines(log)
    state = trainer_state(root)
    if state is not None:
        history = state.get("log_history", [])
        if not isinstance(history, list) or not all(isinstance(line, dict) for line in history):
            raise UserError(f"{STATE} of the last checkpoint in {root} has a log_history that is no list of objects")
        return history
    return _events(root)


def trainer_state(root: Path) -> ReadJson | None:
    """The latest trainer_state.json among the checkpoints in `root`, or None."""
    steps = sorted((step, path) for path in root.iterdir() if path.is_dir() and (step := step_of(path)) is not None)
    for _, path in reversed(steps):
        try:
            return load_json_file(path / STATE)
        except UserError:  # without one, half written, or deleted meanwhile
            continue
    return None


def has_ended(root: Path) -> bool:
    """Whether the trainer has finished its last step."""
    state = trainer_state(root)
    last, now = ((state or {}).get(name) for name in ("max_steps", "global_step"))
    return isinstance(last, int) and isinstance(now, int) and 0 < last <= now


def _events(root: Path) -> list[ReadJson]:
    """Scalars of TensorBoard files below `root`: `train/loss` is `loss`, `eval/loss` is `eval_loss`. Files of `spinal
    watch` are skipped."""
    from spinal_jax.runs.tensorboard import EVENTS

    found: list[ReadJson] = []
    named = (Path(path) / name for path, _, names in os.walk(root) for name in names if "tfevents" in name)
    files = [path for path in named if not path.name.startswith(EVENTS)]
    if special := next((path for path in files if not path.is_file()), None):  # a FIFO may have no end
        raise UserError(f"{special} is not a regular file")
    for folder in sorted({path.parent for path in files}):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            name = tag.removeprefix("train/").replace("eval/", "eval_", 1)
            found += [{"step": int(event.step), name: float(event.value)} for event in events.Scalars(tag)]
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
