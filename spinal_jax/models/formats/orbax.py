"""Checkpoints as Orbax folders: parameters stacked over depth, in chunks that are written and read separately.

The layout is that of Orbax without OCDBT: an uncompressed zarr array for each parameter under `state/`, and three small
files that describe the tree. `orbax.checkpoint.v1.load(folder)` reads it into any sharding. It is written with
TensorStore instead of Orbax, which saves whole arrays and adds random names and timestamps: a conversion could neither
stream nor be reproducible.
https://orbax.readthedocs.io/en/latest/guides/checkpoint/checkpoint_format.html
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import tensorstore as ts

from spinal_jax.errors import UserError
from spinal_jax.jsontypes import Json
from spinal_jax.models.families import read_model
from spinal_jax.models.formats.base import Bounds, TensorInfo, read_config, read_json, sha256_of
from spinal_jax.models.formats.folders import RECORD, read_record
from spinal_jax.models.translate import TensorTarget, as_it_is, parameter_shapes, tensor_targets
from spinal_jax.progress import Advance

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCHEMA = "spinal-checkpoint/2"
STATE = "state"  # name of the tree in Orbax
CHUNK_BYTES = 1 << 24  # maximum size of a chunk, which is a file and the unit of reading
WRITE_BYTES = CHUNK_BYTES  # approximate size of a write, which TensorStore copies


class ParameterFile:
    """A stacked parameter on disk. `lead`: number of leading axes of rows, which are written separately."""

    def __init__(self, state: Path, path: str, shape: tuple[int, ...], dtype: np.dtype, lead: int):
        self.folder, self.shape, self.dtype, self.lead = state / path, shape, dtype, lead
        inner = shape[lead:]
        pieces = max(1, math.ceil(self.row_bytes / CHUNK_BYTES))
        self.rows = max(1, math.ceil(inner[0] / pieces))  # of the first inner axis, in a chunk
        self.chunks = (1,) * lead + (self.rows, *inner[1:])
        self._array: ts.TensorStore | None = None

    @property
    def _store(self) -> ts.TensorStore:
        """The zarr array, created on first use."""
        if self._array is None:
            metadata = {
                "shape": self.shape,
                "chunks": self.chunks,
                "dtype": "bfloat16" if self.dtype == ml_dtypes.bfloat16 else self.dtype.str,
                "compressor": None,
                "dimension_separator": ".",
            }
            # Chunks of zeros are written too, so that a missing chunk is always an unwritten one.
            spec = _spec(self.folder) | {"metadata": metadata, "store_data_equal_to_fill_value": True}
            self._array = ts.open(spec, open=True, create=True).result()
        return self._array

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return math.prod(self.shape[self.lead :]) * self.dtype.itemsize

    def has(self, row: tuple[int, ...]) -> bool:
        """Whether a row is written. Files are renamed when complete, so existence is sufficient."""
        return all(file.exists() for file in chunk_files(self.folder, self.shape, self.chunks, row))

    def files(self) -> Iterator[Path]:
        """All files of the complete parameter."""
        yield self.folder / ".zarray"
        yield from chunk_files(self.folder, self.shape, self.chunks)

    def write(self, row: tuple[int, ...], values: np.ndarray, progress: Advance) -> None:
        """Writes a row in pieces of about WRITE_BYTES. Raises UserError if the disk is full."""
        wide = math.prod(values.shape[1:]) * max(values.dtype.itemsize, self.dtype.itemsize)
        step = max(1, WRITE_BYTES // (wide * self.rows)) * self.rows  # whole chunks
        for start in range(0, len(values), step):
            part = values[start : start + step].astype(self.dtype, copy=False)
            try:
                self._store[row][start : start + len(part)].write(part).result()
            except ValueError as error:  # TensorStore's status for file errors
                raise UserError(f"{self.folder} cannot be written: {str(error).partition(' [')[0]}") from error
            progress(part.nbytes)


def chunk_files(folder: Path, shape: Sequence[int], chunks: Sequence[int], row: tuple[int, ...] = ()) -> Iterator[Path]:
    """The files of a zarr array, or of one `row`, given by its leading indices."""
    counts = [math.ceil(size / chunk) for size, chunk in zip(shape, chunks, strict=True)]
    for index in itertools.product(*map(range, counts[len(row) :])):
        yield folder / ".".join(map(str, (*row, *index)))


def write_orbax_metadata(folder: Path, paths: Iterable[str]) -> None:
    """Writes the files by which Orbax recognises a checkpoint of nested mappings."""
    tree = {
        str(tuple(path.split("."))): {
            "key_metadata": [{"key": key, "key_type": 2} for key in path.split(".")],  # 2: of a mapping
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},  # restores as jax.Array too
        }
        for path in sorted(paths)
    }
    described = {
        "tree_metadata": tree,
        "use_ocdbt": False,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    (folder / STATE / "_METADATA").write_text(json.dumps(described), encoding="utf-8")
    (folder / "orbax.checkpoint").write_bytes(b"")
    (folder / "_CHECKPOINT_METADATA").write_text("{}", encoding="utf-8")  # a timestamp would make the files differ


def state_files(folder: Path) -> list[Path]:
    """The files under `state/`, by name."""
    return sorted(path for path in (folder / STATE).rglob("*") if path.is_file())


class Chunks:
    """A stacked parameter of a complete folder; chunks are checked against digests when they are read."""

    def __init__(self, folder: Path, path: str, digests: Mapping[str, str]):
        self.root, self.folder, self._digests = folder, folder / STATE / path, digests
        metadata = read_json(self.folder / ".zarray")
        self.shape, self.chunks = tuple(map(int, metadata["shape"])), tuple(map(int, metadata["chunks"]))
        self.dtype = np.dtype(ml_dtypes.bfloat16 if metadata["dtype"] == "bfloat16" else metadata["dtype"])

    def read(self, row: tuple[int, ...], start: int = 0, stop: int | None = None) -> np.ndarray:
        """Entries `start` to `stop` of the axis after the leading indices `row`."""
        inner, rows = self.shape[len(row) :], self.chunks[len(row)]
        stop = int(inner[0]) if stop is None else stop
        values = np.empty((stop - start, *inner[1:]), self.dtype)
        for number in range(start // rows, math.ceil(stop / rows)):
            chunk = self._chunk((*row, number)).reshape(rows, *inner[1:])
            begin, end = max(start, number * rows), min(stop, (number + 1) * rows)
            values[begin - start : end - start] = chunk[begin - number * rows : end - number * rows]
        return values

    def _chunk(self, index: tuple[int, ...]) -> np.ndarray:
        padded = (*index, *(0,) * (len(self.shape) - len(index)))
        file = self.folder / ".".join(map(str, padded))
        raw = file.read_bytes()
        check_digest(self.root, file, raw, self._digests)
        return np.frombuffer(raw, self.dtype)


def check_digest(folder: Path, file: Path, raw: bytes, digests: Mapping[str, str]) -> None:
    """Raises UserError if a file of a complete folder has changed."""
    if hashlib.sha256(raw).hexdigest() != digests.get(file.relative_to(folder).as_posix()):
        raise UserError(
            f"{folder} is damaged: {file.relative_to(folder)} is not what spinal convert wrote; convert the model again"
        )


class OrbaxFolder:
    """A folder of `spinal convert` as a `Checkpoint` with HF names.

    Small files are checked against their digests at once, chunks of weights when they are read.
    """

    kind: str = "orbax"

    def __init__(self, folder: Path, source: str) -> None:
        self.folder = folder
        self.source = source
        record = read_record(folder)
        if record is None:
            raise UserError(
                f"{source} is an Orbax checkpoint that spinal convert did not write, so nothing says of what"
            )
        if record["schema"] != SCHEMA:
            raise UserError(f"{source} has the format {record['schema']!r}, which is not {SCHEMA!r}; convert it again")
        self.record = record
        self._digests = self._check_files()
        self.revision: str | None = record["source"]["revision"]
        self.config = read_config(folder)
        family, self._decoder = read_model(self.config, record["ignore_keys"])
        shapes = parameter_shapes(self._decoder)
        self._parameters = {path: self._open(path, info.shape) for path, info in shapes.items()}
        self._places = {
            place.name: place for place in tensor_targets(family.rules(self._decoder), self._decoder, shapes)
        }
        self._infos = self._describe()

    def _check_files(self) -> dict[str, str]:
        """The digests of all files; checks that they exist and that all but the weights are unchanged."""
        digests, source = self.record.get("files"), self.record.get("source")
        ignored = self.record.get("ignore_keys")
        known = isinstance(source, dict) and isinstance(source.get("revision", 0), str | None)
        known = known and isinstance(ignored, list) and all(isinstance(key, str) for key in ignored)
        if not known or not isinstance(digests, dict) or not all(isinstance(text, str) for text in digests.values()):
            raise UserError(f"{self.source} is damaged: {RECORD} does not say what was written; convert it again")
        for name in digests:
            file = self.folder / name
            if not file.is_file():
                raise UserError(f"{self.source} is damaged: {file} is missing")
            if not name.startswith(f"{STATE}/") or file.name in (".zarray", "_METADATA"):
                check_digest(self.folder, file, file.read_bytes(), digests)
        return digests

    def _open(self, path: str, shape: tuple[int, ...]) -> Chunks:
        if f"{STATE}/{path}/.zarray" not in self._digests:
            raise UserError(f"{self.source} lacks the parameter {path}, which its config.json needs")
        parameter = Chunks(self.folder, path, self._digests)
        if parameter.shape != shape:
            raise UserError(f"{self.source}: {path} has shape {parameter.shape}, but its config.json says {shape}")
        size = math.prod(parameter.chunks) * parameter.dtype.itemsize
        for file in chunk_files(parameter.folder, shape, parameter.chunks):
            if not file.exists() or file.stat().st_size != size:
                raise UserError(f"{self.source} is damaged: {file} is missing or cut short")
        return parameter

    def _describe(self) -> dict[str, TensorInfo]:
        """All HF tensors, without reading: the rules are applied to placeholders of one byte for each element."""
        infos: dict[str, TensorInfo] = {}
        joined: dict[tuple[Any, ...], tuple[int, ...]] = {}  # all tensors of a rule have one shape
        for name, place in sorted(self._places.items()):
            arrays = [self._parameters[path] for path in place.paths]
            shapes = tuple(array.shape[len(place.row) :] for array in arrays)
            key = (place.rule.hf, *shapes)
            if key not in joined:
                parts = [np.broadcast_to(np.int8(0), shape) for shape in shapes]
                joined[key] = place.rule.join(parts, self._decoder).shape
            infos[name] = TensorInfo(joined[key], arrays[0].dtype)
        return infos

    def names(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def tensor(self, name: str) -> np.ndarray:
        place: TensorTarget = self._places[name]
        return place.rule.join([self._parameters[path].read(place.row) for path in place.paths], self._decoder)

    def part(self, name: str, bounds: Bounds) -> np.ndarray:
        place = self._places[name]
        if place.rule.split is not as_it_is:
            return self.tensor(name)[tuple(slice(*each) for each in bounds)]
        rows = self._parameters[place.paths[0]].read(place.row, *bounds[0])
        return rows[(slice(None), *(slice(*each) for each in bounds[1:]))]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        from spinal_jax.models.formats.tokenizer import folder_tokenizer

        return folder_tokenizer(self.folder)

    def sha256(self) -> str:
        return sha256_of(state_files(self.folder))

    def close(self) -> None:
        """Nothing is held open between reads."""


def _spec(folder: Path) -> Json:
    return {"driver": "zarr", "kvstore": {"driver": "file", "path": str(folder.absolute())}}
