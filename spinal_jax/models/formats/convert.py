"""Converts a checkpoint to an Orbax folder, row by row; an interrupted conversion can be resumed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from spinal_jax.models.families import read_checkpoint
from spinal_jax.models.formats import folders
from spinal_jax.models.formats.base import Checkpoint, file_digests
from spinal_jax.models.formats.orbax import SCHEMA, STATE, ParameterFile, state_files, write_orbax_metadata
from spinal_jax.models.translate import match, parameter_shapes, parts_of
from spinal_jax.progress import Bar, no_bar


def convert(
    checkpoint: Checkpoint,
    out: str,
    *,
    dtype: str | None = None,
    ignore_keys: Iterable[str] = (),
    overwrite: bool = False,
    bar: Bar | None = None,
) -> Path:
    """Writes the checkpoint to `out`, to be opened by `open_checkpoint`, and returns the path.

    One tensor is in memory at a time, with copies of about 32 MiB. An interrupted conversion stays in `out` +
    ".partial"; the same call resumes it, with the same final bytes. The folder also contains config.json, the tokenizer
    and spinal.json, with hashes of the source and of all files, which are checked when it is loaded.

    Args:
        checkpoint: what to convert.
        out: the folder to write.
        dtype: "float32" or "bfloat16"; None keeps the dtype of each parameter.
        ignore_keys: keys of config.json without effect.
        overwrite: replace an existing checkpoint.
        bar: opens progress bars.

    Raises:
        UserError: the checkpoint does not match its config.json, or `out` exists.
    """
    bar = bar or no_bar
    folder = folders.check_out(out, checkpoint.source, overwrite)
    ignore_keys = tuple(ignore_keys)
    family, config = read_checkpoint(checkpoint, ignore_keys)
    shapes = parameter_shapes(config)
    wanted, stored = match(checkpoint, family, config, shapes)
    dtypes: dict[str, np.dtype] = {}
    leads: dict[str, int] = {}
    for place in wanted:
        own = folders.written_dtype(checkpoint, stored[place.name], place, dtype)
        for path in place.paths:
            dtypes[path] = wider(own, dtypes.get(path, own))
            leads[path] = len(place.row)
    record = folders.source_record(checkpoint, SCHEMA, dtype, ignore_keys, bar)
    with folders.partial_folder(folder, record, overwrite, resume=True) as partial:
        state = partial / STATE
        files = {p: ParameterFile(state, p, s.shape, dtypes[p], leads[p]) for p, s in shapes.items()}
        total = sum(int(np.prod(shapes[p].shape)) * dtypes[p].itemsize for p in shapes)
        with bar("convert", total, "B") as advance:
            for place in wanted:
                targets = {path: files[path] for path in place.paths}
                if all(target.has(place.row) for target in targets.values()):
                    advance(sum(target.row_bytes for target in targets.values()))
                    continue
                parts = dict(parts_of(place, checkpoint.tensor(stored[place.name]), config, shapes))
                while parts:  # freed before the next tensor is read
                    path, part = parts.popitem()
                    targets[path].write(place.row, part, advance)
                    del part
        (partial / "config.json").write_text(json.dumps(checkpoint.config, indent=2) + "\n", encoding="utf-8")
        folders.write_companions(checkpoint, partial)
        write_orbax_metadata(partial, shapes)
        expected = {state / "_METADATA", *(file for parameter in files.values() for file in parameter.files())}
        for stray in set(state_files(partial)) - expected:  # incomplete rows of an interrupted run
            stray.unlink()
        with bar("hash", 1, "folder") as advance:
            record["files"], record["sha256"] = file_digests(partial, state_files(partial))
            others = (path for path in sorted(partial.iterdir()) if path.is_file() and path.name != folders.RECORD)
            record["files"] |= file_digests(partial, others)[0]
            advance(1)
        folders.finish(partial, folder, record)
    return folder


def wider(first: np.dtype, second: np.dtype) -> np.dtype:
    """The dtype that represents the values of both, for stacks of mixed dtype."""
    return first if first == second else max(first, second, np.dtype(np.float32), key=lambda dtype: dtype.itemsize)
