"""Preference pairs and documents: what is read and refused, where a response begins in tokens, and in which order."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from spinal_jax.data import (
    DocumentSet,
    PairSet,
    PreferencePair,
    examples_of,
    order,
    read_documents,
    read_pairs,
    split,
    tokenise_documents,
    tokenise_pairs,
)
from spinal_jax.errors import UserError
from spinal_jax.models.formats.byte_level import byte_tokenizer

ASSISTANT = "\n\nAssistant:"
USER, REPLY = "user", "assistant"
READ_WRITES = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
# Few letters, so that merges meet the boundary; white space, because tokenizers treat it apart; more than one byte.
LETTERS = st.text("ab .\n:é🍅", max_size=12)
SAID = LETTERS.filter(lambda text: bool(text.strip()))


def hh(*turns: str) -> str:
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {turn}" for i, turn in enumerate(turns))


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def written(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_one(path: Path, row: Any, format: str) -> PreferencePair:
    (pair,) = read_pairs(written(path, [row]), format).pairs
    return pair


def message(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    assert not text.endswith(".")
    return text


def pair_set(*sides: tuple[str, str, str]) -> PairSet:
    pairs = (PreferencePair(i, p, c, r, ((USER, p),)) for i, (p, c, r) in enumerate(sides))
    return PairSet(tuple(pairs), "a test", "jsonl", "", {})


# HH transcripts


@given(st.lists(st.tuples(SAID, SAID), max_size=3), SAID, SAID, SAID)
@READ_WRITES
def test_hh_pairs_share_all_but_the_last_reply(tmp_path, exchanges, question, good, bad):
    asked = [turn for exchange in exchanges for turn in exchange] + [question]
    row = {"chosen": hh(*asked, good), "rejected": hh(*asked, bad)}
    path = written(tmp_path / "p", [row])
    if good == bad:
        assert "1 identical" in message(lambda: read_pairs(path))
        return
    read = read_pairs(path)
    (pair,) = read.pairs
    assert pair.prompt == hh(*asked) + ASSISTANT
    assert (pair.prompt + pair.chosen, pair.prompt + pair.rejected) == (row["chosen"], row["rejected"])
    assert pair.turns == tuple(((USER, REPLY)[i % 2], turn.strip()) for i, turn in enumerate(asked))
    assert (read.shortened, read.format, read.source) == (0, "hh", str(path))


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt", "replies"),
    [
        # Dialogues that part before their last reply are compared at the reply where they part.
        (hh("q", "a", "more", "end"), hh("q", "b"), hh("q"), (" a", " b")),
        (hh("q", "b"), hh("q", "a", "more", "end"), hh("q"), (" b", " a")),
        (hh("q", "a", "r", "b", "s", "c"), hh("q", "a", "r", "d", "t", "e"), hh("q", "a", "r"), (" b", " d")),
        (hh("q") + ASSISTANT + " a" + ASSISTANT + " b", hh("q", "c"), hh("q"), (" a", " c")),
        # Replies that begin alike, and a marker that is none.
        (hh("q", "the cat"), hh("q", "the car"), hh("q"), (" the cat", " the car")),
        (hh("q", "a Assistant: b"), hh("q", "a Assistant: c"), hh("q"), (" a Assistant: b", " a Assistant: c")),
    ],
)
def test_hh_dialogues_that_part_early(tmp_path, chosen, rejected, prompt, replies):
    read = read_pairs(written(tmp_path / "p", [{"chosen": chosen, "rejected": rejected}]))
    (pair,) = read.pairs
    assert pair.prompt == prompt + ASSISTANT
    assert (pair.chosen, pair.rejected) == replies
    assert read.shortened == int(pair.prompt + pair.chosen != chosen or pair.prompt + pair.rejected != rejected)


def test_what_is_dropped_is_counted_and_ids_are_rows(tmp_path):
    good = {"chosen": hh("q", "yes"), "rejected": hh("q", "no")}
    rows = [
        good,
        {"chosen": hh("q", "same"), "rejected": hh("q", "same")},
        {"chosen": hh("q", " "), "rejected": hh("q", "x")},
        {"chosen": "", "rejected": hh("q", "x")},
        {"chosen": hh("one", "a"), "rejected": hh("two", "a")},
        {"chosen": hh("q", "a", "b"), "rejected": hh("q", "a", "c", "d")},  # part at a question: equal replies
        good,
    ]
    path = tmp_path / "p.jsonl.gz"
    path.write_bytes(gzip.compress("\n \n".join(json.dumps(row) for row in rows).encode()))
    read = read_pairs(path)
    assert [pair.id for pair in read.pairs] == [0, 6]
    assert read.dropped == {"empty": 2, "identical": 2, "no_prompt": 1}
    assert [pair.id for pair in read_pairs(path, offset=4).pairs] == [6]
    assert [pair.id for pair in read_pairs(path, limit=3).pairs] == [0]
    text = message(lambda: read_pairs(path, limit=5, offset=1))
    assert "offset=1, limit=5; 2 empty, 2 identical, 1 no_prompt" in text


# jsonl


@pytest.mark.parametrize(
    ("row", "prompt", "replies", "turns"),
    [
        ({"prompt": "Q", "chosen": "a", "rejected": "b"}, "Q", ("a", "b"), ((USER, "Q"),)),
        # A prompt that is a transcript gives its turns.
        (
            {"prompt": hh("x", "y", "z") + ASSISTANT, "chosen": " a", "rejected": " b"},
            hh("x", "y", "z") + ASSISTANT,
            (" a", " b"),
            ((USER, "x"), (REPLY, "y"), (USER, "z")),
        ),
        # No prompt: what the two share, in whole words.
        ({"chosen": "Q: x? A: cat", "rejected": "Q: x? A: car"}, "Q: x? A:", (" cat", " car"), ((USER, "Q: x? A:"),)),
        ({"chosen": "Q yes", "rejected": "Q yes sir"}, "Q", (" yes", " yes sir"), ((USER, "Q"),)),
        ({"chosen": hh("q", "a"), "rejected": hh("q", "b"), "prompt": None}, hh("q") + ASSISTANT, (" a", " b"), None),
        # Messages.
        (
            {"prompt": [said(USER, "Q")], "chosen": [said(REPLY, "a")], "rejected": [said(REPLY, "b")]},
            hh("Q") + ASSISTANT,
            (" a", " b"),
            ((USER, "Q"),),
        ),
        ({"prompt": [said(USER, "Q")], "chosen": "a", "rejected": "\nb"}, hh("Q") + ASSISTANT, (" a", "\nb"), None),
        (
            {
                "chosen": [said("system", "S"), said(USER, "Q"), said(REPLY, "a")],
                "rejected": [said("system", "S"), said(USER, "Q"), said(REPLY, "b")],
            },
            "S" + hh("Q") + ASSISTANT,
            (" a", " b"),
            (("system", "S"), (USER, "Q")),
        ),
        # As UltraFeedback has it: the prompt is also the first message of both.
        (
            {
                "prompt": "Q",
                "chosen": [said(USER, "Q"), said(REPLY, "a")],
                "rejected": [said(USER, "Q"), said(REPLY, "b")],
            },
            hh("Q") + ASSISTANT,
            (" a", " b"),
            ((USER, "Q"),),
        ),
        (
            {"prompt": "Q", "chosen": [said(REPLY, "a")], "rejected": [said(REPLY, "b")]},
            hh("Q") + ASSISTANT,
            (" a", " b"),
            ((USER, "Q"),),
        ),
        (
            {
                "prompt": [said(USER, "Q")],
                "chosen": [said(USER, "Q"), said(REPLY, "a")],
                "rejected": [said(USER, "Q"), said(REPLY, "b")],
            },
            hh("Q") + ASSISTANT,
            (" a", " b"),
            ((USER, "Q"),),
        ),
        (
            {
                "chosen": [said(USER, "Q"), said(REPLY, "a"), said(USER, "R"), said(REPLY, "c")],
                "rejected": [said(USER, "Q"), said(REPLY, "b"), said(USER, "S"), said(REPLY, "c")],
            },
            hh("Q") + ASSISTANT,
            (" a", " b"),
            ((USER, "Q"),),
        ),
    ],
)
def test_jsonl_forms(tmp_path, row, prompt, replies, turns):
    pair = read_one(tmp_path / "p", row, "jsonl")
    assert (pair.prompt, pair.chosen, pair.rejected) == (prompt, *replies)
    assert turns is None or pair.turns == turns


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "empty"),
        ({"prompt": "Q", "chosen": "a", "rejected": " \n"}, "empty"),
        ({"prompt": "Q", "chosen": [], "rejected": [said(REPLY, "b")]}, "empty"),
        ({"prompt": "Q", "chosen": "a", "rejected": "a"}, "identical"),
        ({"chosen": "Yes", "rejected": "No"}, "no_prompt"),
        (
            {"chosen": [said(USER, "x"), said(REPLY, "a")], "rejected": [said(USER, "y"), said(REPLY, "b")]},
            "no_prompt",
        ),
        (
            {"chosen": [said(USER, "x"), said(REPLY, "a")], "rejected": [said(USER, "x"), said(REPLY, "a")]},
            "identical",
        ),
    ],
)
def test_jsonl_rows_that_are_dropped(tmp_path, row, reason):
    assert f"; 1 {reason})" in message(lambda: read_pairs(written(tmp_path / "p", [row]), "jsonl"))


@pytest.mark.parametrize(
    ("format", "line", "words"),
    [
        ("hh", "hello", "is not JSON"),
        ("hh", "[1]", "must hold a JSON object"),
        ("hh", '{"chosen": "x"}', "no field 'rejected'; it has 'chosen'"),
        ("hh", '{"rejected": "x"}', "no field 'chosen'"),
        ("hh", '{"chosen": 3, "rejected": "x"}', "'chosen' must be a string, not 3"),
        ("hh", json.dumps({"chosen": hh("q", "a"), "rejected": "x"}), "'rejected' has no '\\n\\nAssistant:'"),
        ("jsonl", '{"prompt": "q", "chosen": "x"}', "no field 'rejected'"),
        ("jsonl", '{"prompt": 1, "chosen": "x", "rejected": "y"}', "'prompt' must be a string, not 1"),
        ("jsonl", '{"prompt": "q", "chosen": null, "rejected": "y"}', "'chosen' must be a string, not null"),
        ("jsonl", '{"prompt": "q", "chosen": "x", "rejected": [1]}', "'rejected' holds messages"),
        ("jsonl", '{"prompt": "q", "chosen": [1], "rejected": [2]}', "a message of 'chosen' must be"),
        ("jsonl", json.dumps({"chosen": [said("nobody", "x")], "rejected": [said(REPLY, "x")]}), '"nobody"'),
        ("jsonl", json.dumps({"chosen": [said(USER, "x")], "rejected": [said(REPLY, "x")]}), "no message of the"),
        ("jsonl", json.dumps({"chosen": [said(REPLY, "x")], "rejected": [said(REPLY, "y")]}), "no field 'prompt'"),
        (
            "jsonl",
            json.dumps({"prompt": [said(REPLY, "q")], "chosen": "x", "rejected": "y"}),
            "'prompt', or what 'chosen' and 'rejected' share, must end with the user's message, not the assistant's",
        ),
        ("jsonl", '{"prompt": [], "chosen": "x", "rejected": "y"}', "must end with the user's message, not nothing"),
    ],
)
def test_a_bad_row_is_named_by_line_and_field(tmp_path, format, line, words):
    path = tmp_path / "p.jsonl"
    good = {"prompt": "q", "chosen": hh("q", "a"), "rejected": hh("q", "b")}
    path.write_text(f"{json.dumps(good)}\n\n{line}\n", encoding="utf-8")
    text = message(lambda: read_pairs(path, format))
    assert f"{str(path)!r}, line 3" in text
    assert words in text


def test_bad_settings_and_files(tmp_path):
    path = written(tmp_path / "p", [{"chosen": hh("q", "a"), "rejected": hh("q", "b")}])
    assert "choose one of hh, jsonl" in message(lambda: read_pairs(path, "csv"))
    assert "preferences.offset=-1" in message(lambda: read_pairs(path, offset=-1))
    assert "preferences.limit=0" in message(lambda: read_pairs(path, limit=0))
    assert "preferences.path: there is no file" in message(lambda: read_pairs(tmp_path / "none"))
    (tmp_path / "empty").touch()
    assert "there are none" in message(lambda: read_pairs(tmp_path / "empty"))


# Tokens


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
    assert split("abcde", None, 2) == (("a", "b", "c"), ("d", "e"))
    assert split("abcde", 2, 1) == (("a", "b"), ("e",))
    assert split("abc", None, 0) == (("a", "b", "c"), ())
    for train, held_out in ((None, 5), (4, 2), (0, 1), (None, -1)):
        text = message(lambda train=train, held_out=held_out: split("abcde", train, held_out))
        assert f"held_out={held_out}" in text
