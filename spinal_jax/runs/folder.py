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
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeGuard

from spinal_jax.audit.trace import DepthTrace
from spinal_jax.comparison.record import Comparison
from spinal_jax.errors import AlreadyDone, UserError
from spinal_jax.files import SCRATCH, TEMPORARY, load_json_file, locked, plain
from spinal_jax.runs.tensorboard import EVENTS

SCHEMA = "spinal-manifest/1"
MANIFEST = "manifest.json"  # a run folder without it is not complete
REPLACED = "replaced.json"  # in a scratch folder: the manifest of the run that is being replaced
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
        "attribution.json",
        "attribution.csv",
        "effects.csv",
    ),
)
PROGRESS = "progress"  # what an audit has saved on its way
# Settings that change nothing but where and how fast a run computes: it may go on with others.
FREE_SETTINGS = {"parallel", "overwrite", "cache", "checkpoint_every", "logging"}
HELD = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
REMEDY = "set overwrite=true to replace it, or choose another hydra.run.dir"


def check_free(folder: Path, overwrite: bool, config: Mapping[str, object] | None = None) -> None:
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


def check_incomplete(folder: Path, config: Mapping[str, object] | None = None) -> None:
    """Refuses a folder that holds a complete run: UserError, or AlreadyDone where its settings are `config`."""
    if not (folder / MANIFEST).exists():
        return
    same = config is not None and without_free(_read(folder / MANIFEST).get("config")) == without_free(_as_json(config))
    raise (AlreadyDone if same else UserError)(f"{folder} already holds a complete run; {REMEDY}")


def has_progress(folder: Path) -> bool:
    """Whether an audit was cut off in the folder that can go on: what else it has left there may be replaced."""
    return (folder / PROGRESS).exists() and not (folder / MANIFEST).exists()


def without_free(values: object) -> Any:
    """The settings without those that may differ between equal runs, at any depth: FREE."""
    if not isinstance(values, Mapping):
        return values
    return {name: without_free(value) for name, value in values.items() if name not in FREE_SETTINGS}


def _as_json(values: Mapping[str, object]) -> Any:
    return json.loads(json.dumps(values))


def _read(path: Path) -> dict[str, Any]:
    """A manifest; empty where what lies there is none."""
    try:
        manifest = load_json_file(path)
    except UserError:
        return {}
    return manifest if manifest.get("schema") == SCHEMA else {}


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Locks a run folder and clears up after processes that were killed in it: a run that was written in full takes its
    place, and what is half-written goes. Without locks nothing is touched, since another process may still write it.

    Raises:
      UserError: another process holds the folder.
    """
    with locked(folder) as alone:
        for path in [*folder.glob(f"{SCRATCH}*"), *folder.rglob(".*.tmp")] if alone else ():
            if path.name.startswith(SCRATCH):
                if _is_written(path, folder):
                    _move_up(path, folder, True)
                shutil.rmtree(path)
            elif TEMPORARY.fullmatch(path.name):
                path.unlink(missing_ok=True)  # it may have been in one of those
        yield


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


def _is_written(scratch: Path, folder: Path) -> bool:
    """Whether all that the manifest of a scratch folder lists is there, or has moved up."""
    names = _read(scratch / MANIFEST).get("files")
    return _are_parts(names) and all((scratch / name).exists() or (folder / name).exists() for name in names)


def _move_up(scratch: Path, folder: Path, overwrite: bool) -> None:
    """Moves the parts of a run into its folder, the manifest last; killed anywhere, `held` takes it from there."""
    if (folder / MANIFEST).exists():
        os.replace(folder / MANIFEST, scratch / REPLACED)
    new = {part.name for part in scratch.iterdir()} - {MANIFEST, REPLACED}
    old = set()
    if overwrite:
        killed = {path.name for path in folder.glob(f"{SCRATCH}*") if path != scratch}
        moved = set(_names_in(scratch / MANIFEST)) - new  # by a run that was killed in between
        old = {*new, *_names_in(scratch / REPLACED), *killed} - moved
    for path in (folder / name for name in old):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for name in (*sorted(new), MANIFEST):
        os.replace(scratch / name, folder / name)


def _parts_of(folder: Path) -> list[str]:
    """The files and folders of the complete run in `folder`, by its manifest; UserError if that is not ours."""
    return _names_in(folder / MANIFEST)


def _names_in(path: Path) -> list[str]:
    """The files and folders that a manifest lists; none where it is not there. UserError if it is not ours."""
    if not path.exists():
        return []
    names = _read(path).get("files")
    if not _are_parts(names):
        raise UserError(f"{path} is not the manifest of a run, so nothing is replaced; choose another hydra.run.dir")
    return names


def _are_parts(names: object) -> TypeGuard[list[str]]:
    """Whether these may be deleted and replaced: names in the folder itself and nowhere else."""
    return isinstance(names, list) and all(isinstance(n, str) and re.fullmatch(r"\w[\w.-]*", n) for n in names)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Holds Ctrl-C, SIGTERM and the end of a shared run (SIGUSR1) back until the block has ended."""
    if threading.current_thread() is not threading.main_thread():
        yield  # they only ever interrupt the main thread
        return
    held: list[int] = []
    before = {s: signal.signal(s, lambda number, _: held.append(number)) for s in HELD}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in held:
            signal.raise_signal(number)


def write_manifest(
    folder: Path, command: str, config: Mapping[str, object], about: Mapping[str, object], seconds: Mapping[str, float]
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
