"""The decoder of all families, and taps that read its residual stream.

The residual stream has D + 1 boundaries: boundary 0 enters block 1 (embedding, with the family's scale and learned
positions), boundary l leaves block l, always before the final norm. `Decoder.forward` runs one `lax.scan` per pattern
of blocks that repeats (`DecoderConfig.groups`) and passes every boundary to a `Tap`. Compile time does not grow with
depth, and only the state of the tap is kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from spinal_jax.metrics.lens import Lens
from spinal_jax.models.attention import Attention, Layout, PerLayer, layout, per_layer
from spinal_jax.models.config import BlockKind, DecoderConfig
from spinal_jax.models.delta_net import GatedDeltaNet
from spinal_jax.models.experts import MixtureOfExperts
from spinal_jax.models.fused_attention import AnyMesh
from spinal_jax.models.latent import MultiHeadLatentAttention
from spinal_jax.models.layers import MLP, Norm, normal
from spinal_jax.models.tiled_attention import KEPT

Remat = Literal["none", "all_but_linear", "blocks"]


class Tap(NamedTuple):
    """A fold over the boundaries of the residual stream.

    `init(h, boundaries)` returns the initial state for the shape of one boundary `h` [B, T, d]; `update(state, h, l)`
    returns the next state after boundary `l` (a traced int32, 0..D).
    """

    init: Callable[[jax.ShapeDtypeStruct, int], Any]
    update: Callable[[Any, Array, Array], Any]


def fold(update: Callable[[Any, Array, Array], Any], state: Any) -> Tap:
    """A tap that carries `state` through `update(state, h, l)`."""
    return Tap(lambda h, boundaries: state, update)


def collect(function: Callable[[Array], Any]) -> Tap:
    """A tap that returns `function(h)` of every boundary, stacked on a new first axis of length D + 1.

    `collect(lambda h: h)` returns every hidden state, [D + 1, B, T, d].
    """

    def init(h: jax.ShapeDtypeStruct, boundaries: int) -> Any:
        return jax.tree.map(lambda x: jnp.zeros((boundaries, *x.shape), x.dtype), jax.eval_shape(function, h))

    def update(state: Any, h: Array, index: Array) -> Any:
        return jax.tree.map(lambda s, x: s.at[index].set(x), state, function(h))

    return Tap(init, update)


class Block(nnx.Module):
    """One residual block, configured by `DecoderConfig`."""

    def __init__(self, config: DecoderConfig, kind: BlockKind, *, lead: tuple[int, ...], rngs: nnx.Rngs):
        def norm(present: bool) -> Norm | None:
            return Norm(config, config.width, lead=lead, rngs=rngs) if present else None

        self.parallel = config.parallel
        self.residual_scale = config.residual_scale
        self.attention_norm = norm(config.pre_norm)
        self.delta = GatedDeltaNet(config, lead=lead, rngs=rngs) if kind.delta else None
        attention = Attention if config.latent is None else MultiHeadLatentAttention
        self.attention = None if kind.delta else attention(config, lead=lead, rngs=rngs)
        self.attention_post_norm = norm(config.post_norm)
        self.mlp_norm = norm(config.pre_norm and not config.shared_norm)
        self.mlp = (
            MixtureOfExperts(config, lead=lead, rngs=rngs)
            if kind.sparse
            else MLP(config, config.mlp_width, lead=lead, rngs=rngs)
        )
        self.mlp_post_norm = norm(config.post_norm)

    def __call__(self, h: Array, shared: Layout, layer: PerLayer) -> Array:
        mixer = self.delta if self.attention is None else self.attention
        assert mixer is not None
        into_attention = h if self.attention_norm is None else self.attention_norm(h)
        attended = mixer(into_attention, shared, layer)
        if self.attention_post_norm is not None:
            attended = self.attention_post_norm(attended)
        after = h + self._scaled(attended)
        source = h if self.parallel else after
        unnormed = into_attention if self.parallel else source  # a shared norm, or none
        mixed = self.mlp(unnormed if self.mlp_norm is None else self.mlp_norm(source))
        return after + self._scaled(mixed if self.mlp_post_norm is None else self.mlp_post_norm(mixed))

    def _scaled(self, x: Array) -> Array:
        return x if self.residual_scale == 1.0 else x * jnp.asarray(self.residual_scale, x.dtype)


class Unembedding(nnx.Module):
    """U [V, d], absent if tied to the embedding, and a bias [V] in some families."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.weight = None if config.tied else nnx.Param(normal(rngs, (config.vocab_size, config.width)))
        self.bias = nnx.Param(jnp.zeros((config.vocab_size,), jnp.float32)) if config.unembed_bias else None


