"""Dialogues as text: the transcript form of Anthropic HH."""

from __future__ import annotations

import re
from collections.abc import Sequence

ASSISTANT = "\n\nAssistant:"
MARKER = re.compile("\n\n(Human|Assistant):")
_ROLE_OF = {"Human": "user", "Assistant": "assistant"}
_NAME_OF = {"user": "Human", "assistant": "Assistant", "tool": "Tool"}


def turns(transcript: str) -> tuple[tuple[str, str], ...]:
    """The turns of a transcript; what stands before the first marker, if anything, is the user's."""
    before, *rest = MARKER.split(transcript)
    found = [(_ROLE_OF[name], content.strip()) for name, content in zip(rest[::2], rest[1::2], strict=True)]
    return (("user", before.strip()), *found) if before.strip() else tuple(found)


def transcript(turns: Sequence[tuple[str, str]]) -> str:
    """The transcript of turns, ending where the assistant's reply begins; a system's content stands there unmarked."""
    parts = [f"\n\n{_NAME_OF[role]}: {content}" if role in _NAME_OF else content for role, content in turns]
    return "".join(parts) + ASSISTANT
