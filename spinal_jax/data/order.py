"""Order of training examples as a pure function of seed and step, so that resuming needs only the step."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from spinal_jax.errors import UserError

T = TypeVar("T")


@functools.lru_cache(maxsize=4)
def order(count: int, seed: int, epoch: int) -> np.ndarray:
    """A random permutation of 0..count - 1, int64, read-only, equal on all platforms and NumPy versions.

    Sorts `count` raw 64-bit draws of Philox with the key (seed, epoch). NEP 19 guarantees the raw streams of NumPy's
    bit generators, but not `permutation`.
    """
    draws = np.random.Philox(np.random.SeedSequence((seed, epoch))).random_raw(count)
    permutation = np.argsort(draws, kind="stable")
    permutation.flags.writeable = False
    return permutation


def examples_of(step: int, batch_size: int, count: int, seed: int) -> np.ndarray:
    """int64 [batch_size] numbers of the examples, of `count`, in optimiser step `step` (0-based).

    Epochs follow each other without a gap: a batch may hold the end of one epoch and the start of the next, and each
    epoch has every example once.
    """
    at = np.arange(step * batch_size, (step + 1) * batch_size)
    return np.array([order(count, seed, int(n // count))[n % count] for n in at], dtype=np.int64)


def split_examples(examples: Sequence[T], train: int | None, held_out: int) -> tuple[tuple[T, ...], tuple[T, ...]]:
    """The first `train` examples (None: all that are not held out) and the last `held_out`.

    Raises `UserError` if there are fewer examples, or none is left for training.
    """
    rest = len(examples) - held_out
    if held_out < 0 or rest < 1 or not 1 <= (rest if train is None else train) <= rest:
        asked = f"train={'null' if train is None else train} and held_out={held_out}"
        raise UserError(
            f"{len(examples)} examples cannot be split into {asked}; train needs 1 or more, held_out 0 or more"
        )
    return tuple(examples[: rest if train is None else train]), tuple(examples[rest:])
