"""GGUF tokenizers against those that transformers makes of the same file, and refusals."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import Sequence as PreTokenizerSequence
from transformers import AutoTokenizer

from spinal_jax.errors import UserError
from spinal_jax.models.formats.open import open_checkpoint
from spinal_jax.models.formats.splitters import REFUSED, SPLITTERS, splitter_of

from .gguf_files import KEYS, some_tensors, write

TEXTS = [
    "",
    "Hello world! It's 1234 and I'LL pay $5,678.90 -- OK?",
    "def f(x):\n    return x ** 2  # squared\n\n\tprint('a  b   c')\r\n",
    " leading and trailing  ",
    "emoji 🙂👩‍👩‍👧 and naïve café, 中文字 日本語 한국어 العربية",
    "<|im_start|>user\nhi<|im_end|> <think>hm</think>\n\n\n1) one\n\n2) two",
    "CamelCase snake_case don't DON'T 3.14e10 x=1;y=22;z=333;w=4444",
]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.fixture(scope="module")
def byte_level() -> tuple[list[str], list[str]]:
    """Vocabulary and merges of a small byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [" ".join(merge) for merge in model["merges"]]


def byte_level_keys(byte_level: tuple[list[str], list[str]], **changed: Any) -> dict[str, Any]:
    vocabulary, merges = byte_level
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", *vocabulary]
    keys = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [3, 3, 3, 4, 4] + [1] * len(vocabulary),
        "merges": merges,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "padding_token_id": 2,
        "add_bos_token": False,
    }
    keys = {f"tokenizer.ggml.{key}": value for key, value in (keys | changed).items() if value is not None}
    return KEYS | keys | {"tokenizer.chat_template": TEMPLATE}


def sentencepiece_keys(beginning: str = "<s>", end: str = "</s>", **changed: Any) -> dict[str, Any]:
    special = ["<unk>", beginning, end, "<pad>", "<mask>", "<think>"]
    words = ["▁", "he", "lo", "llo", "hello", "▁hello", "or", "▁w", "▁wor", "ld", "▁a", "nd", "an", "12", "▁1", "▁▁"]
    letters = [letter for letter in "abcdefghijklmnopqrstuvwxyz123()=*,." if letter not in words]
    pieces = [*words, *letters]
    keys = {
        "model": "llama",
        "pre": "default",
        "tokens": [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces],
        "scores": [0.0] * 262 + [-float(rank) for rank in range(len(pieces))],
        "token_type": [2, 3, 3, 3, 3, 4] + [6] * 256 + [1] * len(pieces),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "padding_token_id": 3,
        "add_bos_token": True,
    }
    return KEYS | {f"tokenizer.ggml.{key}": value for key, value in (keys | changed).items() if value is not None}


def both_tokenizers(path: Path, architecture: str, keys: Mapping[str, Any]) -> tuple[Any, Any]:
    write(path, architecture, keys, {"token_embd.weight": np.zeros((8, 64), np.float32)})
    ours = open_checkpoint(str(path)).tokenizer()
    return ours, AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def assert_same_tokens(ours: Any, theirs: Any) -> None:
    assert ours.is_fast
    assert len(ours) == len(theirs)
    for name in ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id"):
        assert getattr(ours, name) == getattr(theirs, name)
    for text in TEXTS:
        ids = ours(text).input_ids
        assert ids == theirs(text).input_ids, text
        assert ours.decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "dbrx", "qwen2", "tekken", "gpt-4o"])
def test_byte_level_tokens_are_those_of_transformers(tmp_path: Path, byte_level: Any, pre: str) -> None:
    keys = byte_level_keys(byte_level, pre=pre)
    ours, theirs = both_tokenizers(tmp_path / "m.gguf", "llama", keys)
    assert_same_tokens(ours, theirs)
    assert len(ours) == len(keys["tokenizer.ggml.tokens"])
    messages = [{"role": "user", "content": "hi"}]
    assert ours.apply_chat_template(messages, tokenize=False) == theirs.apply_chat_template(messages, tokenize=False)
    assert ours.apply_chat_template(messages, tokenize=False) == "<|im_start|>user\nhi<|im_end|>\n"


# tokenizer.ggml.pre of llama.cpp's src/llama-vocab.cpp (2026), a line for every way of splitting it knows.
TABLE = """
default
minicpm5
llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano
deepseek-llm
deepseek-coder
deepseek-v3 hunyuan-dense joyai-llm hy_v4
spark2_5
youtu
falcon
gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert jina-v1-en jina-v2-code \
    roberta-bpe exaone4 mpt olmo jais trillion granite-docling
starcoder refact command-r smollm codeshell exaone minerva-7b mellum2
jais-2
gemma4 granite-embed-multi-311m
sarvam-moe
whitespace
qwen2 deepseek-r1-qwen kormo f2llmv2 stablelm2 megrez hunyuan solar-open grok-2
qwen35
dbrx smaug-bpe glm4 chatglm-bpe
poro-chat bloom gpt3-finnish
viking
tekken
exaone-moe
chameleon
gpt-4o llama4 kanana2 talkie minimax-m2
granite-embed-multi-97m
tiny_aya cohere2moe
superbpe
bailingmoe bailingmoe2 llada-moe
seed-coder
kimi-k2
ufakzeka
afmoe
laguna
""".replace("\\\n", "").strip()


