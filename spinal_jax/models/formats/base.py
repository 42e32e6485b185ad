"""What every checkpoint looks like: an HF-style config, and tensors under HF names, read one by one."""

from __future__ import annotations

import hashlib
import json
import stat
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from spinal_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TensorInfo(NamedTuple):
    """What is known of a tensor without reading it."""

    shape: tuple[int, ...]
    dtype: np.dtype


class Checkpoint(Protocol):
    """A model on disk: a config as config.json holds it, and tensors under HF names in HF layout, read one by one."""

    source: str  # what the user named
    kind: str  # "huggingface", "gguf" or "orbax"
    config: dict[str, Any]  # the content of config.json, or the same rebuilt from the file's own metadata
    revision: str | None  # the commit that a hub download resolved to

    def names(self) -> Mapping[str, TensorInfo]:
        """Every tensor by HF name, sorted, with its shape and the dtype that `tensor` returns; reads no weights."""
        ...

    def tensor(self, name: str) -> np.ndarray:
        """One tensor, read now into an array of its own. bfloat16 is `ml_dtypes.bfloat16`. KeyError if unknown."""
        ...

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's fast tokenizer, with its chat template; UserError if it has none that can be trusted."""
        ...

    def sha256(self) -> str:
        """Hex digest of the weight files' bytes, in order of file name; of one file it is what `sha256sum` prints."""
        ...

    def close(self) -> None:
        """Release what is held open. Arrays already read stay valid."""
        ...


Bounds = tuple[tuple[int, int], ...]  # (start, stop) along each axis


@runtime_checkable
class ReadsParts(Protocol):
    """A checkpoint that can read some rows of a tensor without the others."""

    def part(self, name: str, bounds: Bounds) -> np.ndarray:
        """A block of a tensor, read now into an array of its own."""
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
MOST_JSON_BYTES = 1 << 28  # the index of the largest published checkpoint takes some 10 MB


def require_regular(path: Path) -> None:
    """Refuses what is no regular file, such as a FIFO or a device, whose reading may have no end. Errors: UserError."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise UserError(f"{path} is not a regular file")


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. ValueError where a key stands in it twice, for readers differ in which one they take."""
    found = dict(pairs)
    if len(found) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"it has the key {name[:100]!r} twice")
    return found


def read_json(path: Path, most: int = MOST_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file of at most `most` bytes. Errors: UserError."""
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


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json. Errors: UserError."""
    path = folder / "config.json"
    if path.exists():
        return read_json(path, MOST_CONFIG_BYTES)
    raise UserError(f"{folder} has no config.json, so it is not a Hugging Face model folder")
