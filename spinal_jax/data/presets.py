"""Formats of public data sets: for each, a function for the prompt of a row and one for the pair of responses."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spinal_jax.data.messages import Turn, ending_before_reply, transposed, turns_of
from spinal_jax.data.sources import field_of, json_start, names_of, string_of
from spinal_jax.data.transcripts import ASSISTANT, MARKER, transcript, turns
from spinal_jax.errors import UserError
from spinal_jax.jsontypes import Json

Turns = tuple[Turn, ...]
Record = Json
LARGEST = sys.float_info.max


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A prompt as text and as turns."""

    text: str
    turns: Turns


@dataclass(frozen=True, kw_only=True)
class Sides:
    """The pair of a row: `prompt + chosen` and `prompt + rejected` are texts, `turns` the prompt's.

    `shortened`: turns after a response were removed.
    """

    prompt: str
    chosen: str
    rejected: str
    turns: Turns
    shortened: bool = False


def from_text(text: str) -> Asked:
    """A prompt from a text; a transcript that ends with "Assistant:" is parsed into turns."""
    ends = text.rstrip().endswith(ASSISTANT)
    return Asked(text=text, turns=turns(text.rstrip().removesuffix(ASSISTANT)) if ends else (("user", text),))


def from_turns(turns: Turns) -> Asked:
    """A prompt from turns; its text is the content of a lone user's turn, and an HH transcript of several."""
    alone = len(turns) == 1 and turns[0][0] == "user"
    return Asked(text=turns[0][1] if alone else transcript(turns), turns=turns)


def from_value(value: object, field: str, where: str) -> Asked:
    """A prompt from a field that holds a text or messages, cut before the assistant's at the end."""
    if isinstance(value, list | dict):
        return from_turns(ending_before_reply(turns_of(value, field, where), field, where))
    return from_text(_plain(value, field, where))


def _plain(value: object, field: str, where: str) -> str:
    """A text. Raises UserError if it is messages in JSON, which would be taken for what was said."""
    text = string_of(value, field, where)
    if text.lstrip()[:1] == "[" and '"content"' in text[:10_000]:
        try:
            messages = json.loads(text)
        except (ValueError, RecursionError):
            return text
        if messages and all(isinstance(each, dict) and {"role", "content"} <= each.keys() for each in messages):
            raise UserError(f"{where}: {field!r} holds messages as a JSON text; give them as a list")
    return text


def mapped(record: Record, fields: Mapping[str, str], where: str) -> Record:
    """The record with renamed columns; "a.b" is the column b of the column a."""
    named = {}
    for name, column in fields.items():
        value: Any = record
        if column in record:
            value = record[column]
        else:
            for part in column.split("."):
                if not isinstance(value, dict) or part not in value:
                    raise UserError(f"{where} has no field {column!r}; it has {names_of(record)}")
                value = value[part]
        named[name] = value
    return {**record, **named}


# Pairs


def hh_pair(record: Record, where: str) -> Sides | str:
    chosen, rejected = (string_of(field_of(record, field, where), field, where) for field in ("chosen", "rejected"))
    if not (chosen.strip() and rejected.strip()):
        return "empty"
    for field, text in (("chosen", chosen), ("rejected", rejected)):
        if ASSISTANT not in text:
            raise UserError(f"{where}: {field!r} has no {ASSISTANT!r}, so it is not an HH transcript")
    return _from_transcripts(chosen, rejected)