def test_every_name_of_the_published_table_is_known_or_refused_with_why(tmp_path: Path) -> None:
    lines = [line.split() for line in TABLE.splitlines()]
    names = [name for line in lines for name in line]
    assert sorted(names) == sorted([*SPLITTERS, *REFUSED])
    for line in lines:
        assert len({SPLITTERS[name].patterns for name in line if name in SPLITTERS}) <= 1, line
    kinds = [next((SPLITTERS[name].patterns for name in line if name in SPLITTERS), tuple(line)) for line in lines]
    same = [lines[i][0] for i in range(len(kinds)) if kinds.index(kinds[i]) != i]
    assert same == ["dbrx"]  # Llama 3's split without its other two habits
    for name in REFUSED:
        with pytest.raises(UserError, match=name):
            splitter_of(name, tmp_path)


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("smollm", ["It", "'s", " ", "1", "2", "3", "4", "  ", "5", " $", "6", ",", " ---", "x"]),
        ("gpt-2", ["It", "'s", " 1234", " ", " 5", " $", "6", ",", " ---", "x"]),
        ("default", ["It", "'", "s", " ", "123", "4", " ", " ", "5", " ", "$", "6", ",", " ", "---", "x"]),
        ("llama-bpe", ["It", "'s", " ", "123", "4", " ", " ", "5", " $", "6", ",", " ---", "x"]),
        ("qwen2", ["It", "'s", " ", "1", "2", "3", "4", " ", " ", "5", " $", "6", ",", " ---", "x"]),
        ("falcon", ["It", "'", "s", " ", "123", "4", " ", " 5", " ", "$", "6", ",", " ", "---", "x"]),
        ("deepseek-v3", ["It", "'s", " ", "123", "4", "  ", "5", " $", "6", ",", " ---", "x"]),
    ],
)
def test_text_is_cut_as_the_name_says(pre: str, pieces: list[str], tmp_path: Path) -> None:
    stages = PreTokenizerSequence(splitter_of(pre, tmp_path).stages)
    found = [piece.replace("\u0120", " ") for piece, _ in stages.pre_tokenize_str("It's 1234  5 $6, ---x")]
    assert found == pieces


def test_control_tokens_that_a_file_types_as_normal_are_whole(tmp_path: Path, byte_level: Any) -> None:
    """Named by a token id, by llama.cpp's list, or standing in the template: never cut into letters."""
    vocabulary, _ = byte_level
    normal = [1] * (5 + len(vocabulary))
    keys = byte_level_keys(byte_level, token_type=normal, bos_token_id=None, eos_token_id=4)
    tokenizer = open_checkpoint(str(write(tmp_path / "m.gguf", "llama", keys, some_tensors()))).tokenizer()
    assert tokenizer("<|im_start|>hi<|im_end|></think>").input_ids == [1, *tokenizer("hi").input_ids, 2, 4]
    assert {1, 2, 4} <= set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    assert len(tokenizer("<think>").input_ids) > 1  # nothing says that it is one
    sound = open_checkpoint(str(write(tmp_path / "s.gguf", "llama", byte_level_keys(byte_level), some_tensors())))
    marked = sound.tokenizer()("<|im_start|>user").input_ids
    assert tokenizer("<|im_start|>user").input_ids == marked


@pytest.mark.parametrize(
    "changed",
    [
        {"tokens": [1, 2, 3]},
        {"tokens": 7},
        {"tokens": "abc"},
        {"tokens": ["a" * 5000, "b", "c"]},
        {"token_type": [3, 3]},
        {"token_type": ["a"] * 3},
        {"merges": [1, 2]},
        {"pre": 3},
        {"model": 3.5},
        {"bos_token_id": "one"},
        {"add_bos_token": "yes"},
    ],
    ids=str,
)
def test_metadata_of_another_type_is_one_sentence(tmp_path: Path, byte_level: Any, changed: dict[str, Any]) -> None:
    path = write(tmp_path / "m.gguf", "llama", byte_level_keys(byte_level, **changed), some_tensors())
    with pytest.raises(UserError, match=next(iter(changed))) as error:
        open_checkpoint(str(path)).tokenizer()
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "phi3"])
def test_sentencepiece_tokens_are_those_of_transformers(tmp_path: Path, architecture: str) -> None:
    keys = sentencepiece_keys("<bos>", "<eos>") if architecture == "gemma2" else sentencepiece_keys()
    ours, theirs = both_tokenizers(tmp_path / "m.gguf", architecture, keys)
    assert_same_tokens(ours, theirs)
    assert ours("hello and hello").input_ids[0] == 1


