"""Builds a checkpoint's fast tokenizer, from a Hugging Face folder or from a GGUF file's own metadata."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import PreTokenizer

from spinal_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def folder_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face folder; code that comes with it is never run. Errors: UserError."""
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise UserError(f"{folder} has no tokenizer: expected tokenizer.json, tokenizer.model or vocab.json")
    with without_advice():
        from transformers import AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # tokenizers raises plain Exception for a damaged file
        if "trust_remote_code" in str(error):
            raise UserError(f"the tokenizer in {folder} comes as Python code of its own, which is never run") from error
        reason = shorten(str(error) or type(error).__name__, 400)
        raise UserError(f"the tokenizer in {folder} cannot be built: {reason}") from error
    if not tokenizer.is_fast:
        raise UserError(f"{folder} has only a slow tokenizer; save it once with a tokenizer.json")
    return tokenizer


def gguf_tokenizer(metadata: Mapping[str, Any], path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that a GGUF file's metadata describes, with its chat template.

    Errors: UserError where the file has none, or one whose way of splitting text is not known here.
    """
    given = {key.removeprefix(_PREFIX): value for key, value in metadata.items() if key.startswith(_PREFIX)}
    if "model" not in given or "tokens" not in given:
        raise UserError(f"{path} has no tokenizer in its metadata")
    if given["model"] not in ("gpt2", "llama"):
        raise UserError(
            f"{path} has a tokenizer of type {given['model']!r}; those that can be built are gpt2 and llama"
        )
    is_byte_level = given["model"] == "gpt2"
    if (lacking := "merges" if is_byte_level else "scores") not in given:
        raise UserError(f"{path} lacks {_PREFIX}{lacking}, without which its tokenizer cannot be built")
    if len(set(given["tokens"])) != len(given["tokens"]):
        raise UserError(f"{path} has a vocabulary in which a token occurs twice")
    splitter = _splitter(given.get("pre"), path) if is_byte_level else None
    try:
        if splitter is not None:
            tokenizer = _byte_level(given, splitter)
        else:
            tokenizer = _sentencepiece(given, metadata.get("general.architecture", ""))
        _add_whole_tokens(tokenizer, given)
    except Exception as error:  # tokenizers raises plain Exception for merges that do not fit the vocabulary
        raise UserError(f"the tokenizer in the metadata of {path} cannot be built: {error}") from error
    return _wrapped(tokenizer, given, metadata, adds_bos=splitter is None or splitter.adds_bos)


def _wrapped(
    tokenizer: Tokenizer, given: Mapping[str, Any], metadata: Mapping[str, Any], adds_bos: bool
) -> PreTrainedTokenizerBase:
    """The tokenizer as transformers presents it: special tokens, what is added to a text, chat template."""
    with without_advice():
        from transformers import PreTrainedTokenizerFast
    tokens = given["tokens"]
    special = {name: tokens[given[key]] for name, key in _SPECIAL.items() if 0 <= given.get(key, -1) < len(tokens)}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        add_bos_token=bool(given.get("add_bos_token", adds_bos)) and "bos_token" in special,
        add_eos_token=bool(given.get("add_eos_token", False)) and "eos_token" in special,
        **special,
    )


@contextmanager
def without_advice() -> Iterator[None]:
    """Imports of transformers within say nothing about PyTorch, which is not needed here."""
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


_PREFIX = "tokenizer.ggml."
_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


class _Splitter(NamedTuple):
    """How text is cut before byte-level merges, as the models' own tokenizer.json have it."""

    stages: tuple[PreTokenizer, ...]
    compose: bool = False  # Unicode NFC first
    whole_words: bool = False  # a piece that is itself a token is taken without merging
    adds_bos: bool = False  # where the file does not say


def _by(*patterns: str) -> tuple[PreTokenizer, ...]:
    """One split after the other, then bytes."""
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    return (*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))


_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_LLAMA3 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_PUNCTUATION}|{_SPACES}"
_QWEN2 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_PUNCTUATION}|{_SPACES}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_SLASHED = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_SLASHED}|{_SPACES}"
_GPT4O = rf"{_CASED[0]}{_CONTRACTION}?|{_CASED[1]}{_CONTRACTION}?|\p{{N}}{{1,3}}|{_SLASHED}|{_SPACES}"
# Cased letters without those that DeepSeek's own list leaves out, Georgian and mathematical ones mostly.
_DEEPSEEK_LETTERS = (
    "\\s?[\\p{Lu}\\p{Ll}\\p{Lt}&&[^\u0560-\u0588\u10c7-\u10ff\u1c80-\u1c8f\u2d00-\u2d2f\ua790-\ua7ff\uab30-\uab6f"
    "\U00010570-\U000105bf\U00016e40-\U00016e7f\U0001d400-\U0001d7ff\U0001df00-\U0001dfff]]+"
)
_DEEPSEEK_PUNCTUATION = "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
_DEEPSEEK_ASIAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"

