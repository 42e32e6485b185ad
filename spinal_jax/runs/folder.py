"""Run folders. Files are written to a scratch folder and moved at the end, the manifest last."""

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
from spinal_jax.jsontypes import Json
from spinal_jax.runs.tensorboard import EVENTS

SCHEMA = "spinal-manifest/1"
MANIFEST = "manifest.json"  # marks a complete run
REPLACED = "replaced.json"  # in a scratch folder: manifest of the replaced run
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
PROGRESS = "progress"  # saved state of an audit
WRITTEN_INTO = (PROGRESS, "traces", "figures", "others")  # folders whose files are written one by one
# Settings without effect on results, which may change when a run is resumed.
FREE_SETTINGS = {"parallel", "overwrite", "cache", "checkpoint_every", "logging"}
HELD = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
REMEDY = "set overwrite=true to replace it, or choose another hydra.run.dir"


def check_free(folder: Path, overwrite: bool, config: Mapping[str, object] | None = None) -> None:
    """Raises UserError for a folder that is not writable or, without `overwrite`, has files of a run; AlreadyDone if
    that run is complete with the settings `config`."""
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder} cannot be written to; choose another hydra.run.dir")
    if overwrite:
        _parts_of(folder)
        return
    check_incomplete(folder, config)
    if there := next((name for name in PARTS if (folder / name).exists()), None):
        raise UserError(f"{folder} already holds {there}, though no complete run; {REMEDY}")


def check_incomplete(folder: Path, config: Mapping[str, object] | None = None) -> None:
    """Raises UserError for a folder with a complete run, or AlreadyDone if its settings are `config`."""
    if not (folder / MANIFEST).exists():
        return
    same = config is not None and without_free(_read(folder / MANIFEST).get("config")) == without_free(_as_json(config))
    raise (AlreadyDone if same else UserError)(f"{folder} already holds a complete run; {REMEDY}")


def has_progress(folder: Path) -> bool:
    """Whether the folder has an interrupted audit that can be resumed."""
    return (folder / PROGRESS).exists() and not (folder / MANIFEST).exists()


def without_free(values: object) -> Any:
    """The settings without FREE_SETTINGS, at any depth."""
    if not isinstance(values, Mapping):
        return values
    return {name: without_free(value) for name, value in values.items() if name not in FREE_SETTINGS}


def _as_json(values: Mapping[str, object]) -> Any:
    return json.loads(json.dumps(values))


def _read(path: Path) -> Json:
    """A manifest; empty if there is none."""
    try:
        manifest = load_json_file(path)
    except UserError:
        return {}
    return manifest if manifest.get("schema") == SCHEMA else {}


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Locks a run folder and cleans up after killed processes: a completely written run is moved into place, incomplete
    files are deleted. Without file locks nothing is changed, because another process may still write.

    Raises:
      UserError: another process holds the folder.
    """
    with locked(folder) as alone:
        left = (path for part in WRITTEN_INTO for path in (folder / part).rglob(".*.tmp"))
        for path in [*folder.glob(f"{SCRATCH}*"), *folder.glob(".*.tmp"), *left] if alone else ():
            if path.name.startswith(SCRATCH):
                if _is_written(path, folder):
                    _move_up(path, folder, True)
                shutil.rmtree(path)
            elif TEMPORARY.fullmatch(path.name):
                path.unlink(missing_ok=True)  # it may have been in one of those
        yield


@contextlib.contextmanager
def writing(folder: Path, overwrite: bool = False) -> Iterator[Path]:
    """A scratch folder inside `folder` for the files of a run, including its manifest.

    If the block succeeds, the files are moved into `folder`. With `overwrite` they replace the existing run: the files
    in its manifest and those of an interrupted one, and no others. If the block fails, `folder` is unchanged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=folder) as scratch:
        yield Path(scratch)
        check_free(folder, overwrite)  # again, because another run may have finished meanwhile
        with _uninterrupted():
            _move_up(Path(scratch), folder, overwrite)


def _is_written(scratch: Path, folder: Path) -> bool:
    """Whether all files in the manifest of a scratch folder exist there or in the run folder."""
    names = _read(scratch / MANIFEST).get("files")
    return _are_parts(names) and all((scratch / name).exists() or (folder / name).exists() for name in names)


def _move_up(scratch: Path, folder: Path, overwrite: bool) -> None:
    """Moves the files of a run into its folder, the manifest last. `held` completes an interrupted move."""
    if (folder / MANIFEST).exists():
        os.replace(folder / MANIFEST, scratch / REPLACED)
    new = {part.name for part in scratch.iterdir()} - {MANIFEST, REPLACED}
    old = set()
    if overwrite:
        killed = {path.name for path in folder.glob(f"{SCRATCH}*") if path != scratch}
        moved = set(_names_in(scratch / MANIFEST)) - new  # of an interrupted run
        old = {*new, *_names_in(scratch / REPLACED), *killed} - moved
    for path in (folder / name for name in old):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for name in (*sorted(new), MANIFEST):
        os.replace(scratch / name, folder / name)


def _parts_of(folder: Path) -> list[str]:
    """Files and folders of the complete run, from its manifest. Raises UserError for a foreign manifest."""
    return _names_in(folder / MANIFEST)


def _names_in(path: Path) -> list[str]:
    """Files and folders in a manifest; none without a manifest. Raises UserError for a foreign one."""
    if not path.exists():
        return []
    names = _read(path).get("files")
    if not _are_parts(names):
        raise UserError(f"{path} is not the manifest of a run, so nothing is replaced; choose another hydra.run.dir")
    return names


def _are_parts(names: object) -> TypeGuard[list[str]]:
    """Whether all names are directly in the folder, so that they may be replaced."""
    return isinstance(names, list) and all(isinstance(n, str) and re.fullmatch(r"\w[\w.-]*", n) for n in names)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Delays Ctrl-C, SIGTERM and the end of a shared run (SIGUSR1) until the block has ended."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals interrupt the main thread only
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
    """Writes the manifest: resolved configuration, versions, devices and hashes (`about`), the files of the run, and
    under `time` everything that differs between equal runs: end time (UTC) and seconds of each stage."""
    manifest = {
        "schema": SCHEMA,
        "command": command,
        "config": config,
        **about,
        "files": sorted(path.name for path in folder.iterdir()),
        "time": {"ended": datetime.now(UTC).isoformat(timespec="seconds"), "seconds": dict(seconds)},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def about_trace(trace: DepthTrace) -> Json:
    """Manifest entries of a trace: versions, devices, and hashes of weights, prompts and settings."""
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


def about_comparison(comparison: Comparison) -> Json:
    """Manifest entries of a comparison: hashes of both weights, the prompts and the settings."""
    settings = json.dumps(plain(comparison.settings), sort_keys=True).encode()
    return {
        "environment": {name: version(name) for name in ("spinal-jax", "numpy", "scipy")},
        "sha256": {
            "aligned": comparison.aligned["sha256"],
            "reference": comparison.reference["sha256"],
            "prompts": comparison.prompts["sha256"],
            "settings": hashlib.sha256(settings).hexdigest(),
        },
        "prompts": {name: comparison.prompts[name] for name in ("count", "skipped_empty")},
    }
