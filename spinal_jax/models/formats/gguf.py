"""Reads GGUF files as if they were Hugging Face checkpoints: the file format, and values as they were before export."""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import ml_dtypes
import numpy as np

from spinal_jax.errors import UserError
from spinal_jax.models.formats.base import Bounds, TensorInfo, require_regular, sha256_of
from spinal_jax.models.formats.gguf_architectures import (
    ARCHITECTURES,
    ROPE_FACTORS,
    Architecture,
    Config,
    Keys,
    Undo,
    halves,
    minus_one,
    transposed,
)
from spinal_jax.models.hf_config import shorten_middle, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# GGML's numbers of the types that hold values and not blocks.
_PLAIN = {0: np.dtype("<f4"), 1: np.dtype("<f2"), 30: np.dtype(ml_dtypes.bfloat16)}


_Value = TypeVar("_Value")


class _Stored(NamedTuple):
    """A tensor as it lies in its file."""

    path: Path
    type: int  # GGML's number
    shape: tuple[int, ...]  # outermost dimension first, as in NumPy
    offset: int  # of its first byte in the file
    row_bytes: int  # taken by one run of the innermost dimension


class _Origin(NamedTuple):
    """How a tensor with an HF name comes from a stored one."""

    stored: _Stored
    part: slice  # of the outermost dimension
    undo: Undo | None
    info: TensorInfo


