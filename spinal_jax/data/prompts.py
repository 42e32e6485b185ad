"""Reads prompts from files and data sets, independent of models and tokenizers.

Rows are streamed and parsed by the function of their format. Errors of a source are one `UserError` with the location.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from spinal_jax.data.presets import PROMPTS, Asked, from_value
from spinal_jax.data.sources import Row, Source, asked, field_of, json_object, read_rows, texts_sha256, valid
from spinal_jax.errors import UserError
from spinal_jax.jsontypes import Json

SHIPPED = "spinal_jax/prompts/default.jsonl"
FORMATS = ("jsonl", "text", *PROMPTS)


@dataclass(frozen=True)
class Prompt:
    """One prompt: `text` is what is tokenised as it stands, `turns` the same as (role, content) for a chat template.

    Roles are "system", "user", "assistant" and "tool". Both hold valid Unicode (no lone surrogates). `where` is how
    errors name the row.
    """

    text: str
    turns: tuple[tuple[str, str], ...]
    where: str = field(default="", compare=False)


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a source in order, and the number of skipped empty rows and blank lines.

    `sha256` is the `texts_sha256` of the texts: equal digests mean equal prompts in equal order. `undecodable` counts
    the bytes that are no UTF-8 and became U+FFFD.
    """

    prompts: tuple[Prompt, ...]
    source: str
    format: str
    skipped_empty: int
    sha256: str
    undecodable: int = 0


def read_prompts(
    path: str | Path | Source | None,
    format: str = "jsonl",
    field: str = "prompt",
    limit: int | None = None,
    offset: int = 0,
) -> PromptSet:
    """The prompts of rows `offset` to `offset + limit` of a source; `path` None is the prompt set of the package.

    Sources: text, JSON lines, a JSON array, parquet or Arrow, told by content, compressed or not; a folder of these; a
    data set on a hub (`sources.source_of`). Formats:
      `jsonl`  rows with named fields, whatever holds them; `field` is a text or a list of chat messages, which is cut
               before the assistant's messages at its end.
      `text`   one prompt a line, as it stands.
      `hh`     Anthropic HH: everything up to and including the last "\\n\\nAssistant:" of `chosen`.
      Others are the presets of `spinal_jax.data.presets`.
    A row of a text file is a line that is not blank; `offset` and `limit` count rows, and what follows the last row
    asked for is not read. A row whose turns are nothing but white space is left out: it and the blank lines among the
    rows asked for are counted in `skipped_empty`. Lone surrogates become U+FFFD.

    Raises `UserError` if the source cannot be read, a row is not of the format (it is named), or nothing is left.
    """
    if format not in FORMATS:
        raise UserError(f"prompts.format={format!r} is unknown; choose one of {', '.join(FORMATS)}")
    if path is None:
        package, name = SHIPPED.split("/", 1)
        path = Source(importlib.resources.files(package).joinpath(name), label=SHIPPED)
    source = path if isinstance(path, Source) else Source(path)
    prompts: list[Prompt] = []
    counts: dict[str, int] = {}
    skipped = 0
    for row in read_rows(source, "prompts", offset, limit, counts, as_text=format == "text"):
        said = None if row.blank else _read(row, format, field)
        if said is None or not any(content.strip() for _, content in said.turns):
            skipped += 1
            continue
        prompts.append(Prompt(said.text, said.turns, row.where))
    if not prompts:
        wanted = asked(offset, limit)
        raise UserError(
            f"{source.shown!r} has no prompt among the rows asked for ({wanted}; {skipped} empty ones left out)"
        )
    sha256 = texts_sha256(prompt.text for prompt in prompts)
    return PromptSet(tuple(prompts), source.shown, format, skipped, sha256, counts.get("undecodable", 0))


def prompts_of(texts: Sequence[str]) -> PromptSet:
    """A prompt set of texts in memory; blank ones are left out. UserError where none is left, or one is no text."""
    if (wrong := next((text for text in texts if not isinstance(text, str)), None)) is not None:
        raise UserError(f"prompts holds {wrong!r}; it takes a list of texts, or a file")
    kept = tuple(
        Prompt(text, (("user", text),), f"prompt {number}")
        for number, text in enumerate(map(valid, texts))
        if text.strip()
    )
    if not kept:
        raise UserError("prompts is an empty list; give at least one text that is not blank")
    return PromptSet(
        kept, "a list of texts", "text", len(texts) - len(kept), texts_sha256(prompt.text for prompt in kept)
    )


def _read(row: Row, format: str, field: str) -> Asked | None:
    if format == "text":
        return Asked(text=row.text, turns=(("user", row.text),))
    record: Json = json_object(row, " or prompts.format=text")
    if format == "jsonl":
        value = field_of(record, field, row.where)
        return from_value(value, field, row.where) if value != [] else None
    return PROMPTS[format](record, row.where)
