"""The vocabulary that token distributions are taken over: the ids that stand for a token, not all rows of a model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from spinal_jax.errors import UserError

LEFT_OUT = 0.01  # share of either model's tokens that a comparison may leave out


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Ids of a model's unembedding that stand for a token, ascending, and which token each is."""

    token_of: Mapping[int, str]
    rows: int  # of an unembedding that are read, padding among them

    @classmethod
    def of(cls, tokenizer: Any, rows: int) -> Vocabulary:
        """The tokens of a tokenizer among the first `rows` ids; rows of a model beyond them are padding."""
        ids = sorted((number, token) for token, number in tokenizer.get_vocab().items() if 0 <= number < rows)
        return cls(dict(ids), rows)

    @cached_property
    def ids(self) -> np.ndarray:
        """int64 [n], ascending."""
        return np.fromiter(self.token_of, np.int64, len(self.token_of))

    def __len__(self) -> int:
        return len(self.token_of)

    @cached_property
    def sha256(self) -> str:
        """Hex digest over every id and its token."""
        digest = hashlib.sha256()
        for number, token in self.token_of.items():
            digest.update(f"{number}\0{token}\0".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def shared(self, other: Vocabulary) -> Vocabulary:
        """The ids that stand for the same token in both.

        Raises:
            UserError: they are less than 99 % of either.
        """
        common = {n: token for n, token in self.token_of.items() if other.token_of.get(n) == token}
        both = Vocabulary(common, min(self.rows, other.rows))
        for one in (self, other):
            if len(both) < (1 - LEFT_OUT) * len(one):
                raise UserError(
                    f"the two vocabularies of {len(self):,} and {len(other):,} tokens share {len(both):,}, which "
                    f"leaves out {1 - len(both) / len(one):.1%} of one; only checkpoints that share "
                    f"{1 - LEFT_OUT:.0%} of their tokens can be compared"
                )
        return both
