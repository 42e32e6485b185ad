"""The logit lens: token logits of a hidden state after the final norm."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

MASKED_LOGIT = -1e30  # finite, so that its product with a mass of 0 is 0


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["unembed", "bias", "known"],
    meta_fields=["cap", "temperature", "size"],
)
@dataclass(frozen=True)
class Lens:
    """Logits of a hidden state x after the final norm: `softcap(x @ unembed.T + bias) / temperature`."""

    unembed: Array  # [V, d]
    bias: Array | None  # [V]
    cap: float | None
    temperature: float
    size: int | None = None  # number of rows that are tokens; the rows after them are padding. None: all
    known: Array | None = None  # bool [V] rows that are tokens, if padding lies between them. None: all

    @property
    def vocab_size(self) -> int:
        """V, over all devices."""
        return self.unembed.shape[0] if self.size is None else self.size

    def logits(self, scores: Array, bias: Array | float) -> Array:
        """float32 logits from `x @ unembed.T`."""
        z = scores + bias
        return (z if self.cap is None else self.cap * jnp.tanh(z / self.cap)) / self.temperature

    def read(self, x: Array) -> Array:
        """float32 logits [..., V] of x [..., d]."""
        scores = jnp.einsum("...d,vd->...v", x, self.unembed, preferred_element_type=jnp.float32)
        z = self.logits(scores, 0.0 if self.bias is None else self.bias.astype(jnp.float32))
        z = z if self.known is None else jnp.where(self.known, z, MASKED_LOGIT)
        return z[..., : self.vocab_size]

    def over(self, ids: np.ndarray, rows: int) -> Lens:
        """The lens restricted to some tokens; their distribution is renormalised.

        Args:
            ids: int [n], ascending and below `rows`.
            rows: number of rows to keep, equal for models that are measured together; V avoids a copy.
        """
        cut = self
        if rows < self.unembed.shape[0]:
            cut = replace(self, unembed=self.unembed[:rows], bias=None if self.bias is None else self.bias[:rows])
        size = int(ids[-1]) + 1
        if len(ids) == size:
            return replace(cut, size=size)
        known = np.zeros(rows, bool)
        known[ids] = True
        return replace(cut, size=size, known=jnp.asarray(known))
