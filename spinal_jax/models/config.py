"""What a decoder is: every switch that separates one family from another, explicit and without defaults that guess."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from spinal_jax.models.rope import Rope

NormKind = Literal["rms", "layer"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
QueryKeyNorm = Literal["none", "head", "heads", "full"]


@dataclass(frozen=True)
class Experts:
    """A sparse mixture of experts in place of the dense MLP.

    `scoring` turns router logits into scores; the `per_token` best experts are kept, renormalised if `normalise`, and
    scaled by `scale`. With `groups > 1` only the experts of the best `groups_kept` groups compete, a group being worth
    the sum of its `group_top` best scores (DeepSeek). `correction_bias` shifts the scores for the choice alone.
    """

    count: int
    per_token: int
    width: int
    shared_width: int = 0
    scoring: Literal["softmax", "softmax_after", "sigmoid"] = "softmax"
    normalise: bool = True
    scale: float = 1.0
    groups: int = 1
    groups_kept: int = 1
    group_top: int = 1
    correction_bias: bool = False


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2): low-rank queries (`query_rank` 0: full rank) and keys/values."""

    query_rank: int
    key_value_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    interleaved: bool


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer. Widths are in units of features, `windows` in tokens (0: unlimited)."""

    family: str
    vocab_size: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    max_positions: int
    tied: bool
    ropes: tuple[Rope, ...]
    layer_rope: tuple[int, ...]  # [D] which of `ropes` a block uses; empty when positions are learned
    windows: tuple[int, ...]  # [D] how many tokens back a block attends, itself included; 0: all
    norm: NormKind = "rms"
    norm_eps: float = 1e-6
    norm_bias: bool = False
    norm_unit_offset: bool = False  # Gemma multiplies by (1 + weight), in float32
    pre_norm: bool = True
    post_norm: bool = False  # a norm on what attention and MLP return, before it is added
    parallel: bool = False  # attention and MLP read the same residual
    shared_norm: bool = False  # and, of those, one norm serves both
    qk_norm: QueryKeyNorm = "none"  # per head with shared weights, per head with own weights, over all heads
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    unembed_bias: bool = False
    gated: bool = True
    activation: Activation = "silu"
    learned_positions: bool = False
    query_scale: float = 0.0  # multiplies q.k; 0 means head_dim ** -0.5
    attention_softcap: float | None = None
    final_softcap: float | None = None
    embed_scale: float = 1.0
    experts: Experts | None = None
    expert_layers: tuple[bool, ...] = ()  # [D] which blocks are sparse; empty: none, or all when `experts` is set
    latent: LatentAttention | None = None

    @property
    def sparse_layers(self) -> tuple[bool, ...]:
        """[D] True where the block's MLP is a mixture of experts."""
        return self.expert_layers or (self.experts is not None,) * self.depth

    @property
    def stacks(self) -> tuple[tuple[bool, int], ...]:
        """Runs of blocks that share one parameter structure, as (sparse, how many), in order of depth."""
        return tuple((sparse, len(list(run))) for sparse, run in groupby(self.sparse_layers))

    def stack_of(self, layer: int) -> tuple[int, int]:
        """(which stack, which row of it) holds block `layer` (0-based)."""
        for index, (_, count) in enumerate(self.stacks):
            if layer < count:
                return index, layer
            layer -= count
        raise IndexError(layer)


def check_per_layer(name: str, values: Sequence[object], depth: int) -> None:
    """Raises ValueError unless a per-layer setting has one value for each block."""
    if len(values) != depth:
        raise ValueError(f"{name} has {len(values)} entries for {depth} blocks")
