"""Checkpoints in memory: trained models before export, and models with random weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np
from flax import nnx

from spinal_jax.errors import UserError
from spinal_jax.jsontypes import Json
from spinal_jax.models.decoder import Decoder
from spinal_jax.models.families import read_model
from spinal_jax.models.formats.base import Checkpoint, TensorInfo
from spinal_jax.models.hf_config import shorten_middle
from spinal_jax.models.parts import take_apart
from spinal_jax.models.translate import parameter_shapes, tensor_targets

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class MemoryCheckpoint:
    """Parameters in memory as a `Checkpoint` with HF names."""

    kind: str = "memory"
    revision: str | None = None

    def __init__(
        self,
        source: str,
        config: Json,
        arrays: Mapping[str, jax.Array | np.ndarray],
        tokenizer: PreTrainedTokenizerBase,
        ignore_keys: Iterable[str] = (),
    ) -> None:
        """From the content of config.json and arrays by parameter path, stacked over depth."""
        self.source, self.config = source, config
        self.folder: Path | None = None  # Hugging Face folder with the tokenizer files
        self._arrays, self._tokenizer = arrays, tokenizer
        family, self._decoder = read_model(config, ignore_keys)
        shapes = parameter_shapes(self._decoder)
        self._places = {
            place.name: place for place in tensor_targets(family.rules(self._decoder), self._decoder, shapes)
        }

    def names(self) -> Mapping[str, TensorInfo]:
        return {name: TensorInfo(t.shape, t.dtype) for name in sorted(self._places) for t in [self.tensor(name)]}

    def tensor(self, name: str) -> np.ndarray:
        place = self._places[name]
        return place.rule.join([np.asarray(self._arrays[path][place.row]) for path in place.paths], self._decoder)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._tokenizer

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for path in sorted(self._arrays):
            digest.update(path.encode() + np.ascontiguousarray(self._arrays[path]).view(np.uint8).tobytes())
        return digest.hexdigest()

    def close(self) -> None:
        """No-op."""


def random_checkpoint(source: str, config: Json, tokenizer: PreTrainedTokenizerBase, seed: int) -> Checkpoint:
    """A model with random float32 weights of `Decoder`; equal seeds give equal weights.

    Raises UserError for a seed of more than 32 bits, which JAX would truncate.
    """
    if not 0 <= seed < 2**32:
        raise UserError(f"{shorten_middle(source, 80)} asks for a seed beyond {2**32 - 1}")
    _, decoder = read_model(config)
    arrays = jax.device_get(take_apart(Decoder(decoder, rngs=nnx.Rngs(seed)))[1])
    return MemoryCheckpoint(source, config, arrays, tokenizer)
