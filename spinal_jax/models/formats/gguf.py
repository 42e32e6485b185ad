"""Reads GGUF files as if they were Hugging Face checkpoints: the file format, and values as they were before export."""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import ml_dtypes
import numpy as np

from spinal_jax.errors import UserError
from spinal_jax.models.formats.base import TensorInfo, sha256_of
from spinal_jax.models.formats.gguf_architectures import (
    ARCHITECTURES,
    ROPE_FACTORS,
    Architecture,
    Config,
    Keys,
    Undo,
    minus_one,
    transposed,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# GGML's numbers of the types that hold values and not blocks.
_PLAIN = {0: np.dtype("<f4"), 1: np.dtype("<f2"), 30: np.dtype(ml_dtypes.bfloat16)}


_Value = TypeVar("_Value")


class _Stored(NamedTuple):
    """A tensor as it lies in the file."""

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
    """One .gguf file as a `Checkpoint`. Quantised tensors read as float32; F32, F16 and BF16 keep their dtype."""

    kind: str = "gguf"
    revision: str | None = None

    def __init__(self, path: Path, source: str) -> None:
        self.path = path
        self.source = source
        self._gguf = _import_gguf()
        self.metadata, stored = _read_header(path, self._gguf)
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
        return sha256_of([self.path])

    def close(self) -> None:
        """Nothing is held open between reads."""

    def _read(self, stored: _Stored) -> np.ndarray:
        """The values, dequantised some rows at a time so that little more than the result is in memory."""
        dtype = _PLAIN.get(stored.type)
        rows, width = math.prod(stored.shape[:-1]), stored.shape[-1]
        values = np.empty((rows, width), dtype or np.float32)
        step = max(1, (1 << 20) // max(1, width))
        with self.path.open("rb") as file:
            file.seek(stored.offset)
            for start in range(0, rows, step):
                stop = min(start + step, rows)
                raw = np.fromfile(file, np.uint8, (stop - start) * stored.row_bytes)
                if raw.size != (stop - start) * stored.row_bytes:
                    raise UserError(f"{self.path} has become shorter since it was opened")
                raw = raw.reshape(stop - start, stored.row_bytes)
                if dtype is None:
                    quantisation = self._gguf.GGMLQuantizationType(stored.type)
                    values[start:stop] = self._gguf.quants.dequantize(raw, quantisation)
                else:
                    values[start:stop] = raw.view(dtype)
        return values.reshape(stored.shape)


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
    if (kind := metadata.get("general.type", "model")) != "model":
        raise UserError(f"{path} holds a GGUF of type {kind!r}, not a model")
    if name not in ARCHITECTURES:
        raise UserError(f"{path} has the GGUF architecture {name!r}; supported are {', '.join(ARCHITECTURES)}")
    if (parts := metadata.get("split.count", 0)) > 1:
        raise UserError(f"{path} is one of {parts} parts of a model; join them with llama-gguf-split --merge")
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
            if not isinstance(alignment, int) or alignment < 1:
                raise ValueError(f"its alignment is {alignment!r}")
            start = -(-cursor.at // alignment) * alignment
            return metadata, {
                name: _locate(path, gguf, name, shape, kind, start + offset, len(data))
                for name, (shape, kind, offset) in table.items()
            }
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (struct.error, ValueError, KeyError, OverflowError) as error:
        raise UserError(f"{path} is a truncated or damaged GGUF file: {error}") from error


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
    return _Stored(kind, shape, offset, row_bytes)


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
            return self.number(_SCALARS[kind])
        element, count = self.number("I"), self.number("Q")
        if element == _STRING:
            return [self.string() for _ in range(count)]
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
        return name, (shape[::-1], self.number("I"), self.number("Q"))


# GGUF's numbers of metadata types, and the struct codes of those that are numbers.
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