def trl_pair(record: Record, where: str) -> Sides | str:
    """TRL's standard and conversational forms, with a prompt of their own or without."""
    prompt, system = record.get("prompt"), record.get("system")
    chosen, rejected = (field_of(record, key, where) for key in ("chosen", "rejected"))
    if isinstance(chosen, list | dict) and isinstance(rejected, list | dict):
        return _from_messages(prompt, system, chosen, rejected, where)
    for field, value in (("chosen", chosen), ("rejected", rejected)):
        if isinstance(value, list | dict):
            raise UserError(f"{where}: {field!r} holds messages but the other response does not; give two of a kind")
    chosen, rejected = _plain(chosen, "chosen", where), _plain(rejected, "rejected", where)
    if isinstance(prompt, list | dict) or (system is not None and prompt is not None):
        given = turns_of(prompt, "prompt", where) if isinstance(prompt, list | dict) else None
        asked = [("user", _plain(prompt, "prompt", where))] if given is None else given
        return _replies(_ending_with_user([*_system(system, where), *asked], where), chosen, rejected)
    if prompt is None:
        return _from_texts(chosen, rejected)
    said = from_text(_plain(prompt, "prompt", where))
    return Sides(prompt=said.text, chosen=chosen, rejected=rejected, turns=said.turns)


def helpsteer3_pair(record: Record, where: str) -> Sides | str:
    """`context`, and of `response1` and `response2` the first where `overall_preference` is below 0; 0 is a tie."""
    asked = _ending_with_user(turns_of(field_of(record, "context", where), "context", where), where)
    one, two = (string_of(field_of(record, name, where), name, where) for name in ("response1", "response2"))
    preference = _number(field_of(record, "overall_preference", where), "overall_preference", where)
    if preference == 0:
        return "tie"
    return _replies(asked, one, two) if preference < 0 else _replies(asked, two, one)


def shp_pair(record: Record, where: str) -> Sides | str:
    """`history`, and of `human_ref_A` and `human_ref_B` the first where `labels` is 1."""
    asked = (("user", string_of(field_of(record, "history", where), "history", where)),)
    a, b = (string_of(field_of(record, name, where), name, where) for name in ("human_ref_A", "human_ref_B"))
    label = field_of(record, "labels", where)
    if label not in (0, 1):
        raise UserError(f"{where}: 'labels' must be 1 (A is preferred) or 0 (B is), not {json_start(label)}")
    return _replies(asked, a, b) if label else _replies(asked, b, a)


def nectar_pair(record: Record, where: str) -> Sides | str:
    """`prompt`, and of `answers` the one of the best (lowest) rank against the one of the worst."""
    asked = nectar_prompt(record, where)
    answers = field_of(record, "answers", where)
    if isinstance(answers, dict) and all(isinstance(column, list) for column in answers.values()):
        answers = transposed(answers, "answers", where)
    if not isinstance(answers, list) or not all(isinstance(answer, dict) for answer in answers):
        raise UserError(f"{where}: 'answers' must be a list of {{answer, rank}}, not {json_start(answers)}")
    ranked = [
        (
            _number(field_of(each, "rank", where), "rank", where),
            string_of(field_of(each, "answer", where), "answer", where),
        )
        for each in answers
    ]
    if len(ranked) < 2:
        return "empty"
    best, worst = min(ranked, key=lambda each: each[0]), max(ranked, key=lambda each: each[0])
    return "tie" if best[0] == worst[0] else _replies(asked.turns, best[1], worst[1])


def orca_pair(record: Record, where: str) -> Sides | str:
    """`system` and `question` or `input`, with `chosen` and `rejected` as texts; or messages, as `jsonl` has them."""
    if isinstance(record.get("chosen"), list | dict):
        return trl_pair(record, where)
    asked = orca_prompt(record, where).turns
    if record.get("status") == "tie":
        return "tie"
    chosen, rejected = (string_of(field_of(record, name, where), name, where) for name in ("chosen", "rejected"))
    return _replies(asked, chosen, rejected)


def kto_pair(record: Record, where: str) -> Sides | str:
    raise UserError(
        "preferences.format=kto has one completion with a label in each row, so there are no pairs to prefer one of; "
        "it can be read as prompts (prompts.format=kto)"
    )


PAIRS: dict[str, Callable[[Record, str], Sides | str]] = {
    "hh": hh_pair,
    "jsonl": trl_pair,
    "ultrafeedback": trl_pair,
    "tulu3": trl_pair,
    "dolci": trl_pair,
    "helpsteer3": helpsteer3_pair,
    "shp": shp_pair,
    "nectar": nectar_pair,
    "orca": orca_pair,
    "kto": kto_pair,
}


