"""Rotary position embeddings: the frequencies of every scaling in use, and the rotation itself.

Frequencies follow the float32 operations of Hugging Face's `modeling_rope_utils` exactly, because a last-bit difference
in a frequency is a large angle at long range.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import Array

from spinal_jax.errors import UserError

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]
# Supported values: published ones lie far within. Float32 holds their products, and `dynamic` subtracts factors.
THETAS, FACTORS = (1e-15, 1e15), (1e-6, 1e6)


@dataclass(frozen=True)
class Rope:
    """One rotary embedding over the first `dim` features of a head (one more if that is odd, as in GPT-NeoX).

    Fields beyond `theta` matter to the kinds named.
    """

    dim: int
    theta: float
    kind: RopeKind = "default"
    interleaved: bool = False  # pairs are (0, 1), (2, 3), ... instead of (i, i + dim / 2)
    factor: float = 1.0  # linear, dynamic, llama3, yarn, longrope
    original_positions: int = 0  # dynamic, llama3, yarn, longrope
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn
    attention_factor: float = 1.0  # yarn, longrope: multiplies cos and sin
    short_factor: tuple[float, ...] = ()  # longrope
    long_factor: tuple[float, ...] = ()  # longrope

    def __post_init__(self) -> None:
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise UserError(
                f"rope type 'llama3' has high_freq_factor {self.high_freq_factor}, which is not above its "
                f"low_freq_factor {self.low_freq_factor}"
            )
        if self.kind == "yarn" and (self.theta == 1 or min(self.beta_fast, self.beta_slow) <= 0):
            raise UserError(
                f"rope type 'yarn' is not defined for a rope_theta of {self.theta} with beta_fast {self.beta_fast} and "
                f"beta_slow {self.beta_slow}"
            )
        factors = (self.factor, self.low_freq_factor, self.high_freq_factor, *self.short_factor, *self.long_factor)
        for name, values, (least, most) in (("theta", (self.theta,), THETAS), ("factor", factors, FACTORS)):
            if wrong := [value for value in values if not least <= value <= most]:
                raise UserError(
                    f"rope type {self.kind!r} has a {name} of {wrong[0]:g}; supported are {least:g} to {most:g}"
                )


def _powers(rope: Rope, theta: float) -> np.ndarray:
    """theta ** (2 i / dim) for i < dim / 2, float32 [dim / 2]."""
    return np.float32(theta) ** (np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim))


def _llama3(rope: Rope, inverse: np.ndarray) -> np.ndarray:
    wavelength = np.float32(2 * math.pi) / inverse
    low = rope.original_positions / rope.low_freq_factor
    high = rope.original_positions / rope.high_freq_factor
    scaled = np.where(wavelength > low, inverse / np.float32(rope.factor), inverse)
    medium = ~(wavelength < high) & ~(wavelength > low)
    smooth = (np.float32(rope.original_positions) / wavelength - np.float32(rope.low_freq_factor)) / np.float32(
        rope.high_freq_factor - rope.low_freq_factor
    )
    smooth = np.where(medium, smooth, 0)  # far from the medium it may be huge
    blended = (1 - smooth) * inverse / np.float32(rope.factor) + smooth * inverse
    return np.where(medium, blended, scaled)


def _yarn(rope: Rope, powers: np.ndarray) -> np.ndarray:
    def correction(rotations: float) -> float:
        return rope.dim * math.log(rope.original_positions / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = correction(rope.beta_fast), correction(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    width = (high - low) or 0.001  # as in Hugging Face, avoids division by zero
    ramp = np.clip((np.arange(rope.dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(width), 0, 1)
    keep = 1 - ramp
    return 1 / (np.float32(rope.factor) * powers) * (1 - keep) + 1 / powers * keep


def inverse_frequencies(rope: Rope, lengths: Array) -> Array:
    """Angles per position, float32 [B, T, dim / 2] or [dim / 2] where they do not depend on the sequence.

    Args:
        rope: the embedding.
        lengths: [B, T] tokens in the sequence that each token belongs to; `dynamic` and `longrope` change their
            frequencies when it exceeds the length of pretraining.
    """
    powers = _powers(rope, rope.theta)
    inverse = np.float32(1) / powers
    match rope.kind:
        case "default":
            return jnp.asarray(inverse)
        case "linear":
            return jnp.asarray(inverse / np.float32(rope.factor))
        case "llama3":
            return jnp.asarray(_llama3(rope, inverse).astype(np.float32))
        case "yarn":
            return jnp.asarray(_yarn(rope, powers).astype(np.float32))
        case "dynamic":
            grown = jnp.maximum(lengths, rope.original_positions).astype(jnp.float32) / rope.original_positions
            stretch = (rope.factor * grown - (rope.factor - 1)) ** (rope.dim / (rope.dim - 2))  # [B, T]
            exponent = np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim)
            return 1.0 / (np.float32(rope.theta) * stretch[..., None]) ** exponent
        case "longrope":
            short = 1 / (np.asarray(rope.short_factor, np.float32) * powers)
            long = 1 / (np.asarray(rope.long_factor, np.float32) * powers)
            return jnp.where((lengths > rope.original_positions)[..., None], long, short)


def rotation(rope: Rope, positions: Array, lengths: Array) -> tuple[Array, Array]:
    """(cos, sin), each float32 [B, T, dim / 2], scaled by the rope's attention factor."""
    angles = positions[..., None].astype(jnp.float32) * inverse_frequencies(rope, lengths)
    return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor


def rotate(x: Array, cos: Array, sin: Array, interleaved: bool) -> Array:
    """Rotates the first 2 * cos.shape[-1] features of every head of `x` [B, T, heads, head_dim]; the rest is unchanged.

    `interleaved` pairs adjacent features and returns them in half-split order, like DeepSeek's reference; dot products
    are not affected. The rotation is in float32 for any dtype of `x`, as in OLMo 2; most families of Hugging Face round
    cos and sin to the dtype first.
    """
    half = cos.shape[-1]
    turned, kept = x[..., : 2 * half].astype(jnp.float32), x[..., 2 * half :]
    first, second = (turned[..., ::2], turned[..., 1::2]) if interleaved else (turned[..., :half], turned[..., half:])
    cos, sin = cos[:, :, None], sin[:, :, None]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([rotated.astype(x.dtype), kept], axis=-1)
