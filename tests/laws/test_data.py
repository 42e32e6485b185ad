"""Prompts: what is read from each format, what is refused and how, and which tokens a model sees."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import random
import statistics
import string
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from spinal_jax.data import Prompt, read_prompts, token_ids
from spinal_jax.errors import UserError
from spinal_jax.stats.groups import group_of

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' and loop.first %}{{ raise_exception('the user speaks first') }}"
    "{% endif %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<s>", "<|user|>", "<|assistant|>", "<|end|>"]
READ_WRITES = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
UNICODE = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One id per byte after four special tokens; puts <s> first, and believes its model takes 16 tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(SPECIAL + alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", chat_template=TEMPLATE, model_max_length=16
    )


def plain(text: str) -> Prompt:
    return Prompt(text, (("user", text),))


def jsonl(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def texts(path: str | None, *args, **kwargs) -> list[str]:
    return [prompt.text for prompt in read_prompts(path, *args, **kwargs).prompts]


def hh_cut(chosen: str) -> str:
    return chosen[: chosen.rfind("\n\nAssistant:") + len("\n\nAssistant:")]


def hh_row(*turns: str) -> str:
    names = ("Human", "Assistant")
    return "".join(f"\n\n{names[i % 2]}: {turn}" for i, turn in enumerate(turns))


# What each format reads


def test_text_is_one_prompt_a_line_as_it_stands(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes("  two spaces \r\n{not json}\n\u2028 one line\x0b\nlast".encode())
    read = read_prompts(str(path), "text")
    assert read.prompts == tuple(map(plain, ["  two spaces ", "{not json}", "\u2028 one line\x0b", "last"]))
    assert (read.source, read.format, read.skipped_empty) == (str(path), "text", 0)


def test_jsonl_reads_the_named_field(tmp_path):
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": "a", "ask": "b"}, {"prompt": "c", "ask": " d\n\n"}])
    assert read_prompts(path).prompts == (plain("a"), plain("c"))
    assert read_prompts(path, field="ask").prompts == (plain("b"), plain(" d\n\n"))


def test_jsonl_reads_chat_messages(tmp_path):
    one = [{"role": "user", "content": "hi "}]
    many = [*one, {"role": "assistant", "content": "yes?"}, {"role": "user", "content": "why", "name": "x"}]
    first, second = read_prompts(jsonl(tmp_path / "p", [{"prompt": one}, {"prompt": many}])).prompts
    assert first == plain("hi ")
    assert second.text == "\n\nHuman: hi \n\nAssistant: yes?\n\nHuman: why\n\nAssistant:"
    assert second.turns == (("user", "hi "), ("assistant", "yes?"), ("user", "why"))


@given(st.lists(st.tuples(UNICODE, UNICODE), max_size=3), UNICODE)
@READ_WRITES
def test_hh_cuts_at_the_last_reply(tmp_path, exchanges, reply):
    asked = ["start", *(turn for exchange in exchanges for turn in exchange)]
    chosen = hh_row(*asked, reply)
    (prompt,) = read_prompts(jsonl(tmp_path / "hh.jsonl", [{"chosen": chosen, "rejected": ""}]), "hh").prompts
    assert prompt.text == hh_cut(chosen) == hh_row(*asked) + "\n\nAssistant:"
    assert prompt.turns == tuple((("user", "assistant")[i % 2], turn.strip()) for i, turn in enumerate(asked))


@pytest.mark.parametrize(
    ("chosen", "turns"),
    [
        (hh_row("a", "b"), (("user", "a"),)),
        (hh_row("a", "b", "c", ""), (("user", "a"), ("assistant", "b"), ("user", "c"))),
        ("\n\nAssistant: b\n\nHuman: c\n\nAssistant: d", (("assistant", "b"), ("user", "c"))),
        ("no marker\n\nAssistant: d", (("user", "no marker"),)),
        ("\n\nHuman: a\nHuman: b\n\nAssistant: c\n\nAssistant:", (("user", "a\nHuman: b"), ("assistant", "c"))),
        ("\n\nHuman:\n\nAssistant: b\n\nHuman: c\n\nAssistant:", (("user", ""), ("assistant", "b"), ("user", "c"))),
    ],
)
def test_hh_turns(tmp_path, chosen, turns):
    (prompt,) = read_prompts(jsonl(tmp_path / "hh.jsonl", [{"chosen": chosen}]), "hh").prompts
    assert prompt == Prompt(hh_cut(chosen), turns)


@given(offset=st.integers(0, 12), limit=st.none() | st.integers(1, 12), blank=st.sets(st.integers(0, 9)))
@READ_WRITES
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_offset_and_limit_count_rows(tmp_path, suffix, offset, limit, blank):
    """The oracle's rule, rows[offset : offset + limit], wherever blank lines stand."""
    rows = [hh_row(f"question {i}", "answer") for i in range(10)]
    lines = [("\n" if i in blank else "") + json.dumps({"chosen": row}) + "\n" for i, row in enumerate(rows)]
    path = tmp_path / f"hh.jsonl{suffix}"
    data = "".join(lines).encode()
    path.write_bytes(gzip.compress(data) if suffix else data)
    stop = 10 if limit is None else offset + limit
    expected = [hh_cut(row) for row in rows][offset:stop]
    if not expected:
        with pytest.raises(UserError, match=f"offset={offset}, limit="):
            read_prompts(str(path), "hh", limit=limit, offset=offset)
        return
    read = read_prompts(str(path), "hh", limit=limit, offset=offset)
    assert [prompt.text for prompt in read.prompts] == expected
    assert read.skipped_empty == sum(offset <= i < stop for i in blank)


