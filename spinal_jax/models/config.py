"""What a decoder is: every switch that separates one family from another, explicit and without defaults that guess."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from spinal_jax.errors import UserError
from spinal_jax.models.rope import Rope

NormKind = Literal["rms", "layer"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
QueryKeyNorm = Literal["none", "head", "heads", "full"]

MOST_EXPERTS = 1 << 14  # in a block; no model comes near


@dataclass(frozen=True)
class Experts:
    """A sparse mixture of experts in place of the dense MLP.

    `scoring` turns router logits into scores; the `per_token` best experts are kept, renormalised if `normalise`, and
    scaled by `scale`. With `groups > 1` only the experts of the best `groups_kept` groups compete, a group being worth
    the sum of its `group_top` best scores (DeepSeek). `correction_bias` shifts the scores for the choice alone. A
    shared expert of `shared_width` serves every token, weighed by its own sigmoid with a `shared_gate` (Qwen2).
    Settings that contradict each other raise UserError.
    """

    count: int
    per_token: int
    width: int
    shared_width: int = 0
    shared_gate: bool = False
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    normalise: bool = True
    scale: float = 1.0
    groups: int = 1
    groups_kept: int = 1
    group_top: int = 1
    correction_bias: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.count <= MOST_EXPERTS or self.width < 1:
            raise UserError(f"a block cannot have {self.count} experts of width {self.width}")
        if self.groups < 1 or self.count % self.groups:
            raise UserError(f"{self.count} experts cannot be put into {self.groups} equal groups")
        group = self.count // self.groups
        if not 1 <= self.group_top <= group or not 1 <= self.groups_kept <= self.groups:
            raise UserError(
                f"the best {self.group_top} experts of each group cannot choose {self.groups_kept} groups among "
                f"{self.groups} of {group} experts"
            )
        if not 1 <= self.per_token <= self.groups_kept * group:
            raise UserError(f"{self.per_token} experts per token cannot be chosen among {self.groups_kept * group}")


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2): low-rank queries (`query_rank` 0: full rank) and keys/values."""

    query_rank: int
    key_value_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int


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
    norm_unit_offset: bool = False  # the scale is 1 + weight (Gemma)
    norm_float32: bool = False  # RMS norm scales before it rounds to the compute dtype, not after
    pre_norm: bool = True
    post_norm: bool = False  # a norm on what attention and MLP return, before it is added
    parallel: bool = False  # attention and MLP read the same residual
    shared_norm: bool = False  # and, of those, one norm serves both
    qk_norm: QueryKeyNorm = "none"  # per head with shared weights, per head with own weights, over all heads
    qk_norm_bias: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    unembed_bias: bool = False
    gated: bool = True
    activation: Activation = "silu"
    learned_positions: bool = False
    query_scale: float = 0.0  # multiplies q.k; 0 means head_dim ** -0.5
    scale_by_depth: bool = False  # divides that by the block's number, 1..D
    attention_softcap: float | None = None
    final_softcap: float | None = None
    embed_scale: float = 1.0
    experts: Experts | None = None
    expert_layers: tuple[bool, ...] = ()  # [D] which blocks are sparse; empty: none, or all when `experts` is set
    latent: LatentAttention | None = None

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise UserError(f"a {self.family} model needs at least one block, not {self.depth}")
        for name in ("vocab_size", "width", "heads", "kv_heads", "head_dim", "mlp_width", "max_positions"):
            if not 1 <= getattr(self, name) < 2**31:
                raise UserError(f"a {self.family} model cannot have a {name} of {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise UserError(f"{self.heads} attention heads cannot share {self.kv_heads} key heads equally")
        for name in ("windows", "layer_rope", "expert_layers"):
            values = getattr(self, name)
            if len(values) != self.depth and (values or name == "windows"):
                raise ValueError(f"{name} has {len(values)} entries for {self.depth} blocks")

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
