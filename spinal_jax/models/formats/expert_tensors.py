"""Reads mixtures that store all experts of a block in one tensor, like Qwen3.5 and files of transformers 5.

`NAME.experts.gate_up_proj` is [experts, gate and up concatenated, d], `NAME.experts.down_proj` [experts, d, inner].
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from spinal_jax.errors import UserError
from spinal_jax.jsontypes import Json
from spinal_jax.models.config import MOST_EXPERTS
from spinal_jax.models.families import FAMILIES
from spinal_jax.models.formats.base import Bounds, TensorInfo
from spinal_jax.models.formats.quantised import Dequantised
from spinal_jax.models.formats.safetensors import SafetensorsFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Folder = SafetensorsFolder | Dequantised

_TOGETHER = re.compile(r"(.+\.experts)\.(gate_up_proj|down_proj)")


class _Where(NamedTuple):
    """The rows of a stored tensor that form the matrix of an expert."""

    stored: str
    expert: int
    first: int


def apart(folder: Folder) -> Folder | ExpertsApart:
    """The folder with a tensor for each expert, if its family has such tensors. Raises UserError if that fails."""
    family = FAMILIES.get(str(folder.config.get("model_type", "")))
    together = [name for name in folder.names() if _TOGETHER.fullmatch(name)]
    if family is None or not family.experts_apart or not together:
        return folder
    return ExpertsApart(folder, together)


class ExpertsApart:
    """A `Checkpoint` with a tensor for each expert, from a folder whose tensors `together` contain all experts."""

    kind: str = "huggingface"

    def __init__(self, inner: Folder, together: list[str]) -> None:
        self.folder, self.source, self.revision = inner.folder, inner.source, inner.revision
        self.config: Json = inner.config
        self.inner = inner
        self._infos = {name: info for name, info in inner.names().items() if name not in together}
        self._where: dict[str, _Where] = {}
        for name in together:
            info = inner.names()[name]
            match = _TOGETHER.fullmatch(name)
            assert match is not None
            parts = ("gate_proj", "up_proj") if match[2] == "gate_up_proj" else ("down_proj",)
            if len(info.shape) != 3 or info.shape[0] > MOST_EXPERTS or info.shape[1] % len(parts):
                raise UserError(
                    f"{inner.source}: {name} of shape {tuple(info.shape)} is not one matrix for each expert"
                )
            count, rows, columns = info.shape[0], info.shape[1] // len(parts), info.shape[2]
            for expert in range(count):
                for number, part in enumerate(parts):
                    own = f"{match[1]}.{expert}.{part}.weight"
                    if own in self._infos:
                        raise UserError(f"{inner.source} holds experts both in {name} and in {own}")
                    self._infos[own] = TensorInfo((rows, columns), info.dtype)
                    self._where[own] = _Where(name, expert, number * rows)
        self._infos = dict(sorted(self._infos.items()))

    def names(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def tensor(self, name: str) -> np.ndarray:
        if name not in self._where:
            return self.inner.tensor(name)
        return self.part(name, tuple((0, size) for size in self._infos[name].shape))

    def part(self, name: str, bounds: Bounds) -> np.ndarray:
        if name not in self._where:
            return self.inner.part(name, bounds)
        stored, expert, first = self._where[name]
        (start, stop), columns = bounds
        return self.inner.part(stored, ((expert, expert + 1), (first + start, first + stop), columns))[0]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.inner.tokenizer()

    def sha256(self) -> str:
        return self.inner.sha256()

    def close(self) -> None:
        self.inner.close()
