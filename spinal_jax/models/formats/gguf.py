"""Reads GGUF files as Hugging Face checkpoints, undoing the changes of the exporter."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from spinal_jax.errors import UserError
from spinal_jax.jsontypes import ReadJson
from spinal_jax.models.config import MOST_EXPERTS
from spinal_jax.models.formats.base import Bounds, TensorInfo, sha256_of
from spinal_jax.models.formats.gguf_architectures import (
    ARCHITECTURES,
    Architecture,
    Undo,
    alternating,
    halves,
    minus_one,
    out_in,
)
from spinal_jax.models.formats.gguf_header import PLAIN, GGUFTensor, import_gguf, read_parts
from spinal_jax.models.formats.gguf_keys import ROPE_FACTORS, Config, Keys
from spinal_jax.models.hf_config import shorten_middle, value_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class _Origin(NamedTuple):
    """The origin of an HF tensor in a stored tensor."""

    stored: GGUFTensor
    part: slice | int  # of the outermost dimension, which an index leaves out
    undo: Undo | None
    info: TensorInfo


class _Experts(NamedTuple):
    """An HF tensor that concatenates stored tensors."""

    stored: list[str]
    info: TensorInfo


class GgufFile:
    """A .gguf file, or its several parts, as a `Checkpoint`.

    Quantised tensors are returned as float32; F32, F16 and BF16 keep their dtype.
    """

    kind: str = "gguf"
    revision: str | None = None

    def __init__(self, path: Path, source: str) -> None:
        self.path = path
        self.source = source
        self._gguf = import_gguf()
        self.paths, self.metadata, stored = read_parts(path, self._gguf)
        architecture = _architecture(path, self.metadata)
        shapes = {name: tensor.shape for name, tensor in stored.items()}
        name = self.metadata["general.architecture"]
        keys = Keys(path, name, self.metadata, shapes, lambda tensor: self._read(stored[tensor]))
        self.config: Config = architecture.config(keys)
        keys.done()
        self._constants = _constants(path, self.metadata, architecture, self.config)
        self._experts = _experts(path, stored, architecture, self.config)
        taken = {tensor for joined in self._experts.values() for tensor in joined.stored}
        rest = {tensor: found for tensor, found in stored.items() if tensor not in taken}
        self._origins = _origins(path, rest, architecture, self.config)
        self._stored = stored

    def names(self) -> Mapping[str, TensorInfo]:
        infos = {name: origin.info for name, origin in self._origins.items()}
        infos |= {name: TensorInfo(values.shape, values.dtype) for name, values in self._constants.items()}
        infos |= {name: joined.info for name, joined in self._experts.items()}
        return dict(sorted(infos.items()))

    def tensor(self, name: str) -> np.ndarray:
        if name in self._constants:
            return self._constants[name]
        if name in self._experts:
            joined = self._experts[name]
            parts = [self._read(self._stored[tensor]).astype(joined.info.dtype) for tensor in joined.stored]
            return alternating(parts)
        stored, part, undo, info = self._origins[name]
        if isinstance(part, int):
            rows = math.prod(stored.shape[1:-1])
            return self._read(stored, np.arange(part * rows, (part + 1) * rows)).reshape(info.shape)
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
        if name not in self._origins:
            return self.tensor(name)[tuple(slice(*each) for each in bounds)]
        stored, outer, undo, info = self._origins[name]
        order = undo if isinstance(undo, partial) and undo.func is halves else None  # which moves rows alone
        if len(info.shape) < 2 or not (undo is None or undo is out_in or order is not None):
            return self.tensor(name)[tuple(slice(*each) for each in bounds)]
        rows = np.arange(math.prod(stored.shape[:-1])).reshape(stored.shape[:-1])[outer]
        if order is not None:
            rows = order(rows)
        within = bounds[::-1] if undo is out_in else bounds
        rows = rows[tuple(slice(*each) for each in within[:-1])]
        values = self._read(stored, rows.reshape(-1), within[-1]).reshape(*rows.shape, within[-1][1] - within[-1][0])
        return out_in(values) if undo is out_in else values

    def _read(
        self, stored: GGUFTensor, numbers: np.ndarray | None = None, columns: tuple[int, int] | None = None
    ) -> np.ndarray:
        """The values of a tensor, or of some rows and columns, [len(numbers), columns], for which only the necessary
        blocks are read. Rows are dequantised in batches to limit memory."""
        dtype, kind = PLAIN.get(stored.type), self._gguf.GGMLQuantizationType(stored.type)
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
                whole = raw.shape[1] == stored.row_bytes  # consecutive rows are read together
                breaks = np.flatnonzero(np.diff(some) != 1) + 1 if whole else np.arange(1, len(some))
                for into, run in zip(np.split(raw, breaks), np.split(some, breaks), strict=True):
                    file.seek(stored.offset + int(run[0]) * stored.row_bytes + first * block_bytes)
                    if file.readinto(into.data) != into.nbytes:
                        raise UserError(f"{stored.path} has become shorter since it was opened")
                found = raw.view(dtype) if dtype is not None else self._gguf.quants.dequantize(raw, kind)
                values[start : start + step] = found[:, begin - first * block : end - first * block]
        return values.reshape(stored.shape) if numbers is None else values


def _architecture(path: Path, metadata: ReadJson) -> Architecture:
    """The architecture of the file. Raises UserError if it is not supported or not a whole model."""
    name = metadata.get("general.architecture")
    if not isinstance(name, str):
        raise UserError(f"{path}: general.architecture is {value_text(name)}, which is not a name")
    if (kind := metadata.get("general.type", "model")) != "model":
        raise UserError(f"{path} holds a GGUF of type {kind!r}, not a model")
    if name not in ARCHITECTURES:
        raise UserError(
            f"{path} has the GGUF architecture {shorten_middle(name)!r}; supported are {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[name]


def _origins(
    path: Path, stored: Mapping[str, GGUFTensor], architecture: Architecture, config: Config
) -> dict[str, _Origin]:
    """HF name -> origin, sorted. Raises UserError for a stored tensor without an HF name."""
    origins = {}
    for name, tensor in stored.items():
        if name in ROPE_FACTORS:  # part of the config
            continue
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
        block, stem, suffix = match.groups() if match else (None, "", "")
        hf = architecture.names.get(stem, ())
        targets = (hf,) if isinstance(hf, str) else hf
        if not targets or ("{}" in targets[0]) != (block is not None):
            raise UserError(f"{path} has the tensor {name}, which is not known for its architecture")
        undo = architecture.undo(stem, config)
        dtype = np.dtype(np.float32) if undo is minus_one else PLAIN.get(tensor.type, np.dtype(np.float32))
        if "{e}" in targets[0]:
            if len(tensor.shape) != 3 or tensor.shape[0] > MOST_EXPERTS:
                raise UserError(f"{path}: {name} has the shape {tensor.shape}, which is not that of some experts")
            for expert in range(tensor.shape[0]):
                own = f"{targets[0].format(block, e=expert)}.{suffix}"
                origins[own] = _Origin(tensor, expert, undo, TensorInfo(tensor.shape[1:], dtype))
            continue
        size = tensor.shape[0] // len(targets)
        for number, target in enumerate(targets):
            shape = (size, *tensor.shape[1:])
            info = TensorInfo(shape[::-1] if undo is out_in else shape, dtype)
            part = slice(number * size, (number + 1) * size)
            full = target.format(block) if stem in architecture.whole else f"{target.format(block)}.{suffix}"
            if full in origins:
                raise UserError(f"{path} has the tensor {name}, which another one stands for too")
            origins[full] = _Origin(tensor, part, undo, info)
    return dict(sorted(origins.items()))


def _experts(
    path: Path, stored: Mapping[str, GGUFTensor], architecture: Architecture, config: Config
) -> dict[str, _Experts]:
    """HF tensors that concatenate stored tensors of equal shape."""
    found = {}
    for block in range(config["num_hidden_layers"] if architecture.experts else 0):
        for target, stems in architecture.experts.items():
            names = [f"blk.{block}.{stem}" for stem in stems]
            tensors = [stored[name] for name in names if name in stored]
            if not tensors:
                continue
            if len(tensors) < len(names):
                raise UserError(f"{path} lacks the tensor {next(name for name in names if name not in stored)}")
            shape = tensors[0].shape
            if any(tensor.shape != shape for tensor in tensors) or len(shape) != (2 if "bias" in stems[0] else 3):
                raise UserError(f"{path}: {names[0]} has the shape {shape}, which does not fit")
            types = {tensor.type for tensor in tensors}
            dtype = PLAIN.get(types.pop(), np.dtype(np.float32)) if len(types) == 1 else np.dtype(np.float32)
            count, out, *into = shape
            found[target.format(block)] = _Experts(names, TensorInfo((count, *into, out * len(names)), dtype))
    return found


def _constants(path: Path, metadata: ReadJson, architecture: Architecture, config: Config) -> dict[str, np.ndarray]:
    """HF tensors with values from the metadata, a number for each block."""
    depth, found = config.get("num_hidden_layers", 0), {}
    for target, (key, shape) in architecture.constants.items():
        values = np.asarray(metadata.get(key, []))
        if values.shape != (depth,) or values.dtype.kind != "f" or not np.isfinite(values).all():
            raise UserError(f"{path}: {key} is not a list of {depth} finite numbers, one for each block")
        for block, value in enumerate(values.astype(np.float32)):
            found[target.format(block)] = value.reshape(shape)
    return found
