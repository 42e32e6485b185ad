"""Attention in tiles: output and gradients are those of whole scores, whatever may look at what."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from spinal_jax.models import tiled_attention
from spinal_jax.models.attention import allowed, attend
from spinal_jax.models.tiled_attention import FORBIDDEN, attend_tiled

BATCH, LENGTH, HEADS, KV_HEADS, DIM, VALUE_DIM = 2, 37, 4, 2, 8, 6


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("branching", [False, True])
def test_output_and_gradients(softcap: float | None, branching: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sequences and padding in a row, or a prompt with two responses; tiles of 8 and one of 5."""
    monkeypatch.setattr(tiled_attention, "TILE", 8)
    rng = np.random.default_rng(0)

    def draw(heads: int, dim: int) -> Array:
        return jnp.asarray(rng.normal(size=(BATCH, LENGTH, heads, dim)), jnp.float32)

    q, k, v, pull = draw(HEADS, DIM), draw(KV_HEADS, DIM), draw(KV_HEADS, VALUE_DIM), draw(HEADS, VALUE_DIM)
    branches = positions = None
    if branching:
        segments = jnp.ones((BATCH, LENGTH), jnp.int32)
        places = np.r_[0:20, 12:29]  # a prompt of 12, then responses of 8 and 17
        positions = jnp.asarray(np.tile(places, (BATCH, 1)), jnp.int32)
        branches = jnp.asarray(np.tile(np.repeat([0, 1, 2], [12, 8, 17]), (BATCH, 1)), jnp.int32)
    else:
        segments = jnp.asarray(np.tile(np.repeat([1, 2, 0], [15, 16, 6]), (BATCH, 1)), jnp.int32)
    seen = allowed(segments, jnp.arange(LENGTH, dtype=jnp.int32), None, branches, positions)
    bias = jnp.where(seen, 0.0, FORBIDDEN)

    def whole(q: Array, k: Array, v: Array) -> Array:
        return attend(
            q,
            k,
            v,
            segments,
            window=None,
            scale=1.0,
            softcap=softcap,
            branches=branches,
            positions=positions,
        )

    with jax.default_matmul_precision("highest"):
        expected, pullback = jax.vjp(whole, q, k, v)
        found, own_pullback = jax.vjp(lambda q, k, v: attend_tiled(softcap, q, k, v, bias), q, k, v)
        np.testing.assert_allclose(found, expected, atol=2e-6)
        for name, one, other in zip("qkv", own_pullback(pull), pullback(pull), strict=True):
            np.testing.assert_allclose(one, other, atol=5e-6 * float(jnp.abs(other).max()), err_msg=name)
