"""What a run trains on and is evaluated on, as token ids."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from spinal_jax import data
from spinal_jax.config.training import CorpusConfig, PreferencesConfig, TrainConfig
from spinal_jax.errors import UserError
from spinal_jax.models.config import DecoderConfig
from spinal_jax.objectives.responses import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


WORLD_PAIRS, WORLD_DOCUMENTS = 1024, 8192  # how many the world gives where no limit is set


@dataclass(frozen=True)
class Examples:
    """Examples of one sequence (`sft`, `lm`) or two (`dpo`), with the row of the file that each comes from."""

    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    train_ids: tuple[int, ...]
    source: str
    sha256: str  # of the texts
    dropped: dict[str, int]  # rows left out, by reason

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(len(sequence.ids) for example in (*self.train, *self.held_out) for sequence in example)

    def step(self, number: int, batch_size: int, seed: int) -> tuple[list[int], list[Example]]:
        """Indices into `train` and the examples of optimiser step `number`, 0-based."""
        chosen = data.examples_of(number, batch_size, len(self.train), seed).tolist()
        return chosen, [self.train[i] for i in chosen]


def read_examples(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, decoder: DecoderConfig) -> Examples:
    """Reads and tokenises what `config` names.

    Raises:
        UserError: a file that is not as it should be, nothing left, more tokens than the model has positions, or token
            ids that it does not have.
    """
    examples = _documents(config.corpus, tokenizer) if config.objective.kind == "lm" else _pairs(config, tokenizer)
    examples = replace(examples, held_out=examples.held_out[: config.eval_examples])
    if decoder.learned_positions and examples.longest > decoder.max_positions:
        raise UserError(
            f"an example has {examples.longest} tokens, but the model has {decoder.max_positions} positions; choose a "
            "smaller max_length"
        )
    top = max(int(sequence.ids.max()) for example in (*examples.train, *examples.held_out) for sequence in example)
    if top >= decoder.vocab_size:
        raise UserError(
            f"the tokenizer makes token {top}, but the model has {decoder.vocab_size}: they do not belong together"
        )
    return examples


def _pairs(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> Examples:
    asked = config.preferences
    assert asked is not None  # TrainConfig has checked it
    sets = pair_sets(asked)
    tokens, dropped = [], [pairs.dropped for pairs in sets]
    for pairs in sets:
        kept, lost = data.tokenise_pairs(pairs, tokenizer, asked.max_length, asked.chat_template, asked.overlong)
        tokens.append(kept)
        dropped.append(lost)
    # A file's last rows are held out; the world has test pairs of its own.
    train, held_out = data.split_examples(tokens[0], None, asked.held_out) if len(sets) == 1 else tokens
    single = config.objective.kind == "sft"
    flipped = _flips(asked, len(train), 0.5 if asked.shuffle_labels else asked.label_noise, "train")
    tossed = _flips(asked, len(held_out), 0.5 if asked.shuffle_labels else 0.0, "held out")

    def example(pair: data.TokenPair, flip: bool) -> Example:
        chosen, rejected = (pair.rejected, pair.chosen) if flip else (pair.chosen, pair.rejected)
        return (chosen,) if single else (chosen, rejected)

    reasons = sorted({why for lost in dropped for why in lost})
    return Examples(
        tuple(example(pair, bool(flip)) for pair, flip in zip(train, flipped, strict=True)),
        tuple(example(pair, bool(flip)) for pair, flip in zip(held_out, tossed, strict=True)),
        tuple(pair.id for pair in train),
        sets[0].source,
        hashlib.sha256(" ".join(pairs.sha256 for pairs in sets).encode()).hexdigest(),
        {why: sum(lost.get(why, 0) for lost in dropped) for why in reasons},
    )


def pair_sets(asked: PreferencesConfig) -> list[data.PairSet]:
    """The pairs, or the world's training pairs and its test pairs, which ask other questions."""
    if asked.format != "world":
        source = data.source_of(asked.path, asked.dataset, asked.split, asked.name, asked.revision)
        return [data.read_pairs(source, asked.format, asked.limit, asked.offset, asked.fields.given)]
    world = data.World(asked.seed, asked.separability)
    count = (asked.limit or WORLD_PAIRS) - asked.held_out
    if count < 1:
        raise UserError(f"preferences.held_out is {asked.held_out}, which leaves no pair of {count + asked.held_out}")
    train = world.pairs(count, "train")
    return [train, world.pairs(asked.held_out, "test")] if asked.held_out else [train]


def _flips(asked: PreferencesConfig, count: int, probability: float, which: str) -> np.ndarray:
    """bool [count]: which pairs change places. Noise is of training labels alone; labels by the toss of a coin are so
    wherever they are, for a model that leaned to one style by chance would else seem to know something."""
    seed = np.random.SeedSequence((asked.seed, *which.encode()))
    return np.random.Philox(seed).random_raw(count) / 2.0**64 < probability


def _documents(asked: CorpusConfig | None, tokenizer: PreTrainedTokenizerBase) -> Examples:
    assert asked is not None  # TrainConfig has checked it
    if asked.format == "world":
        found = data.World(asked.seed).documents(asked.limit or WORLD_DOCUMENTS)
    else:
        assert asked.path is not None
        found = data.read_documents(asked.path, asked.format, asked.field, asked.limit)
    pieces: Sequence[data.Completion] = data.tokenise_documents(found, tokenizer, asked.max_length)
    train, held_out = data.split_examples([(piece,) for piece in pieces], None, asked.held_out)
    return Examples(
        train, held_out, tuple(range(len(train))), found.source, found.sha256, {"empty": found.skipped_empty}
    )