@pytest.mark.parametrize("format", ["hh", "jsonl", "text"])
def test_gzip_reads_the_same(tmp_path, format):
    lines = [json.dumps({"chosen": hh_row(f"q{i} 😀", "a"), "prompt": f"p{i} é"}) for i in range(20)]
    data = "\n".join(lines).encode()
    (tmp_path / "p").write_bytes(data)
    (tmp_path / "p.gz").write_bytes(gzip.compress(data))
    bare, zipped = read_prompts(str(tmp_path / "p"), format), read_prompts(str(tmp_path / "p.gz"), format)
    assert len(bare.prompts) == 20
    assert (bare.prompts, bare.sha256) == (zipped.prompts, zipped.sha256)


@given(st.lists(UNICODE.filter(str.strip), min_size=1, max_size=5))
@READ_WRITES
def test_any_text_survives_a_round_trip(tmp_path, values):
    read = read_prompts(jsonl(tmp_path / "p.jsonl", [{"prompt": value} for value in values]))
    assert [prompt.text for prompt in read.prompts] == values


def test_the_digest_is_over_texts_in_order(tmp_path):
    def digest(*values: str) -> str:
        return read_prompts(jsonl(tmp_path / "p.jsonl", [{"prompt": value} for value in values])).sha256

    frames = b"".join(len(t.encode()).to_bytes(8, "big") + t.encode() for t in ["a", "é"])
    assert digest("a", "é") == hashlib.sha256(frames).hexdigest()
    assert len({digest("a", "é"), digest("é", "a"), digest("aé"), digest("a", "é", "é"), digest("a\n", "é")}) == 5
    (tmp_path / "p.txt").write_text("a\n\né\n", encoding="utf-8")
    assert read_prompts(str(tmp_path / "p.txt"), "text").sha256 == digest("a", "é")


# Odd but legal


def test_empties_are_skipped_and_counted(tmp_path):
    rows = [{"prompt": "a"}, {"prompt": ""}, {"prompt": " \t\n\u3000"}, {"prompt": []}, {"prompt": "b"}]
    rows.append({"prompt": [{"role": "user", "content": " "}]})
    read = read_prompts(jsonl(tmp_path / "p.jsonl", rows))
    assert ([p.text for p in read.prompts], read.skipped_empty) == (["a", "b"], 4)

    (tmp_path / "p.txt").write_text("\n  \na\n\n\t\nb\n\n", encoding="utf-8")
    read = read_prompts(str(tmp_path / "p.txt"), "text")
    assert ([p.text for p in read.prompts], read.skipped_empty) == (["a", "b"], 5)

    empties = ["", " \n", "\n\nHuman:  \n\nAssistant: hello", "\n\nAssistant: hello", hh_row("a", "b")]
    read = read_prompts(jsonl(tmp_path / "hh.jsonl", [{"chosen": chosen} for chosen in empties]), "hh")
    assert ([p.text for p in read.prompts], read.skipped_empty) == ([hh_cut(empties[-1])], 4)


