"""The vocabulary of token distributions: the ids of real tokens, without the padding rows of an unembedding."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from spinal_jax.errors import UserError

MAX_UNSHARED = 0.01  # share of the tokens of either model that a comparison may leave out


class HasVocabulary(Protocol):
    """A tokenizer."""

    def get_vocab(self) -> dict[str, int]: ...


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Ids of an unembedding that are tokens, ascending, with their tokens."""

    token_of: Mapping[int, str]
    rows: int  # rows of the unembedding to read, with padding

    @classmethod
    def of(cls, tokenizer: HasVocabulary, rows: int) -> Vocabulary:
        """The tokens of a tokenizer with ids below `rows`; other rows of the model are padding."""
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
        """Hex digest of all ids and tokens."""
        digest = hashlib.sha256()
        for number, token in self.token_of.items():
            digest.update(f"{number}\0{token}\0".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def shared(self, other: Vocabulary) -> Vocabulary:
        """The ids that are the same token in both.

        Raises:
            UserError: less than 99 % of the ids of either are shared.
        """
        common = {n: token for n, token in self.token_of.items() if other.token_of.get(n) == token}
        both = Vocabulary(common, min(self.rows, other.rows))
        for one in (self, other):
            if len(both) < (1 - MAX_UNSHARED) * len(one):
                raise UserError(
                    f"the two vocabularies of {len(self):,} and {len(other):,} tokens share {len(both):,}, which "
                    f"leaves out {1 - len(both) / len(one):.1%} of one; only checkpoints that share "
                    f"{1 - MAX_UNSHARED:.0%} of their tokens can be compared"
                )
        return both
