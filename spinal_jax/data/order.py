"""In which order examples are seen: pure functions of the seed and the step, so that resuming needs only the step."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from spinal_jax.errors import UserError

T = TypeVar("T")


@functools.lru_cache(maxsize=4)
def order(count: int, seed: int, epoch: int) -> np.ndarray:
    """A random permutation of 0..count - 1, int64, read-only: the same for equal arguments everywhere.

    Sorts `count` raw 64-bit draws of Philox keyed by (seed, epoch), for the raw streams of NumPy's bit generators are
    fixed and those of its `permutation` are not (NEP 19).
    """
    draws = np.random.Philox(np.random.SeedSequence((seed, epoch))).random_raw(count)
    found = np.argsort(draws, kind="stable")
    found.flags.writeable = False
    return found


def examples_of(step: int, batch_size: int, count: int, seed: int) -> np.ndarray:
    """[batch_size] which of `count` examples optimiser step `step` (0-based) sees, int64.

    Steps run through one epoch's `order` after the other, and a batch may hold the end of one and the start of the
    next: each epoch sees each example once.
    """
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    return np.array([order(count, seed, int(place // count))[place % count] for place in places], dtype=np.int64)


def split_examples(examples: Sequence[T], train: int | None, held_out: int) -> tuple[tuple[T, ...], tuple[T, ...]]:
    """The first `train` examples (None: all that are not held out) and the last `held_out`.

    Raises `UserError` if there are not as many, or none is left to train on.
    """
    rest = len(examples) - held_out
    if held_out < 0 or rest < 1 or not 1 <= (rest if train is None else train) <= rest:
        asked = f"train={'null' if train is None else train} and held_out={held_out}"
        raise UserError(
            f"{len(examples)} examples cannot be split into {asked}; train needs 1 or more, held_out 0 or more"
        )
    return tuple(examples[: rest if train is None else train]), tuple(examples[rest:])
