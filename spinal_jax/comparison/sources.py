"""Saved traces as sources of a comparison: run folders, training runs, or trace.json files."""

from __future__ import annotations

import os
from pathlib import Path

from spinal_jax.audit.trace import DepthTrace, load_trace
from spinal_jax.errors import UserError

TRACES = "traces"  # in a training run: a folder step_NNNNNN for each trace


def holds_trace(path: str | os.PathLike[str]) -> bool:
    """Whether the path is a run folder with a trace, a training run, or a trace.json."""
    path = Path(path)
    if path.is_file():
        return path.name.endswith(".json")
    return (path / "trace.json").is_file() or bool(steps_of(path)) or (path / "comparison.json").is_file()


def step_name(step: int) -> str:
    """The name of the folder of the trace of a step."""
    return f"step_{step:06}"


def step_folders(folder: str | os.PathLike[str]) -> dict[int, Path]:
    """Step -> folder of each trace of a training run, ascending, complete or not; empty for other folders. Folders and
    files with other names are left out."""
    places = {}
    for place in (Path(folder) / TRACES).glob("step_*"):
        number = place.name.removeprefix("step_")
        if number.isascii() and number.isdigit() and place.name == step_name(int(number)) and place.is_dir():
            places[int(number)] = place
    return dict(sorted(places.items()))


def steps_of(folder: str | os.PathLike[str]) -> dict[int, Path]:
    """`step_folders` of those that hold a trace."""
    return {step: place for step, place in step_folders(folder).items() if (place / "trace.json").is_file()}


def saved_trace(path: str | os.PathLike[str], step: int | None = None) -> DepthTrace:
    """The trace of a run folder or a trace.json; of a training run the last one, or that of `step`.

    Raises:
        UserError: no trace there, none of that step, or a file that cannot be read.
    """
    folder = Path(path)
    steps = {} if folder.is_file() or (folder / "trace.json").is_file() else steps_of(folder)
    if steps:
        if step is None:
            step = max(steps)
        if step not in steps:
            known = ", ".join(map(str, steps))
            raise UserError(f"{folder} has no trace of step {step}; there are traces of steps {known}")
        return load_trace(steps[step])
    if step is not None:
        raise UserError(f"step is {step}, but {folder} is no training run; only those have traces of several steps")
    if (folder / "comparison.json").is_file() and not (folder / "trace.json").is_file():
        sides = [str(folder / side) for side in ("aligned", "reference") if (folder / side / "trace.json").is_file()]
        give = f"give {' or '.join(sides)}" if sides else "give the traces that it was made from"
        raise UserError(f"{folder} holds a comparison, not a trace; {give}")
    return load_trace(folder)
