"""Layouts of public data sets, row by row on made-up rows: the prompt, the pair, and what is refused or dropped."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from spinal_jax.config import PreferencesConfig, PromptsConfig, build
from spinal_jax.data import PreferencePair, Prompt, read_pairs, read_prompts
from spinal_jax.errors import UserError

A = "\n\nAssistant:"
USER, REPLY, SYSTEM, TOOL = "user", "assistant", "system", "tool"


def said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def human(*turns: str) -> str:
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {turn}" for i, turn in enumerate(turns))


def written(folder: Path, values: list[dict[str, Any]]) -> tuple[Path, Path]:
    """The rows as JSON lines and as parquet, where structs have all their fields and absent ones are null."""
    (folder / "p.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), folder / "p.parquet")
    return folder / "p.jsonl", folder / "p.parquet"


def prompts(folder: Path, format: str, values: list[dict[str, Any]], **options: Any) -> tuple[Prompt, ...]:
    lines, table = (read_prompts(path, format, **options) for path in written(folder, values))
    assert (lines.prompts, lines.sha256) == (table.prompts, table.sha256)
    return lines.prompts


def pairs(folder: Path, format: str, values: list[dict[str, Any]], **options: Any) -> tuple[PreferencePair, ...]:
    lines, table = (read_pairs(path, format, **options) for path in written(folder, values))
    assert (lines.pairs, lines.sha256, lines.dropped) == (table.pairs, table.sha256, table.dropped)
    return lines.pairs


def message(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    assert not text.endswith(".")
    return text


ULTRAFEEDBACK = {
    "prompt": "Name a bird.",
    "prompt_id": "f0",
    "chosen": [said(USER, "Name a bird."), said(REPLY, "A wren.")],
    "rejected": [said(USER, "Name a bird."), said(REPLY, "A cat.")],
    "messages": [said(USER, "Name a bird."), said(REPLY, "A wren.")],
    "score_chosen": 8.5,
    "score_rejected": 3.0,
}
TULU3 = {
    "id": "t-0",
    "prompt": "And a fish?",
    "chosen": [said(USER, "A bird?"), said(REPLY, "Wren."), said(USER, "And a fish?"), said(REPLY, "Carp.")],
    "rejected": [said(USER, "A bird?"), said(REPLY, "Wren."), said(USER, "And a fish?"), said(REPLY, "Dog.")],
    "chosen_model": "x",
    "rejected_model": "y",
}
DOLCI = {
    "chosen": [said(SYSTEM, "Be brief."), said(USER, "A bird?"), said(REPLY, "Wren.")],
    "rejected": [said(SYSTEM, "Be brief."), said(USER, "A bird?"), said(REPLY, "Well, let me think.")],
    "chosen_model": "x",
    "rejected_model": "y",
}
HELPSTEER3 = {
    "domain": "general",
    "language": "english",
    "context": [said(USER, "A bird?"), said(REPLY, "Wren."), said(USER, "Another?")],
    "response1": "Robin.",
    "response2": "Rock.",
    "overall_preference": -2,
}
SHP = {
    "post_id": "s0",
    "history": "Why do birds sing?",
    "human_ref_A": "To be heard.",
    "human_ref_B": "No idea.",
    "labels": 1,
    "score_ratio": 2.0,
}
NECTAR = {
    "prompt": "\n\nHuman: A bird?\n\nAssistant: ",
    "answers": [
        {"answer": "Middling.", "model": "m", "rank": 2.0},
        {"answer": "Wren.", "model": "a", "rank": 1.0},
        {"answer": "Brick.", "model": "z", "rank": 7.0},
    ],
    "turns": 1,
}
ORCA = {"system": "Be brief.", "question": "A bird?", "chosen": "Wren.", "rejected": "Brick."}
KTO = {"prompt": "A bird?", "completion": "Wren.", "label": True}

ASKED = {
    "ultrafeedback": (ULTRAFEEDBACK, human("Name a bird.") + A, ((USER, "Name a bird."),), (" A wren.", " A cat.")),
    "tulu3": (
        TULU3,
        human("A bird?", "Wren.", "And a fish?") + A,
        ((USER, "A bird?"), (REPLY, "Wren."), (USER, "And a fish?")),
        (" Carp.", " Dog."),
    ),
    "dolci": (
        DOLCI,
        "Be brief." + human("A bird?") + A,
        ((SYSTEM, "Be brief."), (USER, "A bird?")),
        (" Wren.", " Well, let me think."),
    ),
    "helpsteer3": (
        HELPSTEER3,
        human("A bird?", "Wren.", "Another?") + A,
        ((USER, "A bird?"), (REPLY, "Wren."), (USER, "Another?")),
        (" Robin.", " Rock."),
    ),
    "shp": (SHP, human("Why do birds sing?") + A, ((USER, "Why do birds sing?"),), (" To be heard.", " No idea.")),
    "nectar": (NECTAR, human("A bird?") + A, ((USER, "A bird?"),), (" Wren.", " Brick.")),
    "orca": (
        ORCA,
        "Be brief." + human("A bird?") + A,
        ((SYSTEM, "Be brief."), (USER, "A bird?")),
        (" Wren.", " Brick."),
    ),
}


@pytest.mark.parametrize("format", ASKED)
def test_a_row_of_each_preset(tmp_path: Path, format: str) -> None:
    row, text, turns, replies = ASKED[format]
    (pair,) = pairs(tmp_path, format, [row])
    assert (pair.prompt, pair.turns, (pair.chosen, pair.rejected)) == (text, turns, replies)
    (prompt,) = prompts(tmp_path, format, [row])
    assert prompt.turns == turns
    # A lone question is tokenised as it stands; of a pair, as a transcript.
    assert prompt.text == (text if len(turns) > 1 or format == "nectar" else turns[0][1])


@pytest.mark.parametrize("format", [*ASKED, "kto"])
def test_presets_are_settings(format: str) -> None:
    assert build(PromptsConfig, {"path": "p", "format": format}).format == format
    assert build(PreferencesConfig, {"dataset": "owner/name", "format": format}).format == format


def test_the_preferred_one_may_be_the_second(tmp_path: Path) -> None:
    (pair,) = pairs(tmp_path, "helpsteer3", [{**HELPSTEER3, "overall_preference": 1}])
    assert (pair.chosen, pair.rejected) == (" Rock.", " Robin.")
    (pair,) = pairs(tmp_path, "shp", [{**SHP, "labels": 0}])
    assert (pair.chosen, pair.rejected) == (" No idea.", " To be heard.")


SIBLINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "answers in columns": (
        "nectar",
        {**NECTAR, "answers": {key: [each[key] for each in NECTAR["answers"]] for key in ("answer", "model", "rank")}},
    ),
    "input": ("orca", {**{k: v for k, v in ORCA.items() if k != "question"}, "input": "A bird?", "status": "swapped"}),
    "messages": (
        "orca",
        {
            "prompt": "A bird?",
            "chosen": [said(SYSTEM, "Be brief."), said(USER, "A bird?"), said(REPLY, "Wren.")],
            "rejected": [said(SYSTEM, "Be brief."), said(USER, "A bird?"), said(REPLY, "Brick.")],
        },
    ),
    "replies alone": (
        "dolci",
        {"prompt": DOLCI["chosen"][:2], "chosen": DOLCI["chosen"][2:], "rejected": DOLCI["rejected"][2:]},
    ),
}


@pytest.mark.parametrize("name", SIBLINGS)
def test_siblings_of_a_preset(tmp_path: Path, name: str) -> None:
    """Rows that say the same in other columns, as other editions of a data set do."""
    format, row = SIBLINGS[name]
    _, text, turns, replies = ASKED[format]
    (pair,) = pairs(tmp_path, format, [row])
    assert (pair.prompt, pair.turns, (pair.chosen, pair.rejected)) == (text, turns, replies)
    assert prompts(tmp_path, format, [row])[0].turns == turns


def test_messages_in_a_json_text_are_refused(tmp_path: Path) -> None:
    for field in ("prompt", "chosen", "rejected"):
        row = {"prompt": "A bird?", "chosen": "Wren.", "rejected": "Brick."}
        path, _ = written(tmp_path, [row | {field: json.dumps([said(USER, "A bird?")])}])
        assert f"{field!r} holds messages as a JSON text" in message(partial(read_pairs, path, "jsonl"))
    path, _ = written(tmp_path, [{"prompt": json.dumps([said(USER, "A bird?")])}])
    assert "line 1: 'prompt' holds messages as a JSON text" in message(lambda: read_prompts(path))
    said_so = {
        "prompt": 'Repeat [{"role": "x", "content": 1}]',
        "chosen": '["content"]',
        "rejected": '[{"content": 2}]',
    }
    (pair,) = pairs(tmp_path, "jsonl", [said_so])
    assert pair.chosen == '["content"]'


def test_ties_are_dropped_and_counted(tmp_path: Path) -> None:
    tied = {**NECTAR, "answers": [{**answer, "rank": 1.0} for answer in NECTAR["answers"]]}
    for format, row, tie in (
        ("helpsteer3", HELPSTEER3, {**HELPSTEER3, "overall_preference": 0}),
        ("nectar", NECTAR, tied),
        ("orca", ORCA, {**ORCA, "status": "tie"}),
    ):
        path, _ = written(tmp_path, [row, tie])
        read = read_pairs(path, format)
        assert (len(read.pairs), read.dropped["tie"]) == (1, 1)


def test_kto_has_prompts_and_no_pairs(tmp_path: Path) -> None:
    assert prompts(tmp_path, "kto", [KTO])[0].turns == ((USER, "A bird?"),)
    chat = {"prompt": [said(USER, "A bird?")], "completion": [said(REPLY, "Wren.")], "label": False}
    assert prompts(tmp_path, "kto", [chat])[0].turns == ((USER, "A bird?"),)
    assert "one completion with a label in each row" in message(lambda: pairs(tmp_path, "kto", [KTO]))


@pytest.mark.parametrize(
    ("format", "row", "words"),
    [
        ("helpsteer3", {**HELPSTEER3, "overall_preference": "much"}, "'overall_preference' must be a number"),
        ("helpsteer3", {"context": [said(USER, "x")], "response1": "a"}, "no field 'response2'"),
        ("shp", {**SHP, "labels": 2}, "'labels' must be 1 (A is preferred) or 0"),
        ("nectar", {**NECTAR, "prompt": "A bird?"}, "does not end with"),
        ("nectar", {"prompt": NECTAR["prompt"], "answers": "x"}, "'answers' must be a list"),
        ("orca", {"chosen": "a", "rejected": "b"}, "no field 'question'"),
        ("tulu3", {"chosen": [said(USER, "x")], "rejected": [said(USER, "x")]}, "no message of the assistant"),
    ],
)
def test_a_row_that_is_of_another_layout_is_named(tmp_path: Path, format: str, row: dict[str, Any], words: str) -> None:
    path, _ = written(tmp_path, [row])
    text = message(lambda: read_pairs(path, format))
    assert "line 1" in text
    assert words in text


# A prompt beside messages


@pytest.mark.parametrize(
    ("prompt", "asked"),
    [
        ("A bird?", ["A bird?"]),
        (" A  bird?\n", ["A bird?"]),
        ("And a fish?", ["A bird?", "Wren.", "And a fish?"]),
        ("A bird?", ["A bird?", "Wren.", "And a fish?"]),
        ("A bird? And a fish?", ["A bird?", "Wren.", "And a fish?"]),
        ("", ["A bird?"]),
    ],
)
def test_a_prompt_that_messages_repeat(tmp_path: Path, prompt: str, asked: list[str]) -> None:
    shared = [said((USER, REPLY)[i % 2], text) for i, text in enumerate(asked)]
    row = {"prompt": prompt, "chosen": [*shared, said(REPLY, "x")], "rejected": [*shared, said(REPLY, "y")]}
    (pair,) = pairs(tmp_path, "jsonl", [row])
    assert [text for _, text in pair.turns] == asked


@pytest.mark.parametrize("prompt", ["A fish?", [said(USER, "A fish?")], [said(USER, "A bird?"), said(USER, "Or two?")]])
@pytest.mark.parametrize("format", ["jsonl", "ultrafeedback", "tulu3", "dolci"])
def test_a_prompt_that_contradicts_the_messages_is_an_error(tmp_path: Path, prompt: Any, format: str) -> None:
    row = {**ULTRAFEEDBACK, "prompt": prompt}
    text = message(lambda: pairs(tmp_path, format, [row]))
    assert "line 1: 'prompt' says " in text
    assert "'Name a bird.'" in text


def test_a_system_prompt_before_messages(tmp_path: Path) -> None:
    row = {**ULTRAFEEDBACK, "prompt": [said(SYSTEM, "Be brief.")]}
    (pair,) = pairs(tmp_path, "jsonl", [row])
    assert pair.turns == ((SYSTEM, "Be brief."), (USER, "Name a bird."))


# Field maps


def test_columns_by_other_names(tmp_path: Path) -> None:
    row = {"ask": "A bird?", "good": "Wren.", "bad": {"text": "Brick."}, "sys": "Be brief.", "chosen": 3}
    fields = {"prompt": "ask", "chosen": "good", "rejected": "bad.text"}
    (pair,) = pairs(tmp_path, "jsonl", [row], fields=fields)
    assert (pair.prompt, pair.chosen, pair.rejected) == ("A bird?", "Wren.", "Brick.")
    (pair,) = pairs(tmp_path, "jsonl", [row], fields={**fields, "system": "sys"})
    assert pair.turns == ((SYSTEM, "Be brief."), (USER, "A bird?"))
    assert pair.prompt == "Be brief." + human("A bird?") + A
    wrong = {**fields, "rejected": "bad.texts"}
    assert "line 1 has no field 'bad.texts'" in message(lambda: pairs(tmp_path, "jsonl", [row], fields=wrong))
    config = build(PreferencesConfig, {"path": "p", "format": "jsonl", "fields": {"chosen": "good"}})
    assert config.fields.given == {"chosen": "good"}


# Messages


def test_forms_of_messages(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "A "}, {"type": "text", "text": "bird?"}]
    rows = [
        {"prompt": [said(SYSTEM, "S"), said(USER, "A bird?")]},
        {"prompt": [said("developer", "S"), said("human", "A bird?")]},
        {"prompt": [{"from": "system", "value": "S"}, {"from": "human", "value": "A bird?"}]},
        {"prompt": [said(SYSTEM, [{"type": "text", "text": "S"}]), said(USER, parts)]},
        {"prompt": {"role": [SYSTEM, USER], "content": ["S", "A bird?"]}},
        # What the assistant says at the end is what a prompt asks for.
        {"prompt": [said(SYSTEM, "S"), said(USER, "A bird?"), said(REPLY, "Wren.")]},
        {"prompt": [said(SYSTEM, "S"), said(USER, "A bird?"), said(REPLY, "W"), said(REPLY, "ren.")]},
    ]
    for row in rows:
        (prompt,) = prompts(tmp_path, "jsonl", [row])
        assert prompt.turns == ((SYSTEM, "S"), (USER, "A bird?"))
        assert prompt.text == "S" + human("A bird?") + A
    assert prompts(tmp_path, "jsonl", [{"messages": rows[-1]["prompt"]}], field="messages")[0].turns == prompt.turns
    transcript = {"prompt": human("A bird?", "Wren.", "Another?") + A}
    assert prompts(tmp_path, "jsonl", [transcript])[0].turns == (
        (USER, "A bird?"),
        (REPLY, "Wren."),
        (USER, "Another?"),
    )


def test_tools(tmp_path: Path) -> None:
    """Calls are text of the turn that makes them; the tool's turn is one to answer."""
    call = {"type": "function", "function": {"name": "look", "arguments": "{}"}}
    messages = [
        said(USER, "A bird?"),
        {**said(REPLY, None), "tool_calls": [call]},
        said("environment", "wren"),
        {**said(REPLY, "It is"), "function_calls": "say('wren')"},
    ]
    path, _ = written(tmp_path, [{"prompt": messages}])
    (prompt,) = read_prompts(path).prompts
    assert prompt.turns == ((USER, "A bird?"), (REPLY, json.dumps([call])), (TOOL, "wren"))
    assert prompt.text == human("A bird?", json.dumps([call])) + "\n\nTool: wren" + A
    path, _ = written(tmp_path, [{"chosen": messages, "rejected": [*messages[:3], said(REPLY, "No.")]}])
    (pair,) = read_pairs(path, "jsonl").pairs
    assert (pair.turns, pair.chosen) == (prompt.turns, " It is\nsay('wren')")


