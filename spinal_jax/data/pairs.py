"""Reads preference pairs from files and data sets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from spinal_jax.data.presets import PAIRS, Sides, mapped
from spinal_jax.data.sources import Source, asked, json_object, read_rows, texts_sha256
from spinal_jax.errors import UserError


@dataclass(frozen=True)
class PreferencePair:
    """Two responses to a prompt; `chosen` is preferred.

    `prompt + chosen` and `prompt + rejected` are the two texts as they stand; `turns` is the prompt as (role, content)
    for a chat template, whose assistant's reply is then a response without the white space around it. `id` is the row
    in the source (0-based, blank lines not counted), whatever offset it was read from.
    """

    id: int
    prompt: str
    chosen: str
    rejected: str
    turns: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class PairSet:
    """The pairs of a source in order, and counts of those left out.

    `dropped` counts rows by reason: `empty` (no prompt, or a response of white space alone), `identical` (two equal
    responses), `no_prompt` (dialogues that part before any reply) and `tie` (neither response is preferred).
    `shortened` counts pairs of which a response lost the turns that follow it. `sha256` is the `texts_sha256` of
    prompt, chosen and rejected, pair by pair.
    """

    pairs: tuple[PreferencePair, ...]
    source: str
    format: str
    sha256: str
    dropped: dict[str, int]
    shortened: int = 0


def read_pairs(
    path: str | Path | Source,
    format: str = "hh",
    limit: int | None = None,
    offset: int = 0,
    fields: Mapping[str, str] | None = None,
) -> PairSet:
    """The preference pairs of rows `offset` to `offset + limit` of a source, as for `read_prompts`.

    Formats:
      `hh`     Anthropic HH: `chosen` and `rejected` are transcripts, and the prompt is what they share up to and
               including the last "\n\nAssistant:". Both responses are replies to that prompt: of dialogues that part
               before their last reply, only the two replies at which they part are kept, for what follows them answers
               different questions.
      `jsonl`  TRL's forms: `prompt`, `chosen` and `rejected` as strings or as chat messages {"role", "content"}.
               Without `prompt`, it is what the two share: leading messages; of strings, as for `hh` where they are
               such transcripts, and else whole words. Messages may repeat the prompt's, must not contradict it, and
               become a transcript where text is needed. `system`, where there is one, comes first.
      Others are the presets of `spinal_jax.data.presets`.
    `fields` names the columns that hold what a format calls prompt, chosen, rejected and system.

    Raises `UserError` if the source cannot be read, a row is not of the format (row and field are named), or no pair is
    left (why is counted).
    """
    if format not in PAIRS:
        raise UserError(f"preferences.format={format!r} is unknown; choose one of {', '.join(PAIRS)}")
    source = path if isinstance(path, Source) else Source(path)
    kept: list[PreferencePair] = []
    counts: dict[str, int] = {}
    dropped = {"empty": 0, "identical": 0, "no_prompt": 0}
    shortened = 0
    for row in read_rows(source, "preferences", offset, limit, counts):
        if row.blank:
            continue
        record = json_object(row)
        sides = _checked(PAIRS[format](mapped(record, fields, row.where) if fields else record, row.where))
        if isinstance(sides, str):
            dropped[sides] = dropped.get(sides, 0) + 1
        else:
            kept.append(PreferencePair(row.number, sides.prompt, sides.chosen, sides.rejected, sides.turns))
            shortened += sides.shortened
    if not kept:
        found = f"{asked(offset, limit)}; {counted(dropped) or 'there are none'}"
        raise UserError(f"{source.shown!r} has no preference pair among the rows asked for ({found})")
    sha256 = texts_sha256(text for pair in kept for text in (pair.prompt, pair.chosen, pair.rejected))
    return PairSet(tuple(kept), source.shown, format, sha256, dropped, shortened)


def counted(dropped: Mapping[str, int]) -> str:
    """The counts of dropped rows for error messages."""
    return ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)


def _checked(sides: Sides | str) -> Sides | str:
    """The pair, or the reason why it is left out."""
    if isinstance(sides, str):
        return sides
    if not (any(content.strip() for _, content in sides.turns) and sides.chosen.strip() and sides.rejected.strip()):
        return "empty"
    return "identical" if sides.chosen == sides.rejected else sides
