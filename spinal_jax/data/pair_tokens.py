"""Tokenises preference pairs and finds the start of the responses.

The log-probability of a response is summed over its tokens given the prompt, so where the response begins is part of
the loss (Rafailov et al. 2023, arXiv 2305.18290). Prompt and response are tokenised as one text: that is what the model
met in training, and a token that straddles the boundary exists only there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from spinal_jax.data.pairs import PairSet, PreferencePair, counted
from spinal_jax.data.spans import encode
from spinal_jax.data.templates import ChatTemplate, Refusals, TemplateRefusal
from spinal_jax.data.tokens import SHORT, WIDEST, end_of, repeated_bos
from spinal_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Completion:
    """`ids` int32 [L]: prompt, response and what ends it; `start` in [1, L): the index of the first response token."""

    ids: np.ndarray
    start: int


@dataclass(frozen=True, eq=False)
class TokenPair:
    """The two tokenised sides of the pair `id`."""

    id: int
    chosen: Completion
    rejected: Completion


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

    Left out too, and counted as `refused`: pairs whose turns the chat template refuses, if they are at most 1 in 20. A
    BOS that the text and the tokenizer both put in front is there once. A response of more than `SHORT` characters and
    `WIDEST` for each token of `max_length` is overlong, and of a prompt only so many last characters are tokenised.

    Raises `UserError` if no pair is left, the template refuses many or does not continue its own opening of the reply,
    or the tokenizer has no EOS to end a response with and no template does.
    """
    if overlong not in ("drop", "cut_prompt"):
        raise UserError(f"preferences.overlong={overlong!r} is unknown; choose drop or cut_prompt")
    if max_length < 2:
        raise UserError(f"preferences.max_length={max_length} leaves no response; give 2 or more")
    eos: Any = None if chat_template else required_eos(tokenizer, "a response", "set preferences.chat_template=true")
    dropped = {"overlong": 0, "identical": 0, "empty": 0, "no_prompt": 0, "refused": 0}
    pieces, sides = _sides(pairs, tokenizer, max_length, chat_template, dropped)
    texts = [text for side in sides for text, _ in side]
    found = encode(texts, tokenizer, not chat_template, [boundary for side in sides for _, boundary in side])
    bos = tokenizer.bos_token_id if isinstance(tokenizer.bos_token_id, int) else None
    kept: list[TokenPair] = []
    # Takes two items at a time: the two sides of a pair are adjacent.
    for (pair, cut), (chosen, chosen_start), (rejected, rejected_start) in zip(pieces, found, found, strict=False):
        if chosen_start is None or rejected_start is None:
            dropped["empty"] += 1
            continue
        again = repeated_bos(chosen, bos), repeated_bos(rejected, bos)
        chosen, chosen_start = chosen[again[0] :], chosen_start - again[0]
        rejected, rejected_start = rejected[again[1] :], rejected_start - again[1]
        if chosen_start < 1 or rejected_start < 1:
            dropped["no_prompt"] += 1
        elif chosen == rejected:
            dropped["identical"] += 1
        else:
            chosen, rejected = _ended(chosen, eos), _ended(rejected, eos)
            kept_first = int(chosen[0] == bos)
            excess = max(0, len(chosen) - max_length, len(rejected) - max_length)
            too_long = excess > 0 or cut
            if too_long and (overlong == "drop" or min(chosen_start, rejected_start) - excess <= kept_first):
                dropped["overlong"] += 1
                continue
            both = ((chosen, chosen_start), (rejected, rejected_start))
            kept.append(TokenPair(pair.id, *(_cut(ids, start, kept_first, excess) for ids, start in both)))
    if not kept:
        why = f"max_length={max_length}, overlong={overlong}: {counted(dropped)}"
        raise UserError(f"{pairs.source!r}: none of its {len(pairs.pairs)} pairs is left as tokens ({why})")
    return tuple(kept), dropped


def required_eos(tokenizer: PreTrainedTokenizerBase, what: str, otherwise: str) -> int:
    """The id of EOS. UserError where the tokenizer has none: the end of `what` could neither be learnt nor scored."""
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise UserError(
            f"the tokenizer has no EOS token, which {what} ends with; name it as eos_token in tokenizer_config.json, "
            f"or {otherwise}"
        )
    return eos


Side = tuple[str, int]  # text of a side, and at which character the response begins


def _sides(
    pairs: PairSet, tokenizer: PreTrainedTokenizerBase, max_length: int, chat_template: bool, dropped: dict[str, int]
) -> tuple[list[tuple[PreferencePair, bool]], list[tuple[Side, Side]]]:
    """The pairs whose texts may fit, whether their prompts were cut, and their two sides."""
    template = ChatTemplate(tokenizer, "preferences") if chat_template else None
    refusals = Refusals(len(pairs.pairs))
    room = max(SHORT, WIDEST * max_length)
    kept, sides = [], []
    for pair in pairs.pairs:
        if max(len(pair.chosen), len(pair.rejected)) > room:
            dropped["overlong"] += 1
            continue
        try:
            both = _texts(pair, template)
        except TemplateRefusal as refusal:
            refusals.add(f"pair {pair.id}", refusal)
            continue
        kept.append((pair, max(boundary for _, boundary in both) > room))
        sides.append(tuple(_shortened(*side, room, tokenizer) for side in both))
    dropped["refused"] = refusals.count
    return kept, sides


def _texts(pair: PreferencePair, template: ChatTemplate | None) -> tuple[Side, Side]:
    if template is None:
        start = len(pair.prompt)
        return (pair.prompt + pair.chosen, start), (pair.prompt + pair.rejected, start)
    opening = template.render(pair.turns, opening=True)
    chosen, rejected = (
        template.render((*pair.turns, ("assistant", reply.strip())), opening=False)
        for reply in (pair.chosen, pair.rejected)
    )
    if not (chosen.startswith(opening) and rejected.startswith(opening)):
        raise UserError(
            f"pair {pair.id}: the tokenizer's chat template opens a reply with {opening[-40:]!r} but writes a finished "
            "one in another way, so where a response begins is unknown; set preferences.chat_template=false"
        )
    return (chosen, len(opening)), (rejected, len(opening))


def _shortened(text: str, boundary: int, room: int, tokenizer: PreTrainedTokenizerBase) -> Side:
    """The side with at most the last `room` characters of its prompt, behind a BOS that it begins with."""
    if boundary <= room:
        return text, boundary
    prompt = end_of(text[:boundary], room)
    bos = tokenizer.bos_token
    if isinstance(bos, str) and text.startswith(bos):
        prompt = bos + prompt
    return prompt + text[boundary:], len(prompt)


def _ended(ids: list[int], eos: int | None) -> list[int]:
    return ids if eos is None or ids[-1] == eos else [*ids, eos]


def _cut(ids: list[int], start: int, first: int, excess: int) -> Completion:
    """The ids without the `excess` that follow the `first` ones."""
    return Completion(np.asarray(ids[:first] + ids[first + excess :], dtype=np.int32), start - excess)
