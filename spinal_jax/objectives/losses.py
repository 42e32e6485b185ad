"""Sequence log-probabilities and the losses of preference optimisation: pure functions on arrays.

Rafailov et al. 2023, "Direct Preference Optimization" (arXiv 2305.18290). For a pair (chosen c, rejected r),
`x = (log p(c) - log p_ref(c)) - (log p(r) - log p_ref(r))`, log-probabilities being sums over response tokens, the end
of the sequence included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from spinal_jax.objectives.responses import ResponseBatch

# Logits that exist at a time: about what a CPU's caches hold, enough to fill the machine elsewhere.
LOGIT_BYTES = {"cpu": 2**25}
LOGIT_BYTES_ELSEWHERE = 2**29


class Scores(NamedTuple):
    """Sums over the response tokens of each of S sequences, float32 [S]."""

    logp: Array  # log-probability, nats
    entropy: Array  # of the distributions that predict them, nats; carries no gradient
    logit: Array  # mean logit over the vocabulary; carries no gradient
    correct: Array  # tokens that were the likeliest


def sequence_scores(read: Callable[[Array], Array], h: Array, batch: ResponseBatch, vocab: int) -> Scores:
    """Log-probabilities of responses, a few positions at a time: no [.., T, V] logits exist, nor are any kept for the
    backward pass.

    Args:
        read: logits float32 [..., V] from the residual stream [..., d] (`Decoder.lens`).
        h: [R, T, d] the residual stream at the last boundary.
        batch: which positions predict which tokens of which sequence.
        vocab: V, which sets how many positions are read at a time.
    """
    rows, length = batch.targets.shape
    budget = LOGIT_BYTES.get(jax.default_backend(), LOGIT_BYTES_ELSEWHERE)
    chunk = max(1, min(length, budget // (4 * vocab * rows)))
    count = -(-length // chunk)
    chunk = -(-length // count)  # even chunks

    def chunks(x: Array) -> Array:  # [R, T, ...] -> [count, R, chunk, ...]
        padded = jnp.pad(x, ((0, 0), (0, count * chunk - length), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(padded.reshape(rows, count, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def some(x: Array, targets: Array, owner: Array, weight: Array) -> Scores:
        z = read(x)  # [R, chunk, V]
        still = jax.lax.stop_gradient(z)
        top = jnp.max(still, axis=-1, keepdims=True)
        mass = jnp.sum(jnp.exp(z - top), axis=-1)
        log_mass = jnp.log(mass)
        target = jnp.take_along_axis(z, targets[..., None], axis=-1)[..., 0]
        logp = target - top[..., 0] - log_mass
        moment = jnp.sum(jnp.exp(still - top) * (still - top), axis=-1) / jax.lax.stop_gradient(mass)
        per_token = Scores(
            logp,
            jax.lax.stop_gradient(log_mass) - moment,
            jnp.mean(still, axis=-1),
            (jax.lax.stop_gradient(target) >= top[..., 0]).astype(jnp.float32),
        )
        return jax.tree.map(
            lambda x: jax.ops.segment_sum((x * weight).ravel(), owner.ravel(), batch.sequences), per_token
        )

    nothing = Scores(*(jnp.zeros(batch.sequences, jnp.float32) for _ in Scores._fields))

    def step(total: Scores, part: tuple[Array, Array, Array, Array]) -> tuple[Scores, None]:
        # Positions that predict come first in a row, so whole chunks are empty behind them.
        found = jax.lax.cond(jnp.any(part[-1] > 0), some, lambda *_: nothing, *part)
        return jax.tree.map(jnp.add, total, found), None

    x = jnp.take_along_axis(h, batch.predicting[..., None], axis=1)
    parts = (chunks(x), chunks(batch.targets), chunks(batch.owner), chunks(batch.weight))
    return jax.lax.scan(step, nothing, parts)[0]


def sigmoid(x: Array, chosen: Array, rejected: Array, beta: float, smoothing: float) -> Array:
    """DPO: `-log sigmoid(beta x)`."""
    return -jax.nn.log_sigmoid(beta * x)


def cdpo(x: Array, chosen: Array, rejected: Array, beta: float, smoothing: float) -> Array:
    """Conservative DPO: the label is wrong with probability `smoothing`. Mitchell 2023, "A note on DPO with noisy
    preferences"."""
    return -(1 - smoothing) * jax.nn.log_sigmoid(beta * x) - smoothing * jax.nn.log_sigmoid(-beta * x)


def robust(x: Array, chosen: Array, rejected: Array, beta: float, smoothing: float) -> Array:
    """Robust DPO, unbiased where labels are flipped with probability `smoothing` (arXiv 2403.00409)."""
    kept, flipped = -jax.nn.log_sigmoid(beta * x), -jax.nn.log_sigmoid(-beta * x)
    return ((1 - smoothing) * kept - smoothing * flipped) / (1 - 2 * smoothing)


def ipo(x: Array, chosen: Array, rejected: Array, beta: float, smoothing: float) -> Array:
    """IPO (arXiv 2310.12036), on log-ratios per token: `(chosen - rejected - 1 / (2 beta))^2`."""
    return jnp.square(chosen - rejected - 1 / (2 * beta))


def hinge(x: Array, chosen: Array, rejected: Array, beta: float, smoothing: float) -> Array:
    """SLiC's hinge (arXiv 2305.10425) on DPO's margin: `max(0, 1 - beta x)`."""
    return jax.nn.relu(1 - beta * x)


# Each takes x [P] and the log-ratios of both responses per token [P] each.
LOSSES: Mapping[str, Callable[[Array, Array, Array, float, float], Array]] = {
    "sigmoid": sigmoid,
    "cdpo": cdpo,
    "robust": robust,
    "ipo": ipo,
    "hinge": hinge,
}


class Pairs(NamedTuple):
    """What a preference loss says of each of P pairs."""

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
        reference: [2 P] the same under the reference.
        tokens: [2 P] how many tokens each response has.
        beta: strength of the pull towards the reference, above 0.
        smoothing: probability that a label is wrong, for `cdpo` and `robust`; below 0.5.
    """
    ratio = logp - reference
    chosen, rejected = ratio[0::2], ratio[1::2]
    per_token = ratio / jnp.maximum(tokens, 1)
    loss = LOSSES[kind](chosen - rejected, per_token[0::2], per_token[1::2], beta, smoothing)
    return Pairs(loss, beta * chosen, beta * rejected)
