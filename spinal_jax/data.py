"""Reads prompts from files into plain records, and turns a record into the token ids a model sees.

Nothing here knows a model or a batch. A file is streamed line by line (`_lines`), cut to the rows asked for (`_rows`)
and each row is read by the one function of its format (`_FORMATS`); whatever is wrong with a file is one `UserError`
that says where.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.resources
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import jinja2
import numpy as np

from spinal_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHIPPED = "spinal_jax/prompts/default.jsonl"
_ASSISTANT = "\n\nAssistant:"
_MARKER = re.compile("\n\n(Human|Assistant):")
_ROLE_OF = {"Human": "user", "Assistant": "assistant"}
_NAME_OF = {role: name for name, role in _ROLE_OF.items()}
_SURROGATE = re.compile("[\ud800-\udfff]")


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

    `sha256` is the hex digest over the texts in order (each as its UTF-8 length in 8 bytes, big-endian, then its UTF-8
    bytes): equal digests mean equal prompts in equal order.
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
        raise UserError(f"prompts.format={format!r} is unknown; choose one of {', '.join(_FORMATS)}.")
    if offset < 0:
        raise UserError(f"prompts.offset={offset} is negative; give the number of rows to pass over, 0 or more.")
    if limit is not None and limit < 1:
        raise UserError(f"prompts.limit={limit} leaves no prompt; give 1 or more, or null for all.")
    source = SHIPPED if path is None else str(path)
    parse = _FORMATS[format]
    prompts: list[Prompt] = []
    skipped = 0
    digest = hashlib.sha256()
    for where, line in _rows(path, source, offset, limit):
        prompt = parse(line, field, where) if line else None
        if prompt is None or not any(content.strip() for _, content in prompt.turns):
            skipped += 1
            continue
        prompts.append(prompt)
        data = prompt.text.encode()
        digest.update(len(data).to_bytes(8, "big") + data)
    if not prompts:
        asked = f"offset={offset}, limit={'null' if limit is None else limit}"
        raise UserError(f"{source!r} has no prompt among the rows asked for ({asked}; {skipped} empty ones left out).")
    return PromptSet(tuple(prompts), source, format, skipped, digest.hexdigest())


def group_of(text: str, groups: int) -> int:
    """The group of a prompt, 0 to `groups` - 1: the 8-byte BLAKE2b hash of its UTF-8 text, big-endian, modulo `groups`.

    The same in every process and on every machine.
    """
    digest = hashlib.blake2b(_valid(text).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % groups


def token_ids(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, max_length: int, chat_template: bool) -> np.ndarray:
    """The LAST `max_length` token ids of a prompt, int32 [T], T <= max_length; the cut may drop a leading BOS.

    Without `chat_template`, `prompt.text` with the tokenizer's default special tokens; with it, `prompt.turns` through
    the tokenizer's own template and its opening of the assistant's reply. T is 0 only if the tokenizer maps the text to
    nothing.

    Raises `UserError` if `max_length` < 1, or the tokenizer has no chat template, or its template refuses these turns.
    """
    if max_length < 1:
        raise UserError(f"prompts.max_length={max_length} leaves no token; give 1 or more.")
    encoded: Any
    # verbose=False: the warning about the model's maximum length is moot, since the cut comes after.
    if not chat_template:
        encoded = tokenizer(prompt.text, verbose=False)
    elif not tokenizer.chat_template:
        raise UserError(
            "prompts.chat_template=true, but this tokenizer has no chat template; set prompts.chat_template=false."
        )
    else:
        messages = [{"role": role, "content": content} for role, content in prompt.turns]
        try:
            encoded = tokenizer.apply_chat_template(
                messages,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,  # the default since transformers 5, said aloud for 4
                tokenizer_kwargs={"verbose": False},
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            roles = ", ".join(role for role, _ in prompt.turns)
            raise UserError(f"The tokenizer's chat template fails on turns ({roles}): {reason}.") from error
    return np.asarray(encoded["input_ids"][-max_length:], dtype=np.int32)


def _rows(path: str | None, source: str, offset: int, limit: int | None) -> Iterator[tuple[str, str]]:
    """(where it is, the line without its newline) of the rows asked for; a blank line among them comes as ""."""
    row = 0
    for number, line in enumerate(_lines(path, source), 1):
        blank = not line.strip()
        if row >= offset:
            yield f"{source!r}, line {number}", "" if blank else line.removesuffix("\n")
        row += not blank
        if limit is not None and row >= offset + limit:
            return


def _lines(path: str | None, source: str) -> Iterator[str]:
    try:
        with _open(path) as file:
            yield from file
    except FileNotFoundError as error:
        raise UserError(f"prompts.path: there is no file {source!r}.") from error
    except IsADirectoryError as error:
        raise UserError(f"prompts.path: {source!r} is a folder; give one file.") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"prompts.path: {source!r} is not a whole gzip file ({error}).") from error
    except OSError as error:
        raise UserError(f"prompts.path: {source!r} cannot be read ({error.strerror or error}).") from error


def _open(path: str | None) -> IO[str]:
    # utf-8-sig passes over a byte order mark
    if path is None:
        package, name = SHIPPED.split("/", 1)
        return importlib.resources.files(package).joinpath(name).open("r", encoding="utf-8-sig", errors="replace")
    file = Path(path).expanduser()
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding="utf-8-sig", errors="replace")
    return file.open(encoding="utf-8-sig", errors="replace")


def _valid(text: str) -> str:
    """The text with lone surrogates, which JSON escapes can carry and UTF-8 cannot, as U+FFFD."""
    return _SURROGATE.sub("\ufffd", text)


def _value(line: str, field: str, where: str) -> Any:
    """The value of one field of a line that must be a JSON object."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where} is not JSON: {line[:60]!r}; give one object a line or prompts.format=text."
        ) from error
    if not isinstance(row, dict):
        raise UserError(f"{where} must hold a JSON object, not {_shown(row)}.")
    if field not in row:
        raise UserError(f"{where} has no field {field!r}; it has {', '.join(map(repr, row)) or 'none'}.")
    return row[field]


