"""Hugging Face folders: config.json beside model.safetensors or the shards that an index names."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from spinal_jax.errors import UserError
from spinal_jax.models.formats.base import Bounds, TensorInfo, once, read_config, read_json, require_regular, sha256_of
from spinal_jax.models.formats.tokenizer import folder_tokenizer
from spinal_jax.models.hf_config import value_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAFETENSORS_DTYPES: dict[str, np.dtype] = {
    code: np.dtype(dtype)
    for code, dtype in {
        "F64": "<f8",
        "F32": "<f4",
        "F16": "<f2",
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "I64": "<i8",
        "I32": "<i4",
        "I16": "<i2",
        "I8": "i1",
        "U8": "u1",
        "BOOL": "?",
    }.items()
}


LONGEST_NAME = 1000  # characters of a tensor's name, which messages show


class TensorLocation(NamedTuple):
    """File, offset and type of a tensor."""

    path: Path
    offset: int
    info: TensorInfo


class SafetensorsFolder:
    """A Hugging Face folder: config.json beside model.safetensors or the shards that an index names."""

    kind: str = "huggingface"

    def __init__(self, folder: Path, source: str, revision: str | None = None) -> None:
        self.folder = folder
        self.source = source
        self.revision = revision
        self.config = read_config(folder)
        self._stored = _find_tensors(folder)

    @cached_property
    def _infos(self) -> dict[str, TensorInfo]:
        return {name: self._stored[name].info for name in sorted(self._stored)}

    def names(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def tensor(self, name: str) -> np.ndarray:
        return read_stored(self._stored[name], name)

    def part(self, name: str, bounds: Bounds) -> np.ndarray:
        shape = self._stored[name].info.shape
        if len(shape) == 2 and bounds[1] != (0, shape[1]):
            return self._block(name, *bounds)
        return self._rows(name, *bounds[0])[(slice(None), *(slice(*each) for each in bounds[1:]))]

    def _block(self, name: str, rows: tuple[int, int], columns: tuple[int, int]) -> np.ndarray:
        """Some columns of some rows, without reading the bytes between them."""
        path, offset, info = self._stored[name]
        values = np.empty((rows[1] - rows[0], columns[1] - columns[0]), info.dtype)
        flat, wide = values.view(np.uint8), info.shape[1] * info.dtype.itemsize
        with path.open("rb", buffering=0) as file:
            for place, row in enumerate(range(*rows)):
                file.seek(offset + row * wide + columns[0] * info.dtype.itemsize)
                if file.readinto(flat[place].data) != flat.shape[1]:
                    raise _shorter(path, name)
        return values

    def _rows(self, name: str, start: int, stop: int) -> np.ndarray:
        path, offset, info = self._stored[name]
        wide = math.prod(info.shape[1:])
        count = (stop - start) * wide
        values = np.fromfile(path, info.dtype, count, offset=offset + start * wide * info.dtype.itemsize)
        if values.size != count:
            raise _shorter(path, name)
        return values.reshape(stop - start, *info.shape[1:])

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return folder_tokenizer(self.folder)

    def sha256(self) -> str:
        return sha256_of(sorted({stored.path for stored in self._stored.values()}))

    def close(self) -> None:
        """No-op."""


def read_stored(stored: TensorLocation, name: str) -> np.ndarray:
    """Reads a whole tensor into a new array."""
    path, offset, info = stored
    # Read instead of memory-mapped, because mapped pages count as resident memory.
    values = np.fromfile(path, info.dtype, math.prod(info.shape), offset=offset)
    if values.size != math.prod(info.shape):
        raise _shorter(path, name)
    return values.reshape(info.shape)


def _shorter(path: Path, name: str) -> UserError:
    return UserError(f"{path} has become shorter since it was opened: {name} cannot be read")


def _find_tensors(folder: Path) -> dict[str, TensorLocation]:
    """Locations of all tensors of the folder, from the headers of the shards."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return read_header(single)
    if index.exists():
        return _read_shards(folder, index)
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pth"})
    if pickles:
        raise UserError(
            f"{folder} has its weights only as pickle ({pickles[0]}), which is never read because it can run code; "
            "convert it where you trust it: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    raise UserError(f"{folder} has no weights: expected model.safetensors or model.safetensors.index.json")


def _read_shards(folder: Path, index: Path) -> dict[str, TensorLocation]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map that says which shard holds which tensor")
    if wrong := [name for name, shard in weight_map.items() if not isinstance(shard, str)]:
        raise UserError(f"{index} does not say which shard holds {value_text(wrong[0])}")
    shards: dict[str, dict[str, TensorLocation]] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise UserError(f"{index} names the shard {shard!r}, which is not a file of the folder itself")
        if not (folder / shard).exists():
            raise UserError(f"the shard {shard} is missing from {folder}: {index.name} names it")
        shards[shard] = read_header(folder / shard)
    copies: dict[str, list[str]] = defaultdict(list)
    for shard, stored in shards.items():
        for name in stored:
            copies[name].append(shard)
    for name, holders in copies.items():
        if name in weight_map and len(holders) > 1:
            _require_equal(name, [shards[shard][name] for shard in holders])
    # An index may name what no file holds, such as a tied unembedding or rotary tables that were saved once. A tensor
    # that the model needs is missed by name when it is loaded.
    found = {name: shards[shard].get(name) for name, shard in weight_map.items()}
    for name, stored in found.items():
        if stored is None and copies[name]:
            raise UserError(f"{index} says that {name} is in {weight_map[name]}, but it is in {copies[name][0]}")
    return {name: stored for name, stored in found.items() if stored is not None}


def _require_equal(name: str, copies: Sequence[TensorLocation]) -> None:
    """Raises UserError if files of a checkpoint contain a tensor with different values."""
    first, *others = copies
    for other in others:
        equal = first.info == other.info
        size, step = math.prod(first.info.shape) * first.info.dtype.itemsize, 1 << 24
        with first.path.open("rb") as one, other.path.open("rb") as two:
            one.seek(first.offset)
            two.seek(other.offset)
            for start in range(0, size if equal else 0, step):
                count = min(step, size - start)
                equal = equal and one.read(count) == two.read(count)
        if not equal:
            raise UserError(f"{name} is in both {first.path} and {other.path}, and the two differ")


def read_header(path: Path) -> dict[str, TensorLocation]:
    """The tensors of one safetensors file; the reference parser refuses a header that does not cover the whole file."""
    require_regular(path)
    try:
        with safe_open(path, framework="numpy"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length), object_pairs_hook=once)
    except SafetensorError as error:
        raise UserError(f"{path} is truncated or not a safetensors file: {error}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    stored = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if not name.isprintable() or len(name) > LONGEST_NAME:
            raise UserError(f"{path} has a tensor with the name {value_text(name)}, which is not a line of text")
        dtype = SAFETENSORS_DTYPES.get(entry["dtype"])
        if dtype is None:
            known = ", ".join(SAFETENSORS_DTYPES)
            raise UserError(f"{name} in {path} has the dtype {entry['dtype']}; those that can be read are {known}")
        stored[name] = TensorLocation(
            path, 8 + length + entry["data_offsets"][0], TensorInfo(tuple(entry["shape"]), dtype)
        )
    return stored