# By tokenizer.ggml.pre. A name that is missing here is refused, since any other splitting gives other tokens.
_SPLITTERS = {
    # smollm as transformers reads such files. The model's own tokenizer.json isolates digits first, which gives other
    # tokens only where two or more blanks stand before a digit: there the last of them is split off.
    **dict.fromkeys(("default", "gpt-2", "phi-2", "smollm"), _Splitter((_GPT2,))),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe"), _Splitter(_by(_LLAMA3), whole_words=True, adds_bos=True)),
    "dbrx": _Splitter(_by(_LLAMA3)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _Splitter(_by(_QWEN2), compose=True)),
    "tekken": _Splitter(_by(_TEKKEN), whole_words=True, adds_bos=True),
    "gpt-4o": _Splitter(_by(_GPT4O)),
    "deepseek-llm": _Splitter(
        _by(r"[\r\n]", _DEEPSEEK_LETTERS, _DEEPSEEK_PUNCTUATION, r"\s+$", _DEEPSEEK_ASIAN, r"\p{N}")
    ),
    "deepseek-coder": _Splitter(_by(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_ASIAN, r"\p{N}")),
}


def _splitter(name: str | None, path: Path) -> _Splitter:
    if name not in _SPLITTERS:
        known = ", ".join(_SPLITTERS)
        raise UserError(f"{path} splits text by tokenizer.ggml.pre = {name!r}; those that are known are {known}")
    return _SPLITTERS[name]


def _byte_level(given: Mapping[str, Any], splitter: _Splitter) -> Tokenizer:
    """Byte-level BPE, as GPT-2 began it."""
    vocabulary = {token: number for number, token in enumerate(given["tokens"])}
    tokenizer = Tokenizer(BPE(vocabulary, _pairs(given["merges"]), ignore_merges=splitter.whole_words))
    if splitter.compose:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(splitter.stages))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(given: Mapping[str, Any], architecture: str) -> Tokenizer:
    """SentencePiece BPE with bytes for what the vocabulary lacks, as transformers rebuilds it for each architecture."""
    tokens, is_gemma = given["tokens"], architecture.startswith("gemma")
    if is_gemma:
        # Runs of spaces are written as such in the file, and merges go by the order of tokens, not by their scores.
        tokens = ["▁" * len(token) if token.strip(" ") == "" else token for token in tokens]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if "merges" in given:
        merges = _pairs(given["merges"])
    else:
        merges = _implied_merges(vocabulary, range(0, -len(tokens), -1) if is_gemma else given["scores"].tolist())
    unknown = given.get("unknown_token_id")
    unknown_token = None if unknown is None else tokens[unknown]
    tokenizer = Tokenizer(BPE(vocabulary, merges, unk_token=unknown_token, fuse_unk=True, byte_fallback=True))
    has_prefix = not is_gemma and given.get("add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    if is_gemma:
        tokenizer.normalizer = spaces
    elif architecture == "phi3" and has_prefix:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
    else:
        scheme = "first" if has_prefix else "never"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    strip = [decoders.Strip(content=" ", left=1)] if has_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _pairs(merges: Sequence[str]) -> list[tuple[str, str]]:
    """The two halves of each merge; a half may begin with a space."""
    cuts = [merge.index(" ", 1) for merge in merges]
    return [(merge[:cut], merge[cut + 1 :]) for merge, cut in zip(merges, cuts, strict=True)]


def _implied_merges(vocabulary: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every way in which two tokens make a third, best and then longest first, for SentencePiece keeps none."""
    merges = [
        (score, token[:cut], token[cut:])
        for token, score in zip(vocabulary, scores, strict=True)
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    merges.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    return [(left, right) for _, left, right in merges]


_CONTROL, _USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type


def _add_whole_tokens(tokenizer: Tokenizer, given: Mapping[str, Any]) -> None:
    """Tokens that are never cut: control tokens, which are special, and user-defined ones."""
    kinds = given.get("token_type", ())
    vocabulary = tokenizer.get_vocab()
    for kind, add in ((_CONTROL, tokenizer.add_special_tokens), (_USER_DEFINED, tokenizer.add_tokens)):
        chosen = [token for token, its in zip(given["tokens"], kinds, strict=False) if its == kind]
        add([AddedToken(token, normalized=False, special=kind == _CONTROL) for token in chosen if token in vocabulary])
