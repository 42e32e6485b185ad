"""Hidden states of a real model, SmolLM2-135M-Instruct: alpha from Gram sums against a float64 SVD of the same states.

`make test` fetches the model; without it these tests fail.
"""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spinal_jax.metrics import contraction
from spinal_jax.metrics.tail import tail_fit
from spinal_jax.models.decoder import collect
from spinal_jax.models.families import family_of
from spinal_jax.models.formats.open import open_checkpoint
from spinal_jax.models.hf_config import HFConfig
from spinal_jax.models.translate import load_decoder

HERE = Path(__file__).parent
MODEL = HERE.parents[1] / "downloads" / "SmolLM2-135M-Instruct.Q4_1.gguf"
WINDOW = (0.10, 0.50)


@pytest.fixture(scope="module")
def states() -> np.ndarray:
    """float32 [3, N, d] hidden states of running text at three boundaries, N = 30 d, the first of each row left out."""
    with contextlib.closing(open_checkpoint(str(MODEL))) as checkpoint:
        hf = HFConfig(checkpoint.config)
        family = family_of(hf.model_type)
        config = family.decoder_config(hf)
        model = load_decoder(checkpoint, family, config, jnp.dtype("float32"))
        tokenizer = checkpoint.tokenizer()
    text = "\n".join(path.read_text() for path in sorted((HERE.parents[1] / "docs").glob("*.md")))
    length, rows = 129, 8 * math.ceil(30 * config.width / (8 * 128))
    ids = np.array(tokenizer(text)["input_ids"], np.int32)
    ids = np.resize(ids, rows * length).reshape(rows, length)  # repeats the text where it is too short

    @jax.jit
    def some(model: Any, tokens: jax.Array) -> jax.Array:
        return model.forward(tokens, tap=collect(lambda h: h))[1][jnp.array([0, 12, 25]), :, 1:]

    parts = [np.asarray(some(model, jnp.asarray(ids[i : i + 8]))) for i in range(0, rows, 8)]
    found = np.concatenate(parts, axis=1)
    return found.reshape(3, -1, config.width)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_alpha_is_that_of_a_float64_svd_of_the_same_states(states: np.ndarray, place: int, rotated: bool) -> None:
    """With the massive directions of a trained model, as they are and spread over all features."""
    rows = states[place]
    assert len(rows) >= 30 * rows.shape[1]
    if rotated:
        basis = np.linalg.qr(np.random.default_rng(0).normal(size=(rows.shape[1],) * 2))[0]
        rows = (rows @ basis).astype(np.float32)
    with jax.enable_x64(True):
        grams = contraction.init(1, 1, rows.shape[1], contraction.gram_dtype())
        step = jax.jit(contraction.update)
        for part in np.array_split(rows, 16):
            counted, slot = jnp.ones((1, len(part)), jnp.float32), jnp.zeros(1, jnp.int32)
            grams = step(grams, jnp.asarray(part[None]), counted, slot, jnp.int32(0))
        second = np.asarray(contraction.lower_triangle(grams.second))[0, 0]
    found = tail_fit(contraction.singular_values(second), len(rows), WINDOW)
    # The R factor has the singular values of the rows and costs less.
    exact = tail_fit(
        np.linalg.svd(np.linalg.qr(rows.astype(np.float64), mode="r"), compute_uv=False), len(rows), WINDOW
    )
    assert (found.low, found.high) == (exact.low, exact.high) == (58, 288)
    assert found.alpha == pytest.approx(exact.alpha, abs=1e-6)  # 1e-3 is promised
