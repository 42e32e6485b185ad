"""Reads GGUF files as Hugging Face checkpoints, undoing the changes of the exporter."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from spinal_jax.errors import UserError
from spinal_jax.jsontypes import ReadJson
from spinal_jax.models.config import MOST_EXPERTS
from spinal_jax.models.formats.base import Bounds, TensorInfo, sha256_of
from spinal_jax.models.formats.gguf_architectures import ARCHITECTURES, Architecture
from spinal_jax.models.formats.gguf_header import PLAIN, GGUFTensor, import_gguf, read_parts
from spinal_jax.models.formats.gguf_keys import ROPE_FACTORS, Config, Keys
from spinal_jax.models.formats.gguf_layouts import Joined, Undo, moves_rows, out_in, returns_float32, shape_after
from spinal_jax.models.hf_config import shorten_middle, value_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class _Origin(NamedTuple):
    """The origin of an HF tensor in a stored tensor."""

    stored: GGUFTensor
    part: tuple[slice | int, ...]  # of the outermost dimensions, which indices leave out
    undo: Undo | None
    info: TensorInfo


class _Made(NamedTuple):
    """An HF tensor made of several stored ones."""

    stored: list[str]
    rule: Joined
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
        self._made = _made(path, stored, architecture, self.config)
        taken = {tensor for made in self._made.values() for tensor in made.stored}
        rest = {tensor: found for tensor, found in stored.items() if tensor not in taken}
        self._origins = _origins(path, rest, architecture, self.config, keys.predicting)
        if twice := sorted(self._made.keys() & self._origins.keys()):
            first, other = self._made[twice[0]].stored[0], self._origins[twice[0]].stored
            raise UserError(f"{path} has the tensor {first}, which another one of shape {other.shape} stands for too")
        self._stored = stored

    def names(self) -> Mapping[str, TensorInfo]:
        infos = {name: origin.info for name, origin in self._origins.items()}
        infos |= {name: TensorInfo(values.shape, values.dtype) for name, values in self._constants.items()}
        infos |= {name: made.info for name, made in self._made.items()}
        return dict(sorted(infos.items()))

    def tensor(self, name: str) -> np.ndarray:
        if name in self._constants:
            return self._constants[name]
        if name in self._made:
            made = self._made[name]
            parts = [self._read(self._stored[tensor]).astype(made.info.dtype) for tensor in made.stored]
            return made.rule.join(parts, self.config)
        stored, part, undo, info = self._origins[name]
        if isinstance(part[0], int):  # one of many, whose rows alone are read
            values = self._read(stored, _row_numbers(stored.shape, part).reshape(-1)).reshape(info.shape)
        else:
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
        order = undo if moves_rows(undo) else None
        if len(info.shape) < 2 or not (undo is None or undo is out_in or order is not None):
            return self.tensor(name)[tuple(slice(*each) for each in bounds)]
        rows = _row_numbers(stored.shape, outer)
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


def _row_numbers(shape: tuple[int, ...], part: tuple[slice | int, ...]) -> np.ndarray:
    """The numbers of the rows in a part of a tensor of two or more axes, in the shape of the part."""
    first, *others = part
    if not isinstance(first, int):
        return np.arange(math.prod(shape[:-1])).reshape(shape[:-1])[part]
    count = math.prod(shape[1:-1])
    return np.arange(first * count, (first + 1) * count).reshape(shape[1:-1])[tuple(others)]


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
    path: Path, stored: Mapping[str, GGUFTensor], architecture: Architecture, config: Config, predicting: int
) -> dict[str, _Origin]:
    """HF name -> origin, sorted. Raises UserError for a stored tensor without an HF name.

    `predicting`: the number of blocks behind the last that predict tokens further ahead, which are left out.
    """
    origins: dict[str, _Origin] = {}
    left_out = range(config.get("num_hidden_layers", 0), config.get("num_hidden_layers", 0) + predicting)
    for name, tensor in stored.items():
        if name in ROPE_FACTORS:  # part of the config
            continue
        match = re.fullmatch(r"(?:blk\.(\d{1,9})\.)?(\w+)(?:\.(weight|bias))?", name)
        if (other := re.match(r"blk\.(\d{1,9})\.", name)) and int(other[1]) in left_out:
            continue
        block, stem, suffix = match.groups() if match else (None, "", "")
        hf = architecture.names.get(stem, ())
        targets = (hf,) if isinstance(hf, str) else hf
        whole = stem in architecture.whole
        if not targets or ("{}" in targets[0]) != (block is not None) or not (suffix or whole):
            raise UserError(f"{path} has the tensor {name}, which is not known for its architecture")
        undo = architecture.undo(stem, config)
        dtype = np.dtype(np.float32) if returns_float32(undo) else PLAIN.get(tensor.type, np.dtype(np.float32))
        many = "{e}" in targets[0]  # experts or heads
        if many and (len(tensor.shape) < 2 or tensor.shape[0] > MOST_EXPERTS):
            raise UserError(f"{path}: {name} has the shape {tensor.shape}, which is not that of some experts")
        rest = tensor.shape[1:] if many else tensor.shape
        if rest[0] % len(targets):
            raise UserError(f"{path}: {name} has {rest[0]} rows, which is not {len(targets)} equal parts")
        size = rest[0] // len(targets)
        try:
            info = TensorInfo(shape_after(undo, (size, *rest[1:])), dtype)
        except ValueError as error:
            raise UserError(f"{path}: {name} has the shape {tensor.shape}: {error}") from error
        for number, target in enumerate(targets):
            rows = slice(number * size, (number + 1) * size)
            for expert in range(tensor.shape[0]) if many else [None]:
                part = (rows,) if expert is None else (expert,) if len(targets) == 1 else (expert, rows)
                full = target.format(block, e=expert) + ("" if whole else f".{suffix}")
                if full in origins:
                    raise UserError(f"{path} has the tensor {name}, which another one stands for too")
                origins[full] = _Origin(tensor, part, undo, info)
    return dict(sorted(origins.items()))


def _made(path: Path, stored: Mapping[str, GGUFTensor], architecture: Architecture, config: Config) -> dict[str, _Made]:
    """HF tensors made of several stored tensors."""
    found = {}
    for block in range(config["num_hidden_layers"] if architecture.joined else 0):
        for target, rule in architecture.joined.items():
            names = [f"blk.{block}.{name}" for name in rule.stored]
            tensors = [stored[name] for name in names if name in stored]
            if not tensors:
                continue
            if len(tensors) < len(names):
                raise UserError(f"{path} lacks the tensor {next(name for name in names if name not in stored)}")
            try:
                shape = rule.shape([tensor.shape for tensor in tensors], config)
            except ValueError as error:
                raise UserError(f"{path}: {names[0]} has the shape {tensors[0].shape}, {error}") from error
            types = {tensor.type for tensor in tensors}
            dtype = PLAIN.get(types.pop(), np.dtype(np.float32)) if len(types) == 1 else np.dtype(np.float32)
            found[target.format(block)] = _Made(names, rule, TensorInfo(shape, dtype))
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
