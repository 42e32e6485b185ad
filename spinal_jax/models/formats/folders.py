"""Output folders of checkpoints, written as DIR.partial and renamed to DIR when complete."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from spinal_jax.errors import UserError
from spinal_jax.files import locked
from spinal_jax.jsontypes import Json, ReadJson
from spinal_jax.progress import Bar

if TYPE_CHECKING:
    from spinal_jax.models.formats.base import Checkpoint
    from spinal_jax.models.translate import TensorTarget


RECORD = "spinal.json"  # record of the inputs in every output folder; "sha256" is null until it is complete

# Files of a Hugging Face model besides weights and config.json.
COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "*.model",
)


def read_record(folder: Path) -> Json | None:
    """The record of an output folder, or None for other folders."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_ours = isinstance(record, dict) and str(record.get("schema")).startswith("spinal-") and "sha256" in record
    return record if is_ours else None


def check_out(out: str, source: str, overwrite: bool) -> Path:
    """The absolute path of an output folder. Raises UserError if writing it would delete other data."""
    folder, origin = Path(out).expanduser().absolute(), Path(source).expanduser()
    if not folder.name:
        raise UserError(f"out={out} cannot be replaced as a whole; choose a folder of its own")
    replaced = _replaced(folder)
    if replaced.exists() and read_record(replaced) is None and (not replaced.is_dir() or any(replaced.iterdir())):
        raise UserError(f"{replaced} is in the way and was not written by spinal; move it elsewhere")
    if origin.exists():
        inner, outer = folder.resolve(), origin.resolve()
        if inner == outer or outer in inner.parents:
            raise UserError(f"out={out} lies inside the source {source}; choose a folder outside of it")
        if inner in outer.parents:
            raise UserError(f"out={out} holds the source {source}; choose a folder of its own")
    _check_free(folder, out, overwrite)
    return folder


def _check_free(folder: Path, out: object, overwrite: bool) -> None:
    """Raises UserError if the folder has contents that may not be replaced; `out` is its name in the message."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    record = read_record(folder)
    if record is None:
        raise UserError(f"out={out} is there and was not written by spinal convert or export; choose another folder")
    if not overwrite:
        raise UserError(f"out={out} already holds a complete {_kind(record)}; set overwrite=true to replace it")


@contextlib.contextmanager
def partial_folder(folder: Path, record: ReadJson, overwrite: bool, resume: bool) -> Iterator[Path]:
    """A locked partial folder next to `folder` to write into. With `resume` it keeps the files of an interrupted run.

    Args:
        folder: the final folder.
        record: the inputs; must equal the record of an interrupted run, except for digests of written files.
        overwrite: discard the files of an interrupted run with other inputs.
        resume: keep the files of an interrupted run with the same inputs.

    Raises:
        UserError: another process writes the folder or has completed it, or it has contents of other programs.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    with contextlib.ExitStack() as stack:
        try:
            partial.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(partial))
            with contextlib.ExitStack() as undo:
                left = sorted(path.name for path in partial.iterdir())
                if not left:
                    undo.callback(partial.rmdir)
                _check_free(folder, folder, overwrite)  # another process may have completed it
                if left and left != [f"{RECORD}.new"]:
                    _take_over(partial, record, overwrite, resume)
                undo.pop_all()
            _write_record(partial, {**record, "sha256": None})
        except OSError as error:
            raise UserError(f"{partial} cannot be written: {error.strerror or error}") from error
        yield partial


def _take_over(partial: Path, record: ReadJson, overwrite: bool, resume: bool) -> None:
    """Empties the partial folder unless it can be resumed. Raises UserError if it may not be changed."""
    before = read_record(partial)
    if before is None:
        raise UserError(f"{partial} is in the way and was not written by spinal; move it elsewhere")
    same = _origin(before) == _origin(record)
    if not same and not overwrite:
        raise UserError(
            f"{partial} holds an unfinished {_kind(before)} of another source or with other settings; finish that one, "
            "or set overwrite=true to discard it"
        )
    if not (same and resume):
        _empty(partial)


def _origin(record: ReadJson) -> Json:
    return {key: value for key, value in record.items() if key not in ("sha256", "files")}


def finish(partial: Path, folder: Path, record: ReadJson) -> None:
    """Completes `partial` with the final `record` and moves it to `folder`, replacing an existing one."""
    _write_record(partial, record)
    replaced = _replaced(folder)
    if folder.exists() and any(folder.iterdir()):
        if replaced.exists():
            _discard(replaced)
        os.rename(folder, replaced)
    os.rename(partial, folder)
    if replaced.exists():  # of a run that was killed here
        _discard(replaced)


def _replaced(folder: Path) -> Path:
    """Temporary name of a folder that is being replaced."""
    return folder.with_name(f"{folder.name}.replaced")


def _discard(folder: Path) -> None:
    """Deletes an output folder."""
    _empty(folder)
    folder.rmdir()


def _empty(folder: Path) -> None:
    """Deletes the contents of an output folder, the record last, so that it is still recognised after a kill."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != RECORD:
            path.unlink()
    (folder / RECORD).unlink(missing_ok=True)


def source_record(
    checkpoint: Checkpoint, schema: str, dtype: str | None, ignore_keys: tuple[str, ...], bar: Bar
) -> Json:
    """The record of the inputs, with the hash of the source weights."""
    with bar("hash source", 1, "source") as advance:
        digest = checkpoint.sha256()
        advance(1)
    origin = Path(checkpoint.source).expanduser()
    name = origin.resolve().name if origin.exists() else checkpoint.source  # for "."
    return {
        "schema": schema,
        "source": {"name": name, "kind": checkpoint.kind, "revision": checkpoint.revision, "sha256": digest},
        "dtype": dtype or "as stored",
        "ignore_keys": list(ignore_keys),
        "sha256": None,
    }


def written_dtype(checkpoint: Checkpoint, name: str, place: TensorTarget, dtype: str | None) -> np.dtype:
    """The dtype of a written tensor: its own, or `dtype` unless it stays float32.

    `name`: of the tensor in the checkpoint. Raises UserError for other than plain numbers.
    """
    own = checkpoint.names()[name].dtype
    if not jnp.issubdtype(own, jnp.floating) or own.itemsize < 2:
        raise UserError(f"{checkpoint.source}: {name} has the dtype {own}; weights must be floats of 16 bits or more")
    if dtype is None:
        return own
    return np.dtype(np.float32) if place.keeps_float32 else np.dtype(jnp.dtype(dtype))


def write_companions(checkpoint: Checkpoint, folder: Path) -> None:
    """Copies tokenizer files and generation_config.json, or saves the tokenizer of a single-file checkpoint."""
    source: Path | None = getattr(checkpoint, "folder", None)
    if source is None:
        checkpoint.tokenizer().save_pretrained(folder)
        return
    for path in sorted({path for pattern in COMPANIONS for path in source.glob(pattern) if path.is_file()}):
        shutil.copyfile(path, folder / path.name)


def _write_record(folder: Path, record: ReadJson) -> None:
    new = folder / f"{RECORD}.new"
    new.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(new, folder / RECORD)


def _kind(record: ReadJson) -> str:
    return str(record["schema"]).removeprefix("spinal-").partition("/")[0]
