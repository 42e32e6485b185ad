"""Preference pairs: what is read, what is dropped, and what is refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spinal_jax.data import (
    PreferencePair,
    read_pairs,
)

from .speech import READ_WRITES, REPLY, SAID, USER, message, written

ASSISTANT = "\n\nAssistant:"


def hh(*turns: str) -> str:
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {turn}" for i, turn in enumerate(turns))


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def read_one(path: Path, row: Any, format: str) -> PreferencePair:
    (pair,) = read_pairs(written(path, [row]), format).pairs
    return pair


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
