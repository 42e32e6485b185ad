"""A small Hugging Face folder, its conversion, and conversions that are cut off."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from spinal_jax.errors import UserError
from spinal_jax.models.families import read_model
from spinal_jax.models.formats.convert import convert
from spinal_jax.models.formats.open import open_checkpoint
from spinal_jax.models.translate import parameter_shapes, tensor_targets

CONFIG = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}


BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def write_model(folder: Path, seed: int = 0, shards: int = 2, dtype: Any = np.float32, **changed: Any) -> Path:
    """A Hugging Face folder of a random model of CONFIG, with files that stand for a tokenizer."""
    values = CONFIG | changed
    family, config = read_model(values)
    shapes = parameter_shapes(config)
    rng = np.random.default_rng(seed)
    tensors = {}
    for place in tensor_targets(family.rules(config), config, shapes):
        parts = [rng.normal(size=shapes[path].shape[len(place.row) :]).astype(dtype) for path in place.paths]
        tensors[place.name] = place.rule.join(parts, config)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    weight_map = {}
    for number in range(shards):
        shard = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = dict(sorted(tensors.items())[number::shards])
        save_file(part, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "generation_config.json").write_text('{"do_sample": true}')
    return folder


def converted(source: Path, out: Path, **options: Any) -> Path:
    return convert(open_checkpoint(str(source)), str(out), **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


@contextmanager
def killer(after: int) -> Iterator[Callable[..., Any]]:
    """A progress bar that is never seen again after so many advances."""
    left = after

    def advance(amount: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed

    @contextmanager
    def bar(what: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        yield advance

    yield bar


def refusal(source: Path | str, out: Path | str, **options: Any) -> str:
    """The one line with which a conversion is refused."""
    with pytest.raises(UserError) as error:
        converted(Path(source), Path(out), **options)
    assert "\n" not in str(error.value)
    return str(error.value)
