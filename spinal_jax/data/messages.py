"""Converts chat messages to turns. Unsupported content raises UserError."""

from __future__ import annotations

import json
from typing import Any

from spinal_jax.data.sources import json_start, string_of, valid
from spinal_jax.errors import UserError
from spinal_jax.jsontypes import Json

Turn = tuple[str, str]  # (role, content)

ROLES = ("system", "user", "assistant", "tool")
_SAME = {
    "developer": "system",
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "model": "assistant",
    "function": "tool",
    "ipython": "tool",
    "environment": "tool",
    "observation": "tool",
}
_CALLS = ("functions", "tool_calls", "function_calls", "function_call")  # text of a message beside its content


def turns_of(messages: object, field: str, where: str) -> list[Turn]:
    """Chat messages {"role", "content"}, or {"from", "value"} as ShareGPT has them, as (role, content).

    Other names of roles become system, user, assistant or tool. Content may be a list of text parts, which are joined;
    images and other parts are refused by name. Calls of tools beside the content follow it on a line of their own.
    """
    if isinstance(messages, dict) and all(isinstance(column, list) for column in messages.values()):
        messages = transposed(messages, field, where)
    if not isinstance(messages, list):
        raise UserError(f"{where}: {field!r} must be a list of messages, not {json_start(messages)}")
    turns: list[Turn] = []
    for message in messages:
        if isinstance(message, dict) and {"from", "value"} <= message.keys():
            message = {"role": message["from"], "content": message["value"]}
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise UserError(f'{where}: a message of {field!r} must be {{"role", "content"}}, not {json_start(message)}')
        role = message["role"]
        role = _SAME.get(role, role) if isinstance(role, str) else role
        if role not in ROLES:
            right = ", ".join(ROLES[:-1]) + f" or {ROLES[-1]}"
            raise UserError(f"{where}: a role in {field!r} must be {right}, not {json_start(role)}")
        calls = [_call(message[name], where) for name in _CALLS if message.get(name)]
        content = message["content"]
        content = "" if content is None and calls else content_of(content, where)
        turns.append((role, "\n".join([content, *calls] if content else calls)))
    return turns


def content_of(content: object, where: str) -> str:
    """The text of a message's content: a string, or a list of text parts."""
    if not isinstance(content, list):
        return string_of(content, "content", where)
    texts = []
    for part in content:
        kind = part.get("type", "text" if "text" in part else None) if isinstance(part, dict) else None
        if isinstance(part, str):
            texts.append(string_of(part, "content", where))
        elif kind in ("text", "input_text", "output_text"):
            texts.append(string_of(part.get("text"), "text", where))
        elif isinstance(kind, str):
            raise UserError(f"{where}: a message has a part of type {json_start(kind)}; only text parts can be read")
        else:
            raise UserError(f"{where}: 'content' must be a string or a list of text parts, not {json_start(content)}")
    return "".join(texts)


def ending_before_reply(turns: list[Turn], field: str, where: str) -> tuple[Turn, ...]:
    """The turns before a reply: without final assistant turns, if a user or tool turn precedes them."""
    end = len(turns)
    while end and turns[end - 1][0] == "assistant":
        end -= 1
    if turns and (not end or turns[end - 1][0] == "system"):
        last = turns[-1][0]
        raise UserError(f"{where}: {field!r} must have a user's message to answer, but it ends with the {last}'s alone")
    return tuple(turns[:end])


def transposed(columns: dict[str, list[Any]], field: str, where: str) -> list[Json]:
    """Rows from a list for each field, the format of older data sets."""
    if len({len(column) for column in columns.values()}) > 1:
        raise UserError(f"{where}: the lists of {field!r} differ in length")
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _call(value: object, where: str) -> str:
    if isinstance(value, str):
        return valid(value)
    try:
        return valid(json.dumps(value, ensure_ascii=False, default=str))
    except RecursionError as error:
        raise UserError(f"{where}: the calls of tools in a message are nested too deeply") from error
