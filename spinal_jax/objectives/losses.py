"""Sequence log-probabilities and the losses of preference optimisation: pure functions on arrays.

Rafailov et al. 2023, "Direct Preference Optimization" (arXiv 2305.18290). For a pair (chosen c, rejected r),
`x = (log p(c) - log p_ref(c)) - (log p(r) - log p_ref(r))`, with log-probabilities summed over response tokens,
including the end-of-sequence token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from spinal_jax.models.decoder import Decoder
from spinal_jax.objectives.responses import ResponseBatch
from spinal_jax.objectives.token_scores import TokenScores, token_scores


class Scores(NamedTuple):
    """Sums over the response tokens of each of S sequences, float32 [S]."""

    logp: Array  # log-probability, nats
    entropy: Array  # of the distributions that predict them, nats; carries no gradient
    logit: Array  # mean logit over the vocabulary; carries no gradient
    correct: Array  # tokens with the largest probability


def sequence_scores(model: Decoder, h: Array, batch: ResponseBatch, trains_lens: bool = True) -> Scores:
    """Sums over the response tokens of each sequence.

    Args:
        model: its final norm and unembedding give the logits.
        h: [R, T, d] residual stream at the last boundary.
        batch: positions, target tokens and sequences.
        trains_lens: whether the unembedding has a gradient.
    """
    with model.precision():
        x = model.final_norm(jnp.take_along_axis(h, batch.predicting[..., None], axis=1))
        by_token: TokenScores = token_scores(trains_lens, model.head(), x, batch.targets, batch.weight)

    def by_sequence(values: Array) -> Array:
        return jax.ops.segment_sum((values * batch.weight).ravel(), batch.owner.ravel(), batch.sequences)

    return Scores(
        logp=by_sequence(by_token.logp),
        entropy=by_sequence(by_token.entropy),
        logit=by_sequence(by_token.logit),
        correct=by_sequence(by_token.correct),
    )


def sigmoid(x: Array, chosen: Array, rejected: Array, beta: float, smoothing: float) -> Array:
    """The DPO loss [P], `-log sigmoid(beta x)`. Rafailov et al. 2023 (arXiv 2305.18290).

    Args, of all losses below:
        x: [P] log-ratio of the chosen response minus that of the rejected, `log p - log p_ref` each, nats.
        chosen: [P] log-ratio of the chosen response per token.
        rejected: [P] log-ratio of the rejected response per token.
        beta: strength of the regularisation towards the reference, above 0.
        smoothing: probability that a label is wrong, in [0, 0.5).
    """
    return -jax.nn.log_sigmoid(beta * x)


def cdpo(x: Array, chosen: Array, rejected: Array, beta: float, smoothing: float) -> Array:
    """The conservative DPO loss [P]: the label is wrong with probability e = `smoothing`,
    `-(1 - e) log sigmoid(beta x) - e log sigmoid(-beta x)`. Mitchell 2023, "A note on DPO with noisy preferences".
    Arguments as in `sigmoid`."""
    return -(1 - smoothing) * jax.nn.log_sigmoid(beta * x) - smoothing * jax.nn.log_sigmoid(-beta * x)


def robust(x: Array, chosen: Array, rejected: Array, beta: float, smoothing: float) -> Array:
    """The robust DPO loss [P], unbiased if labels are flipped with probability e = `smoothing`:
    `(-(1 - e) log sigmoid(beta x) + e log sigmoid(-beta x)) / (1 - 2 e)` (arXiv 2403.00409). Arguments as in
    `sigmoid`."""
    kept, flipped = -jax.nn.log_sigmoid(beta * x), -jax.nn.log_sigmoid(-beta * x)
    return ((1 - smoothing) * kept - smoothing * flipped) / (1 - 2 * smoothing)


def ipo(x: Array, chosen: Array, rejected: Array, beta: float, smoothing: float) -> Array:
    """The IPO loss [P] (arXiv 2310.12036), on log-ratios per token: `(chosen - rejected - 1 / (2 beta))^2`. Arguments
    as in `sigmoid`."""
    return jnp.square(chosen - rejected - 1 / (2 * beta))


def hinge(x: Array, chosen: Array, rejected: Array, beta: float, smoothing: float) -> Array:
    """SLiC's hinge loss [P] (arXiv 2305.10425) on DPO's margin: `max(0, 1 - beta x)`. Arguments as in `sigmoid`."""
    return jax.nn.relu(1 - beta * x)


LOSSES: Mapping[str, Callable[[Array, Array, Array, float, float], Array]] = {
    "sigmoid": sigmoid,
    "cdpo": cdpo,
    "robust": robust,
    "ipo": ipo,
    "hinge": hinge,
}


class Pairs(NamedTuple):
    """Loss and rewards of P pairs."""

    loss: Array  # [P]
    chosen: Array  # [P] reward `beta (log p - log p_ref)`
    rejected: Array  # [P]


def preference_loss(
    kind: str, logp: Array, reference: Array, tokens: Array, beta: float, smoothing: float = 0.0
) -> Pairs:
    """The loss and the rewards of pairs.

    Args:
        kind: one of LOSSES.
        logp: [2 P] log-probabilities of responses under the policy, nats: chosen, rejected, chosen, ...
        reference: [2 P] log-probabilities under the reference.
        tokens: [2 P] number of tokens of each response.
        beta: strength of the regularisation towards the reference, above 0.
        smoothing: probability that a label is wrong, for `cdpo` and `robust`; below 0.5.
    """
    ratio = logp - reference
    chosen, rejected = ratio[0::2], ratio[1::2]
    per_token = ratio / jnp.maximum(tokens, 1)
    loss = LOSSES[kind](chosen - rejected, per_token[0::2], per_token[1::2], beta, smoothing)
    return Pairs(loss=loss, chosen=beta * chosen, rejected=beta * rejected)
