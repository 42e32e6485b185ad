"""Reads documents for language modelling and splits them into sequences."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from spinal_jax.data.pair_tokens import Completion, required_eos
from spinal_jax.data.sources import Source, asked, field_of, json_object, read_rows, string_of, texts_sha256
from spinal_jax.data.spans import encode
from spinal_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORMATS = ("text", "jsonl")


@dataclass(frozen=True)
class DocumentSet:
    """Documents in file order, and where they came from.

    `skipped_empty` counts blank lines and documents of white space alone. `sha256` is the `texts_sha256` of the texts.
    """

    texts: tuple[str, ...]
    source: str
    format: str
    skipped_empty: int
    sha256: str


def read_documents(
    path: str | Path, format: str = "text", field: str = "text", limit: int | None = None, offset: int = 0
) -> DocumentSet:
    """The documents of rows `offset` to `offset + limit` of a file (as for `read_prompts`).

    Formats: `text`, one document a line as it stands; `jsonl`, rows with named fields of which `field` is the document.

    Raises `UserError` if the file cannot be read, a row is not of the format (the line is named), or nothing is left.
    """
    if format not in _FORMATS:
        raise UserError(f"corpus.format={format!r} is unknown; choose one of {', '.join(_FORMATS)}")
    source = str(path)
    texts: list[str] = []
    skipped = 0
    for row in read_rows(Source(path), "corpus", offset, limit, {}, as_text=format == "text"):
        text = row.text
        if not row.blank and format == "jsonl":
            text = string_of(field_of(json_object(row, " or corpus.format=text"), field, row.where), field, row.where)
        if text.strip():
            texts.append(text)
        else:
            skipped += 1
    if not texts:
        wanted = asked(offset, limit)
        raise UserError(
            f"{source!r} has no document among the rows asked for ({wanted}; {skipped} empty ones left out)"
        )
    return DocumentSet(tuple(texts), source, format, skipped, texts_sha256(texts))


def tokenise_documents(
    documents: DocumentSet, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[Completion, ...]:
    """The token ids of every document, in pieces of at most `max_length`; all but a piece's first are predicted.

    A document has the tokenizer's default special tokens, and its EOS at the end. A longer one is cut into pieces that
    each begin with the last token of the one before: every token but a document's first is predicted once. A document
    of a single token is left out.

    Raises `UserError` if `max_length` < 2, no document has two tokens, or the tokenizer has no EOS.
    """
    if max_length < 2:
        raise UserError(f"corpus.max_length={max_length} leaves no token to predict; give 2 or more")
    eos = required_eos(tokenizer, "a document", "choose another tokenizer")
    pieces: list[Completion] = []
    for ids, _ in encode(documents.texts, tokenizer, special=True):
        if ids[-1:] != [eos]:
            ids = [*ids, eos]
        for first in range(0, len(ids) - 1, max_length - 1):
            pieces.append(Completion(np.asarray(ids[first : first + max_length], dtype=np.int32), 1))
    if not pieces:
        raise UserError(
            f"{documents.source!r}: none of its {len(documents.texts)} documents has two tokens, and so one to predict"
        )
    return tuple(pieces)
