"""Builds the fast tokenizer of a Hugging Face folder or of a GGUF file."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from spinal_jax.errors import UserError
from spinal_jax.jsontypes import ReadJson
from spinal_jax.models.formats.base import require_regular
from spinal_jax.models.formats.splitters import Splitter, splitter_of
from spinal_jax.models.hf_config import value_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


LONGEST = 1024  # characters of a token or merge: finding the halves of one takes the square of its length
# Files of a folder that transformers reads for a tokenizer.
_READ = re.compile(r"tokenizer|special_tokens_map|added_tokens|vocab|merges|chat_template|config\.json|.*\.model$")


def has_tokenizer(folder: Path) -> bool:
    """Whether a Hugging Face folder has a tokenizer."""
    return any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def folder_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face folder, without running remote code. Raises UserError if there is none."""
    if not has_tokenizer(folder):
        raise UserError(f"{folder} has no tokenizer: expected tokenizer.json, tokenizer.model or vocab.json")
    for path in sorted(folder.iterdir()):
        if _READ.match(path.name) and not path.is_dir():
            require_regular(path)  # transformers would wait for a FIFO without end
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


def gguf_tokenizer(metadata: ReadJson, path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of the metadata of a GGUF file, with its chat template.

    Raises UserError if the file has none, or one with an unknown pre-tokenizer.
    """
    given = {key.removeprefix(_PREFIX): value for key, value in metadata.items() if key.startswith(_PREFIX)}
    if "model" not in given or "tokens" not in given:
        raise UserError(f"{path} has no tokenizer in its metadata")
    _check_types(given, metadata, path)
    if given["model"] not in ("gpt2", "llama"):
        raise UserError(
            f"{path} has a tokenizer of type {given['model']!r}; those that can be built are gpt2 and llama"
        )
    is_byte_level = given["model"] == "gpt2"
    if (lacking := "merges" if is_byte_level else "scores") not in given:
        raise UserError(f"{path} lacks {_PREFIX}{lacking}, without which its tokenizer cannot be built")
    if len(set(given["tokens"])) != len(given["tokens"]):
        raise UserError(f"{path} has a vocabulary in which a token occurs twice")
    splitter = splitter_of(given.get("pre"), path) if is_byte_level else None
    try:
        if splitter is not None:
            tokenizer = _byte_level(given, splitter)
        else:
            tokenizer = _sentencepiece(given, metadata.get("general.architecture", ""))
        _add_whole_tokens(tokenizer, given, metadata.get(_TEMPLATE) or "")
    except Exception as error:  # tokenizers raises plain Exception for merges that do not fit the vocabulary
        raise UserError(f"the tokenizer in the metadata of {path} cannot be built: {error}") from error
    return _wrapped(tokenizer, given, metadata, adds_bos=splitter is None or splitter.adds_bos)


def _wrapped(tokenizer: Tokenizer, given: ReadJson, metadata: ReadJson, adds_bos: bool) -> PreTrainedTokenizerBase:
    """The tokenizer as a transformers object with special tokens and chat template."""
    with without_advice():
        from transformers import PreTrainedTokenizerFast
    tokens = given["tokens"]
    special = {name: tokens[given[key]] for name, key in _SPECIAL.items() if 0 <= given.get(key, -1) < len(tokens)}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=metadata.get(_TEMPLATE),
        clean_up_tokenization_spaces=False,
        add_bos_token=bool(given.get("add_bos_token", adds_bos)) and "bos_token" in special,
        add_eos_token=bool(given.get("add_eos_token", False)) and "eos_token" in special,
        **special,
    )


@contextmanager
def without_advice() -> Iterator[None]:
    """Suppresses the warning of transformers about missing PyTorch, which is not needed."""
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


_PREFIX, _TEMPLATE = "tokenizer.ggml.", "tokenizer.chat_template"
_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def _byte_level(given: ReadJson, splitter: Splitter) -> Tokenizer:
    """Byte-level BPE as in GPT-2."""
    vocabulary = {token: number for number, token in enumerate(given["tokens"])}
    tokenizer = Tokenizer(BPE(vocabulary, _pairs(given["merges"]), ignore_merges=splitter.whole_words))
    if splitter.compose:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splitter.stages)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(given: ReadJson, architecture: str) -> Tokenizer:
    """SentencePiece BPE with byte fallback, as transformers rebuilds it for each architecture."""
    tokens, is_gemma = given["tokens"], architecture.startswith("gemma")
    if is_gemma:
        # Runs of spaces are stored literally, and merges are ordered by token instead of by score.
        tokens = ["▁" * len(token) if token.strip(" ") == "" else token for token in tokens]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if "merges" in given:
        merges = _pairs(given["merges"])
    else:
        merges = _implied_merges(vocabulary, range(0, -len(tokens), -1) if is_gemma else given["scores"].tolist())
    unknown = given.get("unknown_token_id")
    unknown_token = tokens[unknown] if unknown is not None and 0 <= unknown < len(tokens) else None
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
    """The two halves of each merge; a half may start with a space."""
    cuts = [merge.index(" ", 1) for merge in merges]
    return [(merge[:cut], merge[cut + 1 :]) for merge, cut in zip(merges, cuts, strict=True)]


def _implied_merges(vocabulary: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """All merges of two tokens into a third, by rank and length; SentencePiece stores no merges."""
    merges = [
        (score, token[:cut], token[cut:])
        for token, score in zip(vocabulary, scores, strict=True)
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    merges.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    return [(left, right) for _, left, right in merges]


_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # of tokenizer.ggml.token_type

# Pattern of control tokens, and those that llama.cpp recognises by their text.
_CONTROL_LOOK = re.compile(
    "<\\|[^<>|\\s]+\\|>|<\uff5c[^<>\\s]+\uff5c>|<[a-z]+(?:_[a-z]+)+>|</?s>|\\[/?[A-Z_]+\\]|<[/_]?[A-Z]+>"
)
_KNOWN = """
<|eot_id|> <|eom_id|> <|im_end|> <|end|> <end_of_turn> <|endoftext|> <|end_of_text|> <EOT> _<EOT> [EOT]
<end_of_utterance> <\uff5cend\u2581of\u2581sentence\uff5c>
"""
_KNOWN_CONTROL = frozenset(_KNOWN.split())


def _add_whole_tokens(tokenizer: Tokenizer, given: ReadJson, template: str) -> None:
    """Adds tokens that are never split: control tokens, which are special, and user-defined ones.

    Some converters mark control tokens as normal, so that markers of a chat template would be split. A normal token is
    a control token if a `*_token_id` refers to it, if llama.cpp recognises its text, or if it matches the pattern and
    occurs in the chat template.
    """
    tokens, vocabulary = given["tokens"], tokenizer.get_vocab()
    kinds = dict(zip(tokens, map(int, given.get("token_type", ())), strict=False))
    named = {tokens[i] for key, i in given.items() if key.endswith("_token_id") and 0 <= i < len(tokens)}
    written = set(_CONTROL_LOOK.findall(template))
    for token in tokens:
        is_named = token in named or token in _KNOWN_CONTROL or token in written
        if is_named and kinds.get(token, _NORMAL) == _NORMAL:
            kinds[token] = _CONTROL
    for kind, add in ((_CONTROL, tokenizer.add_special_tokens), (_USER_DEFINED, tokenizer.add_tokens)):
        chosen = [token for token in tokens if kinds.get(token) == kind and token in vocabulary]
        add([AddedToken(token, normalized=False, special=kind == _CONTROL) for token in chosen])


def _check_types(given: ReadJson, metadata: ReadJson, path: Path) -> None:
    """Raises UserError for metadata of a wrong type and for lists of unequal length."""

    def require(name: str, value: object, is_right: bool, what: str) -> None:
        if not is_right:
            raise UserError(f"{path}: {name} is {value_text(value)}, which is not {what}")

    count = len(given["tokens"]) if isinstance(given["tokens"], list) else 0
    for key, value in given.items():
        name = _PREFIX + key
        if key in ("model", "pre"):
            require(name, value, isinstance(value, str), "a name")
        elif key in ("tokens", "merges"):
            texts = isinstance(value, list) and all(isinstance(text, str) for text in value)
            require(name, value, texts, "a list of texts")
            longest = max(map(len, value), default=0)
            require(f"the longest of {name}", longest, longest <= LONGEST, f"{LONGEST} characters or fewer")
        elif key in ("scores", "token_type"):
            kinds = "fiu" if key == "scores" else "iu"
            numbers = isinstance(value, np.ndarray) and value.dtype.kind in kinds and len(value) == count
            require(name, value, numbers, f"a list of {count} numbers, one for each token")
        elif key.endswith("_token_id"):
            require(name, value, type(value) is int, "the number of a token")
        elif key.startswith("add_"):
            require(name, value, isinstance(value, bool), "true or false")
    template = metadata.get(_TEMPLATE)
    require(_TEMPLATE, template, template is None or isinstance(template, str), "a text")
