"""One optimiser step: gradients over micro-batches of one shape, then an update that skips non-finite values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from spinal_jax.config.training import ObjectiveConfig
from spinal_jax.metrics.gradient import BlockNorms, block_norms
from spinal_jax.models import lora
from spinal_jax.models.config import DecoderConfig
from spinal_jax.models.decoder import Remat
from spinal_jax.models.parts import Parts, cast
from spinal_jax.objectives.losses import Scores, preference_loss, sequence_scores
from spinal_jax.objectives.responses import ResponseBatch

Arrays = dict[str, Array]
MERGED = ".merged"  # suffix of frozen weights with their adapters added


class TrainState(NamedTuple):
    """The state of training."""

    parameters: Arrays  # by path, float32: all parameters, or the adapters
    moments: optax.OptState
    step: Array  # int32 number of completed steps


class Sums(NamedTuple):
    """Sums over the examples of a step, float32 scalars."""

    loss: Array  # over pairs, or over tokens
    pairs: Array
    chosen: Array  # rewards
    rejected: Array
    accurate: Array  # pairs with a larger chosen reward
    accurate_per_token: Array  # pairs with a larger chosen reward per response token
    shorter: Array  # pairs with a shorter chosen response
    logp: Array  # [2] nats, of chosen (or only) and rejected responses
    logit: Array  # [2] mean logits, summed over tokens
    tokens: Array  # [2] response tokens
    sequences: Array  # [2]
    entropy: Array  # nats, summed over tokens
    correct: Array  # tokens with the largest probability


class Updated(NamedTuple):
    """Result of an update."""

    state: TrainState  # unchanged if the loss or a gradient is not finite
    norm: Array  # of the whole gradient, before clipping
    norms: BlockNorms
    fine: Array  # bool: everything was finite


class Steps(NamedTuple):
    """The compiled functions of a training run."""

    # (parameters, fixed): frozen weights with their adapters added, float32, to be put into the `fixed` of `first` and
    # `more`. Once for each step, because it depends on `parameters`. Empty without adapters.
    merge: Callable[[Arrays, Arrays], Arrays]
    first: Callable[..., tuple[Arrays, Sums]]  # (parameters, fixed, batch, normaliser)
    more: Callable[..., tuple[Arrays, Sums]]  # (parameters, fixed, batch, normaliser, gradients, sums): adds to both
    update: Callable[..., Updated]  # (state, gradients, sums)
    evaluate: Callable[..., Sums]  # (parameters, fixed, batch)
    score: Callable[..., Array]  # (parameters, fixed, batch): log-probability [S] of each sequence


def make_steps(
    parts: Parts,
    config: DecoderConfig,
    objective: ObjectiveConfig,
    method: optax.GradientTransformation,
    *,
    dtype: str,
    remat: Remat,
    mesh: Mesh | None = None,
) -> Steps:
    """The functions of a run.

    Args:
        parts: the structure of the model.
        config: its shape.
        objective: what is minimised.
        method: the optimiser.
        dtype: of the forward and backward pass.
        remat: what the backward pass recomputes (`Decoder.forward`).
        mesh: the devices (`Decoder.forward`).
    """

    def scores(parameters: Arrays, fixed: Arrays, batch: ResponseBatch, remat: Remat) -> Scores:
        merged = {name.removesuffix(MERGED): x for name, x in fixed.items() if name.endswith(MERGED)}
        model = parts.assemble(cast({**fixed, **merged, **parameters}, dtype))
        if merged:
            lora.expect_sums(model)
        h, _ = model.forward(
            batch.tokens,
            positions=batch.positions,
            segments=batch.segments,
            lengths=batch.lengths,
            branches=batch.branches,
            remat=remat,
            training=True,
            mesh=mesh,
        )
        trains_lens = not parameters.keys().isdisjoint({"embedding", "unembedding.weight", "unembedding.bias"})
        return sequence_scores(model, h, batch, trains_lens)

    def loss(
        parameters: Arrays, fixed: Arrays, batch: ResponseBatch, normaliser: Array, remat: Remat
    ) -> tuple[Array, Sums]:
        sums = summed(scores(parameters, fixed, batch, remat), batch, objective)
        return sums.loss / normaliser, sums

    def merge(parameters: Arrays, fixed: Arrays) -> Arrays:
        adapted = [name for name in fixed if name.removesuffix("weight") + "adapter.a" in parameters]
        if dtype != "float32" or not adapted:
            return {}
        model = parts.assemble({**fixed, **parameters})
        lora.sum_once(model)
        arrays = {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(model))}
        return {name + MERGED: arrays[name] for name in adapted}

    gradient = jax.grad(partial(loss, remat=remat), has_aux=True)

    def more(
        parameters: Arrays, fixed: Arrays, batch: ResponseBatch, normaliser: Array, gradients: Arrays, sums: Sums
    ) -> tuple[Arrays, Sums]:
        return jax.tree.map(jnp.add, (gradients, sums), gradient(parameters, fixed, batch, normaliser))

    def update(state: TrainState, gradients: Arrays, sums: Sums) -> Updated:
        norm = jnp.asarray(optax.tree.norm(gradients))
        norms = block_norms(gradients, config.layers_of_stacks)

        def step(state: TrainState) -> TrainState:
            with jax.numpy_dtype_promotion("standard"):  # optax mixes integers and floats
                changes, moments = method.update(gradients, state.moments, state.parameters)
            parameters: Any = optax.apply_updates(state.parameters, changes)
            return TrainState(parameters=parameters, moments=moments, step=state.step + 1)

        fine = jnp.isfinite(norm) & jnp.isfinite(sums.loss)
        # An elementwise choice, because a branch would keep both states in memory.
        after: TrainState = jax.tree.map(partial(jnp.where, fine), step(state), state)
        return Updated(state=after, norm=norm, norms=norms, fine=fine)

    return Steps(
        merge=jax.jit(merge),
        first=jax.jit(gradient),
        more=jax.jit(more, donate_argnames=("gradients", "sums")),
        update=jax.jit(update, donate_argnames="state"),
        evaluate=jax.jit(lambda parameters, fixed, batch: loss(parameters, fixed, batch, jnp.float32(1), "none")[1]),
        score=jax.jit(lambda parameters, fixed, batch: scores(parameters, fixed, batch, "none").logp),
    )


def summed(scores: Scores, batch: ResponseBatch, objective: ObjectiveConfig) -> Sums:
    """Loss and metrics of a micro-batch."""
    counts = batch.counts
    real = (counts > 0).astype(jnp.float32)
    sides = (real, jnp.zeros_like(real))
    if objective.kind == "dpo":
        is_chosen = (jnp.arange(batch.sequences) % 2 == 0).astype(jnp.float32)
        sides = (real * is_chosen, real * (1 - is_chosen))
        pairs = preference_loss(
            objective.loss, scores.logp, batch.reference, counts, objective.beta, objective.label_smoothing
        )
        present = real[0::2]
        total = jnp.sum(pairs.loss * present)
        chosen, rejected = jnp.sum(pairs.chosen * present), jnp.sum(pairs.rejected * present)
        chosen_tokens, rejected_tokens = counts[0::2], counts[1::2]
        accurate, accurate_per_token, shorter = (
            jnp.sum(jnp.where(is_so, present, 0.0))
            for is_so in (
                pairs.chosen > pairs.rejected,
                pairs.chosen * rejected_tokens
                > pairs.rejected * chosen_tokens,  # avoids division by 0 for absent pairs
                chosen_tokens < rejected_tokens,
            )
        )
        count = jnp.sum(present)
    else:
        total = -jnp.sum(scores.logp)
        chosen = rejected = accurate = accurate_per_token = shorter = count = jnp.zeros((), jnp.float32)

    def by_side(values: Array) -> Array:  # [S] -> [2]
        return jnp.stack([jnp.sum(values * side) for side in sides])

    return Sums(
        loss=total,
        pairs=count,
        chosen=chosen,
        rejected=rejected,
        accurate=accurate,
        accurate_per_token=accurate_per_token,
        shorter=shorter,
        logp=by_side(scores.logp),
        logit=by_side(scores.logit),
        tokens=by_side(counts),
        sequences=by_side(real),
        entropy=jnp.sum(scores.entropy),
        correct=jnp.sum(scores.correct),
    )


def metrics(sums: Sums, kind: str, prefix: str = "") -> dict[str, float]:
    """Metrics of a step with the names of TRL: means over pairs, sequences or tokens."""
    total = jax.tree.map(lambda x: x.astype(float), sums)  # float64 on the host
    tokens = float(total.tokens.sum())
    logged = {"loss": float(total.loss) / (float(total.pairs) if kind == "dpo" else tokens)}
    if kind == "dpo":
        chosen, rejected = float(total.chosen / total.pairs), float(total.rejected / total.pairs)
        logged |= {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": float(total.accurate / total.pairs),
            "rewards/accuracies_per_token": float(total.accurate_per_token / total.pairs),
            "chosen_shorter": float(total.shorter / total.pairs),
            "logps/chosen": float(total.logp[0] / total.sequences[0]),
            "logps/rejected": float(total.logp[1] / total.sequences[1]),
            "logits/chosen": float(total.logit[0] / total.tokens[0]),
            "logits/rejected": float(total.logit[1] / total.tokens[1]),
        }
    else:
        logged["mean_token_accuracy"] = float(total.correct) / tokens
    logged["entropy"] = float(total.entropy) / tokens
    return {f"{prefix}{name}": value for name, value in logged.items()}


def zeroed_adapters(parameters: Mapping[str, Array]) -> Arrays:
    """The parameters with adapters that have no effect."""
    return {name: jnp.zeros_like(x) if name.endswith(".adapter.b") else x for name, x in parameters.items()}
