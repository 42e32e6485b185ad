"""Dialogues as text and as turns: the transcript form of Anthropic HH, and a tokenizer's own chat template."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jinja2

from spinal_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ASSISTANT = "\n\nAssistant:"
MARKER = re.compile("\n\n(Human|Assistant):")
_ROLE_OF = {"Human": "user", "Assistant": "assistant"}
_NAME_OF = {role: name for name, role in _ROLE_OF.items()}


def turns(transcript: str) -> tuple[tuple[str, str], ...]:
    """The turns of a transcript; what stands before the first marker, if anything, is the user's."""
    before, *rest = MARKER.split(transcript)
    found = [(_ROLE_OF[name], content.strip()) for name, content in zip(rest[::2], rest[1::2], strict=True)]
    return (("user", before.strip()), *found) if before.strip() else tuple(found)


def transcript(turns: Sequence[tuple[str, str]]) -> str:
    """The transcript of turns, ending where the assistant's reply begins; a system's content stands there unmarked."""
    parts = [f"\n\n{_NAME_OF[role]}: {content}" if role in _NAME_OF else content for role, content in turns]
    return "".join(parts) + ASSISTANT


def render(turns: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, opening: bool, key: str) -> str:
    """The text of turns under the tokenizer's chat template; `opening`: with its opening of the assistant's reply.

    Special tokens are in the text: tokenise it without adding any. Raises `UserError` if the tokenizer has no chat
    template, or its template refuses these turns; `key` is the part of the configuration that asked for one.
    """
    if not tokenizer.chat_template:
        raise UserError(
            f"{key}.chat_template=true, but this tokenizer has no chat template; set {key}.chat_template=false"
        )
    messages = [{"role": role, "content": content} for role, content in turns]
    rendered: Any
    try:
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=opening, tokenize=False)
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()).removesuffix(".")
        roles = ", ".join(role for role, _ in turns)
        raise UserError(f"the tokenizer's chat template fails on turns ({roles}): {reason}") from error
    return rendered