def test_calls_of_any_content(tmp_path: Path) -> None:
    messages = [said(USER, "A bird?"), {**said(REPLY, None), "tool_calls": [{"\ud800": "\udc00"}]}, said("tool", "")]
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": messages}))
    assert read_prompts(path).prompts[0].turns[1] == (REPLY, '[{"\ufffd": "\ufffd"}]')
    for depth in range(900, 1000, 5):
        calls = "[" * depth + "1" + "]" * depth
        path.write_text(f'{{"prompt": [{{"role": "user", "content": null, "tool_calls": {calls}}}]}}')
        with contextlib.suppress(UserError):  # whether it is too deep depends on the stack of the caller
            read_prompts(path)
    path.write_text(json.dumps({**HELPSTEER3, "overall_preference": 10**400}))
    assert "'overall_preference' must be a number" in message(lambda: read_pairs(path, "helpsteer3"))


def test_a_row_of_many_columns_is_named_by_a_few(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({f"column {number}": "" for number in range(10_000)}))
    assert len(message(lambda: read_pairs(path, "jsonl", fields={"prompt": "none"}))) < 600


def test_images_are_refused_by_name(tmp_path: Path) -> None:
    parts = [{"type": "image", "url": "x.png"}, {"type": "text", "text": "What is it?"}]
    path, _ = written(tmp_path, [{"prompt": [said(USER, parts)]}])
    assert 'line 1: a message has a part of type "image"; only text' in message(lambda: read_prompts(path))


# Settings


@pytest.mark.parametrize(
    ("part", "values", "words"),
    [
        (PromptsConfig, {"path": "p", "dataset": "a/b"}, "prompts.path is 'p'; it takes null beside prompts.dataset"),
        (PromptsConfig, {"dataset": "a/b", "format": "text"}, "prompts.format is 'text'"),
        (PromptsConfig, {"dataset": "https://host/a"}, "prompts.dataset is 'https://host/a'"),
        (PromptsConfig, {"name": "x"}, "prompts.name is 'x'; it takes null without prompts.dataset"),
        (PromptsConfig, {"split": "train"}, "prompts.split is 'train'"),
        (PreferencesConfig, {"path": "p", "revision": "main"}, "preferences.revision is 'main'"),
        (PreferencesConfig, {}, "preferences.path is missing"),
    ],
)
def test_sources_that_do_not_fit(part: type, values: dict[str, Any], words: str) -> None:
    assert words in message(lambda: build(part, values))
