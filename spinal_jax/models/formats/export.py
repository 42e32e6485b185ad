"""Exports a checkpoint as a Hugging Face folder: config.json, sharded safetensors, tokenizer."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from spinal_jax.jsontypes import Json, ReadJson
from spinal_jax.models.families import read_checkpoint
from spinal_jax.models.formats import folders
from spinal_jax.models.formats.base import Checkpoint, TensorInfo, sha256_of
from spinal_jax.models.formats.safetensors import SAFETENSORS_DTYPES
from spinal_jax.models.translate import TensorTarget, match, parameter_shapes, parts_of
from spinal_jax.progress import Bar, no_bar

SCHEMA = "spinal-export/1"
_CODES = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}
_COPY_BYTES = 1 << 26


class _Planned(NamedTuple):
    """A tensor to be written."""

    place: TensorTarget
    stored: str  # its name in the checkpoint
    info: TensorInfo

    @property
    def size(self) -> int:
        return math.prod(self.info.shape) * self.info.dtype.itemsize


def export(
    checkpoint: Checkpoint,
    out: str,
    *,
    dtype: str | None = None,
    ignore_keys: Iterable[str] = (),
    shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
    bar: Bar | None = None,
) -> Path:
    """Writes the checkpoint to `out` as `AutoModelForCausalLM.from_pretrained` reads it, and returns its path.

    Every tensor is split into parameters and joined again by the rules of the family, so the export contains what an
    audit computes with, bit for bit in the same dtype. Tensors without parameters, such as rotary tables and vision
    towers, are left out. Until it is complete, the folder is called `out` + ".partial".

    Args:
        checkpoint: what to export.
        out: the folder to write.
        dtype: "float32" or "bfloat16"; None keeps the dtype of each tensor.
        ignore_keys: keys of config.json without effect.
        shard_bytes: maximum size of a file, unless a single tensor is larger.
        overwrite: replace an existing checkpoint.
        bar: opens progress bars.

    Raises:
        UserError: the checkpoint does not match its config.json, or `out` exists.
    """
    bar = bar or no_bar
    folder = folders.check_out(out, checkpoint.source, overwrite)
    ignore_keys = tuple(ignore_keys)
    family, config = read_checkpoint(checkpoint, ignore_keys)
    shapes = parameter_shapes(config)
    wanted, stored = match(checkpoint, family, config, shapes)
    planned: list[_Planned] = []
    for place in sorted(wanted, key=lambda place: place.name):
        name = stored[place.name]
        own = folders.written_dtype(checkpoint, name, place, dtype)
        planned.append(_Planned(place, name, TensorInfo(checkpoint.names()[name].shape, own)))
    record = folders.source_record(checkpoint, SCHEMA, dtype, ignore_keys, bar)
    shards = _shards(planned, shard_bytes)
    with folders.partial_folder(folder, record, overwrite, resume=False) as partial:
        with bar("export", sum(tensor.size for tensor in planned), "B") as advance:
            for name, members in shards.items():
                with (partial / name).open("wb") as file:
                    file.write(_header(members))
                    for tensor in members:
                        read = checkpoint.tensor(tensor.stored)
                        parts = [part for _, part in parts_of(tensor.place, read, config, shapes)]
                        del read
                        joined = tensor.place.rule.join(parts, config)
                        del parts
                        _write(file, joined, tensor.info)
                        del joined  # before the next tensor is read
                        advance(tensor.size)
        embedding = next(tensor for tensor in planned if tensor.place.paths == ("embedding",))
        described = exported_config(checkpoint.config, embedding.info.dtype, config.tied)
        (partial / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        folders.write_companions(checkpoint, partial)
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": sum(tensor.size for tensor in planned)},
                "weight_map": {tensor.place.name: name for name, members in shards.items() for tensor in members},
            }
            text = json.dumps(index, indent=2) + "\n"
            (partial / "model.safetensors.index.json").write_text(text, encoding="utf-8")
        with bar("hash", 1, "folder") as advance:
            record["sha256"] = sha256_of([partial / name for name in shards])
            advance(1)
        folders.finish(partial, folder, record)
    return folder


def exported_config(config: ReadJson, dtype: np.dtype, tied: bool) -> Json:
    """config.json of the exported weights: the text part of a composite model, with the new dtype."""
    exported = dict(config)
    if "text_config" in config:
        text = config["text_config"]
        kind = text.get("model_type", _TEXT_KINDS[config["model_type"]])
        exported = {
            "architectures": [_CLASSES[kind]],
            **{key: config[key] for key in _TOKENS if config.get(key) is not None},
            **text,
            "tie_word_embeddings": tied,
            "model_type": kind,
        }
    if dtype.name != exported.get("dtype", exported.get("torch_dtype")):
        exported = {key: value for key, value in exported.items() if key != "torch_dtype"} | {"dtype": dtype.name}
    return exported


# What the text part of a composite model is where its config does not say so, and the classes of text parts.
_TEXT_KINDS = {
    "gemma3": "gemma3_text",
    "mistral3": "mistral",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
}
_CLASSES = {
    "gemma3_text": "Gemma3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
}
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def _shards(planned: Sequence[_Planned], limit: int) -> dict[str, list[_Planned]]:
    """File name -> its tensors, in order of name."""
    groups: list[list[_Planned]] = [[]]
    held = 0
    for tensor in planned:
        if groups[-1] and held + tensor.size > limit:
            groups.append([])
            held = 0
        groups[-1].append(tensor)
        held += tensor.size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    count = len(groups)
    return {f"model-{i:05}-of-{count:05}.safetensors": group for i, group in enumerate(groups, start=1)}


def _header(members: Sequence[_Planned]) -> bytes:
    """What a safetensors file begins with: the length of a JSON text, and the text. https://huggingface.co/docs/safetensors"""
    header: Json = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in members:
        dtype, shape = tensor.info.dtype, list(tensor.info.shape)
        ends = [offset, offset + tensor.size]
        header[tensor.place.name] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": ends}
        offset = ends[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write(file: BinaryIO, tensor: np.ndarray, info: TensorInfo) -> None:
    """Writes the values of a tensor in blocks of rows."""
    assert tensor.shape == info.shape
    tensor = np.atleast_1d(tensor)
    step = max(1, _COPY_BYTES // max(1, math.prod(info.shape[1:]) * info.dtype.itemsize))
    for start in range(0, len(tensor), step):
        part = np.ascontiguousarray(tensor[start : start + step].astype(info.dtype, copy=False))
        file.write(part.view(np.uint8).data)