class Decoder(nnx.Module):
    """A decoder-only transformer with its parameters stacked over depth.

    >>> h, states = model.forward(tokens, tap=collect(lambda h: h))  # every hidden state, [D + 1, B, T, d]
    >>> h, top = model.forward(tokens, tap=collect(lambda h: model.lens(h).argmax(-1)))  # logit-lens top tokens
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = nnx.Param(normal(rngs, (config.vocab_size, config.width)))
        self.positions = (
            nnx.Param(normal(rngs, (config.max_positions, config.width))) if config.learned_positions else None
        )
        self.stacks = nnx.List(
            [Block(config, stack.kind, lead=(len(stack.layers),), rngs=rngs) for stack in config.stacks]
        )
        self.final_norm = Norm(config, config.width, rngs=rngs)
        self.unembedding = Unembedding(config, rngs=rngs)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the parameters and of the computation."""
        return self.embedding[...].dtype

    def forward(
        self,
        tokens: Array,
        *,
        tap: Tap | None = None,
        positions: Array | None = None,
        segments: Array | None = None,
        lengths: Array | None = None,
        branches: Array | None = None,
        remat: Remat = "none",
        training: bool = False,
        backend: str | None = None,
        mesh: AnyMesh | None = None,
    ) -> tuple[Array, Any]:
        """Runs the forward pass.

        Args:
            tokens: int [B, T]. Rows may be right-padded or contain several sequences.
            tap: called with every boundary; None for no tap.
            positions: int [B, T] position within the sequence; default 0..T-1. Tokens beyond the vocabulary and
                positions beyond the learned ones give NaN.
            segments: int [B, T], equal for tokens of one sequence; tokens attend within theirs. Default: one per row.
            lengths: int [B, T] length of the sequence, for the rope scalings `dynamic` and `longrope`. Default T.
            branches: int [B, T] continuation of a shared prompt; 0 for the prompt. Default: no shared prompts.
            remat: what the backward pass recomputes: nothing, everything but the results of linear layers and of
                attention, or whole blocks.
            training: use the attention for a backward pass on a CPU (`tiled_attention`).
            backend: kind of device, which selects the attention kernel; None is JAX's default.
            mesh: devices that split the work, for kernels that XLA cannot partition, or `fused_attention.ALONE`; None
                if unknown, which allows such kernels on a single device only.

        Returns:
            (h_D [B, T, d] before the final norm, the tap's last state or None)
        """
        config = self.config
        length = tokens.shape[1]
        if positions is None:
            if config.learned_positions and length > config.max_positions:
                raise ValueError(f"{length} tokens in a row, but the model has {config.max_positions} positions")
            positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape)
        if segments is None:
            segments = jnp.ones_like(tokens)
        if lengths is None:
            lengths = jnp.full_like(tokens, length)

        with self.precision():
            h = look_up(self.embedding[...], tokens)
            if config.embed_scale != 1.0:
                h = h * jnp.asarray(config.embed_scale, h.dtype)  # rounded to the compute dtype first, as in Gemma
            if self.positions is not None:
                h = h + look_up(self.positions[...], positions)
            at = backend or jax.default_backend()
            tiled = training and at == "cpu"
            shared = layout(config, positions, segments, lengths, branches, h.dtype, at, mesh, tiled=tiled)
            state = None
            if tap is not None:
                state = tap.init(jax.ShapeDtypeStruct(h.shape, h.dtype), config.depth + 1)
                state = tap.update(state, h, jnp.int32(0))

            def step(carry: tuple[Array, Any], xs: tuple[Block, PerLayer, Array]) -> tuple[Array, Any]:
                h, state = carry
                block, layer, index = xs
                h = block(h, shared, layer)
                return h, state if tap is None else tap.update(state, h, index)

            policies = jax.checkpoint_policies
            products = policies.save_from_both_policies(
                policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(KEPT)
            )
            keep = products if remat == "all_but_linear" else None
            body = step if remat == "none" else jax.checkpoint(step, prevent_cse=False, policy=keep)

            def turn(carry: tuple[Array, Any], blocks: Any) -> tuple[tuple[Array, Any], None]:
                for xs in blocks:
                    carry = body(carry, xs)
                return carry, None

            layers, parameters = per_layer(config), iter(self.stacks)
            for group in config.groups:
                xs = []
                for stack in group:
                    part = jax.tree.map(lambda x, at=stack.layers: x[at.start : at.stop : at.step], layers)
                    xs.append((next(parameters), part, jnp.asarray(stack.layers, jnp.int32) + 1))
                (h, state), _ = jax.lax.scan(turn, (h, state), xs)
        return h, state

    def unembed_weights(self) -> tuple[Array, Array | None]:
        """(U [V, d], bias [V] or None); the embedding if tied."""
        weight, bias = self.unembedding.weight, self.unembedding.bias
        return (self.embedding if weight is None else weight)[...], None if bias is None else bias[...]

    def head(self, temperature: float = 1.0) -> Lens:
        """The logit lens of the model."""
        cap, divisor = self.config.final_softcap, self.config.logit_divisor
        weight, bias = self.unembed_weights()
        if cap is not None and divisor != 1.0:
            raise AssertionError("a soft-cap and a divisor of the logits do not go together in any family")
        return Lens(weight, bias, cap, temperature * divisor)

    def lens(self, h: Array) -> Array:
        """Logit-lens logits of a boundary, float32 [..., V], with the final norm and the unembedding of the model.

        At boundary D they are the output of the model.
        """
        with self.precision():
            return self.head().read(self.final_norm(h))

    def precision(self) -> contextlib.AbstractContextManager[None]:
        """Full precision for float32 models; by default TPUs and GPUs multiply float32 at lower precision."""
        return jax.default_matmul_precision("highest" if self.dtype == jnp.float32 else "default")


def look_up(table: Array, index: Array) -> Array:
    """Rows of `table` [n, d]; NaN for an index out of range, which JAX would clip."""
    return table.at[index].get(mode="fill", fill_value=jnp.nan)
