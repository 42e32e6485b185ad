"""Tokenises, groups and packs the prompts of an audit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import numpy as np

from spinal_jax import data
from spinal_jax.audit.devices import Devices, OneDevice
from spinal_jax.config import MetricsConfig, PromptsConfig
from spinal_jax.config.positions import Positions
from spinal_jax.data.packing import Plan, TokenSequence, plan_batches
from spinal_jax.data.vocabulary import Vocabulary
from spinal_jax.errors import UserError
from spinal_jax.metrics.depth import terminal_block
from spinal_jax.metrics.tail import MIN_RANKS, fitted_ranks
from spinal_jax.models.config import DecoderConfig
from spinal_jax.parallel import device_defaults
from spinal_jax.parallel.agreement import gathered, leads, of_leader, own_part
from spinal_jax.parallel.distributed import check_same
from spinal_jax.stats.groups import Dialogue, assign_groups

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HASHED = 4096  # sequences hashed at a time


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupedPrompts:
    """Tokenised prompts with their groups, before they are packed into batches.

    Attributes:
        sequences: the prompts.
        settings: what is measured.
        vocabulary: of the token distributions.
        counts, notes: as in `Plan`.
    """

    sequences: tuple[TokenSequence, ...]
    settings: MetricsConfig
    vocabulary: Vocabulary
    counts: Mapping[str, int]
    notes: Sequence[str]

    def pack(self, batch_tokens: int, rows: int, slots: int | None, among: Sequence[int] | None = None) -> Plan:
        """Packs the prompts into batches.

        Args:
            batch_tokens: tokens of a batch, over all devices.
            rows: number of devices that split the rows of a batch.
            slots: maximum number of groups in a batch if sums leave the devices; None if they stay.
            among: numbers of the prompts to pack; None is all.
        """
        return plan_batches(
            self.sequences,
            Positions.parse(self.settings.transport.positions),
            self.settings.contraction.skip,
            batch_tokens,
            rows,
            slots,
            groups=self.settings.groups,
            counts=self.counts,
            notes=self.notes,
            among=among,
            vocabulary=self.vocabulary,
        )


def group_prompts(
    prompts: data.PromptSet,
    tokenizer: PreTrainedTokenizerBase,
    decoder: DecoderConfig,
    asked: PromptsConfig,
    settings: MetricsConfig,
    others: Sequence[DecoderConfig] = (),
) -> GroupedPrompts:
    """Tokenises and groups the prompts. If several processes share a run, each tokenises a part.

    Args:
        prompts: the texts.
        tokenizer: that of all models.
        decoder: the model, whose vocabulary is measured.
        asked: how prompts become tokens.
        settings: what is measured.
        others: further models that are measured on the same prompts.

    Raises:
        UserError: there are too few tokens for a fit, or processes have different prompts or tokenizers.
    """
    limit, decoders = asked.max_length, (decoder, *others)
    for each in decoders:
        terminal_block(each.depth, settings.terminal)  # raises UserError for blocks that the model does not have
        if each.learned_positions and limit > each.max_positions:
            raise UserError(f"prompts.max_length is {limit}, but the model has {each.max_positions} positions")
    if jax.process_count() > 1:  # before any tokens are exchanged: parts of different texts would make one pool
        check_same({"prompts": _sha256(map(repr, prompts.prompts)), "tokenizer": _sha256([_described(tokenizer)])})
    part, exchange = (own_part(len(prompts.prompts)), gathered) if jax.process_count() > 1 else (None, None)
    tokens = data.tokenise_prompts(prompts, tokenizer, limit, asked.chat_template, part, exchange)
    if (top := max(int(ids.max()) for ids in tokens.ids)) >= (least := min(each.vocab_size for each in decoders)):
        raise UserError(f"the tokenizer makes token {top}, but the model has {least}: they do not belong together")
    prompts_left = tokens.prompts
    group, component = common_groups([p.text for p in prompts_left], [p.turns for p in prompts_left], settings.groups)
    grouped = GroupedPrompts(
        sequences=tuple(TokenSequence(ids, each) for ids, each in zip(tokens.ids, group.tolist(), strict=True)),
        settings=settings,
        vocabulary=Vocabulary.of(tokenizer, decoder.vocab_size),
        counts={
            "count": len(prompts_left),
            "components": int(component.max()) + 1,
            "largest_component": int(np.bincount(component).max()),
            "shortened": tokens.shortened,
            "refused_by_template": tokens.refused,
            "undecodable_bytes": prompts.undecodable,
        },
        notes=notes_on(prompts, tokens),
    )
    for each in decoders:
        _check(grouped, each)
    return grouped


def common_groups(texts: Sequence[str], dialogues: Sequence[Dialogue], groups: int) -> tuple[np.ndarray, np.ndarray]:
    """`assign_groups` of prompts that are equal in all processes. Process 0 groups them and broadcasts the result, so
    only its host needs the memory."""
    found = np.empty((2, len(texts)), np.int32)
    if leads():
        found[:] = assign_groups(texts, dialogues, groups)
    group, component = of_leader(found)
    return group, component


def _check(grouped: GroupedPrompts, decoder: DecoderConfig) -> None:
    """Raises UserError if there are too few tokens."""
    settings = grouped.settings
    rows = sum(max(0, len(sequence.ids) - settings.contraction.skip) for sequence in grouped.sequences)
    low, high = fitted_ranks(rows, decoder.width, settings.contraction.window)
    if high - low + 1 < MIN_RANKS:
        raise UserError(
            f"{rows} measured tokens of {decoder.width} features leave fewer than {MIN_RANKS} singular values "
            f"in the window {list(settings.contraction.window)}; give more or longer prompts, or a wider "
            "metrics.contraction.window"
        )
    selector = Positions.parse(settings.transport.positions)
    if not any(len(sequence.measured(selector)) for sequence in grouped.sequences):
        raise UserError(
            f"metrics.transport.positions is {settings.transport.positions!r}, but no prompt is long enough to have one"
        )


def plan_prompts(
    prompts: data.PromptSet,
    tokenizer: PreTrainedTokenizerBase,
    decoder: DecoderConfig,
    asked: PromptsConfig,
    settings: MetricsConfig,
    batch_tokens: int | None = None,
    devices: Devices | None = None,
    slots: int | None = None,
    others: Sequence[DecoderConfig] = (),
) -> Plan:
    """`group_prompts`, packed for `devices`. Raises UserError if there are too few tokens for a fit."""
    devices = devices or OneDevice()
    grouped = group_prompts(prompts, tokenizer, decoder, asked, settings, others)
    return grouped.pack(batch_tokens or default_batch_tokens(devices), devices.rows, slots)


def default_batch_tokens(devices: Devices) -> int:
    """Default tokens of a batch, over all devices."""
    return device_defaults.batch_tokens(jax.default_backend()) * devices.rows


def notes_on(prompts: data.PromptSet, tokens: data.TokenisedPrompts) -> list[str]:
    """Warnings about the tokenised prompts, one sentence each."""
    notes = []
    if tokens.refused:
        notes.append(
            f"{tokens.refused} of {len(prompts.prompts)} prompts are left out because the chat template refuses them; "
            f"the first is {tokens.first_refusal}."
        )
    if prompts.undecodable:
        notes.append(f"{prompts.undecodable} bytes of the prompts' file are no UTF-8 and were read as U+FFFD.")
    return notes


def tokens_sha256(sequences: Sequence[TokenSequence]) -> str:
    """Hex digest of the token ids and lengths of all prompts in order."""
    digest = hashlib.sha256()
    for begin in range(0, len(sequences), HASHED):
        some = sequences[begin : begin + HASHED]
        parts = [part for sequence in some for part in (np.array([len(sequence.ids)]), sequence.ids)]
        digest.update(np.concatenate(parts).astype("<i8").tobytes())
    return digest.hexdigest()


def batches_sha256(work: Plan) -> str:
    """Hex digest of the packing of the prompts."""
    return hashlib.sha256(repr((work.batches, work.runs)).encode()).hexdigest()


def _sha256(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(f"{line}\n".encode("utf-8", errors="surrogatepass"))
    return digest.hexdigest()


def _described(tokenizer: PreTrainedTokenizerBase) -> str:
    """A text of everything in a tokenizer that affects tokenisation, with merges and rules for fast tokenizers."""
    rules = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(sorted(tokenizer.get_vocab().items()))  # type: ignore[attr-defined]
    return repr((rules, tokenizer.chat_template))
