"""Reads prompts from files into plain records, and turns a record into the token ids a model sees.

Nothing here knows a model or a batch. A file is streamed (`rows`), and each row is read by the one function of its
format (`_FORMATS`); whatever is wrong with a file is one `UserError` that says where.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from spinal_jax.data.sources import Row, asked, digest, field_of, json_object, rows, text_of, turns_of
from spinal_jax.data.transcripts import ASSISTANT, render, transcript, turns
from spinal_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHIPPED = "spinal_jax/prompts/default.jsonl"


@dataclass(frozen=True)
class Prompt:
    """One prompt: `text` is what is tokenised as it stands, `turns` the same as (role, content) for a chat template.

    Roles are "user" and "assistant". Both hold valid Unicode (no lone surrogates).
    """

    text: str
    turns: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class PromptSet:
    """The prompts of one file in file order, where they came from, and how many empty rows and blank lines were left.

    `sha256` is the `rows.digest` of the texts: equal digests mean equal prompts in equal order.
    """

    prompts: tuple[Prompt, ...]
    source: str
    format: str
    skipped_empty: int
    sha256: str


def read_prompts(
    path: str | None, format: str = "jsonl", field: str = "prompt", limit: int | None = None, offset: int = 0
) -> PromptSet:
    """The prompts of rows `offset` to `offset + limit` of a file; `path` None is the pool shipped with the package.

    Formats, each also gzipped when the name ends in `.gz`:
      `jsonl`  one JSON object a line; `field` holds a string, or a list of chat messages {"role", "content"} of which
               the last is the user's.
      `hh`     Anthropic HH: everything up to and including the last "\\n\\nAssistant:" of `chosen`.
      `text`   one prompt a line, as it stands.
    A row is a line that is not blank; `offset` and `limit` count rows, and lines after the last row asked for are not
    read. A row whose turns are nothing but white space is left out: it and the blank lines among the rows asked for
    are counted in `skipped_empty`. Invalid UTF-8 and lone surrogates become U+FFFD.

    Raises `UserError` if the file cannot be read, a row is not of the format (the line is named), or nothing is left.
    """
    if format not in _FORMATS:
        raise UserError(f"prompts.format={format!r} is unknown; choose one of {', '.join(_FORMATS)}")
    package, name = SHIPPED.split("/", 1)
    file = importlib.resources.files(package).joinpath(name) if path is None else Path(path)
    source = SHIPPED if path is None else str(path)
    parse = _FORMATS[format]
    prompts: list[Prompt] = []
    skipped = 0
    for row in rows(file, source, "prompts", offset, limit):
        prompt = parse(row, field) if row.text else None
        if prompt is None or not any(content.strip() for _, content in prompt.turns):
            skipped += 1
            continue
        prompts.append(prompt)
    if not prompts:
        wanted = asked(offset, limit)
        raise UserError(f"{source!r} has no prompt among the rows asked for ({wanted}; {skipped} empty ones left out)")
    return PromptSet(tuple(prompts), source, format, skipped, digest(prompt.text for prompt in prompts))


def token_ids(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, max_length: int, chat_template: bool) -> np.ndarray:
    """The LAST `max_length` token ids of a prompt, int32 [T], T <= max_length; the cut may drop a leading BOS.

    Without `chat_template`, `prompt.text` with the tokenizer's default special tokens; with it, `prompt.turns` through
    the tokenizer's own template and its opening of the assistant's reply. T is 0 only if the tokenizer maps the text to
    nothing.

    Raises `UserError` if `max_length` < 1, or the tokenizer has no chat template, or its template refuses these turns.
    """
    if max_length < 1:
        raise UserError(f"prompts.max_length={max_length} leaves no token; give 1 or more")
    text = render(prompt.turns, tokenizer, opening=True, key="prompts") if chat_template else prompt.text
    # verbose=False: the warning about the model's maximum length is moot, since the cut comes after.
    encoded = tokenizer(text, add_special_tokens=not chat_template, verbose=False)
    return np.asarray(encoded["input_ids"][-max_length:], dtype=np.int32)


def _read_text(row: Row, field: str) -> Prompt:
    return Prompt(row.text, (("user", row.text),))


def _read_jsonl(row: Row, field: str) -> Prompt:
    value = field_of(json_object(row, " or prompts.format=text"), field, row.where)
    if isinstance(value, list):
        return _from_turns(tuple(turns_of(value, field, row.where)), field, row.where)
    text = text_of(value, field, row.where)
    return Prompt(text, (("user", text),))


def _read_hh(row: Row, field: str) -> Prompt | None:
    record = json_object(row, " or prompts.format=text")
    chosen = text_of(field_of(record, "chosen", row.where), "chosen", row.where)
    if not chosen.strip():
        return None
    cut = chosen.rfind(ASSISTANT)
    if cut < 0:
        raise UserError(f"{row.where}: 'chosen' has no {ASSISTANT!r}, so it is not an HH transcript")
    return Prompt(chosen[: cut + len(ASSISTANT)], turns(chosen[:cut]))


def _from_turns(turns: tuple[tuple[str, str], ...], field: str, where: str) -> Prompt:
    """A prompt from chat messages; its text is the content of a lone user's turn, and an HH transcript of several."""
    if turns and turns[-1][0] != "user":
        raise UserError(f"{where}: {field!r} must end with the user's message, not the {turns[-1][0]}'s")
    return Prompt(turns[0][1] if len(turns) == 1 else transcript(turns), turns)


_FORMATS: dict[str, Callable[[Row, str], Prompt | None]] = {"hh": _read_hh, "jsonl": _read_jsonl, "text": _read_text}
