"""What every checkpoint looks like: an HF-style config, and tensors under HF names, read one by one."""

from __future__ import annotations

import hashlib
import json
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


def sha256_of(paths: Iterable[Path]) -> str:
    """Hex SHA-256 of the files' bytes one after the other, read in blocks."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Errors: UserError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, expected a JSON object")
    return content


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json. Errors: UserError."""
    path = folder / "config.json"
    if path.exists():
        return read_json(path)
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{folder} holds an adapter, not a whole model: merge it into its base model and save that")
    raise UserError(f"{folder} has no config.json, so it is not a Hugging Face model folder")
