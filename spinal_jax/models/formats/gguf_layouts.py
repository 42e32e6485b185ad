"""How llama.cpp's converter changes tensors, undone: `Undo` for one tensor, `Joined` for one made of several.

The converter is https://github.com/ggml-org/llama.cpp (convert_hf_to_gguf.py and conversion/).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from spinal_jax.models.formats.gguf_keys import Config

Undo = Callable[[np.ndarray], np.ndarray]
Shape = tuple[int, ...]


def undo_nothing(stem: str, config: Config) -> Undo | None:
    """The stored tensor is that of the checkpoint."""
    return None


def minus_one(weight: np.ndarray) -> np.ndarray:
    """Norms that multiply by 1 + weight; the file holds that sum. Returns float32."""
    return weight.astype(np.float32) - np.float32(1)


def log_of_negative(weight: np.ndarray) -> np.ndarray:
    """Decays; the file holds -exp(weight). Returns float32; NaN for what is no such number."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.log(-weight.astype(np.float32))


def out_in(weight: np.ndarray) -> np.ndarray:
    """GPT-2 stores matrices as [in, out]; the file stores [out, in]."""
    return np.ascontiguousarray(weight.T)


def one_row(weight: np.ndarray) -> np.ndarray:
    """A matrix of one row, [1, d], which the file may store as [d]."""
    return weight.reshape(1, -1)


def halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Query and key rows of Llama: the file interleaves rotated pairs, HF stores two halves of a head."""
    paired = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return paired.swapaxes(1, 2).reshape(weight.shape)


def fused_by_head(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of GPT-NeoX: the file holds all queries, all keys and all values; HF those of a head together."""
    parts = weight.reshape(3, heads, -1, *weight.shape[1:])
    return parts.swapaxes(0, 1).reshape(weight.shape)


def by_key_head(weight: np.ndarray, key_heads: int, value_heads: int, first: int = 0) -> np.ndarray:
    """Rows of the value heads of a delta net, behind `first` others: the file has the first value head of every key
    head, then the second; HF has those of a key head together."""
    values = weight[first:]
    tiled = values.reshape(value_heads // key_heads, key_heads, -1, *weight.shape[1:])
    return np.concatenate([weight[:first], tiled.swapaxes(0, 1).reshape(values.shape)])


def columns_by_key_head(weight: np.ndarray, key_heads: int, value_heads: int) -> np.ndarray:
    """`by_key_head` of the columns of a matrix."""
    return np.ascontiguousarray(by_key_head(weight.T, key_heads, value_heads).T)


def decays_by_key_head(weight: np.ndarray, key_heads: int, value_heads: int) -> np.ndarray:
    """`log_of_negative`, then `by_key_head`."""
    return by_key_head(log_of_negative(weight), key_heads, value_heads)


def filters(weight: np.ndarray) -> np.ndarray:
    """Convolutions of a channel each, [channels, 1, tokens], stored without the middle axis."""
    return weight[:, None]


def filters_by_key_head(weight: np.ndarray, key_heads: int, value_heads: int, first: int) -> np.ndarray:
    """`by_key_head`, then `filters`."""
    return filters(by_key_head(weight, key_heads, value_heads, first))


_FLOAT32 = (minus_one, log_of_negative, decays_by_key_head)
_ROW_ORDERS = (halves, fused_by_head, by_key_head)


def _function(undo: Undo | None) -> object:
    return undo.func if isinstance(undo, partial) else undo


def returns_float32(undo: Undo | None) -> bool:
    """Whether an undo computes, rather than moves, values."""
    return _function(undo) in _FLOAT32


def moves_rows(undo: Undo | None) -> bool:
    """Whether an undo puts whole rows in another order, and so works on their numbers too."""
    return _function(undo) in _ROW_ORDERS


def shape_after(undo: Undo | None, shape: Shape) -> Shape:
    """The shape of an undone tensor. Raises ValueError if the stored one does not fit."""
    match _function(undo):
        case function if function is out_in:
            return shape[::-1]
        case function if function is one_row:
            return (1, math.prod(shape))
        case function if function in (filters, filters_by_key_head):
            if len(shape) != 2:
                raise ValueError("it is not [channels, tokens]")
            return (shape[0], 1, shape[1])
        case _:
            return shape


class Joined(NamedTuple):
    """An HF tensor made of several stored ones."""

    stored: tuple[str, ...]  # names without the block
    join: Callable[[Sequence[np.ndarray], Config], np.ndarray]
    shape: Callable[[Sequence[Shape], Config], Shape]  # raises ValueError for shapes that do not fit


def alternating(parts: Sequence[np.ndarray], config: Config) -> np.ndarray:
    """Joins expert weights [E, out, in] or biases [E, out] into [E, in, n out] or [E, n out] with alternating
    outputs."""
    joined = np.stack(parts, axis=2).reshape(len(parts[0]), -1, *parts[0].shape[2:])
    return joined.swapaxes(1, 2) if joined.ndim == 3 else joined


def alternating_shape(shapes: Sequence[Shape], config: Config) -> Shape:
    first = shapes[0]
    if any(shape != first for shape in shapes) or len(first) not in (2, 3):
        raise ValueError("which does not fit")
    count, out, *into = first
    return (count, *into, out * len(shapes))


def latent_up(parts: Sequence[np.ndarray], config: Config) -> np.ndarray:
    """Keys [H, rank, nope] and values [H, value, rank] of a latent: the rows of a head together, [H (nope + value),
    rank]."""
    keys, values = parts
    return np.concatenate([keys.swapaxes(1, 2), values], axis=1).reshape(-1, values.shape[2])


def latent_up_shape(shapes: Sequence[Shape], config: Config) -> Shape:
    keys, values = shapes
    if len(keys) != 3 or len(values) != 3 or (keys[0], keys[1]) != (values[0], values[2]):
        raise ValueError(f"which does not fit {values}")
    return (keys[0] * (keys[2] + values[1]), keys[1])


def delta_inputs(parts: Sequence[np.ndarray], config: Config) -> np.ndarray:
    """Queries, keys and values of a delta net in one matrix and its gates in another: the rows of a key head
    together."""
    joined, gates = parts
    heads = config["linear_num_key_heads"]
    keys = heads * config["linear_key_head_dim"]
    query, key, value = np.split(joined, [keys, 2 * keys])
    apart = [part.reshape(heads, -1, *part.shape[1:]) for part in (query, key, value, gates)]
    return np.concatenate(apart, axis=1).reshape(-1, *joined.shape[1:])


def delta_inputs_shape(shapes: Sequence[Shape], config: Config) -> Shape:
    joined, gates = shapes
    keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    values = config["linear_num_value_heads"] * config["linear_value_head_dim"]
    if len(joined) != 2 or joined[0] != 2 * keys + values or gates != (values, joined[1]):
        raise ValueError(f"which does not fit {gates} and the sizes of the metadata")
    return (joined[0] + gates[0], joined[1])
