"""GGUF files to be: a writer, and the least that opens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType as Quantisation

RAW = {Quantisation.F32: np.float32, Quantisation.F16: np.float16, Quantisation.BF16: ml_dtypes.bfloat16}


def write(path: Path, architecture: str, keys: Mapping[str, Any], tensors: Mapping[str, Any]) -> Path:
    """A GGUF file. A key that begins with a dot gets the architecture before it; a tensor may be (raw bytes, type)."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in keys.items():
        name = architecture + key if key.startswith(".") else key
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_array(name, value)
    for name, tensor in tensors.items():
        data, kind = tensor if isinstance(tensor, tuple) else (tensor, None)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


KEYS = {
    ".block_count": 1,
    ".context_length": 64,
    ".embedding_length": 64,
    ".feed_forward_length": 96,
    ".attention.head_count": 4,
    ".attention.head_count_kv": 2,
    ".attention.layer_norm_rms_epsilon": 1e-5,
}


def some_tensors(**changed: Any) -> dict[str, Any]:
    """Tensors of a file that opens; those named get another value."""
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (24, 64), "blk.0.attn_q": (64, 64), "blk.0.attn_k": (32, 64), "blk.0.ffn_down": (64, 96)}
    tensors = {f"{name}.weight": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return tensors | {f"{name}.weight": value for name, value in changed.items()}


def quantised(values: np.ndarray, kind: Quantisation) -> tuple[np.ndarray, Quantisation]:
    return gguf.quants.quantize(values, kind), kind


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)
