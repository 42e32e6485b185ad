"""Preference pairs in tokens: where a response begins, what fits, and chat templates."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from spinal_jax.data import (
    PairSet,
    PreferencePair,
    tokenise_pairs,
)
from spinal_jax.models.formats.byte_level import byte_tokenizer

from .speech import READ_WRITES, REPLY, SAID, USER, message


def pair_set(*sides: tuple[str, str, str]) -> PairSet:
    pairs = (PreferencePair(i, p, c, r, ((USER, p),)) for i, (p, c, r) in enumerate(sides))
    return PairSet(tuple(pairs), "a test", "jsonl", "", {})


# HH transcripts


@pytest.fixture(scope="module")
def bytewise() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


SYMBOLS = {byte_tokenizer().convert_ids_to_tokens(byte): byte for byte in range(256)}


LETTER_BYTES = ["a", "b", " ", ".", "\n", ":"]


@pytest.fixture(scope="module", params=["plain", "trimmed", "words", "metaspace"])
def merged(request) -> PreTrainedTokenizerFast:
    """BPE trained to merge across whatever it meets, with spans in each of the ways that tokenizers report them."""
    metaspace = request.param == "metaspace"
    backend = Tokenizer(models.BPE(byte_fallback=metaspace, unk_token="<unk>" if metaspace else None))
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    else:
        # `words` cuts as GPT-2 does; the others merge across white space too.
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=request.param == "words")
    if request.param in ("trimmed", "words"):
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256 if metaspace else 0))],
        initial_alphabet=LETTER_BYTES if metaspace else pre_tokenizers.ByteLevel.alphabet(),
        limit_alphabet=8 if metaspace else 256,
        show_progress=False,
    )
    backend.train_from_iterator(
        ["ab ab. ba\nab: é🍅 a.\n\nb: ab é🍅é .\n a b" * 3, "a.\nb: a b.\n\nab 🍅 b:\n b"], trainer
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def token_bytes(tokenizer: PreTrainedTokenizerFast, token: int) -> bytes:
    """The bytes that a token stands for."""
    text = tokenizer.convert_ids_to_tokens(token)
    if isinstance(tokenizer.backend_tokenizer.pre_tokenizer, pre_tokenizers.Metaspace):
        return bytes([int(text[3:5], 16)]) if text.startswith("<0x") else text.replace("▁", " ").encode()
    return bytes(SYMBOLS[symbol] for symbol in text)


@given(SAID, SAID, SAID)
@READ_WRITES
def test_the_response_starts_at_the_first_token_beyond_the_prompt(merged, prompt, good, bad):
    """Whatever was merged: what stands before `start` lies within the prompt, and with the next token it does not."""
    ids = [merged(prompt + response).input_ids for response in (good, bad)]
    ends = []
    for tokens, response in zip(ids, (good, bad), strict=True):
        sizes = [len(token_bytes(merged, token)) for token in tokens]
        lead = sum(sizes) - len((prompt + response).encode())  # the blank that Metaspace puts first
        assert 0 <= lead <= 1
        ends.append(np.cumsum(sizes) - lead)
    starts = [int(np.argmax(end > len(prompt.encode()))) for end in ends]
    reason = "1 no_prompt" if 0 in starts else "1 identical" if good == bad else ""
    pairs = pair_set((prompt, good, bad))
    if reason:
        assert reason in message(lambda: tokenise_pairs(pairs, merged, 999, False))
        return
    ((pair,), dropped) = tokenise_pairs(pairs, merged, 999, False)
    assert not any(dropped.values())
    assert [pair.chosen.start, pair.rejected.start] == starts
    assert [side.ids.tolist() for side in (pair.chosen, pair.rejected)] == [[*i, merged.eos_token_id] for i in ids]


def test_a_token_that_straddles_the_boundary_is_the_response_s(merged):
    """A full stop and a line break are one token unless text is cut between them; trimmed spans would hide it."""
    ((pair,), _) = tokenise_pairs(pair_set(("ab.", "\nb: a", " a")), merged, 99, False)
    head, first = pair.chosen.ids[: pair.chosen.start], pair.chosen.ids[pair.chosen.start]
    cuts_there = getattr(merged.backend_tokenizer.pre_tokenizer, "use_regex", False)
    assert token_bytes(merged, int(first)).startswith(b"\n" if cuts_there else b".\n")
    assert b"".join(token_bytes(merged, int(token)) for token in head).strip() == (b"ab." if cuts_there else b"ab")


def test_eos_ends_each_side_once(bytewise):
    """Appended by the tokenizer, by the text itself, or here; a tokenizer without EOS is refused."""
    pairs = pair_set(("p", "a<|eos|>", "b"))
    own = byte_tokenizer()
    own.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A <|eos|>", special_tokens=[("<|bos|>", 256), ("<|eos|>", 257)]
    )
    without = byte_tokenizer()
    without.eos_token = None
    assert "has no EOS token, which a response ends with" in message(lambda: tokenise_pairs(pairs, without, 99, False))
    for tokenizer, rejected in ((bytewise, [98, 257]), (own, [98, 257])):
        ((pair,), _) = tokenise_pairs(pairs, tokenizer, 99, False)
        assert pair.rejected.ids[pair.rejected.start :].tolist() == rejected
        assert pair.chosen.ids[pair.chosen.start :].tolist() == ([97, 257] if tokenizer is not own else [97, 257, 257])


def test_sides_that_become_one_in_tokens_and_responses_without_any(bytewise):
    lower = byte_tokenizer()
    lower.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace("x", "")])
    pairs = pair_set(("p", "YES", "yes"), ("p", "x", "y"), ("p", "a", "b"))
    kept, dropped = tokenise_pairs(pairs, lower, 99, False)
    assert [pair.id for pair in kept] == [2]
    assert dropped == {"overlong": 0, "identical": 1, "empty": 1, "no_prompt": 0, "refused": 0}


@given(st.lists(st.tuples(SAID, SAID, SAID), min_size=1, max_size=6), st.integers(2, 40), st.booleans())
@example([("ab", "x", "yz")], 4, True)  # BOS alone would be left of the prompt
@example([("ab", "x", "yz")], 5, True)
@READ_WRITES
def test_what_fits(bytewise, sides, max_length, cut):
    """Dropping keeps the pairs that fit as they are; cutting takes the prompt's first tokens after BOS, alike."""
    pairs = pair_set(*sides)
    distinct = [pair for pair in pairs.pairs if pair.chosen != pair.rejected]
    wanted = {}
    for pair in distinct:
        prompt, replies = list(pair.prompt.encode()), [[*r.encode(), 257] for r in (pair.chosen, pair.rejected)]
        excess = max(0, 1 + len(prompt) + max(map(len, replies)) - max_length)
        if excess == 0 or (cut and excess < len(prompt)):
            wanted[pair.id] = [[256, *prompt[excess:], *reply] for reply in replies]
    if not wanted:
        text = message(lambda: tokenise_pairs(pairs, bytewise, max_length, False, "cut_prompt" if cut else "drop"))
        assert (f"{len(distinct)} overlong" in text) == bool(distinct)
        assert f"max_length={max_length}" in text
        return
    kept, dropped = tokenise_pairs(pairs, bytewise, max_length, False, "cut_prompt" if cut else "drop")
    assert {pair.id: [pair.chosen.ids.tolist(), pair.rejected.ids.tolist()] for pair in kept} == wanted
    assert len(kept) + sum(dropped.values()) == len(pairs.pairs)
    for pair in kept:
        reply = pairs.pairs[pair.id].chosen.encode()
        assert bytes(pair.chosen.ids[pair.chosen.start : -1].tolist()) == reply


TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|eos|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_chat_template(bytewise):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    turns = ((USER, "Q"), (REPLY, "R"), (USER, "S"))
    pairs = PairSet((PreferencePair(0, "unused", " yes \n", " no", turns),), "a test", "hh", "", {})
    ((pair,), _) = tokenise_pairs(pairs, tokenizer, 999, True)
    for side, reply in ((pair.chosen, "yes"), (pair.rejected, "no")):
        opening = "<|user|>Q<|eos|>\n<|assistant|>R<|eos|>\n<|user|>S<|eos|>\n<|assistant|>"
        assert tokenizer.decode(side.ids[: side.start]) == opening
        assert tokenizer.decode(side.ids[side.start :]) == f"{reply}<|eos|>\n"
        assert 256 not in side.ids  # what the template does not write is not added


def test_chat_templates_that_do_not_serve(bytewise):
    pairs = pair_set(("p", "a", "b"))
    assert "preferences.chat_template=false" in message(lambda: tokenise_pairs(pairs, bytewise, 99, True))
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    text = message(lambda: tokenise_pairs(pairs, tokenizer, 99, True))
    assert "pair 0: the tokenizer's chat template fails" in text
    tokenizer.chat_template = (
        "{{ messages[0].content }}{{ '<think>' if add_generation_prompt else messages[-1].content }}"
    )
    text = message(lambda: tokenise_pairs(pairs, tokenizer, 99, True))
    assert "pair 0" in text
    assert "'p<think>'" in text


def test_bad_token_settings(bytewise):
    pairs = pair_set(("p", "a", "b"))
    assert "max_length=1 " in message(lambda: tokenise_pairs(pairs, bytewise, 1, False))
    other: Any = "trim"
    assert "choose drop or cut_prompt" in message(lambda: tokenise_pairs(pairs, bytewise, 9, False, other))


# Documents
