"""The configuration of a decoder: every difference between families as an explicit setting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from spinal_jax.errors import UserError
from spinal_jax.models.rope import Rope

NormKind = Literal["rms", "layer"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "xielu"]
QueryKeyNorm = Literal["none", "head", "heads", "full"]


@dataclass(frozen=True)
class ClampedSwiGLU:
    """`g sigmoid(alpha g) (u + 1)` of a gate `g`, at most `limit`, and `u`, within `limit` of 0 (gpt-oss)."""

    alpha: float
    limit: float


MOST_EXPERTS = 1 << 14  # in a block, beyond any published model
LONGEST_PERIOD = 8  # blocks in a repeating pattern; each is compiled


@dataclass(frozen=True)
class Experts:
    """A sparse mixture of experts in place of the dense MLP.

    `scoring` turns router logits into scores; the `per_token` best experts are kept, renormalised if `normalise`, and
    scaled by `scale`. With `groups > 1` only the experts of the best `groups_kept` groups compete, scored by
    the sum of its `group_top` best scores (DeepSeek). `correction_bias` is added to the scores for the selection only.
    A shared expert of `shared_width` processes every token, with a sigmoid weight if `shared_gate` is set (Qwen2). With
    `bias` the router and the routed experts' layers have biases (gpt-oss).
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
    bias: bool = False

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
class DeltaNet:
    """A gated delta net (arXiv 2412.06464): a short convolution and a recurrent state for each value head.

    Each of `key_heads` query and key heads of `key_dim` features serves `value_heads / key_heads` value heads of
    `value_dim` features. The convolution spans `kernel` tokens, including the current one.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int

    def __post_init__(self) -> None:
        if self.value_heads % self.key_heads:
            raise UserError(f"{self.value_heads} value heads cannot share {self.key_heads} key heads equally")


class BlockKind(NamedTuple):
    """Settings that determine the parameters of a block."""

    sparse: bool  # its MLP is a mixture of experts
    delta: bool  # a gated delta net takes the place of attention


class Stack(NamedTuple):
    """Blocks of one kind with stacked parameters: row r is block `layers[r]`, counted from 0."""

    kind: BlockKind
    layers: range


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer. Widths are in units of features, `windows` in tokens (0: unlimited).

    Fields that only some families set are followed by their names; see `families/`.
    """

    family: str  # model_type of its config.json
    vocab_size: int  # V, rows of the embedding; the tokenizer may have fewer
    width: int  # d, features of the residual stream
    depth: int  # D, blocks
    heads: int  # query heads
    kv_heads: int  # key and value heads, each shared by heads / kv_heads query heads
    head_dim: int  # features of a query or key head
    mlp_width: int  # features between the two layers of a dense MLP
    max_positions: int  # maximum sequence length; a hard limit for learned positions
    tied: bool  # the unembedding is the embedding
    ropes: tuple[Rope, ...]  # the rotary embeddings in use; empty: none
    layer_rope: tuple[int, ...]  # [D] which of `ropes` a block uses, -1: none; empty when positions are learned
    windows: tuple[int, ...]  # [D] how many tokens back a block attends, itself included; 0: all
    norm: NormKind = "rms"  # root mean square, or mean and variance
    norm_eps: float = 1e-6  # added to the mean square or variance
    norm_weight: bool = True  # norms have a scale; OLMo 1 has none
    norm_bias: bool = False  # and an offset
    norm_unit_offset: bool = False  # the scale is 1 + weight (Gemma)
    norm_float32: bool = False  # RMS norm scales before it rounds to the compute dtype, not after
    pre_norm: bool = True  # a norm on what attention and MLP read
    post_norm: bool = False  # a norm on what attention and MLP return, before it is added
    parallel: bool = False  # attention and MLP read the same residual
    shared_norm: bool = False  # and, of those, one norm serves both
    residual_scale: float = 1.0  # multiplies what attention and MLP add to the residual stream (Granite)
    qk_norm: QueryKeyNorm = "none"  # per head with shared weights, per head with own weights, over all heads
    qk_norm_bias: bool = False  # these norms have an offset
    qk_norm_last: bool = False  # norms follow the rotation instead of preceding it (Hunyuan)
    qkv_clip: float | None = None  # queries, keys and values are clipped to this magnitude (OLMo 1, OLMoE)
    qkv_bias: bool = False  # query, key and value layers have a bias
    out_bias: bool = False  # attention's output layer has one
    mlp_bias: bool = False  # the MLP's layers have one
    unembed_bias: bool = False  # the unembedding has one
    gated: bool = True  # the MLP multiplies its hidden features by an activated gate
    activation: Activation | ClampedSwiGLU = "silu"  # of the MLP
    learned_positions: bool = False  # a position embedding is added to the token embedding
    query_scale: float = 0.0  # multiplies q.k; 0 means head_dim ** -0.5
    query_growth: tuple[float, int] | None = None  # (b, p): at position t by 1 + b log(1 + floor(t / p)) (Ministral 3)
    scale_by_depth: bool = False  # divides q.k by the block's number, 1..D (GPT-2)
    sinks: bool = False  # an additional learned logit for each head, without a value (gpt-oss)
    attention_softcap: float | None = None  # scores are c tanh(score / c) (Gemma 2)
    final_softcap: float | None = None  # logits are c tanh(logit / c)
    logit_divisor: float = 1.0  # logits are divided by this (Granite)
    embed_scale: float = 1.0  # multiplies the embedding where it enters block 1 (Gemma, Granite)
    experts: Experts | None = None  # the mixture in place of the dense MLP
    expert_layers: tuple[bool, ...] = ()  # [D] which blocks are sparse; empty: none, or all when `experts` is set
    latent: LatentAttention | None = None  # multi-head latent attention in place of grouped queries
    attention_gate: bool = False  # a sigmoid of the input multiplies what attention reads (Qwen3-Next)
    delta: DeltaNet | None = None  # the gated delta net that some blocks have in place of attention (Qwen3-Next)
    delta_layers: tuple[bool, ...] = ()  # [D] which blocks; empty: none

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise UserError(f"a {self.family} model needs at least one block, not {self.depth}")
        for name in ("vocab_size", "width", "heads", "kv_heads", "head_dim", "mlp_width", "max_positions"):
            if not 1 <= getattr(self, name) < 2**31:
                raise UserError(f"a {self.family} model cannot have a {name} of {getattr(self, name)}")
        if self.logit_divisor <= 0:
            raise UserError(f"a {self.family} model cannot divide its logits by {self.logit_divisor}")
        if self.heads % self.kv_heads:
            raise UserError(f"{self.heads} attention heads cannot share {self.kv_heads} key heads equally")
        for name in ("windows", "layer_rope", "expert_layers", "delta_layers"):
            values = getattr(self, name)
            if len(values) != self.depth and (values or name == "windows"):
                raise ValueError(f"{name} has {len(values)} entries for {self.depth} blocks")

    @property
    def sparse_layers(self) -> tuple[bool, ...]:
        """[D] True where the block's MLP is a mixture of experts."""
        return self.expert_layers or (self.experts is not None,) * self.depth

    @property
    def kinds(self) -> tuple[BlockKind, ...]:
        """[D] kinds of the blocks."""
        delta = self.delta_layers or (False,) * self.depth
        return tuple(BlockKind(*kind) for kind in zip(self.sparse_layers, delta, strict=True))

    @property
    def groups(self) -> tuple[tuple[Stack, ...], ...]:
        """The blocks in order of depth as repeating patterns. A scan over the rows of the stacks of a group runs one
        block of each stack in every iteration."""
        kinds, groups, start = self.kinds, [], 0
        while start < self.depth:
            period, turns = _pattern(kinds, start)
            end = start + period * turns
            groups.append(tuple(Stack(kinds[i], range(i, end, period)) for i in range(start, start + period)))
            start = end
        return tuple(groups)

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The stacks of all groups, in the order of the decoder."""
        return tuple(stack for group in self.groups for stack in group)

    @property
    def layers_of_stacks(self) -> tuple[tuple[int, ...], ...]:
        """The blocks that each stack holds, counted from 0."""
        return tuple(tuple(stack.layers) for stack in self.stacks)

    @property
    def rows(self) -> tuple[tuple[int, int], ...]:
        """[D] (stack, row) of each block."""
        held = {layer: (i, row) for i, stack in enumerate(self.stacks) for row, layer in enumerate(stack.layers)}
        return tuple(held[layer] for layer in range(self.depth))


def _pattern(kinds: tuple[BlockKind, ...], start: int) -> tuple[int, int]:
    """(period, repeats) of the pattern that covers the most blocks from `start`; the shortest of several."""
    best = (1, 1)
    for period in range(1, min(LONGEST_PERIOD, (len(kinds) - start) // 2) + 1):
        turns = 1
        while kinds[start : start + period] == kinds[start + turns * period : start + (turns + 1) * period]:
            turns += 1
        if turns > 1 and period * turns > best[0] * best[1]:
            best = (period, turns)
    return best
