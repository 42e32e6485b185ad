"""Reads preference pairs, and turns a pair into the token ids of its two sides with the boundary of the response.

The log-probability of a response is summed over its tokens given the prompt, so where the response begins is part of
the loss (Rafailov et al. 2023, arXiv 2305.18290). Prompt and response are tokenised as one text: that is what the model
met in training, and a token that straddles the boundary exists only there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from spinal_jax.data.sources import asked, digest, field_of, json_object, rows, text_of, turns_of
from spinal_jax.data.spans import encode
from spinal_jax.data.transcripts import ASSISTANT, MARKER, render, transcript, turns
from spinal_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class PreferencePair:
    """Two responses to one prompt, of which `chosen` is preferred.

    `prompt + chosen` and `prompt + rejected` are the two texts as they stand; `turns` is the prompt as (role, content)
    for a chat template, whose assistant's reply is then a response without the white space around it. `id` is the row
    in the file (0-based, blank lines not counted), whatever offset it was read from.
    """

    id: int
    prompt: str
    chosen: str
    rejected: str
    turns: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class PairSet:
    """The pairs of one file in file order, and what was left out of them.

    `dropped` counts rows by reason: `empty` (no prompt, or a response of white space alone), `identical` (two equal
    responses) and `no_prompt` (dialogues that part before any reply). `shortened` counts pairs of which a response lost
    the turns that follow it. `sha256` is the `rows.digest` of prompt, chosen and rejected, pair by pair.
    """

    pairs: tuple[PreferencePair, ...]
    source: str
    format: str
    sha256: str
    dropped: dict[str, int]
    shortened: int = 0


@dataclass(frozen=True, eq=False)
class Completion:
    """`ids` int32 [L]: prompt, response and what ends it; `start` in [1, L): the index of the first response token."""

    ids: np.ndarray
    start: int


@dataclass(frozen=True, eq=False)
class TokenPair:
    """The two sides of the pair whose `id` it bears."""

    id: int
    chosen: Completion
    rejected: Completion


def read_pairs(path: str | Path, format: str = "hh", limit: int | None = None, offset: int = 0) -> PairSet:
    """The preference pairs of rows `offset` to `offset + limit` of a file of JSON rows, gzipped if it ends in `.gz`.

    Formats:
      `hh`     Anthropic HH: `chosen` and `rejected` are transcripts, and the prompt is what they share up to and
               including the last "\\n\\nAssistant:". Both responses are replies to that prompt: of dialogues that part
               before their last reply, only the two replies at which they part are kept, for what follows them answers
               different questions.
      `jsonl`  `prompt`, `chosen` and `rejected` as strings or as chat messages {"role", "content"}. Without `prompt`,
               it is what the two share: leading messages; of strings, as for `hh` where they are such transcripts, and
               else whole words. Messages may repeat the prompt's, and become a transcript where text is needed.

    Raises `UserError` if the file cannot be read, a row is not of the format (line and field are named), or no pair is
    left (why is counted).
    """
    if format not in _FORMATS:
        raise UserError(f"preferences.format={format!r} is unknown; choose one of {', '.join(_FORMATS)}")
    source = str(path)
    kept: list[PreferencePair] = []
    dropped = {"empty": 0, "identical": 0, "no_prompt": 0}
    shortened = 0
    for row in rows(path, source, "preferences", offset, limit):
        if not row.text:
            continue
        sides = _checked(_FORMATS[format](json_object(row), row.where))
        if isinstance(sides, str):
            dropped[sides] += 1
        else:
            kept.append(PreferencePair(row.number, sides.prompt, sides.chosen, sides.rejected, sides.turns))
            shortened += sides.shortened
    if not kept:
        found = f"{asked(offset, limit)}; {_counts(dropped) or 'there are none'}"
        raise UserError(f"{source!r} has no preference pair among the rows asked for ({found})")
    sha256 = digest(text for pair in kept for text in (pair.prompt, pair.chosen, pair.rejected))
    return PairSet(tuple(kept), source, format, sha256, dropped, shortened)


def tokenise_pairs(
    pairs: PairSet,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    chat_template: bool,
    overlong: Literal["drop", "cut_prompt"] = "drop",
) -> tuple[tuple[TokenPair, ...], dict[str, int]]:
    """Both sides of every pair as token ids, and how many pairs were dropped why.

    A side is prompt and response as one text with the tokenizer's default special tokens, and its EOS at the end; with
    `chat_template`, the prompt's turns and the response as the assistant's message under the tokenizer's template,
    which ends it in its own way. The response starts at the first token that reaches beyond the prompt's characters.

    A pair with a side of more than `max_length` tokens is dropped (`overlong`). With `cut_prompt` both sides first lose
    as many of the prompt's first tokens as the longer one needs to fit, BOS excepted; the pair is dropped only if no
    token of the prompt would remain. Dropped too: `identical` sides, `empty` responses (no token), and `no_prompt`: a
    response whose first token nothing precedes.

    Raises `UserError` if no pair is left, or the template fails or does not continue its own opening of the reply.
    """
    if overlong not in ("drop", "cut_prompt"):
        raise UserError(f"preferences.overlong={overlong!r} is unknown; choose drop or cut_prompt")
    if max_length < 2:
        raise UserError(f"preferences.max_length={max_length} leaves no response; give 2 or more")
    sides = [
        _side(pair, reply, tokenizer, chat_template) for pair in pairs.pairs for reply in (pair.chosen, pair.rejected)
    ]
    texts, boundaries = zip(*sides, strict=True)
    eos: Any = None if chat_template else tokenizer.eos_token_id
    found = encode(texts, tokenizer, not chat_template, boundaries)
    kept: list[TokenPair] = []
    dropped = {"overlong": 0, "identical": 0, "empty": 0, "no_prompt": 0}
    # One iterator twice: the two sides of a pair follow each other.
    for pair, (chosen, chosen_start), (rejected, rejected_start) in zip(pairs.pairs, found, found, strict=False):
        if chosen_start is None or rejected_start is None:
            dropped["empty"] += 1
        elif not (chosen_start and rejected_start):
            dropped["no_prompt"] += 1
        elif chosen == rejected:
            dropped["identical"] += 1
        else:
            chosen, rejected = _ended(chosen, eos), _ended(rejected, eos)
            kept_first = int(chosen[0] == tokenizer.bos_token_id)
            excess = max(0, len(chosen) - max_length, len(rejected) - max_length)
            if excess and (overlong == "drop" or min(chosen_start, rejected_start) - excess <= kept_first):
                dropped["overlong"] += 1
                continue
            sides = ((chosen, chosen_start), (rejected, rejected_start))
            kept.append(TokenPair(pair.id, *(_cut(ids, start, kept_first, excess) for ids, start in sides)))
    if not kept:
        why = f"max_length={max_length}, overlong={overlong}: {_counts(dropped)}"
        raise UserError(f"{pairs.source!r}: none of its {len(pairs.pairs)} pairs is left as tokens ({why})")
    return tuple(kept), dropped


def _side(
    pair: PreferencePair, response: str, tokenizer: PreTrainedTokenizerBase, chat_template: bool
) -> tuple[str, int]:
    """The text of one side, and at which character the response begins."""
    if not chat_template:
        return pair.prompt + response, len(pair.prompt)
    try:
        opening = render(pair.turns, tokenizer, opening=True, key="preferences")
        whole = render((*pair.turns, ("assistant", response.strip())), tokenizer, opening=False, key="preferences")
    except UserError as error:
        raise UserError(f"pair {pair.id}: {error}") from error
    if not whole.startswith(opening):
        raise UserError(
            f"pair {pair.id}: the tokenizer's chat template opens a reply with {opening[-40:]!r} but writes a finished "
            "one in another way, so where a response begins is unknown; set preferences.chat_template=false"
        )
    return whole, len(opening)


def _ended(ids: list[int], eos: int | None) -> list[int]:
    return ids if eos is None or ids[-1] == eos else [*ids, eos]


def _cut(ids: list[int], start: int, first: int, excess: int) -> Completion:
    """The ids without the `excess` that follow the `first` ones."""
    return Completion(np.asarray(ids[:first] + ids[first + excess :], dtype=np.int32), start - excess)


def _shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many leading items are equal."""
    pairs = zip(one, other, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _counts(dropped: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)


@dataclass(frozen=True)
class _Sides:
    """A row as read: the fields of a `PreferencePair`, and whether a response lost what follows it."""

    prompt: str
    chosen: str
    rejected: str
    turns: tuple[tuple[str, str], ...]
    shortened: bool = False


def _checked(sides: _Sides | str) -> _Sides | str:
    """What a format has read, or why the pair is left out."""
    if isinstance(sides, str):
        return sides
    if not (any(content.strip() for _, content in sides.turns) and sides.chosen.strip() and sides.rejected.strip()):
        return "empty"
    return "identical" if sides.chosen == sides.rejected else sides


def _read_hh(record: dict[str, Any], where: str) -> _Sides | str:
    chosen, rejected = (text_of(field_of(record, field, where), field, where) for field in ("chosen", "rejected"))
    if not (chosen.strip() and rejected.strip()):
        return "empty"
    for field, text in (("chosen", chosen), ("rejected", rejected)):
        if ASSISTANT not in text:
            raise UserError(f"{where}: {field!r} has no {ASSISTANT!r}, so it is not an HH transcript")
    return _from_transcripts(chosen, rejected)


def _from_transcripts(chosen: str, rejected: str) -> _Sides | str:
    """Cut behind the last "\n\nAssistant:" that both share, and before the next turn of either."""
    cut = chosen.rfind(ASSISTANT, 0, _shared(chosen, rejected))
    if cut < 0:
        return "no_prompt"
    end = cut + len(ASSISTANT)
    replies = [MARKER.split(text[end:], maxsplit=1) for text in (chosen, rejected)]
    shortened = any(len(parts) > 1 for parts in replies)
    return _Sides(chosen[:end], replies[0][0], replies[1][0], turns(chosen[:cut]), shortened)


def _read_jsonl(record: dict[str, Any], where: str) -> _Sides | str:
    prompt, chosen, rejected = record.get("prompt"), *(field_of(record, key, where) for key in ("chosen", "rejected"))
    if isinstance(chosen, list) and isinstance(rejected, list):
        return _from_messages(prompt, chosen, rejected, where)
    for field, value in (("chosen", chosen), ("rejected", rejected)):
        if isinstance(value, list):
            raise UserError(f"{where}: {field!r} holds messages but the other response does not; give two of a kind")
    chosen, rejected = text_of(chosen, "chosen", where), text_of(rejected, "rejected", where)
    if prompt is None:
        return _from_texts(chosen, rejected)
    if isinstance(prompt, list):
        asked = _ending_with_user(turns_of(prompt, "prompt", where, _ROLES), where)
        return _Sides(transcript(asked), _reply(chosen), _reply(rejected), asked)
    prompt = text_of(prompt, "prompt", where)
    ends = prompt.rstrip().endswith(ASSISTANT)
    asked = turns(prompt.rstrip().removesuffix(ASSISTANT)) if ends else (("user", prompt),)
    return _Sides(prompt, chosen, rejected, asked)


def _from_texts(chosen: str, rejected: str) -> _Sides | str:
    """Without a prompt of their own: the one that two texts share."""
    if not (chosen.strip() and rejected.strip()):
        return "empty"
    shared = chosen[: _shared(chosen, rejected)]
    if ASSISTANT in shared:
        return _from_transcripts(chosen, rejected)
    # The response begins with the last white space that they share, so that no word is cut.
    cut = max((index for index, character in enumerate(shared) if character.isspace()), default=0)
    prompt = chosen[:cut]
    return _Sides(prompt, chosen[cut:], rejected[cut:], (("user", prompt),)) if prompt.strip() else "no_prompt"


def _from_messages(prompt: object, chosen: list[Any], rejected: list[Any], where: str) -> _Sides | str:
    """The prompt is its own messages, those that both sides share, or a string."""
    given = turns_of(prompt, "prompt", where, _ROLES) if isinstance(prompt, list) else []
    sides = []
    for field, messages in (("chosen", chosen), ("rejected", rejected)):
        found = turns_of(messages, field, where, _ROLES)
        if found and all(role != "assistant" for role, _ in found):
            raise UserError(f"{where}: {field!r} has no message of the assistant")
        sides.append(found)
    if not all(sides):
        return "empty"
    if all(side[: len(given)] == given for side in sides):
        sides = [side[len(given) :] for side in sides]
    shared = _shared(*sides)
    while not all(side[shared : shared + 1] and side[shared][0] == "assistant" for side in sides):
        if shared == 0:
            return "no_prompt"
        shared -= 1
    asked = [*given, *sides[0][:shared]]
    if not asked:
        if prompt is None:
            raise UserError(f"{where} has no field 'prompt', and 'chosen' and 'rejected' share no message")
        asked = [("user", text_of(prompt, "prompt", where))]
    replies = [_reply(side[shared][1]) for side in sides]
    shortened = any(len(side) > shared + 1 for side in sides)
    asked = _ending_with_user(asked, where)
    return _Sides(transcript(asked), replies[0], replies[1], asked, shortened)


def _ending_with_user(turns: list[tuple[str, str]], where: str) -> tuple[tuple[str, str], ...]:
    if not turns or turns[-1][0] != "user":
        last = f"the {turns[-1][0]}'s" if turns else "nothing"
        prompt = "'prompt', or what 'chosen' and 'rejected' share,"
        raise UserError(f"{where}: {prompt} must end with the user's message, not {last}")
    return tuple(turns)


def _reply(content: str) -> str:
    """A response behind "Assistant:"."""
    return content if content[:1].isspace() else f" {content}"


_FORMATS: dict[str, Callable[[dict[str, Any], str], _Sides | str]] = {"hh": _read_hh, "jsonl": _read_jsonl}
