"""The interface of checkpoints: a config and tensors in the format of Hugging Face, read one at a time."""

from __future__ import annotations

import hashlib
import json
import stat
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import numpy as np

from spinal_jax.errors import UserError
from spinal_jax.jsontypes import Json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TensorInfo(NamedTuple):
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: np.dtype


class Checkpoint(Protocol):
    """A model on disk: the content of config.json, and tensors with HF names and layout, read one at a time."""

    source: str  # what the user named
    kind: str  # "huggingface", "gguf" or "orbax"
    config: Json  # content of config.json, or its equivalent from metadata
    revision: str | None  # commit of a hub download

    def names(self) -> Mapping[str, TensorInfo]:
        """HF name -> shape and dtype of all tensors, sorted, without reading weights."""
        ...

    def tensor(self, name: str) -> np.ndarray:
        """Reads a tensor into a new array. bfloat16 is `ml_dtypes.bfloat16`. Raises KeyError for an unknown name."""
        ...

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The fast tokenizer with its chat template. Raises UserError without a supported one."""
        ...

    def sha256(self) -> str:
        """Hex digest of the weight files' bytes, in order of file name; of one file it is what `sha256sum` prints."""
        ...

    def close(self) -> None:
        """Closes files. Arrays stay valid."""
        ...


Bounds = tuple[tuple[int, int], ...]  # (start, stop) along each axis


@runtime_checkable
class ReadsParts(Protocol):
    """A checkpoint that can read parts of a tensor."""

    def part(self, name: str, bounds: Bounds) -> np.ndarray:
        """Reads a block of a tensor into a new array."""
        ...


def file_digests(folder: Path, paths: Iterable[Path]) -> tuple[dict[str, str], str]:
    """Hex SHA-256 of each file, by its path within `folder`, and `sha256_of` all of them; each is read once."""
    digests: dict[str, str] = {}
    together = hashlib.sha256()
    for path in paths:
        own = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                own.update(block)
                together.update(block)
        digests[path.relative_to(folder).as_posix()] = own.hexdigest()
    return digests, together.hexdigest()


def sha256_of(paths: Iterable[Path]) -> str:
    """Hex SHA-256 of the files' bytes one after the other, read in blocks."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


MOST_CONFIG_BYTES = 1 << 24
MOST_JSON_BYTES = 1 << 28  # the largest published index has about 10 MB


def require_regular(path: Path) -> None:
    """Raises UserError unless it is a regular file; reading a FIFO or a device may not end."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise UserError(f"{path} is not a regular file")


def once(pairs: list[tuple[str, object]]) -> Json:
    """A JSON object. Raises ValueError for a duplicate key, on which readers disagree."""
    values = dict(pairs)
    if len(values) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"it has the key {name[:100]!r} twice")
    return values


def read_json(path: Path, most: int = MOST_JSON_BYTES) -> Json:
    """The JSON object in a file of at most `most` bytes. Raises UserError if it cannot be read."""
    require_regular(path)
    try:
        if path.stat().st_size > most:
            raise UserError(f"{path} has more than {most >> 20} MiB, which is too much for a description")
        content = json.loads(path.read_bytes(), object_pairs_hook=once)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise UserError(f"{path} is nested too deeply to be read") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, expected a JSON object")
    return content


def read_config(folder: Path) -> Json:
    """The config.json of a folder. Raises UserError if it cannot be read."""
    path = folder / "config.json"
    if path.exists():
        return read_json(path, MOST_CONFIG_BYTES)
    raise UserError(f"{folder} has no config.json, so it is not a Hugging Face model folder")
