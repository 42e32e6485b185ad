"""One optimiser step: gradients over micro-batches of one shape, then an update that refuses what is not finite."""

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
MERGED = ".merged"  # ends the name of a frozen weight that holds its adapter


class TrainState(NamedTuple):
    """What a step changes."""

    parameters: Arrays  # by path, float32: all of the model's, or its adapters
    moments: optax.OptState
    step: Array  # int32: how many steps were done


class Sums(NamedTuple):
    """Sums over the examples of a step, to be divided last. float32 scalars."""

    loss: Array  # over pairs, or over tokens
    pairs: Array
    chosen: Array  # rewards
    rejected: Array
    accurate: Array  # pairs whose chosen reward is the larger
    accurate_per_token: Array  # pairs whose chosen reward is the larger when each is divided by its response's tokens
    shorter: Array  # pairs whose chosen response has fewer tokens
    logp: Array  # [2] nats, of chosen (or only) and rejected responses
    logit: Array  # [2] mean logits, summed over tokens
    tokens: Array  # [2] response tokens
    sequences: Array  # [2]
    entropy: Array  # nats, summed over tokens
    correct: Array  # tokens that were the likeliest


class Updated(NamedTuple):
    """What an update leaves."""

    state: TrainState  # as before where the loss or a gradient is not finite
    norm: Array  # of the whole gradient, before clipping
    norms: BlockNorms
    fine: Array  # bool: everything was finite


class Steps(NamedTuple):
    """The compiled functions of a run."""

    # (parameters, fixed): in float32 the frozen weights with their adapters added, by names under which `first` and
    # `more` find them in `fixed`; of equal `parameters`, so once a step. Empty where no adapters are trained.
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
        dtype: of forward and backward.
        remat: what the backward pass computes again (`Decoder.forward`).
        mesh: the devices that share the work; None: not known (`Decoder.forward`).
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
        # Chosen element by element: a branch would hold the state before and after it at the same time.
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
    """The loss and what is logged beside it, of one micro-batch."""
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
                pairs.chosen * rejected_tokens > pairs.rejected * chosen_tokens,  # no division by an absent pair's 0
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
    """What is logged of a step, by TRL's names; means over its pairs, sequences or tokens."""
    total = jax.tree.map(lambda x: x.astype(float), sums)  # float64 on the host
    tokens = float(total.tokens.sum())
    found = {"loss": float(total.loss) / (float(total.pairs) if kind == "dpo" else tokens)}
    if kind == "dpo":
        chosen, rejected = float(total.chosen / total.pairs), float(total.rejected / total.pairs)
        found |= {
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
        found["mean_token_accuracy"] = float(total.correct) / tokens
    found["entropy"] = float(total.entropy) / tokens
    return {f"{prefix}{name}": value for name, value in found.items()}


def zeroed_adapters(parameters: Mapping[str, Array]) -> Arrays:
    """The adapters with which a model is its base again."""
    return {name: jnp.zeros_like(x) if name.endswith(".adapter.b") else x for name, x in parameters.items()}
