"""A small synthetic world: dialogues and preference pairs generated from a seed, without downloads.

Each world has random facts (what a heron eats, when the fair is held), questions about them, and two styles of answers,
kind and curt, which have equal lengths and probabilities. Documents contain both styles equally often after every
question, so a model of them prefers neither; preference pairs prefer the kind one. Within a style word probabilities
differ, in the same way for both styles, so that a model with a weak preference still ranks many pairs the other way.

Only `random.Random.random` with string seeds is used, whose sequence Python guarantees. Every item has its own seed:
item 7 is the same on every machine, for any number of items.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

from spinal_jax.data.documents import DocumentSet
from spinal_jax.data.order import order
from spinal_jax.data.pairs import PairSet, PreferencePair
from spinal_jax.data.prompts import Prompt, PromptSet
from spinal_jax.data.sources import texts_sha256
from spinal_jax.data.transcripts import transcript
from spinal_jax.data.words import CURT, GREETINGS, KIND, RELATIONS, Relation, Style, forms
from spinal_jax.errors import UserError
from spinal_jax.stats.groups import group_of

T = TypeVar("T")
MOST = 1_000_000  # documents or pairs

Split = Literal["train", "test", "audit"]
_STYLES = (KIND, CURT)


@dataclass(frozen=True)
class World:
    """A world of dialogues; equal settings give equal bytes on every machine.

    Attributes:
        seed: of its facts, and of what is drawn; 0 or more.
        separability: how often, from 0 to 1, a pair prefers a kind response to a curt one. Else both have a style by
            coin flip: at 0 chosen and rejected come from the same distribution, and at s no rule that goes by style
            tells more than (1 + s) / 2 of the pairs apart.
        label_noise: how often, from 0 to 1, the two responses of a training pair are swapped. Test pairs never are.
        shuffle_labels: of all pairs, training and test, a coin flip says which response is chosen: the null control.
    """

    seed: int = 0
    separability: float = 1.0
    label_noise: float = 0.0
    shuffle_labels: bool = False

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise UserError(f"the world's seed is {self.seed}; it takes a whole number from 0")
        for name, value in (("separability", self.separability), ("label_noise", self.label_noise)):
            if not 0 <= value <= 1:
                raise UserError(f"the world's {name} is {value}; it takes a fraction from 0 to 1")

    def documents(self, count: int) -> DocumentSet:
        """The first `count` dialogues of training questions, which depend on the seed alone.

        Documents 2k and 2k + 1 answer the same question, one kindly and one curtly, in either order.
        """
        _check("documents", count)
        texts = tuple(self._document(index) for index in range(count))
        return DocumentSet(texts, self._name(), "world", 0, texts_sha256(texts))

    def pairs(self, count: int, split: Literal["train", "test"] = "train") -> PairSet:
        """The first `count` preference pairs; no question of one split is in another.

        Questions repeat, with other responses, only after each was asked once.
        """
        if split not in ("train", "test"):
            raise UserError(f"the world has no pairs of the split {split!r}; choose train or test")
        _check("pairs", count)
        pairs = tuple(self._pair(index, split) for index in range(count))
        sha256 = texts_sha256(text for pair in pairs for text in (pair.prompt, pair.chosen, pair.rejected))
        told = [f"separability {self.separability:g}"] if self.separability < 1 else []
        told += [f"label noise {self.label_noise:g}"] if self.label_noise else []
        told += ["labels shuffled"] if self.shuffle_labels else []
        return PairSet(pairs, self._name(*told), "world", sha256, {"empty": 0, "identical": 0, "no_prompt": 0})

    def prompts(self, count: int) -> PromptSet:
        """The first `count` questions of those kept for audits, which no document or pair asks; all are different.

        Each ends with "\\n\\nAssistant:". Raises `UserError` where there are fewer.
        """
        _check("prompts", count)
        if count > (most := len(_questions()["audit"])):
            raise UserError(f"the world has {most} prompts for audits, not {count}")
        questions = [self._question(index, "audit") for index in range(count)]
        prompts = tuple(Prompt(question.prompt, question.turns) for question in questions)
        return PromptSet(prompts, self._name(), "world", 0, texts_sha256(prompt.text for prompt in prompts))

    def _name(self, *more: str) -> str:
        """What a trace and its page say of texts that are drawn."""
        return ", ".join((f"the controlled world (seed {self.seed})", *more))

    def _question(self, index: int, split: Split) -> _Question:
        questions = _questions()[split]
        return questions[order(len(questions), self.seed, index // len(questions))[index % len(questions)]]

    def _document(self, index: int) -> str:
        first = _Draw(f"{self.seed}/styles/{index // 2}").of((0, 1))
        question = self._question(index // 2, "train")
        style = _STYLES[(first + index) % 2]
        return question.prompt + self._response(question, style, _Draw(f"{self.seed}/document/{index}"))

    def _pair(self, index: int, split: Literal["train", "test"]) -> PreferencePair:
        draw = _Draw(f"{self.seed}/{split}/{index}")
        separable = draw.happens(self.separability)
        drawn = draw.of(_STYLES), draw.of(_STYLES)
        noise = self.label_noise if split == "train" else 0.0
        swapped = draw.happens(0.5 if self.shuffle_labels else noise)
        question = self._question(index, split)
        styles = _STYLES if separable else drawn
        chosen, rejected = (self._response(question, style, draw) for style in styles)
        while rejected == chosen:
            chosen, rejected = (self._response(question, style, draw) for style in styles)
        if swapped:
            chosen, rejected = rejected, chosen
        return PreferencePair(index, question.prompt, chosen, rejected, question.turns)

    def _response(self, question: _Question, style: Style, draw: _Draw) -> str:
        relation, subject = question.relation, question.subject
        fact = _Draw(f"{self.seed}/{relation.name}/{subject}").of(relation.values)
        words = forms(subject) | {"v": fact, "d": draw.early(style.deeds)}
        clause = draw.of(relation.clauses).format(**words)
        return f" {draw.early(style.openers)}{clause}{draw.early(style.closers)}"


class _Question(NamedTuple):
    relation: Relation
    subject: str
    turns: tuple[tuple[str, str], ...]
    prompt: str


@functools.cache
def _questions() -> dict[Split, tuple[_Question, ...]]:
    """All questions by split: an eighth for tests and an eighth for audits.

    The hash differs from that of the prompt groups; otherwise a split would fill only a few groups.
    """
    found: dict[Split, list[_Question]] = {"train": [], "test": [], "audit": []}
    splits: dict[int, Split] = {0: "test", 1: "audit"}
    for relation in RELATIONS:
        for subject in relation.subjects:
            for question in relation.questions:
                for greeting in GREETINGS:
                    turns = (("user", greeting + question.format(**forms(subject))),)
                    prompt = transcript(turns)
                    split = splits.get(group_of(f"split {prompt}", 8), "train")
                    found[split].append(_Question(relation, subject, turns, prompt))
    return {split: tuple(questions) for split, questions in found.items()}


class _Draw:
    """Random choices seeded by a text."""

    def __init__(self, seed: str):
        self._random = random.Random(seed)

    def of(self, items: Sequence[T]) -> T:
        return items[int(self._random.random() * len(items))]

    def early(self, items: Sequence[T]) -> T:
        """Index k = 1, 2, ... with probability proportional to 1 / k (Zipf)."""
        left = self._random.random() * sum(1 / place for place in range(1, len(items) + 1))
        for place, item in enumerate(items, 1):
            left -= 1 / place
            if left < 0:
                return item
        return items[-1]

    def happens(self, probability: float) -> bool:
        return self._random.random() < probability


def _check(what: str, count: int) -> None:
    if not 1 <= count <= MOST:
        raise UserError(f"the world was asked for {count} {what}; ask for 1 to {MOST:,}")
