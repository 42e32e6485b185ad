"""Tokenises texts in bulk, and finds the token at which a part of a text begins."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_AT_ONCE = 1024  # texts whose offsets are held at a time


def encode(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, special: bool, boundaries: Sequence[int] | None = None
) -> Iterator[tuple[list[int], int | None]]:
    """Each text's token ids, and the index of the first token that reaches beyond its first `boundary` characters.

    A token that straddles the boundary counts as beyond it. The index is None if no token does; without `boundaries`
    it is that of the first token that stands for any text. `special`: with the tokenizer's default special tokens.
    """
    backend = _whole_offsets(tokenizer)
    for first in range(0, len(texts), _AT_ONCE):
        some = list(texts[first : first + _AT_ONCE])
        ends = [0] * len(some) if boundaries is None else boundaries[first : first + _AT_ONCE]
        for found, boundary in zip(backend.encode_batch(some, add_special_tokens=special), ends, strict=True):
            # A special token that the tokenizer adds stands for no text: its span is (0, 0).
            start = next((index for index, (_, end) in enumerate(found.offsets) if end > boundary), None)
            yield found.ids, start


def _whole_offsets(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A copy of the tokenizer that neither cuts nor pads, and whose spans hold the white space of a token.

    GPT-2's post-processor trims spans (`trim_offsets`): a token ".\\n" would seem to end before a response that begins
    with the line break.
    """
    fast: Any = tokenizer
    state = json.loads(fast.backend_tokenizer.to_str())
    processor = state["post_processor"] or {}
    for stage in processor.get("processors", [processor]):
        if "trim_offsets" in stage:
            stage["trim_offsets"] = False
    backend = Tokenizer.from_str(json.dumps(state))
    backend.no_truncation()
    backend.no_padding()
    return backend