def _text(value: object, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: {field!r} must be a string, not {_shown(value)}.")
    return _valid(value)


def _shown(value: object) -> str:
    return json.dumps(value)[:60]


def _read_text(line: str, field: str, where: str) -> Prompt:
    return Prompt(line, (("user", line),))


def _read_jsonl(line: str, field: str, where: str) -> Prompt:
    value = _value(line, field, where)
    if isinstance(value, list):
        return _from_messages(value, field, where)
    text = _text(value, field, where)
    return Prompt(text, (("user", text),))


def _read_hh(line: str, field: str, where: str) -> Prompt | None:
    chosen = _text(_value(line, "chosen", where), "chosen", where)
    if not chosen.strip():
        return None
    cut = chosen.rfind(_ASSISTANT)
    if cut < 0:
        raise UserError(f"{where}: 'chosen' has no {_ASSISTANT!r}, so it is not an HH transcript.")
    return Prompt(chosen[: cut + len(_ASSISTANT)], _turns(chosen[:cut]))


def _turns(transcript: str) -> tuple[tuple[str, str], ...]:
    """The turns of an HH transcript; what stands before the first marker, if anything, is the user's."""
    before, *rest = _MARKER.split(transcript)
    turns = [(_ROLE_OF[name], content.strip()) for name, content in zip(rest[::2], rest[1::2], strict=True)]
    return (("user", before.strip()), *turns) if before.strip() else tuple(turns)


def _from_messages(messages: list[Any], field: str, where: str) -> Prompt:
    """A prompt from chat messages; its text is the content of a lone user's turn, and an HH transcript of several."""
    turns: list[tuple[str, str]] = []
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise UserError(f'{where}: a message of {field!r} must be {{"role", "content"}}, not {_shown(message)}.')
        role = message["role"]
        if role not in ("user", "assistant"):
            raise UserError(f"{where}: a role in {field!r} must be user or assistant, not {_shown(role)}.")
        turns.append((role, _text(message["content"], "content", where)))
    if turns and turns[-1][0] != "user":
        raise UserError(f"{where}: {field!r} must end with the user's message, not the {turns[-1][0]}'s.")
    if len(turns) == 1:
        return Prompt(turns[0][1], tuple(turns))
    transcript = "".join(f"\n\n{_NAME_OF[role]}: {content}" for role, content in turns)
    return Prompt(transcript + _ASSISTANT, tuple(turns))


_FORMATS: dict[str, Callable[[str, str, str], Prompt | None]] = {
    "hh": _read_hh,
    "jsonl": _read_jsonl,
    "text": _read_text,
}
