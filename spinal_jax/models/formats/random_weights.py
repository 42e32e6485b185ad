"""Sources with random weights: `random:SHAPE@SEED`."""

from __future__ import annotations

import contextlib

from spinal_jax.errors import UserError
from spinal_jax.models.formats.base import Checkpoint
from spinal_jax.models.formats.byte_level import SIZES, byte_tokenizer
from spinal_jax.models.formats.memory import random_checkpoint
from spinal_jax.models.formats.open import open_checkpoint

RANDOM = "random:"  # prefix of such a source


def random_shape(source: str, revision: str | None, base: str | None) -> tuple[str, int]:
    """The shape and the seed of `random:SHAPE@SEED`; the seed is 0 by default.

    Raises UserError for a `base`, which only adapters have, and for a `revision` of a named size.
    """
    if base is not None:
        raise UserError(f"base {base!r} was given for {source!r}, which is no adapter")
    shape, at, seed = source.removeprefix(RANDOM).rpartition("@")
    if not (at and seed.isascii() and seed.isdigit()):
        shape, seed = source.removeprefix(RANDOM), "0"
    if shape in SIZES and revision is not None:
        raise UserError(f"revision {revision!r} was given for {source!r}, but only a hub id (owner/name) has any")
    return shape, int(seed[:20])  # long enough to be rejected as too large


def open_random(source: str, revision: str | None, base: str | None) -> Checkpoint:
    """A checkpoint of random weights: a byte-level Llama of a named size, or the shape and tokenizer of another
    checkpoint. Raises UserError as `random_shape` and `open_checkpoint`."""
    shape, seed = random_shape(source, revision, base)
    if shape in SIZES:
        return random_checkpoint(source, dict(SIZES[shape]), byte_tokenizer(), seed)
    try:
        like = open_checkpoint(shape, revision)
    except UserError as error:
        raise UserError(f"{error}; sizes of random models are {', '.join(SIZES)}") from error
    with contextlib.closing(like):
        return random_checkpoint(source, like.config, like.tokenizer(), seed)
