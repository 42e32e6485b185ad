"""Rows of parquet and Arrow files, of folders of data files, and of data sets on a hub: streamed, nothing executed."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spinal_jax.data.textfiles import FileErrors
from spinal_jax.errors import UserError
from spinal_jax.jsontypes import Json

ROWS_AT_ONCE = 256
_DATA = re.compile(r"\.(parquet|arrow|feather|jsonl?|ndjson)(\.(gz|bz2|xz|zst))?$")
_STATE, _SPLITS = "state.json", "dataset_dict.json"  # written by `save_to_disk` of the datasets library


@dataclass(frozen=True, kw_only=True)
class HubDataset:
    """A data set on a hub, or a local folder with the same layout."""

    dataset: str  # owner/name
    split: str = "train"
    name: str | None = None  # of the configuration
    revision: str | None = None

    @property
    def shown(self) -> str:
        """Name in error messages and traces."""
        parts = [self.dataset, self.name or "", self.split]
        return " ".join(part for part in parts if part) + (f"@{self.revision}" if self.revision else "")


def table_rows(file: Path, kind: str, source: str, key: str) -> Iterator[Json]:
    """The rows of a parquet file or an Arrow file or stream, read in small batches.

    Raises `UserError` if pyarrow is missing or the file is damaged.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError(
            f"{key}.path: {source!r} is a {kind} file, which needs pyarrow; pip install 'spinal-jax[parquet]'"
        )
    import pyarrow
    import pyarrow.parquet

    try:
        if kind == "parquet":
            with pyarrow.parquet.ParquetFile(file) as table:
                for batch in table.iter_batches(ROWS_AT_ONCE):
                    yield from batch.to_pylist()
            return
        with pyarrow.OSFile(str(file)) as stream:
            batches = pyarrow.ipc.open_file(stream) if kind == "Arrow" else pyarrow.ipc.open_stream(stream)
            for batch in _batches(batches):
                for start in range(0, batch.num_rows, ROWS_AT_ONCE):
                    yield from batch.slice(start, ROWS_AT_ONCE).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{key}.path: {source!r} is not a whole {kind} file ({reason})") from error


def _batches(reader: Any) -> Iterator[Any]:
    count = getattr(reader, "num_record_batches", None)
    if count is None:
        yield from reader
    else:
        for number in range(count):
            yield reader.get_batch(number)


def data_files(folder: Path, split: str | None, source: str, key: str) -> list[Path]:
    """The data files of a folder, in the order of their rows.

    The folder was written by `save_to_disk` of the datasets library, or contains parquet, Arrow or JSON files at any
    depth, which are read in order of their names. `split` selects files whose name or folder starts with it.

    Raises `UserError` if there are none, or several splits and none is chosen.
    """
    if (folder / _SPLITS).is_file():
        splits = _listed(folder / _SPLITS, "splits", str, source, key)
        if split is None and len(splits) == 1:
            split = splits[0]
        if split is None or split not in splits:
            raise UserError(
                f"{key}.split is {split!r}, but {source!r} has the splits {', '.join(splits)}; choose one of them"
            )
        folder = folder / split
    if (folder / _STATE).is_file():
        names = [entry.get("filename") for entry in _listed(folder / _STATE, "_data_files", dict, source, key)]
        if not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise UserError(f"{key}.path: {source!r} has a {_STATE} that names files outside of its folder")
        return [folder / name for name in names]
    try:
        files = sorted(path for path in folder.rglob("*") if _DATA.search(path.name) and path.is_file())
    except OSError as error:  # a folder that was deleted meanwhile
        raise UserError(f"{key}.path: {source!r} cannot be searched for files ({error})") from error
    files = [p for p in files if not any(part.startswith(".") for part in p.relative_to(folder).parts)]
    files = [p for p in files if p.name not in ("dataset_info.json", "dataset_infos.json")]
    if split is not None and files:
        begins = re.compile(rf"{re.escape(split)}([-_.]|$)")
        chosen = [p for p in files if any(begins.match(part) for part in p.relative_to(folder).parts)]
        if not chosen:
            names = ", ".join(str(p.relative_to(folder)) for p in files[:5])
            raise UserError(f"{key}.split is {split!r}, but no file of {source!r} is named for it; it has {names}")
        return chosen
    if not files:
        raise UserError(f"{key}.path: {source!r} is a folder without parquet, Arrow or JSON files; give one file")
    begins = {re.split(r"[-_.]", p.relative_to(folder).parts[-1])[0] for p in files}
    splits = sorted(begins & {"train", "test", "validation", "valid", "dev"})
    if len(splits) > 1:
        raise UserError(f"{key}.path: {source!r} has the splits {', '.join(splits)}; choose one with {key}.split")
    return files


def _listed(file: Path, name: str, kind: type, source: str, key: str) -> list[Any]:
    with FileErrors(source, key):
        try:
            value = json.loads(file.read_bytes())[name]
        except (KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{key}.path: {source!r} has a {file.name} that lists no {name}") from error
    if not isinstance(value, list) or not value or not all(isinstance(each, kind) for each in value):
        raise UserError(f"{key}.path: {source!r} has a {file.name} that lists no {name}")
    return value


def hub_rows(asked: HubDataset, key: str) -> Iterator[Json]:
    """The rows of a split, streamed by the datasets library without executing code of the data set.

    Raises `UserError` if the library is missing, or the data set cannot be read.
    """
    if importlib.util.find_spec("datasets") is None:
        raise UserError(f"{key}.dataset needs the datasets library; pip install 'spinal-jax[datasets]'")
    import datasets

    try:
        dataset: Any = datasets.load_dataset(
            asked.dataset, asked.name, split=asked.split, revision=asked.revision, streaming=True
        )
        # Arrow tables are not decoded, so rows are as in the files.
        for table in dataset.with_format("arrow").iter(ROWS_AT_ONCE):
            yield from table.to_pylist()
    except UserError:
        raise
    except Exception as error:  # the library passes on errors of file systems and hubs
        reason = " ".join(str(error).split())[:300].removesuffix(".") or type(error).__name__
        raise UserError(f"{key}.dataset: {asked.shown!r} cannot be read ({reason})") from error
