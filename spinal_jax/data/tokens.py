"""Tokenises prompts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from spinal_jax.data.prompts import Prompt, PromptSet
from spinal_jax.data.templates import ChatTemplate, Refusals, TemplateRefusal
from spinal_jax.data.tokenising import tokenising
from spinal_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WIDEST = 64  # characters of a token, beyond which a text is taken to have more tokens than it has characters / WIDEST
SHORT = 1 << 16  # characters that are always tokenised whole
REFUSED = -1  # marks a prompt that the chat template refuses
AT_ONCE = 512  # prompts in a batch, which the tokenizer divides over threads

Exchange = Callable[[bytes], "list[bytes]"]


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenisedPrompts:
    """A prompt set as token ids.

    Attributes:
        prompts: prompts with at least one token, in order.
        ids: token ids of each prompt, int32 [T], T <= max_length.
        shortened: number of prompts that were truncated to their last tokens.
        refused: number of prompts that the chat template refused, which are left out.
        first_refusal: the first of them, with the reason.
    """

    prompts: tuple[Prompt, ...]
    ids: tuple[np.ndarray, ...]
    shortened: int
    refused: int
    first_refusal: str


def tokenise_prompts(
    prompts: PromptSet,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    chat_template: bool,
    part: range | None = None,
    exchange: Exchange | None = None,
) -> TokenisedPrompts:
    """Tokenises all prompts by the rules of `token_ids`. Prompts without tokens are left out.

    Args:
        prompts: all prompts.
        tokenizer, max_length, chat_template: as in `token_ids`.
        part: prompts that this process tokenises, if several share the work; None is all.
        exchange: gathers the results of all processes in order of their parts.

    Raises `UserError` if no prompt has a token, if the tokenizer has no chat template, or if its template refuses more
    than 1 in 20 prompts; fewer are left out and counted.
    """
    template = ChatTemplate(tokenizer, "prompts") if chat_template else None
    refusals = Refusals(len(prompts.prompts))
    part = part if part is not None else range(len(prompts.prompts))
    lengths = np.full(len(part), REFUSED, np.int32)
    found: list[np.ndarray] = []
    shortened = 0
    for first in range(0, len(part), AT_ONCE):
        some: list[int] = []
        texts: list[str] = []
        for place, number in enumerate(part[first : first + AT_ONCE], start=first):
            prompt = prompts.prompts[number]
            try:
                texts.append(_text(prompt, template))
                some.append(place)
            except TemplateRefusal as refusal:
                refusals.add(prompt.where or prompts.source, refusal)
        for place, (ids, cut) in zip(some, _encode(texts, tokenizer, max_length, template is None), strict=True):
            lengths[place] = len(ids)
            found.append(ids)
            shortened += cut and len(ids) > 0
    flat = np.concatenate(found) if found else np.zeros(0, np.int32)
    if exchange is not None:
        every = [_unpacked(each) for each in exchange(_packed(lengths, flat, shortened, refusals.first))]
        lengths, flat = (np.concatenate([each[number] for each in every]) for number in range(2))
        shortened = sum(each[2] for each in every)
        refusals.merge(int(np.count_nonzero(lengths == REFUSED)), [each[3] for each in every])
    ends = np.cumsum(np.maximum(lengths, 0))
    kept = np.flatnonzero(lengths > 0)
    if not len(kept):
        raise UserError(f"the tokenizer makes no token of any prompt in {prompts.source}")
    return TokenisedPrompts(
        prompts=tuple(prompts.prompts[number] for number in kept.tolist()),
        ids=tuple(flat[end - size : end] for end, size in zip(ends[kept], lengths[kept], strict=True)),
        shortened=shortened,
        refused=refusals.count,
        first_refusal=refusals.first,
    )


def _packed(lengths: np.ndarray, flat: np.ndarray, shortened: int, refusal: str) -> bytes:
    """Serialises the tokenised part of a process."""
    head = json.dumps({"prompts": len(lengths), "shortened": shortened, "refusal": refusal}).encode()
    return b"\n".join([head, lengths.astype("<i4").tobytes() + flat.astype("<i4").tobytes()])


def _unpacked(found: bytes) -> tuple[np.ndarray, np.ndarray, int, str]:
    """The inverse of `_packed`."""
    head, _, rest = found.partition(b"\n")
    said = json.loads(head)
    numbers = np.frombuffer(rest, "<i4").astype(np.int32, copy=False)
    return numbers[: said["prompts"]], numbers[said["prompts"] :], said["shortened"], said["refusal"]


def token_ids(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, max_length: int, chat_template: bool) -> np.ndarray:
    """The token ids of a prompt, int32 [T], T <= max_length: of a longer one the last, behind its BOS if it has one.

    Without `chat_template`, `prompt.text` with the tokenizer's default special tokens; with it, `prompt.turns` through
    the tokenizer's own template and its opening of the assistant's reply. A BOS that the text and the tokenizer both
    put in front is there once. Of a text of more than `SHORT` characters and `WIDEST` for each token that is kept, only
    the end is tokenised, from a white space onwards. T is 0 only if the tokenizer maps the text to nothing.

    Raises `UserError` if `max_length` < 1, or the tokenizer has no chat template, or its template refuses these turns.
    """
    template = ChatTemplate(tokenizer, "prompts") if chat_template else None
    ((ids, _),) = _encode([_text(prompt, template)], tokenizer, max_length, template is None)
    return ids


def _text(prompt: Prompt, template: ChatTemplate | None) -> str:
    return prompt.text if template is None else template.render(prompt.turns, opening=True)


def _encode(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int, special: bool
) -> Iterator[tuple[np.ndarray, bool]]:
    """The ids of each text, and whether there were more; `special`: with the tokenizer's default special tokens."""
    if max_length < 1:
        raise UserError(f"prompts.max_length={max_length} leaves no token; give 1 or more")
    if not texts:
        return
    bos = tokenizer.bos_token_id if isinstance(tokenizer.bos_token_id, int) else None
    room = max(SHORT, WIDEST * max_length)

    def encoded(tails: list[str]) -> list[list[int]]:
        # verbose=False: the warning about the model's maximum length is moot, since the cut comes after.
        with tokenising():
            return tokenizer(tails, add_special_tokens=special, verbose=False)["input_ids"]

    tails = [end_of(text, room) for text in texts]
    for text, tail, ids in zip(texts, tails, encoded(tails), strict=True):
        more = room
        while len(tail) < len(text) and len(ids) <= max_length:  # tokens wider than WIDEST
            more *= 4
            tail = end_of(text, more)
            (ids,) = encoded([tail])
        begins = begins_with_bos(text, ids, tokenizer) if len(tail) < len(text) else ids[:1] == [bos]
        ids = ids[repeated_bos(ids, bos) :]
        if len(tail) < len(text) and begins and ids[:1] != [bos]:
            ids = [bos, *ids]
        cut = len(ids) > max_length
        if cut:
            ids = [bos, *ids[len(ids) - max_length + 1 :]] if begins else ids[-max_length:]
        yield np.asarray(ids, dtype=np.int32), cut


def end_of(text: str, room: int) -> str:
    """The text, or of a longer one at most its last `room` characters, from a white space onwards where there is one.

    Most tokenizers cut a text before white space, so that what follows has the tokens that it has in the whole.
    """
    if len(text) <= room:
        return text
    start = len(text) - room
    for place in range(start, min(start + room // 2, len(text))):
        if text[place].isspace() and not text[place - 1].isspace():
            return text[place:]
    return text[start:]


def begins_with_bos(text: str, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokens of a text, of whose end these ids are, begin with BOS: put by the tokenizer or by the text."""
    bos = tokenizer.bos_token_id
    return bos is not None and (ids[:1] == [bos] or text.startswith(str(tokenizer.bos_token)))


def repeated_bos(ids: list[int], bos: int | None) -> int:
    """How many of the first ids are a BOS before another."""
    count = 0
    while bos is not None and ids[count : count + 2] == [bos, bos]:
        count += 1
    return count