# Prompts


def hh_prompt(record: Record, where: str) -> Asked | None:
    chosen = string_of(field_of(record, "chosen", where), "chosen", where)
    if not chosen.strip():
        return None
    cut = chosen.rfind(ASSISTANT)
    if cut < 0:
        raise UserError(f"{where}: 'chosen' has no {ASSISTANT!r}, so it is not an HH transcript")
    return Asked(text=chosen[: cut + len(ASSISTANT)], turns=turns(chosen[:cut]))


def dialogue_prompt(record: Record, where: str) -> Asked:
    """What comes before the last reply in `messages` or `chosen`, or `prompt` where these have none."""
    for field in ("messages", "chosen"):
        if isinstance(value := record.get(field), list | dict):
            alone = all(role == "assistant" for role, _ in turns_of(value, field, where))
            if not (alone and record.get("prompt")):
                return from_value(value, field, where)
    return from_value(field_of(record, "prompt", where), "prompt", where)


def helpsteer3_prompt(record: Record, where: str) -> Asked:
    return from_value(field_of(record, "context", where), "context", where)


def shp_prompt(record: Record, where: str) -> Asked:
    return from_turns((("user", string_of(field_of(record, "history", where), "history", where)),))


def nectar_prompt(record: Record, where: str) -> Asked:
    """A transcript that ends with "Assistant:" and white space, which a reply begins with."""
    text = string_of(field_of(record, "prompt", where), "prompt", where).rstrip()
    if text and not text.endswith(ASSISTANT):
        raise UserError(f"{where}: 'prompt' does not end with {ASSISTANT!r}, as those of Nectar do")
    return from_text(text)


def orca_prompt(record: Record, where: str) -> Asked:
    if isinstance(record.get("chosen"), list | dict):
        return dialogue_prompt(record, where)
    name = "input" if "input" in record and "question" not in record else "question"
    question = string_of(field_of(record, name, where), name, where)
    return from_turns((*_system(record.get("system"), where), ("user", question)))


def kto_prompt(record: Record, where: str) -> Asked:
    return from_value(field_of(record, "prompt", where), "prompt", where)


PROMPTS: dict[str, Callable[[Record, str], Asked | None]] = {
    "hh": hh_prompt,
    "ultrafeedback": dialogue_prompt,
    "tulu3": dialogue_prompt,
    "dolci": dialogue_prompt,
    "helpsteer3": helpsteer3_prompt,
    "shp": shp_prompt,
    "nectar": nectar_prompt,
    "orca": orca_prompt,
    "kto": kto_prompt,
}


