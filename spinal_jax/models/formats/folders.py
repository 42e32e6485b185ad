"""Output folders of checkpoints: built as DIR.partial, whole only once they are renamed to DIR."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from spinal_jax.errors import UserError
from spinal_jax.files import locked
from spinal_jax.progress import Bar

if TYPE_CHECKING:
    from spinal_jax.models.formats.base import Checkpoint
    from spinal_jax.models.translate import TensorTarget


RECORD = "spinal.json"  # in every folder written here: what it was made from; "sha256" is null until it is whole

# What stands beside the weights and config.json of a Hugging Face model.
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


def read_record(folder: Path) -> dict[str, Any] | None:
    """What the folder says that it was made from, or None where it is not one of ours."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_ours = isinstance(record, dict) and str(record.get("schema")).startswith("spinal-") and "sha256" in record
    return record if is_ours else None


def check_out(out: str, source: str, overwrite: bool) -> Path:
    """The absolute path of an output folder that may be written; UserError where something would be lost."""
    folder, origin = Path(out).expanduser().absolute(), Path(source).expanduser()
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
    """UserError, which calls the folder `out`, where it holds what may not be replaced."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    record = read_record(folder)
    if record is None:
        raise UserError(f"out={out} is there and was not written by spinal convert or export; choose another folder")
    if not overwrite:
        raise UserError(f"out={out} already holds a complete {_kind(record)}; set overwrite=true to replace it")


@contextlib.contextmanager
def partial_folder(folder: Path, record: Mapping[str, Any], overwrite: bool, resume: bool) -> Iterator[Path]:
    """The folder beside `folder` to write into, locked until the block ends. With `resume` it holds what an earlier run
    of the same work left.

    Args:
        folder: where the result will stand.
        record: what it is made from; that of an earlier run must be equal. Digests of what was written do not count.
        overwrite: discard what a run of other work left.
        resume: whether what the same work left is kept.

    Raises:
        UserError: another process writes there, or has finished `folder` meanwhile; what lies there is of others.
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
                _check_free(folder, folder, overwrite)  # another process may have written it meanwhile
                if left and left != [f"{RECORD}.new"]:
                    _take_over(partial, record, overwrite, resume)
                undo.pop_all()
            _write_record(partial, {**record, "sha256": None})
        except OSError as error:
            raise UserError(f"{partial} cannot be written: {error.strerror or error}") from error
        yield partial


def _take_over(partial: Path, record: Mapping[str, Any], overwrite: bool, resume: bool) -> None:
    """Empties what an earlier run left unless that can be resumed; UserError where it may not be touched."""
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


def _origin(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in ("sha256", "files")}


def finish(partial: Path, folder: Path, record: Mapping[str, Any]) -> None:
    """Makes `partial` whole, `record` now having the "sha256", and moves it to `folder`, in place of what is there."""
    _write_record(partial, record)
    replaced = _replaced(folder)
    if folder.exists() and any(folder.iterdir()):
        if replaced.exists():
            _discard(replaced)
        os.rename(folder, replaced)
    os.rename(partial, folder)
    if replaced.exists():  # perhaps of a run that was killed right here
        _discard(replaced)


def _replaced(folder: Path) -> Path:
    """Where the folder that is replaced stands until the new one has its name."""
    return folder.with_name(f"{folder.name}.replaced")


def _discard(folder: Path) -> None:
    """Deletes a folder of ours."""
    _empty(folder)
    folder.rmdir()


def _empty(folder: Path) -> None:
    """Deletes what is in a folder of ours, its record last, so that what a kill leaves can still be told to be ours."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != RECORD:
            path.unlink()
    (folder / RECORD).unlink(missing_ok=True)


def source_record(
    checkpoint: Checkpoint, schema: str, dtype: str | None, ignore_keys: tuple[str, ...], bar: Bar
) -> dict[str, Any]:
    """What a folder is made from, as spinal.json says it; the source's weights are hashed for it."""
    with bar("hash source", 1, "source") as advance:
        digest = checkpoint.sha256()
        advance(1)
    origin = Path(checkpoint.source).expanduser()
    name = origin.resolve().name if origin.exists() else checkpoint.source  # "." has no name of its own
    return {
        "schema": schema,
        "source": {"name": name, "kind": checkpoint.kind, "revision": checkpoint.revision, "sha256": digest},
        "dtype": dtype or "as stored",
        "ignore_keys": list(ignore_keys),
        "sha256": None,
    }


def written_dtype(checkpoint: Checkpoint, name: str, place: TensorTarget, dtype: str | None) -> np.dtype:
    """The dtype in which the tensor of a place is written: its own, or `dtype` unless it is one that stays float32.

    `name` is what the checkpoint calls it. UserError where it holds no plain numbers.
    """
    own = checkpoint.names()[name].dtype
    if not jnp.issubdtype(own, jnp.floating) or own.itemsize < 2:
        raise UserError(f"{checkpoint.source}: {name} has the dtype {own}; weights must be floats of 16 bits or more")
    if dtype is None:
        return own
    return np.dtype(np.float32) if place.keeps_float32 else np.dtype(jnp.dtype(dtype))


def write_companions(checkpoint: Checkpoint, folder: Path) -> None:
    """Copies the tokenizer's files and generation_config.json, or saves the tokenizer of a single file anew."""
    source: Path | None = getattr(checkpoint, "folder", None)
    if source is None:
        checkpoint.tokenizer().save_pretrained(folder)
        return
    for path in sorted({path for pattern in COMPANIONS for path in source.glob(pattern) if path.is_file()}):
        shutil.copyfile(path, folder / path.name)


def _write_record(folder: Path, record: Mapping[str, Any]) -> None:
    new = folder / f"{RECORD}.new"
    new.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(new, folder / RECORD)


def _kind(record: Mapping[str, Any]) -> str:
    return str(record["schema"]).removeprefix("spinal-").partition("/")[0]
