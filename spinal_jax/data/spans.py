"""Tokenises texts in batches and finds the first token of a part of a text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from spinal_jax.data.tokenising import tokenising

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_AT_ONCE = 1024  # texts in a batch


def encode(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, special: bool, boundaries: Sequence[int] | None = None
) -> Iterator[tuple[list[int], int | None]]:
    """Token ids of each text, and the index of the first token that extends beyond the first `boundary` characters.

    The index is None if there is no such token; without `boundaries` it is that of the first token with text.
    `special`: adds the default special tokens of the tokenizer.
    """
    backend = _whole_offsets(tokenizer)
    for first in range(0, len(texts), _AT_ONCE):
        some = list(texts[first : first + _AT_ONCE])
        ends = [0] * len(some) if boundaries is None else boundaries[first : first + _AT_ONCE]
        with tokenising():
            encoded = backend.encode_batch(some, add_special_tokens=special)
        for found, boundary in zip(encoded, ends, strict=True):
            # Special tokens that the tokenizer adds have the span (0, 0).
            start = next((index for index, (_, end) in enumerate(found.offsets) if end > boundary), None)
            yield found.ids, start


def _whole_offsets(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A copy of the tokenizer without truncation, padding and trimming of spans.

    The post-processor of GPT-2 trims white space from spans (`trim_offsets`): a token ".\\n" would seem to end before a
    response that starts with the line break.
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
