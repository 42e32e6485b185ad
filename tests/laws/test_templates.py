"""Chat templates: the text that transformers renders, under limits that no template can get past."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from spinal_jax.data import (
    PairSet,
    PreferencePair,
    Prompt,
    PromptSet,
    templates,
    token_ids,
    tokenise_pairs,
    tokenise_prompts,
)
from spinal_jax.data.templates import ChatTemplate, TemplateRefusal
from spinal_jax.errors import UserError
from spinal_jax.models.formats.byte_level import byte_tokenizer

CHATML = (
    "{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>\n' }}"
    "{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% set ns = namespace(n=0) %}{% for m in messages %}{% if m.role == 'system' %}{% continue %}"
    "{% endif %}{% set ns.n = ns.n + 1 %}[{{ ns.n }}] {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if tools is none and documents is none %}{{ dict(a=1) | tojson }}{% endif %}"
)
ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}{{ m.content }}{% endfor %}"
)
GENERATION = "{% for m in messages %}{% generation %}{{ m.content }}\n{% endgeneration %}{% endfor %}   \n  x\n"
TURNS = (("system", "be kind"), ("user", " q <b> é😀 "), ("assistant", "a"), ("user", "r"))


def tokenizer_with(template: Any) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def message(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 700
    return text


def prompt_set(*turns: tuple[tuple[str, str], ...]) -> PromptSet:
    prompts = tuple(Prompt("", each, f"row {number}") for number, each in enumerate(turns, 1))
    return PromptSet(prompts, "a test", "jsonl", 0, "")


@pytest.mark.parametrize("template", [CHATML, LLAMA, GENERATION, {"default": CHATML, "tool_use": "x"}])
@pytest.mark.parametrize("opening", [False, True])
def test_templates_render_as_with_transformers(template: Any, opening: bool) -> None:
    tokenizer = tokenizer_with(template)
    messages = [{"role": role, "content": content} for role, content in TURNS]
    theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=opening, tokenize=False)
    assert ChatTemplate(tokenizer, "prompts").render(TURNS, opening=opening) == theirs


def test_the_day_is_fixed_so_that_equal_runs_are_equal() -> None:
    tokenizer = tokenizer_with("{{ strftime_now('%d %b %Y') }}")
    assert ChatTemplate(tokenizer, "prompts").render(TURNS, opening=True) == "26 Jul 2024"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ 'a' * 10**10 }}", "it needs more memory than a template may"),
        ("{{ 'a' * 10**8 }}", "it writes 100000000 characters"),
        ("{% for i in range(10000) %}{{ 'a' * 10000 }}{% endfor %}", "it writes 100000000 characters"),
        ("{{ 1/0 }}", "ZeroDivisionError: division by zero"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "it calls itself without end"),
        ("{{ '%c' % 1114112 }}", "OverflowError"),
        ("{{ '\ud800' }}".encode("utf-8", "surrogatepass").decode("utf-8", "surrogatepass"), "a lone surrogate"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ nothing.at.all }}", "undefined"),
        ("{% if %}", "Expected an expression"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "nested too deeply"),
        ("{% for a in [1] %}" * 30 + "{% endfor %}" * 30, "SyntaxError"),
        ("{{ raise_exception('line one\nline two.') }}", "line one line two"),
    ],
)
def test_a_template_that_fails_is_one_sentence(template: str, said: str) -> None:
    text = message(lambda: token_ids(Prompt("", TURNS), tokenizer_with(template), 9, True))
    assert text.startswith("the tokenizer's chat template fails")
    assert said in text


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
        "{{ 7 ** (10 ** 9) }}",
    ],
)
def test_a_template_without_end_is_ended(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "SECONDS", 0.3)
    assert "it takes more than 0.3 s" in message(
        lambda: token_ids(Prompt("", TURNS), tokenizer_with(template), 9, True)
    )
    # The next template has a process of its own.
    assert token_ids(Prompt("", TURNS), tokenizer_with(CHATML), 9, True).size == 9


def test_few_refusals_are_left_out_and_counted_and_many_end_the_run() -> None:
    good, bad = (("user", "q"),), (("user", "q"), ("user", "r"))
    tokenizer = tokenizer_with(ALTERNATE)
    found = tokenise_prompts(prompt_set(*[good] * 20, bad, *[good] * 19), tokenizer, 9, True)
    assert (len(found.ids), found.refused) == (39, 1)
    assert found.first_refusal.startswith("row 21: the tokenizer's chat template fails on turns (user, user)")
    text = message(lambda: tokenise_prompts(prompt_set(*[good] * 20, bad, bad), tokenizer, 9, True))
    assert "row 21: " in text
    assert "roles must alternate" in text
    assert "(2 of 22 rows are refused)" in text
    with pytest.raises(TemplateRefusal):
        ChatTemplate(tokenizer, "prompts").render(bad, opening=True)


class _Told(Exception):
    pass


@pytest.mark.parametrize("processes", [2, 3, 50])
def test_processes_that_tokenise_parts_find_what_one_does(processes: int) -> None:
    good, longer, bad = (("user", "q"),), (("user", "q" * 30),), (("user", "q"), ("user", "r"))
    tokenizer, prompts = tokenizer_with(ALTERNATE), prompt_set(*[good, longer] * 12, bad, *[good] * 19)
    whole = tokenise_prompts(prompts, tokenizer, 9, True)
    count = len(prompts.prompts)
    parts = [range(count * k // processes, count * (k + 1) // processes) for k in range(processes)]
    told: list[bytes] = []

    def tell(found: bytes) -> list[bytes]:
        told.append(found)
        raise _Told

    for part in parts:
        with pytest.raises(_Told):
            tokenise_prompts(prompts, tokenizer, 9, True, part, tell)
    for part in parts[:1]:
        found = tokenise_prompts(prompts, tokenizer, 9, True, part, lambda _: told)
        assert [ids.tolist() for ids in found.ids] == [ids.tolist() for ids in whole.ids]
        assert found.prompts == whole.prompts
        assert (found.shortened, found.refused) == (whole.shortened, whole.refused) == (whole.shortened, 1)
        assert found.first_refusal == whole.first_refusal
    assert whole.shortened


def test_refused_pairs_are_counted() -> None:
    turns = [(("user", "q"),)] * 30 + [(("user", "q"), ("user", "r"))]
    pairs = tuple(PreferencePair(number, "", "yes", "no", each) for number, each in enumerate(turns))
    kept, dropped = tokenise_pairs(PairSet(pairs, "a test", "jsonl", "", {}), tokenizer_with(ALTERNATE), 99, True)
    assert (len(kept), dropped["refused"]) == (30, 1)


# BOS and long prompts


@pytest.mark.parametrize("max_length", [1, 2, 5, 12])
def test_a_long_prompt_keeps_its_last_tokens_behind_its_bos(max_length: int) -> None:
    tokenizer = byte_tokenizer()  # puts BOS, 256, in front
    found = tokenise_prompts(
        PromptSet((Prompt("0123456789", (("user", "x"),)), Prompt("01", (("user", "x"),))), "", "text", 0, ""),
        tokenizer,
        max_length,
        False,
    )
    whole = [256, *b"0123456789"]
    assert found.ids[0].tolist() == ([256, *whole[len(whole) - max_length + 1 :]] if max_length < 11 else whole)
    assert found.shortened == sum(max_length < size for size in (11, 3))


def test_a_bos_that_text_and_tokenizer_both_put_is_there_once() -> None:
    tokenizer = byte_tokenizer()
    assert token_ids(Prompt("<|bos|>ab", ()), tokenizer, 9, False).tolist() == [256, 97, 98]
    assert token_ids(Prompt("<|bos|><|bos|>ab", ()), tokenizer, 9, False).tolist() == [256, 97, 98]
    templated = tokenizer_with("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}")
    for text in ("ab", "<|bos|>ab"):
        assert token_ids(Prompt("", (("user", text),)), templated, 9, True).tolist() == [256, 97, 98]
    assert token_ids(Prompt("", (("user", "abcdef"),)), templated, 3, True).tolist() == [256, 101, 102]
    pair = PreferencePair(0, "<|bos|>p", "a", "b", (("user", "<|bos|>p"),))
    for template in (False, True):
        ((found,), _) = tokenise_pairs(PairSet((pair,), "", "jsonl", "", {}), templated, 9, template)
        assert found.chosen.ids.tolist()[:3] == [256, ord("p"), ord("a")]
        assert found.chosen.start == found.rejected.start == 2


def test_an_always_present_bos_of_the_tokenizer_and_one_of_the_template() -> None:
    """A post-processor that puts BOS even where no special token is to be added."""
    tokenizer = tokenizer_with("{{ bos_token }}{{ messages[0].content }}")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", 256)]
    )
    assert token_ids(Prompt("", (("user", "ab"),)), tokenizer, 9, True).tolist() == [256, 97, 98]


@pytest.mark.parametrize("template", [False, True])
def test_only_what_max_length_can_use_is_tokenised(template: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_with("{{ bos_token }}{{ messages[0].content }}")
    longest = []
    call = type(tokenizer).__call__

    def counted(self: Any, texts: list[str], **options: Any) -> Any:
        longest.extend(map(len, texts))
        return call(self, texts, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", counted)
    for text in ("word " * 2_000_000, "a" * 10_000_000):
        prompt = Prompt(text, (("user", text),))
        found = tokenise_prompts(PromptSet((prompt,), "", "text", 0, ""), tokenizer, 24, template)
        assert found.ids[0].tolist() == [256, *text[-23:].encode()]
        assert found.shortened == 1
    assert max(longest) < 100_000


@pytest.mark.parametrize("overlong", ["drop", "cut_prompt"])
def test_huge_pairs_are_tokenised_as_far_as_they_are_used(overlong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    small = PreferencePair(0, "p", "a", "b", (("user", "p"),))
    prompt = PreferencePair(1, "word " * 2_000_000, "a", "b", (("user", "p"),))
    reply = PreferencePair(2, "p", "a" * 10_000_000, "b", (("user", "p"),))
    kept, dropped = tokenise_pairs(PairSet((small, prompt, reply), "", "jsonl", "", {}), tokenizer, 24, False, overlong)
    cut = overlong == "cut_prompt"
    assert [pair.id for pair in kept] == ([0, 1] if cut else [0])
    assert dropped["overlong"] == (1 if cut else 2)
    if cut:
        assert kept[1].chosen.ids.tolist() == [256, *("word " * 9)[-21:].encode(), 97, 257]
        assert kept[1].chosen.start == 22


def test_the_end_of_a_long_text_has_the_tokens_of_the_whole() -> None:
    text = json.dumps([{"n": n, "square": n * n} for n in range(9000)])
    ids = token_ids(Prompt(text, ()), byte_tokenizer(), 100, False)
    assert ids.tolist() == [256, *text[-99:].encode()]
    assert ids.dtype == np.int32


@pytest.mark.parametrize(
    ("model", "splitter", "reason"),
    [
        (models.WordLevel({"c": 0}, unk_token="?"), None, "Missing"),
        (models.BPE({"a": 0, "c": 1}, []), pre_tokenizers.Split(Regex("(a+)+b"), "isolated"), "retry-limit"),
    ],
    ids=["a word that is unknown", "a rule without end"],
)
def test_a_tokenizer_that_fails_is_one_sentence(
    model: Any, splitter: Any, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    backend = Tokenizer(model)
    backend.pre_tokenizer = splitter or pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="c")
    text = "a" * 60 + "c"
    pair = PreferencePair(0, text, text, "b", ())
    calls: list[Callable[[], object]] = [
        lambda: token_ids(Prompt(text, ()), tokenizer, 8, False),
        lambda: tokenise_pairs(PairSet((pair,), "p", "jsonl", "", {}), tokenizer, 8, False),
    ]
    for call in calls:
        with pytest.raises(UserError, match=f"the tokenizer fails on the texts .*{reason}"):
            call()
    assert capfd.readouterr().err == ""