def test_an_empty_row_takes_its_place_in_the_limit(tmp_path):
    """So that two disjoint windows of a file stay disjoint and cover it."""
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": text} for text in ["a", "", "b", "c"]])
    first, second = read_prompts(path, limit=2), read_prompts(path, limit=2, offset=2)
    assert [p.text for p in (*first.prompts, *second.prompts)] == ["a", "b", "c"]
    assert (first.skipped_empty, second.skipped_empty) == (1, 0)


def test_invalid_utf8_is_replaced(tmp_path, tokenizer):
    path = tmp_path / "p"
    path.write_bytes(b"caf\xe9 \xff ok\n\xf0\x9f\x98\n")
    read = read_prompts(str(path), "text")
    assert read.undecodable == 3  # of a character that ends early, one is counted
    for prompt in read.prompts:
        assert "\ufffd" in prompt.text
        assert token_ids(prompt, tokenizer, 99, False).size
    path.write_bytes(b'{"prompt": "caf\xe9"}\n')
    assert texts(str(path)) == ["caf\ufffd"]


def test_lone_surrogates_are_replaced_and_pairs_kept(tmp_path, tokenizer):
    path = tmp_path / "p"
    path.write_text(r'{"prompt": "x\ud800y \ud83d\ude00 \udfff"}', encoding="utf-8")
    (prompt,) = read_prompts(str(path)).prompts
    assert prompt == plain("x\ufffdy 😀 \ufffd")
    path.write_text(r'{"prompt": [{"role": "user", "content": "\udc00"}]}', encoding="utf-8")
    assert read_prompts(str(path)).prompts[0] == plain("\ufffd")
    path.write_text(r'{"chosen": "\n\nHuman: \udc00\n\nAssistant: a"}', encoding="utf-8")
    assert read_prompts(str(path), "hh").prompts[0].turns == (("user", "\ufffd"),)
    for template in (False, True):
        assert tokenizer.decode(token_ids(prompt, tokenizer, 99, template)).count("\ufffd") == 2


def test_a_byte_order_mark_is_passed_over(tmp_path):
    path = tmp_path / "p"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\n')
    assert texts(str(path)) == ["a"]


def test_a_thousand_prompts_of_every_length(tmp_path, tokenizer):
    draw = random.Random(0)
    letters = string.printable + "é漢🍅\u200d\x00\u202e"
    values = ["".join(draw.choices(letters, k=draw.randint(1, 2000))) for _ in range(999)] + ["x" * 100_000]
    kept = [value for value in values if value.strip()]
    read = read_prompts(jsonl(tmp_path / "p.jsonl", [{"prompt": value} for value in values]))
    assert [p.text for p in read.prompts] == kept
    assert read.skipped_empty == len(values) - len(kept)
    for prompt in read.prompts:
        ids = token_ids(prompt, tokenizer, 128, False)
        assert ids.dtype == np.int32
        assert ids.size == min(128, 1 + len(prompt.text.encode()))


def test_reading_stops_at_the_limit(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\nbroken\n', encoding="utf-8")
    assert texts(str(path), limit=2) == ["a", "b"]
    assert texts(str(path), limit=1, offset=1) == ["b"]


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}])
    read = read_prompts("~/p.jsonl")
    assert (read.source, read.prompts) == ("~/p.jsonl", (plain("a"),))


# Mistakes