class GgufFile:
    """A .gguf file, or the several parts of one, as a `Checkpoint`.

    Quantised tensors read as float32; F32, F16 and BF16 keep their dtype.
    """

    kind: str = "gguf"
    revision: str | None = None

    def __init__(self, path: Path, source: str) -> None:
        self.path = path
        self.source = source
        self._gguf = _import_gguf()
        self.paths, self.metadata, stored = _read_parts(path, self._gguf)
        architecture = _architecture(path, self.metadata)
        shapes = {name: tensor.shape for name, tensor in stored.items()}
        name = self.metadata["general.architecture"]
        keys = Keys(path, name, self.metadata, shapes, lambda tensor: self._read(stored[tensor]))
        self.config: Config = architecture.config(keys)
        keys.done()
        self._origins = _origins(path, stored, architecture, self.config)

    def names(self) -> Mapping[str, TensorInfo]:
        return {name: origin.info for name, origin in self._origins.items()}

    def tensor(self, name: str) -> np.ndarray:
        stored, part, undo, _ = self._origins[name]
        values = self._read(stored)[part]
        return values if undo is None else undo(values)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        from spinal_jax.models.formats.tokenizer import gguf_tokenizer

        return gguf_tokenizer(self.metadata, self.path)

    def sha256(self) -> str:
        return sha256_of(self.paths)

    def close(self) -> None:
        """Nothing is held open between reads."""

    def part(self, name: str, bounds: Bounds) -> np.ndarray:
        stored, outer, undo, info = self._origins[name]
        order = undo if isinstance(undo, partial) and undo.func is halves else None  # which moves rows alone
        if len(info.shape) < 2 or not (undo is None or undo is transposed or order is not None):
            return self.tensor(name)[tuple(slice(*each) for each in bounds)]
        rows = np.arange(math.prod(stored.shape[:-1])).reshape(stored.shape[:-1])[outer]
        if order is not None:
            rows = order(rows)
        within = bounds[::-1] if undo is transposed else bounds
        rows = rows[tuple(slice(*each) for each in within[:-1])]
        values = self._read(stored, rows.reshape(-1), within[-1]).reshape(*rows.shape, within[-1][1] - within[-1][0])
        return transposed(values) if undo is transposed else values

    def _read(
        self, stored: _Stored, numbers: np.ndarray | None = None, columns: tuple[int, int] | None = None
    ) -> np.ndarray:
        """The values of a tensor, or of some of its rows [len(numbers), columns]: of these only the blocks that hold
        the columns are read. They are dequantised some rows at a time, so that little more than the result is in
        memory."""
        dtype, kind = _PLAIN.get(stored.type), self._gguf.GGMLQuantizationType(stored.type)
        rows, width = math.prod(stored.shape[:-1]), stored.shape[-1]
        wanted = np.arange(rows) if numbers is None else numbers
        begin, end = columns or (0, width)
        block, block_bytes = self._gguf.GGML_QUANT_SIZES[kind]
        first, last = begin // block, -(-end // block)
        values = np.empty((len(wanted), end - begin), dtype or np.float32)
        if not values.size:
            return values
        step = max(1, (1 << 20) // max(1, (last - first) * block))
        with stored.path.open("rb", buffering=0) as file:
            for start in range(0, len(wanted), step):
                some = wanted[start : start + step]
                raw = np.empty((len(some), (last - first) * block_bytes), np.uint8)
                whole = raw.shape[1] == stored.row_bytes  # then rows that follow each other are read together
                breaks = np.flatnonzero(np.diff(some) != 1) + 1 if whole else np.arange(1, len(some))
                for into, run in zip(np.split(raw, breaks), np.split(some, breaks), strict=True):
                    file.seek(stored.offset + int(run[0]) * stored.row_bytes + first * block_bytes)
                    if file.readinto(into.data) != into.nbytes:
                        raise UserError(f"{stored.path} has become shorter since it was opened")
                found = raw.view(dtype) if dtype is not None else self._gguf.quants.dequantize(raw, kind)
                values[start : start + step] = found[:, begin - first * block : end - first * block]
        return values.reshape(stored.shape) if numbers is None else values


def _import_gguf() -> ModuleType:
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise UserError("a .gguf file is read with the gguf package: pip install gguf") from error
    return gguf


def _architecture(path: Path, metadata: Mapping[str, Any]) -> Architecture:
    """The translation for this file, if it holds a whole model of a supported architecture."""
    name = metadata.get("general.architecture")
    if not isinstance(name, str):
        raise UserError(f"{path}: general.architecture is {shown(name)}, which is not a name")
    if (kind := metadata.get("general.type", "model")) != "model":
        raise UserError(f"{path} holds a GGUF of type {kind!r}, not a model")
    if name not in ARCHITECTURES:
        raise UserError(
            f"{path} has the GGUF architecture {shorten_middle(name)!r}; supported are {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[name]


def _origins(
    path: Path, stored: Mapping[str, _Stored], architecture: Architecture, config: Config
) -> dict[str, _Origin]:
    """Every HF name and where it comes from, sorted; a stored tensor without an HF name is refused."""
    origins = {}
    for name, tensor in stored.items():
        if name in ROPE_FACTORS:  # they went into the config
            continue
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
        block, stem, suffix = match.groups() if match else (None, "", "")
        hf = architecture.names.get(stem, ())
        targets = (hf,) if isinstance(hf, str) else hf
        if not targets or ("{}" in targets[0]) != (block is not None):
            raise UserError(f"{path} has the tensor {name}, which is not known for its architecture")
        undo = architecture.undo(stem, config)
        size = tensor.shape[0] // len(targets)
        for number, target in enumerate(targets):
            shape = (size, *tensor.shape[1:])
            dtype = np.dtype(np.float32) if undo is minus_one else _PLAIN.get(tensor.type, np.dtype(np.float32))
            info = TensorInfo(shape[::-1] if undo is transposed else shape, dtype)
            part = slice(number * size, (number + 1) * size)
            origins[f"{target.format(block)}.{suffix}"] = _Origin(tensor, part, undo, info)
    return dict(sorted(origins.items()))


def _read_header(path: Path, gguf: ModuleType) -> tuple[dict[str, Any], dict[str, _Stored]]:
    """Metadata and tensor table. Parsed here: the gguf package takes 10 s for a vocabulary of 262,144 tokens."""
    require_regular(path)
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[:4] != b"GGUF":
                raise UserError(f"{path} is not a GGUF file: it does not begin with GGUF")
            cursor = _Cursor(data, at=4)
            if (version := cursor.number("I")) not in (2, 3):
                raise UserError(f"{path} is GGUF version {version} or big-endian; little-endian 2 and 3 can be read")
            tensors, pairs = cursor.number("Q"), cursor.number("Q")
            metadata = _unique(cursor.pair() for _ in range(pairs))
            table = _unique(cursor.tensor() for _ in range(tensors))
            alignment = metadata.get("general.alignment", 32)
            if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
                raise ValueError(f"its alignment is {shown(alignment)}, which is not a power of two")
            start = -(-cursor.at // alignment) * alignment
            stored: dict[str, _Stored] = {}
            expected = 0  # tensors lie one behind the other in the order of the table, each padded to the alignment
            for name, (shape, kind, offset) in table.items():
                if offset != expected:
                    raise ValueError(
                        f"its table says that {name} begins at {offset}, but the one before ends at {expected}"
                    )
                stored[name] = _locate(path, gguf, name, shape, kind, start + offset, len(data))
                size = math.prod(shape[:-1]) * stored[name].row_bytes
                expected = -(-(offset + size) // alignment) * alignment
            return metadata, stored
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (struct.error, ValueError, KeyError, OverflowError, RecursionError, MemoryError) as error:
        raise UserError(f"{path} is a truncated or damaged GGUF file: {error}") from error


def _read_parts(path: Path, gguf: ModuleType) -> tuple[list[Path], dict[str, Any], dict[str, _Stored]]:
    """The files of a model, in order, the metadata of the first, and the tensors of all.

    llama.cpp names the parts NAME-00001-of-00003.gguf and so on, and numbers them from 0 in their metadata.
    """
    metadata, stored = _read_header(path, gguf)
    count = metadata.get("split.count", 0)
    if type(count) is not int or not 0 <= count < 100_000:
        raise UserError(f"{path}: split.count is {shown(count)}, which is not a number of parts")
    if count < 2:
        return [path], metadata, stored
    match = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", path.name, re.IGNORECASE)
    if match is None or int(match[3]) != count:
        raise UserError(f"{path} is one of {count} parts, but is not named as they are: NAME-00001-of-{count:05}.gguf")
    paths = [path.with_name(f"{match[1]}-{part:05}-of-{count:05}{path.suffix}") for part in range(1, count + 1)]
    if missing := [part for part in paths if not part.exists()]:
        raise UserError(f"{path} is one of {count} parts of a model, of which {missing[0].name} is missing")
    merged: dict[str, _Stored] = {}
    for number, part in enumerate(paths):
        own, tensors = _read_header(part, gguf)
        if (own.get("split.no"), own.get("split.count")) != (number, count):
            said = f"part {shown(own.get('split.no'))} of {shown(own.get('split.count'))}"
            raise UserError(f"{part} says that it is {said}, counted from 0, which its name contradicts")
        if number == 0:
            metadata = own
        if twice := sorted(merged.keys() & tensors.keys()):
            raise UserError(f"{part} holds {twice[0]}, which a part before it holds too")
        merged |= tensors
    if metadata.get("split.tensors.count", len(merged)) != len(merged):
        raise UserError(
            f"the parts of {path} hold {len(merged)} tensors, but split.tensors.count is "
            f"{shown(metadata['split.tensors.count'])}"
        )
    return paths, metadata, merged


def _unique(pairs: Iterable[tuple[str, _Value]]) -> dict[str, _Value]:
    unique: dict[str, _Value] = {}
    for name, value in pairs:
        if name in unique:
            raise ValueError(f"{name} occurs twice")
        unique[name] = value
    return unique


def _locate(
    path: Path, gguf: ModuleType, name: str, shape: tuple[int, ...], kind: int, offset: int, end: int
) -> _Stored:
    """A tensor whose type can be read and whose bytes are all there."""
    if kind not in set(gguf.GGMLQuantizationType):
        raise UserError(f"{path}: {name} has the quantisation {kind}, which the gguf package does not know")
    quantisation = gguf.GGMLQuantizationType(kind)
    block, block_bytes = gguf.GGML_QUANT_SIZES[quantisation]
    if kind not in _PLAIN:
        try:
            gguf.quants.dequantize(np.zeros((1, block_bytes), np.uint8), quantisation)
        except NotImplementedError as error:
            known = "which the gguf package cannot dequantise"
            raise UserError(f"{path}: {name} has the quantisation {quantisation.name}, {known}") from error
    if shape[-1] % block:
        raise ValueError(f"the rows of {name} have {shape[-1]} values, which are no whole blocks of {block}")
    row_bytes = shape[-1] // block * block_bytes
    if offset + math.prod(shape[:-1]) * row_bytes > end:
        raise ValueError(f"it ends within or before the tensor {name}")
    return _Stored(path, kind, shape, offset, row_bytes)


class _Cursor:
    """Reads a GGUF header value by value; running off its end is a struct.error."""

    def __init__(self, data: mmap.mmap, at: int) -> None:
        self.data = data
        self.at = at

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.data, self.at)
        self.at += struct.calcsize(f"<{code}")
        # A float32 in the shortest decimals that mean it, as it was in config.json: 1e-05, not 9.999999747378752e-06.
        return float(str(np.float32(value))) if code == "f" else value

    def string(self) -> str:
        size = self.number("Q")
        self.at += size
        if self.at > len(self.data):
            raise struct.error(f"a string of {size} bytes runs past its end")
        return self.data[self.at - size : self.at].decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            if kind not in _SCALARS:
                raise ValueError(f"it has a value of type {kind}, which GGUF does not define")
            return self.number(_SCALARS[kind])
        element, count = self.number("I"), self.number("Q")
        if count > len(self.data) - self.at:
            raise ValueError(f"a list of {count} entries runs past its end")
        if element == _STRING:
            return [self.string() for _ in range(count)]
        if element not in _SCALARS:
            raise ValueError(f"it has a list of entries of type {element}, which is not supported")
        values = np.frombuffer(self.data, f"<{_SCALARS[element]}", count, self.at).copy()
        self.at += values.nbytes
        return values

    def pair(self) -> tuple[str, Any]:
        return self.string(), self.value(self.number("I"))

    def tensor(self) -> tuple[str, tuple[tuple[int, ...], int, int]]:
        """Name, and shape (outermost first), type and offset within the data."""
        name, dimensions = self.string(), self.number("I")
        if not 1 <= dimensions <= 4:
            raise ValueError(f"the tensor {name} has {dimensions} dimensions")
        shape = tuple(self.number("Q") for _ in range(dimensions))
        if 0 in shape or math.prod(shape) >= 2**48:
            raise ValueError(f"the tensor {name} has the shape {shape[::-1]}")
        return name, (shape[::-1], self.number("I"), self.number("Q"))


# GGUF's numbers of metadata types, and the struct codes of those that are numbers.
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
