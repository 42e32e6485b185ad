"""Distributions over the tokens that a tokenizer has: rows of the unembedding that stand for none change nothing."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spinal_jax.data.vocabulary import Vocabulary
from spinal_jax.errors import UserError
from spinal_jax.metrics.lens import Lens
from spinal_jax.metrics.transport import Pair, lens_stats

PAIRS = (Pair(0, 3, 1), Pair(0, 2, 2))


def tokenizer(tokens: dict[str, int]) -> SimpleNamespace:
    return SimpleNamespace(get_vocab=lambda: tokens)


def case(tokens: int, seed: int = 0) -> tuple[Lens, jax.Array]:
    rng = np.random.default_rng(seed)
    unembed = jnp.asarray(rng.normal(size=(tokens, 16)), jnp.float32)
    bias = jnp.asarray(rng.normal(size=tokens), jnp.float32)
    return Lens(unembed, bias, 5.0, 1.0), jnp.asarray(rng.normal(size=(4, 6, 16)), jnp.float32)


def stats(lens: Lens, x: jax.Array, top_k: int | None = None) -> list[np.ndarray]:
    found = lens_stats((lens, lens), (x, x[::-1]), PAIRS, ((3, 7),), top_k)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(found)]


@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("ids", [np.arange(272), np.arange(1, 272, 2), np.setdiff1d(np.arange(300), [3, 150])])
def test_rows_that_stand_for_no_token_change_nothing(ids: np.ndarray, top_k: int | None) -> None:
    """A masked table gives what a table of the tokens alone gives, whatever the other rows hold."""
    lens, x = case(336)
    alone = replace(lens, unembed=lens.unembed[ids], bias=None if lens.bias is None else lens.bias[ids])
    masked, exact = stats(lens.over(ids, 336), x, top_k), stats(alone, x, top_k)
    for ours, theirs in zip(masked, exact, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)  # the same sums in another order, float32
    assert np.abs(stats(lens, x, top_k)[0] - exact[0]).max() > 1e-3  # and the rows would have mattered


def test_a_prefix_copies_no_table_and_a_shorter_table_is_cut() -> None:
    lens, x = case(336)
    assert lens.over(np.arange(272), 336).unembed is lens.unembed
    cut = lens.over(np.arange(0, 272, 3), 280)
    assert cut.unembed.shape[0] == 280
    read = np.asarray(jax.nn.softmax(cut.read(x[0])))
    assert read.shape[-1] == 271
    np.testing.assert_array_equal(read[:, 1::3], 0.0)
    np.testing.assert_allclose(read.sum(axis=-1), 1, rtol=1e-6)


def test_a_vocabulary_is_the_ids_of_its_tokens() -> None:
    found = Vocabulary.of(tokenizer({"b": 1, "a": 0, "z": 5, "beyond": 9}), 8)
    assert found.ids.tolist() == [0, 1, 5]
    assert found.rows == 8
    assert len(found) == 3
    again = Vocabulary.of(tokenizer({"z": 5, "a": 0, "b": 1}), 6)
    assert again.sha256 == found.sha256
    assert Vocabulary.of(tokenizer({"z": 4, "a": 0, "b": 1}), 6).sha256 != found.sha256


def test_two_vocabularies_share_the_ids_of_equal_tokens() -> None:
    base = {f"t{n}": n for n in range(1000)}
    tuned = {**{f"t{n}": n for n in range(1000) if n != 7}, "<|chat|>": 7, "<|end|>": 1000}
    one, other = Vocabulary.of(tokenizer(base), 1024), Vocabulary.of(tokenizer(tuned), 1001)
    both = one.shared(other)
    assert both.ids.tolist() == [n for n in range(1000) if n != 7]
    assert both.rows == 1001
    assert both.sha256 == other.shared(one).sha256
    far = Vocabulary.of(tokenizer({f"t{n}": n for n in range(900)}), 1024)
    with pytest.raises(UserError, match=r"share 900, which leaves out 10\.0% of one; .* share 99% of their tokens"):
        one.shared(far)
