"""Checkpoints as Orbax folders: our own parameters, stacked over depth, in chunks that can be written and read alone.

The layout is the one that Orbax writes without OCDBT: an uncompressed zarr array for each parameter under `state/`, and
three small files that describe the tree, so `orbax.checkpoint.v1.load(folder)` reads it, into any sharding. It is
written through TensorStore and not through Orbax, because Orbax saves whole arrays, gives its files random names and
stamps them with the time: a conversion could neither stream nor end in the same bytes twice.
https://orbax.readthedocs.io/en/latest/guides/checkpoint/checkpoint_format.html
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import tensorstore as ts

from spinal_jax.errors import UserError
from spinal_jax.models.config import DecoderConfig
from spinal_jax.models.families import family_of
from spinal_jax.models.formats.base import Bounds, TensorInfo, read_config, sha256_of
from spinal_jax.models.formats.folders import read_record
from spinal_jax.models.hf_config import HFConfig
from spinal_jax.models.translate import Family, Place, as_it_is, parameter_shapes, places

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCHEMA = "spinal-checkpoint/1"
STATE = "state"  # what Orbax calls the tree
CHUNK_BYTES = 1 << 24  # at most, of one chunk: a file of its own, and what a device must read to get a part of it
WRITE_BYTES = CHUNK_BYTES  # about how much is handed to TensorStore at a time, which copies it


def read_model(config: Mapping[str, Any], ignore: Iterable[str] = ()) -> tuple[Family, DecoderConfig]:
    """Family and decoder of a config.json, every key of it accounted for but those to `ignore`. Errors: UserError."""
    hf = HFConfig(config, ignore)
    family = family_of(hf.model_type)
    decoder = family.decoder_config(hf)
    hf.done()
    return family, decoder


class ParameterFile:
    """One stacked parameter on disk. `lead`: how many of its first axes count rows, each of which is written alone."""

    def __init__(self, state: Path, path: str, shape: tuple[int, ...], dtype: np.dtype, lead: int):
        self.folder, self.shape, self.dtype, self.lead = state / path, shape, dtype, lead
        inner = shape[lead:]
        pieces = max(1, math.ceil(self.row_bytes / CHUNK_BYTES))
        self.rows = max(1, math.ceil(inner[0] / pieces))  # of the first inner axis, in a chunk
        self.chunks = (1,) * lead + (self.rows, *inner[1:])
        self._array: ts.TensorStore | None = None

    @property
    def _store(self) -> ts.TensorStore:
        """The zarr array, made on first use where it is not there."""
        if self._array is None:
            metadata = {
                "shape": self.shape,
                "chunks": self.chunks,
                "dtype": "bfloat16" if self.dtype == ml_dtypes.bfloat16 else self.dtype.str,
                "compressor": None,
                "dimension_separator": ".",
            }
            # Chunks of zeros are written too, so that a chunk that is not there is one that is still to be written.
            spec = _spec(self.folder) | {"metadata": metadata, "store_data_equal_to_fill_value": True}
            self._array = ts.open(spec, open=True, create=True).result()
        return self._array

    @property
    def row_bytes(self) -> int:
        """Size of a row."""
        return math.prod(self.shape[self.lead :]) * self.dtype.itemsize

    def has(self, row: tuple[int, ...]) -> bool:
        """Whether a row is written. A file is renamed to its name when it is whole, so being there is enough."""
        return all(file.exists() for file in chunk_files(self.folder, self.shape, self.chunks, row))

    def files(self) -> Iterator[Path]:
        """All files that the parameter has when it is whole."""
        yield self.folder / ".zarray"
        yield from chunk_files(self.folder, self.shape, self.chunks)

    def write(self, row: tuple[int, ...], values: np.ndarray, progress: Callable[[int], None]) -> None:
        """Writes a row, little more than WRITE_BYTES of it being copied at a time. UserError where the disk is full."""
        wide = math.prod(values.shape[1:]) * max(values.dtype.itemsize, self.dtype.itemsize)
        step = max(1, WRITE_BYTES // (wide * self.rows)) * self.rows  # whole chunks
        for start in range(0, len(values), step):
            part = values[start : start + step].astype(self.dtype, copy=False)
            try:
                self._store[row][start : start + len(part)].write(part).result()
            except ValueError as error:  # TensorStore's word for whatever goes wrong with a file
                raise UserError(f"{self.folder} cannot be written: {str(error).partition(' [')[0]}") from error
            progress(part.nbytes)


def chunk_files(folder: Path, shape: Sequence[int], chunks: Sequence[int], row: tuple[int, ...] = ()) -> Iterator[Path]:
    """The files of a zarr array, or of a `row` of it alone: its first indices, along which a chunk has one entry."""
    counts = [math.ceil(size / chunk) for size, chunk in zip(shape, chunks, strict=True)]
    for index in itertools.product(*map(range, counts[len(row) :])):
        yield folder / ".".join(map(str, (*row, *index)))


def write_orbax_metadata(folder: Path, paths: Iterable[str]) -> None:
    """What makes Orbax see `folder` as a checkpoint of its own, of a tree of nested mappings."""
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
    (folder / "_CHECKPOINT_METADATA").write_text("{}", encoding="utf-8")  # it would say when: not the same bytes twice


def state_files(folder: Path) -> list[Path]:
    """The files under `state/`, by name."""
    return sorted(path for path in (folder / STATE).rglob("*") if path.is_file())


class OrbaxFolder:
    """A folder that `spinal convert` wrote, as a `Checkpoint`: its parameters under HF names again."""

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
        self.revision: str | None = record["source"]["revision"]
        self.config = read_config(folder)
        family, self._decoder = read_model(self.config, record["ignore_keys"])
        shapes = parameter_shapes(self._decoder)
        self._parameters = {path: self._open(path, info.shape) for path, info in shapes.items()}
        self._places = {place.name: place for place in places(family.rules(self._decoder), self._decoder, shapes)}
        self._infos = self._describe()

    def _open(self, path: str, shape: tuple[int, ...]) -> ts.TensorStore:
        try:
            array = ts.open(_spec(self.folder / STATE / path), open=True, read=True).result()
        except ValueError as error:
            raise UserError(f"{self.source} lacks the parameter {path}, which its config.json needs") from error
        if array.shape != shape:
            raise UserError(f"{self.source}: {path} has shape {array.shape}, but its config.json says {shape}")
        # TensorStore would take a file that is missing for zeros.
        chunk: Any = array.chunk_layout.read_chunk.shape
        size = math.prod(chunk) * array.dtype.numpy_dtype.itemsize
        for file in chunk_files(self.folder / STATE / path, shape, chunk):
            if not file.exists() or file.stat().st_size != size:
                raise UserError(f"{self.source} is damaged: {file} is missing or cut short")
        return array

    def _describe(self) -> dict[str, TensorInfo]:
        """Every HF tensor without reading any: rules join stand-ins of one byte for an element."""
        infos: dict[str, TensorInfo] = {}
        joined: dict[tuple[Any, ...], tuple[int, ...]] = {}  # the tensors of a rule have one shape
        for name, place in sorted(self._places.items()):
            arrays = [self._parameters[path] for path in place.paths]
            shapes = tuple(array.shape[len(place.row) :] for array in arrays)
            key = (place.rule.hf, *shapes)
            if key not in joined:
                parts = [np.broadcast_to(np.int8(0), shape) for shape in shapes]
                joined[key] = place.rule.join(parts, self._decoder).shape
            infos[name] = TensorInfo(joined[key], arrays[0].dtype.numpy_dtype)
        return infos

    def names(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def tensor(self, name: str) -> np.ndarray:
        place: Place = self._places[name]
        rows = [self._parameters[path][place.row] for path in place.paths]
        return place.rule.join([row.read().result() for row in rows], self._decoder)

    def part(self, name: str, bounds: Bounds) -> np.ndarray:
        place = self._places[name]
        index = tuple(slice(*each) for each in bounds)
        if place.rule.split is not as_it_is:
            return self.tensor(name)[index]
        return self._parameters[place.paths[0]][(*place.row, *index)].read().result()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        from spinal_jax.models.formats.tokenizer import folder_tokenizer

        return folder_tokenizer(self.folder)

    def sha256(self) -> str:
        return sha256_of(state_files(self.folder))

    def close(self) -> None:
        """Nothing is held open between reads."""


def _spec(folder: Path) -> dict[str, Any]:
    return {"driver": "zarr", "kvstore": {"driver": "file", "path": str(folder.absolute())}}