def message(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    said = str(caught.value)
    assert "\n" not in said
    assert not said.endswith(".")
    return said


@pytest.mark.parametrize("format", ["hh", "jsonl", "text"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_file_that_is_not_there_or_a_folder_or_empty(tmp_path, format, suffix):
    assert "there is no file" in message(lambda: read_prompts(str(tmp_path / f"no{suffix}"), format))
    folder = tmp_path / f"d{suffix}"
    folder.mkdir()
    assert "is a folder" in message(lambda: read_prompts(str(folder), format))
    for data, said in [(b"", "; 0 empty"), (b"\n \n\n", "; 3 empty")]:
        path = tmp_path / f"empty{suffix}"
        path.write_bytes(gzip.compress(data) if suffix else data)
        assert said in message(lambda path=path: read_prompts(str(path), format))


@pytest.mark.parametrize(
    ("format", "line", "said"),
    [
        ("jsonl", "hello there", "'hello there'"),
        ("jsonl", '{"prompt": "a"', "is not JSON"),
        ("jsonl", "[" * 100_000, "is not JSON"),
        ("jsonl", '["a"]', 'must hold a JSON object, not ["a"]'),
        ("jsonl", '{"text": "a", "id": 1}', "no field 'prompt'; it has 'text', 'id'"),
        ("jsonl", "{}", "no field 'prompt'; it has none"),
        ("jsonl", '{"prompt": 12}', "'prompt' must be a string, not 12"),
        ("jsonl", '{"prompt": null}', "'prompt' must be a string, not null"),
        ("jsonl", '{"prompt": ["a"]}', "message of 'prompt'"),
        ("jsonl", '{"prompt": [{"content": "a"}]}', "message of 'prompt'"),
        ("jsonl", '{"prompt": [{"text": "a"}]}', "message of 'prompt'"),
        ("jsonl", '{"prompt": [{"role": "nobody", "content": "a"}]}', 'user, assistant or tool, not "nobody"'),
        ("jsonl", '{"prompt": [{"role": [], "content": "a"}]}', "user, assistant or tool, not []"),
        ("jsonl", '{"prompt": [{"role": "user", "content": [1]}]}', "'content' must be a string or a list of text"),
        ("jsonl", '{"prompt": [{"role": "user", "content": [{"type": "image_url"}]}]}', 'a part of type "image_url"'),
        ("jsonl", '{"prompt": [{"role": "system", "content": "a"}]}', "must have a user's message to answer"),
        ("jsonl", '{"prompt": [{"role": "assistant", "content": "a"}]}', "must have a user's message to answer"),
        ("hh", '{"prompt": "a"}', "no field 'chosen'; it has 'prompt'"),
        ("hh", '{"chosen": "a"}', "has no '\\n\\nAssistant:'"),
        ("hh", '{"chosen": "\\n\\nHuman: a"}', "has no '\\n\\nAssistant:'"),
        ("hh", '{"chosen": ["a"]}', "'chosen' must be a string"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path, format, line, said):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"chosen": hh_row("a", "b"), "prompt": "p"}) + f"\n\n{line}\n", encoding="utf-8")
    text = message(lambda: read_prompts(str(path), format))
    assert f"{str(path)!r}, line 3" in text
    assert said in text
    assert len(text) < 300 + len(str(path))


def test_corrupt_gzip(tmp_path):
    whole = gzip.compress(b'{"prompt": "a"}\n' * 50_000)
    no_such_block = whole[:10] + b"\xff" * 40
    other_sum = whole[:-8] + bytes(8)
    spoiled = {"short.gz": whole[:-20], "block.gz": no_such_block, "sum.gz": other_sum}
    for name, data in spoiled.items():
        (tmp_path / name).write_bytes(data)
        text = message(lambda name=name: read_prompts(str(tmp_path / name)))
        assert name in text
        assert "is not a whole gzip file" in text


def test_bad_settings(tmp_path, tokenizer):
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}])
    text = message(lambda: read_prompts(path, "csv"))
    assert "'csv'" in text
    assert "jsonl, text, hh" in text
    assert "offset=-1" in message(lambda: read_prompts(path, offset=-1))
    for limit in (0, -3):
        assert f"limit={limit}" in message(lambda limit=limit: read_prompts(path, limit=limit))
    assert "(offset=5, limit=null; 0 empty" in message(lambda: read_prompts(path, offset=5))
    assert "Not a directory" in message(lambda: read_prompts(path + "/x"))
    assert "max_length=0" in message(lambda: token_ids(plain("a"), tokenizer, 0, False))


# Tokens


