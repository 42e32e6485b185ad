"""Reads headers of GGUF files: metadata and tensor table, of one file or several parts."""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import ml_dtypes
import numpy as np

from spinal_jax.errors import UserError
from spinal_jax.jsontypes import Json, ReadJson
from spinal_jax.models.formats.base import require_regular
from spinal_jax.models.hf_config import value_text

# GGML type numbers of unquantised types.
PLAIN = {0: np.dtype("<f4"), 1: np.dtype("<f2"), 30: np.dtype(ml_dtypes.bfloat16)}

LONGEST_NAME = 300  # characters of a key or of a tensor's name, which messages show

_Value = TypeVar("_Value")


class GGUFTensor(NamedTuple):
    """Location, type and shape of a stored tensor."""

    path: Path
    type: int  # GGML's number
    shape: tuple[int, ...]  # outermost dimension first, as in NumPy
    offset: int  # of the first byte in the file
    row_bytes: int  # bytes of one row of the innermost dimension


def import_gguf() -> ModuleType:
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise UserError("a .gguf file is read with the gguf package: pip install gguf") from error
    return gguf


def _read_header(path: Path, gguf: ModuleType) -> tuple[Json, dict[str, GGUFTensor]]:
    """Metadata and tensor table. The gguf package would need 10 s for a vocabulary of 262,144 tokens."""
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
                raise ValueError(f"its alignment is {value_text(alignment)}, which is not a power of two")
            start = -(-cursor.at // alignment) * alignment
            stored: dict[str, GGUFTensor] = {}
            expected = 0  # tensors are stored in the order of the table, padded to the alignment
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


def read_parts(path: Path, gguf: ModuleType) -> tuple[list[Path], Json, dict[str, GGUFTensor]]:
    """The files of a model, in order, the metadata of the first, and the tensors of all.

    llama.cpp names the parts NAME-00001-of-00003.gguf and so on, and numbers them from 0 in their metadata.
    """
    metadata, stored = _read_header(path, gguf)
    count = metadata.get("split.count", 0)
    if type(count) is not int or not 0 <= count < 100_000:
        raise UserError(f"{path}: split.count is {value_text(count)}, which is not a number of parts")
    if count < 2:
        return [path], metadata, stored
    match = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", path.name, re.IGNORECASE)
    if match is None or int(match[3]) != count:
        raise UserError(f"{path} is one of {count} parts, but is not named as they are: NAME-00001-of-{count:05}.gguf")
    paths = [path.with_name(f"{match[1]}-{part:05}-of-{count:05}{path.suffix}") for part in range(1, count + 1)]
    if missing := [part for part in paths if not part.exists()]:
        raise UserError(f"{path} is one of {count} parts of a model, of which {missing[0].name} is missing")
    merged: dict[str, GGUFTensor] = {}
    for number, part in enumerate(paths):
        own, tensors = _read_header(part, gguf)
        if (own.get("split.no"), own.get("split.count")) != (number, count):
            said = f"part {value_text(own.get('split.no'))} of {value_text(own.get('split.count'))}"
            raise UserError(f"{part} says that it is {said}, counted from 0, which its name contradicts")
        if number == 0:
            metadata = own
        _require_one_model(part, own, metadata)
        if twice := sorted(merged.keys() & tensors.keys()):
            raise UserError(f"{part} holds {twice[0]}, which a part before it holds too")
        merged |= tensors
    if metadata.get("split.tensors.count", len(merged)) != len(merged):
        raise UserError(
            f"the parts of {path} hold {len(merged)} tensors, but split.tensors.count is "
            f"{value_text(metadata['split.tensors.count'])}"
        )
    return paths, metadata, merged


def _require_one_model(part: Path, own: ReadJson, first: ReadJson) -> None:
    """Raises UserError if the metadata of a part contradict those of the first. Most parts repeat none of them."""
    for key, value in own.items():
        if not key.startswith("split.") and key in first and not np.array_equal(value, first[key]):
            raise UserError(
                f"{part} says that {key} is {value_text(value)}, but the first part says {value_text(first[key])}, so "
                "they are of different models"
            )


def _unique(pairs: Iterable[tuple[str, _Value]]) -> dict[str, _Value]:
    unique: dict[str, _Value] = {}
    for name, value in pairs:
        if not name.isprintable() or len(name) > LONGEST_NAME:
            raise ValueError(f"it has the name {value_text(name)}, which is not a line of {LONGEST_NAME} characters")
        if name in unique:
            raise ValueError(f"{name} occurs twice")
        unique[name] = value
    return unique


def _locate(
    path: Path, gguf: ModuleType, name: str, shape: tuple[int, ...], kind: int, offset: int, end: int
) -> GGUFTensor:
    """Checks the type and the extent of a tensor."""
    if kind not in set(gguf.GGMLQuantizationType):
        raise UserError(f"{path}: {name} has the quantisation {kind}, which the gguf package does not know")
    quantisation = gguf.GGMLQuantizationType(kind)
    block, block_bytes = gguf.GGML_QUANT_SIZES[quantisation]
    if kind not in PLAIN:
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
    return GGUFTensor(path, kind, shape, offset, row_bytes)


class _Cursor:
    """Reads values of a GGUF header; raises struct.error at its end."""

    def __init__(self, data: mmap.mmap, at: int) -> None:
        self.data = data
        self.at = at

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.data, self.at)
        self.at += struct.calcsize(f"<{code}")
        # The shortest decimal of a float32, as in config.json: 1e-05 instead of 9.999999747378752e-06.
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