def test_a_space_prefix_is_left_out_where_the_file_says_so(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    tokens = {}
    for flag in (True, False):
        write(path, "llama", sentencepiece_keys(add_space_prefix=flag), some_tensors())
        tokenizer = open_checkpoint(str(path)).tokenizer()
        tokens[flag] = tokenizer.convert_ids_to_tokens(tokenizer("hello").input_ids)
        assert tokenizer.decode(tokenizer("hello").input_ids, skip_special_tokens=True) == "hello"
    assert tokens == {True: ["<s>", "▁hello"], False: ["<s>", "hello"]}


def test_control_tokens_may_be_written_in_any_letters(tmp_path: Path, byte_level: Any) -> None:
    """As DeepSeek's are: they keep their number, and the vocabulary its size."""
    keys = byte_level_keys(byte_level, pre="deepseek-llm")
    beginning = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
    keys["tokenizer.ggml.tokens"][1] = beginning
    path = write(tmp_path / "m.gguf", "llama", keys, some_tensors())
    tokenizer = open_checkpoint(str(path)).tokenizer()
    assert len(tokenizer) == len(keys["tokenizer.ggml.tokens"])
    assert tokenizer.bos_token_id == 1
    hi = tokenizer("hi").input_ids
    assert tokenizer(beginning + "hi").input_ids == [1, *hi]


@pytest.mark.parametrize("pre", ["deepseek-llm", "deepseek-coder"])
def test_deepseek_cuts_letters_digits_and_lines_apart(tmp_path: Path, byte_level: Any, pre: str) -> None:
    path = write(tmp_path / "m.gguf", "llama", byte_level_keys(byte_level, pre=pre), some_tensors())
    splitter = open_checkpoint(str(path)).tokenizer().backend_tokenizer.pre_tokenizer
    pieces = [piece for piece, _ in splitter.pre_tokenize_str("Ab cd12,\n\n x\u4e2d\u6587")]
    spaced = [piece.replace("\u0120", " ").replace("\u010a", "\n") for piece in pieces[:8]]
    assert spaced == ["Ab", " cd", "1", "2", ",", "\n", "\n", " x"]
    assert len(pieces) == 9


@pytest.mark.parametrize(("pre", "adds"), [("gpt-2", False), ("llama-bpe", True)])
def test_a_beginning_is_added_as_the_file_or_its_kind_says(
    tmp_path: Path, byte_level: Any, pre: str, adds: bool
) -> None:
    path = tmp_path / "m.gguf"
    for flag in (True, False, None):
        write(path, "llama", byte_level_keys(byte_level, pre=pre, add_bos_token=flag), some_tensors())
        first = open_checkpoint(str(path)).tokenizer()("hi").input_ids[0]
        assert (first == 1) == (adds if flag is None else flag)


def test_a_saved_tokenizer_still_gives_the_same_tokens(tmp_path: Path, byte_level: Any) -> None:
    write(tmp_path / "m.gguf", "llama", byte_level_keys(byte_level, pre="qwen2", add_bos_token=True), some_tensors())
    tokenizer = open_checkpoint(str(tmp_path / "m.gguf")).tokenizer()
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert [again(text).input_ids for text in TEXTS] == [tokenizer(text).input_ids for text in TEXTS]
    assert again.chat_template == TEMPLATE


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"pre": "from-the-future"}, ["from-the-future", "llama-bpe"]),
        ({"pre": None}, ["None", "llama-bpe"]),
        ({"model": "t5"}, ["'t5'", "gpt2"]),
        ({"tokens": None}, ["no tokenizer"]),
        ({"merges": None}, ["lacks tokenizer.ggml.merges"]),
        ({"tokens": ["a", "b", "a"], "token_type": None}, ["twice"]),
        ({"merges": ["x yz"]}, ["cannot be built", "yz"]),
        ({"merges": ["xyz"]}, ["cannot be built"]),
    ],
)
def test_a_tokenizer_that_would_be_wrong_is_refused(
    tmp_path: Path, byte_level: Any, changed: dict[str, Any], words: list[str]
) -> None:
    path = write(tmp_path / "m.gguf", "llama", byte_level_keys(byte_level, **changed), some_tensors())
    checkpoint = open_checkpoint(str(path))
    with pytest.raises(UserError) as error:
        checkpoint.tokenizer()
    assert all(word in str(error.value) for word in (str(path), *words)), error.value
