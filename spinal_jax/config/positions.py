"""The selector of the positions at which transport is measured."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spinal_jax.errors import UserError


@dataclass(frozen=True)
class Positions:
    """Selector of the positions at which transport is measured."""

    kind: str
    count: int = 0

    @staticmethod
    def parse(text: str) -> Positions:
        """Parses `last:K`, `response:K`, `stride:K` or `all`. Raises UserError for anything else."""
        kind, _, count = str(text).partition(":")
        if kind == "all" and not count:
            return Positions("all")
        if (
            kind in ("last", "stride", "response")
            and count.isascii()
            and count.isdigit()
            and 0 < len(count) < 10
            and int(count) > 0
        ):
            return Positions(kind, int(count))
        raise UserError(
            f"metrics.transport.positions is {text!r}; it takes last:K, response:K, stride:K (K a whole number "
            "above 0) or all"
        )

    def of(self, length: int, response_start: int | None) -> np.ndarray:
        """int [m] selected indices of a sequence, ascending.

        Args:
          length: tokens of the sequence.
          response_start: index of its first response token; None: it has no response.
        """
        if self.kind == "all":
            return np.arange(length)
        if self.kind == "last":
            return np.arange(max(0, length - self.count), length)
        if self.kind == "stride":
            return np.arange(self.count - 1, length, self.count)
        if response_start is None:
            raise UserError(
                f"metrics.transport.positions is 'response:{self.count}', but the prompts have no responses; use last:K"
            )
        first = max(response_start - 1, 0)  # predicts the first response token
        return np.arange(first, min(first + self.count, length - 1))
