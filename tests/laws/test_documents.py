"""Documents in tokens, and the order in which training takes its examples."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from spinal_jax.data import (
    DocumentSet,
    examples_of,
    order,
    read_documents,
    split_examples,
    tokenise_documents,
)
from spinal_jax.models.formats.byte_level import byte_tokenizer

from .speech import READ_WRITES, SAID, message, written


@pytest.fixture(scope="module")
def bytewise() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def documents(*texts: str) -> DocumentSet:
    return DocumentSet(texts, "a test", "text", 0, "")


@given(st.lists(SAID, min_size=1, max_size=5), st.integers(2, 30))
@READ_WRITES
def test_every_token_but_a_document_s_first_is_predicted_once(bytewise, texts, max_length):
    pieces = iter(tokenise_documents(documents(*texts), bytewise, max_length))
    for text in texts:
        whole = [256, *text.encode(), 257]
        predicted: list[int] = []
        while len(predicted) < len(whole) - 1:
            piece = next(pieces)
            assert piece.start == 1
            assert 2 <= len(piece.ids) <= max_length
            assert piece.ids[0] == whole[len(predicted)]  # what the piece before ended with
            predicted += piece.ids[1:].tolist()
        assert predicted == whole[1:]
    assert next(pieces, None) is None


def test_document_files(tmp_path, bytewise):
    path = tmp_path / "d.txt"
    path.write_text("one \n\n  \ntwo\n", encoding="utf-8")
    read = read_documents(path)
    assert (read.texts, read.skipped_empty, read.source, read.format) == (("one ", "two"), 2, str(path), "text")
    path = written(tmp_path / "d.jsonl", [{"text": "a"}, {"text": "b"}, {"text": " "}, {"body": "c"}])
    assert read_documents(path, "jsonl", limit=2, offset=1).texts == ("b",)
    assert "line 4 has no field 'text'" in message(lambda: read_documents(path, "jsonl"))
    assert "choose one of text, jsonl" in message(lambda: read_documents(path, "hh"))
    assert "(offset=2, limit=1; 1 empty" in message(lambda: read_documents(path, "jsonl", limit=1, offset=2))
    assert "corpus.max_length=1 " in message(lambda: tokenise_documents(documents("a"), bytewise, 1))
    bare = byte_tokenizer()
    bare.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    assert "has two tokens" in message(lambda: tokenise_documents(documents("<|eos|>"), bare, 9))
    bare.eos_token = None
    assert "no EOS token, which a document ends with" in message(lambda: tokenise_documents(documents("a"), bare, 9))


# Order


@given(st.integers(1, 50), st.integers(0, 2**63), st.integers(0, 5), st.integers(1, 17))
def test_steps_run_through_one_epoch_after_the_other(count, seed, first, batch_size):
    epochs = np.concatenate([order(count, seed, epoch) for epoch in range(8)])
    assert all(sorted(order(count, seed, epoch)) == list(range(count)) for epoch in range(8))
    for step in range(first, min(first + 3, 8 * count // batch_size)):
        wanted = epochs[step * batch_size : (step + 1) * batch_size]
        assert examples_of(step, batch_size, count, seed).tolist() == wanted.tolist()


def test_the_order_is_pinned_and_differs_by_epoch_and_seed():
    """A run that resumes on another machine or release meets the same examples."""
    assert order(10, 0, 0).tolist() == [0, 8, 9, 3, 7, 5, 1, 2, 6, 4]
    assert order(10, 0, 1).tolist() == [3, 7, 4, 2, 9, 8, 1, 6, 5, 0]
    assert examples_of(2, 4, 10, 0).tolist() == [6, 4, 3, 7]
    assert len({tuple(order(20, seed, epoch)) for seed in range(5) for epoch in range(5)}) == 25


def test_the_last_are_held_out():
    assert split_examples("abcde", None, 2) == (("a", "b", "c"), ("d", "e"))
    assert split_examples("abcde", 2, 1) == (("a", "b"), ("e",))
    assert split_examples("abc", None, 0) == (("a", "b", "c"), ())
    for train, held_out in ((None, 5), (4, 2), (0, 1), (None, -1)):
        text = message(lambda train=train, held_out=held_out: split_examples("abcde", train, held_out))
        assert f"held_out={held_out}" in text