@given(UNICODE, st.integers(1, 60))
@READ_WRITES
def test_tokens_are_the_last_of_the_tokenizer(tokenizer, text, max_length):
    ids = token_ids(plain(text), tokenizer, max_length, False)
    assert ids.dtype == np.int32
    whole = tokenizer(text, verbose=False).input_ids
    assert ids.tolist() == (whole if len(whole) <= max_length else [0, *whole[len(whole) - max_length + 1 :]])


@given(st.lists(UNICODE, min_size=1, max_size=4), st.integers(1, 200))
@READ_WRITES
def test_template_tokens(tokenizer, contents, max_length):
    turns = tuple((("user", "assistant")[i % 2], content) for i, content in enumerate(contents))
    rendered = "".join(f"<|{role}|>{content}<|end|>" for role, content in turns) + "<|assistant|>"
    whole = tokenizer(rendered, add_special_tokens=False, verbose=False).input_ids
    ids = token_ids(Prompt("unused", turns), tokenizer, max_length, True)
    assert ids.dtype == np.int32
    assert ids.tolist() == whole[-max_length:]


@pytest.mark.parametrize("template", [False, True])
def test_a_huge_prompt_is_cut_without_a_warning(tokenizer, template, caplog):
    tokenizer.deprecation_warnings.clear()
    text = "a long story 🐉 " * 7000
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)  # transformers does not propagate to the root logger
    try:
        ids = token_ids(plain(text), tokenizer, 128, template)
        assert not caplog.records
        tokenizer(text)
        assert "longer than" in caplog.text, "the tokenizer of this test should warn when called plainly"
    finally:
        logger.removeHandler(caplog.handler)
    tail = ["<|end|>", "<|assistant|>"] if template else []
    assert ids.size == 128
    assert text.endswith(tokenizer.decode(ids[: 128 - len(tail)])[4:])  # the cut may fall within one of the dragons
    assert tokenizer.convert_ids_to_tokens(ids[128 - len(tail) :].tolist()) == tail


def test_template_failures_are_user_errors(tokenizer):
    text = message(lambda: token_ids(Prompt("", (("assistant", "a"), ("user", "b"))), tokenizer, 9, True))
    assert "assistant, user" in text
    assert "the user speaks first" in text
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    assert "has no chat template" in message(lambda: token_ids(plain("a"), bare, 9, True))
    for broken in ("{% for", "{{ messages[0].content + 1 }}", {"other": "x"}, "{{ 1 / 0 }}"):
        bare.chat_template = broken
        assert "chat template fails" in message(lambda: token_ids(plain("a"), bare, 9, True))


# The pool that ships with the package


def test_the_shipped_pool(tokenizer):
    read = read_prompts(None)
    assert (read.source, read.skipped_empty, len(read.prompts)) == ("spinal_jax/prompts/default.jsonl", 0, 256)
    assert len({prompt.text for prompt in read.prompts}) == 256
    words = [len(prompt.text.split()) for prompt in read.prompts]
    assert min(words) >= 7
    assert max(words) <= 170
    assert 40 <= statistics.median(words) <= 55
    assert 15_000 <= sum(words) <= 18_000
    assert all(
        prompt.text == prompt.text.strip() and prompt.turns == plain(prompt.text).turns for prompt in read.prompts
    )
    assert all(token_ids(prompt, tokenizer, 128, True).size for prompt in read.prompts)
    assert len({group_of(prompt.text, 16) for prompt in read.prompts}) == 16


def test_the_shipped_pool_is_mixed_from_the_start():
    kinds, topics = texts(None, field="kind"), texts(None, field="topic")
    assert (kinds.count("helpful"), kinds.count("harmful-request")) == (160, 96)
    assert all(kinds[i : i + 8].count("helpful") == 5 for i in range(0, 256, 8))
    assert len(set(topics)) >= 60


def test_no_two_shipped_prompts_are_alike():
    """Fewer than a quarter of the three-word runs of the shorter one occur in the other."""
    runs = [{tuple(w[i : i + 3]) for i in range(len(w) - 2)} for w in (t.lower().split() for t in texts(None))]
    assert all(len(a & b) < 0.25 * min(len(a), len(b)) for i, a in enumerate(runs) for b in runs[:i])
