"""Reference log-probabilities, cached on disk by a hash of their inputs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from spinal_jax.errors import UserError
from spinal_jax.files import write_whole
from spinal_jax.objectives.responses import Example, ResponseBatch, Shape, micro_batches
from spinal_jax.progress import Advance

Score = Callable[[ResponseBatch], np.ndarray]  # log-probability [S] of each sequence


def cache_folder(asked: str | None) -> Path:
    """The cache folder: that of the settings, or one in the user's cache."""
    if asked is not None:
        return Path(asked).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "spinal_jax" / "reference"


def fingerprint(weights: str, dtype: str, examples: Iterable[Example]) -> str:
    """Hex digest of everything that a reference log-probability depends on. Tokenizer, template, data and length enter
    through the token ids, which are hashed with the start of each response."""
    digest = hashlib.sha256(f"{weights} {dtype}".encode())
    for example in examples:
        for sequence in example:
            digest.update(np.array([len(sequence.ids), sequence.start], np.int64).tobytes())
            digest.update(np.ascontiguousarray(sequence.ids, np.int32).tobytes())
    return digest.hexdigest()


def score_examples(
    examples: Sequence[Example], batch_size: int, shape: Shape, score: Score, advance: Advance
) -> np.ndarray:
    """float32 [examples, sequences of each] log-probabilities; `batch_size` examples are packed at a time."""
    logp = np.zeros((len(examples), len(examples[0])), np.float32)
    for start in range(0, len(examples), batch_size):
        part = examples[start : start + batch_size]
        for numbers, batch in micro_batches(part, shape):
            values = score(batch)[: len(numbers) * logp.shape[1]]
            logp[[start + number for number in numbers]] = values.reshape(len(numbers), -1)
        advance(len(part))
    return logp


def cached(file: Path, count: int, width: int) -> np.ndarray:
    """float32 [count, width] from a cache file, NaN where unknown. Raises UserError for a damaged file."""
    if not file.exists():
        return np.full((count, width), np.nan, np.float32)
    try:
        logp = load_file(file)["logp"]
    except (SafetensorError, KeyError, OSError) as error:
        raise UserError(f"the cached log-probabilities {file} cannot be read ({error}); delete that file") from error
    if logp.shape != (count, width):
        raise UserError(f"the cached log-probabilities {file} have shape {logp.shape}; delete that file")
    return logp


def save_cached(file: Path, logp: np.ndarray) -> None:
    """Writes the cache file atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, save({"logp": logp}))
