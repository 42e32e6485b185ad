"""Dequantises checkpoints with block-scaled weights: FP8 (DeepSeek-V3) and MXFP4 (gpt-oss).

FP8: a tensor `NAME` of float8 beside `NAME_scale_inv`, one factor for each block of `weight_block_size` (or one for the
whole tensor); the weight is their product, in float32. Kimi K2 and the FP8 editions of Qwen3 are stored so too.
MXFP4 (OCP Microscaling Formats 1.0): `NAME_blocks` [..., rows, groups, 16], two 4-bit floats a byte, low half first,
beside `NAME_scales` [..., rows, groups], exponents of two with a bias of 127. Every such product is exact in bfloat16,
the dtype of the result. As in Hugging Face, the last two axes are exchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from spinal_jax.errors import UserError
from spinal_jax.jsontypes import Json, ReadJson
from spinal_jax.models.formats.base import Bounds, TensorInfo
from spinal_jax.models.formats.safetensors import SafetensorsFolder
from spinal_jax.models.hf_config import value_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Decode = Callable[[str, Bounds], np.ndarray]  # a block of a tensor, by name

_KEY = "quantization_config"
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_FP4 = np.asarray([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_FP4_PAIRS = np.stack([_FP4[np.arange(256) & 15], _FP4[np.arange(256) >> 4]], axis=-1)  # of a byte
_FLOAT8 = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))


def dequantised(folder: SafetensorsFolder) -> SafetensorsFolder | Dequantised:
    """The folder with dequantised weights, if config.json declares a quantisation. Raises UserError for unknown
    ones."""
    settings = folder.config.get(_KEY)
    if settings is None:
        return folder
    if not isinstance(settings, dict):
        raise UserError(f"config.json: {_KEY} is {value_text(settings)}, which is not a mapping")
    match settings.get("quant_method"):
        case "fp8":
            return Dequantised(folder, *_fp8(folder, settings))
        case "mxfp4":
            return Dequantised(folder, *_mxfp4(folder))
        case method:
            raise UserError(
                f"{folder.source} is quantised by {value_text(method)}, as its config.json has it in {_KEY}; "
                "those that can be read are fp8 and mxfp4"
            )


class Dequantised:
    """A `Checkpoint` of a folder whose tensors in `packed` are decoded by `decode`; `infos` describes all tensors."""

    kind: str = "huggingface"

    def __init__(
        self, inner: SafetensorsFolder, infos: Mapping[str, TensorInfo], packed: Collection[str], decode: Decode
    ) -> None:
        self.folder, self.source, self.revision = inner.folder, inner.source, inner.revision
        self.config: Json = {key: value for key, value in inner.config.items() if key != _KEY}
        self._inner, self._infos, self._packed, self._decode = inner, infos, packed, decode

    def names(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def tensor(self, name: str) -> np.ndarray:
        if name not in self._packed:
            return self._inner.tensor(name)
        return self._decode(name, tuple((0, size) for size in self._infos[name].shape))

    def part(self, name: str, bounds: Bounds) -> np.ndarray:
        return self._decode(name, bounds) if name in self._packed else self._inner.part(name, bounds)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._inner.tokenizer()

    def sha256(self) -> str:
        return self._inner.sha256()

    def close(self) -> None:
        self._inner.close()


def _fp8(inner: SafetensorsFolder, settings: ReadJson) -> tuple[dict[str, TensorInfo], set[str], Decode]:
    block = settings.get("weight_block_size")
    block = [1 << 31, 1 << 31] if block is None else block
    if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        raise UserError(
            f"config.json: {_KEY}.weight_block_size is {value_text(block)}, which is not two positive numbers"
        )
    stored = inner.names()
    scales = {name: f"{name}_scale_inv" for name in stored if f"{name}_scale_inv" in stored}
    infos: dict[str, TensorInfo] = {}
    for name, info in stored.items():
        if name in scales:
            scale = stored[scales[name]]
            blocks = tuple(-(-size // each) for size, each in zip(info.shape, block, strict=False))
            fits = math.prod(scale.shape) == math.prod(blocks) == 1 or (len(info.shape) == 2 and scale.shape == blocks)
            if info.dtype not in _FLOAT8 or not fits:
                raise UserError(
                    f"{inner.source}: {name} of shape {info.shape} and dtype {info.dtype} does not fit its "
                    f"{scale.shape} factors for blocks of {block}"
                )
            infos[name] = TensorInfo(info.shape, np.dtype(np.float32))
        elif info.dtype in _FLOAT8:
            raise UserError(f"{inner.source}: {name} is float8, but there is no {name}_scale_inv beside it")
        elif name.removesuffix("_scale_inv") not in scales and not _of_activations(name, scales):
            infos[name] = info

    def decode(name: str, bounds: Bounds) -> np.ndarray:
        values = inner.part(name, bounds).astype(np.float32)
        scale = inner.tensor(scales[name]).astype(np.float32)
        if scale.size == 1:
            return values * scale.reshape(())
        rows, columns = (np.arange(*each) // size for each, size in zip(bounds, block, strict=True))
        for number in np.unique(rows):  # by rows of blocks, to limit memory
            values[rows == number] *= scale[number][columns]
        return values

    return infos, set(scales), decode


def _of_activations(name: str, scales: Collection[str]) -> bool:
    """Whether a tensor is the activation scale of an FP8 weight."""
    layer, _, last = name.rpartition(".")
    return last == "activation_scale" and f"{layer}.weight" in scales


def _mxfp4(inner: SafetensorsFolder) -> tuple[dict[str, TensorInfo], set[str], Decode]:
    stored = inner.names()
    infos: dict[str, TensorInfo] = {}
    packed = {name.removesuffix("_blocks") for name in stored if name.endswith("_blocks")}
    for name, info in stored.items():
        if name.endswith("_blocks"):
            plain = name.removesuffix("_blocks")
            scales = stored.get(f"{plain}_scales")
            fits = scales is not None and len(info.shape) >= 3 and (*scales.shape, 16) == info.shape
            if not fits or scales is None or {info.dtype, scales.dtype} != {np.dtype(np.uint8)}:
                raise UserError(
                    f"{inner.source}: {name} of shape {info.shape} and {plain}_scales of "
                    f"{None if scales is None else scales.shape} are not MXFP4"
                )
            shape: tuple[int, ...] = tuple(info.shape)
            infos[plain] = TensorInfo((*shape[:-3], shape[-2] * 32, shape[-3]), _BFLOAT16)
        elif name.removesuffix("_scales") not in packed:
            infos[name] = info

    def decode(name: str, bounds: Bounds) -> np.ndarray:
        blocks, scales = inner.tensor(f"{name}_blocks"), inner.tensor(f"{name}_scales")
        *lead, rows, groups, _ = blocks.shape
        values = np.empty((math.prod(lead), groups * 32, rows), _BFLOAT16)
        each = zip(blocks.reshape(-1, rows, groups, 16), scales.reshape(-1, rows, groups), strict=True)
        for number, (block, exponent) in enumerate(each):
            pairs = _FP4_PAIRS[block].reshape(rows, groups, 32)
            pairs *= np.ldexp(np.float32(1), exponent.astype(np.int32) - 128)[..., None]  # half, which float32 holds
            pairs *= 2
            values[number] = pairs.reshape(rows, -1).T
        return values.reshape(*lead, groups * 32, rows)[tuple(slice(*each) for each in bounds)]

    return dict(sorted(infos.items())), packed, decode