def shared(one: Sequence[object], other: Sequence[object]) -> int:
    """Number of equal leading items."""
    pairs = zip(one, other, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _from_transcripts(chosen: str, rejected: str) -> Sides | str:
    """Cut behind the last "\n\nAssistant:" that both share, and before the next turn of either."""
    cut = chosen.rfind(ASSISTANT, 0, shared(chosen, rejected))
    if cut < 0:
        return "no_prompt"
    end = cut + len(ASSISTANT)
    replies = [MARKER.split(text[end:], maxsplit=1) for text in (chosen, rejected)]
    shortened = any(len(parts) > 1 for parts in replies)
    return Sides(
        prompt=chosen[:end],
        chosen=replies[0][0],
        rejected=replies[1][0],
        turns=turns(chosen[:cut]),
        shortened=shortened,
    )


def _from_texts(chosen: str, rejected: str) -> Sides | str:
    """Without a prompt of their own: the one that two texts share."""
    if not (chosen.strip() and rejected.strip()):
        return "empty"
    begin = chosen[: shared(chosen, rejected)]
    if ASSISTANT in begin:
        return _from_transcripts(chosen, rejected)
    # The response starts at the last shared white space, so that no word is split.
    cut = max((index for index, character in enumerate(begin) if character.isspace()), default=0)
    prompt = chosen[:cut]
    if not prompt.strip():
        return "no_prompt"
    return Sides(prompt=prompt, chosen=chosen[cut:], rejected=rejected[cut:], turns=(("user", prompt),))


def _from_messages(prompt: object, system: object, chosen: object, rejected: object, where: str) -> Sides | str:
    """The prompt is its own messages, those that both sides share, or a string."""
    given = turns_of(prompt, "prompt", where) if isinstance(prompt, list | dict) else []
    sides = []
    for field, messages in (("chosen", chosen), ("rejected", rejected)):
        side = turns_of(messages, field, where)
        if side and all(role != "assistant" for role, _ in side):
            raise UserError(f"{where}: {field!r} has no message of the assistant")
        sides.append(side)
    if not all(sides):
        return "empty"
    if given and all(side[: len(given)] == given for side in sides):
        sides = [side[len(given) :] for side in sides]
    elif given and given[-1][0] != "system" and any(side[0][0] != "assistant" for side in sides):
        raise _contradiction(given[-1][1], next(s for s in sides if s[0][0] != "assistant")[0][1], where)
    same = shared(*sides)
    while not all(side[same : same + 1] and side[same][0] == "assistant" for side in sides):
        if same == 0:
            return "no_prompt"
        same -= 1
    asked = [*given, *sides[0][:same]]
    if not given and asked and isinstance(prompt, str) and not _repeats(prompt, asked):
        raise _contradiction(prompt, next((text for role, text in asked if role == "user"), asked[0][1]), where)
    if not asked:
        if prompt is None:
            raise UserError(f"{where} has no field 'prompt', and 'chosen' and 'rejected' share no message")
        asked = [("user", string_of(prompt, "prompt", where))]
    if not any(role == "system" for role, _ in asked):
        asked = [*_system(system, where), *asked]
    shortened = any(len(side) > same + 1 for side in sides)
    replies = [side[same][1] for side in sides]
    return _replies(_ending_with_user(asked, where), replies[0], replies[1], shortened)


def _repeats(prompt: str, asked: Sequence[Turn]) -> bool:
    """Whether a text says again what the messages ask: one turn of the user's, all of them, or the transcript."""
    said = [text for role, text in asked if role == "user"]
    forms = [*said, *(text for role, text in asked if role == "system"), " ".join(said), transcript(asked)]
    forms += [" ".join(text for _, text in asked)]
    words = prompt.split()
    return not words or any(words == form.split() for form in forms)


def _contradiction(prompt: str, asked: str, where: str) -> UserError:
    return UserError(
        f"{where}: 'prompt' says {prompt[:40]!r} but the messages of 'chosen' and 'rejected' say {asked[:40]!r}; leave "
        "out the one that is wrong"
    )


def _ending_with_user(turns: Sequence[Turn], where: str) -> Turns:
    if not turns or turns[-1][0] not in ("user", "tool"):
        last = f"the {turns[-1][0]}'s" if turns else "nothing"
        prompt = "'prompt', or what 'chosen' and 'rejected' share,"
        raise UserError(f"{where}: {prompt} must end with the user's message, not {last}")
    return tuple(turns)


def _replies(asked: Turns, chosen: str, rejected: str, shortened: bool = False) -> Sides:
    return Sides(
        prompt=transcript(asked), chosen=_reply(chosen), rejected=_reply(rejected), turns=asked, shortened=shortened
    )


def _reply(content: str) -> str:
    """A response after "Assistant:"."""
    return content if content[:1].isspace() else f" {content}"


def _system(content: object, where: str) -> Turns:
    """The system turn, unless it is empty."""
    text = "" if content is None else string_of(content, "system", where)
    return (("system", text),) if text.strip() else ()


def _number(value: object, field: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
        raise UserError(f"{where}: {field!r} must be a number, not {json_start(value)}")
    return float(value)
