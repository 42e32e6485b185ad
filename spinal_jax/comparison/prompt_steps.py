"""Which prompts, and which tokens of them, moved most between two models measured on the same batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from spinal_jax.comparison.record import Comparison
from spinal_jax.data.packing import Plan
from spinal_jax.jsontypes import Json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GROUPS = 4  # groups of prompts that are shown
PLACES = 3  # positions of each prompt that are kept
BEFORE, AFTER = 12, 4  # tokens shown around a position
BEGINNING = 48  # tokens of a prompt that are shown


@dataclass(frozen=True)
class _Place:
    """A measured position, with the boundary of the terminal block at which the two models' steps differ most."""

    position: int
    boundary: int
    aligned: float  # radians
    reference: float


class PromptSteps:
    """Change of transport by prompt and position: a `watch` of `measure`, which is to have a reference.

    Of each prompt it keeps one sum and `PLACES` positions, so that memory does not grow with their length.

    Args:
        plan: what is measured.
        terminal: first and last boundary of the terminal block.
    """

    def __init__(self, plan: Plan, terminal: tuple[int, int]):
        self.plan, self.terminal = plan, terminal
        self._change: dict[int, float] = {}  # by sequence: sum over its positions of the mean change in the block
        self._places: dict[int, tuple[_Place, ...]] = {}

    def __call__(self, number: int, steps: tuple[np.ndarray, ...]) -> None:
        """Adds a batch. `steps`: [D, m] radians of the aligned model and of the reference, in the batch's order."""
        first, last = self.terminal
        aligned, reference = (each[first - 1 : last].astype(np.float64) for each in steps)  # column l - 1 ends at l
        begin = 0
        for sequence in (n for row in self.plan.batches[number].rows for n in row):
            at = self.plan.sequences[sequence].measured(self.plan.selector)
            mine = slice(begin, begin + len(at))
            begin += len(at)
            ours, theirs = aligned[:, mine], reference[:, mine]
            change = ours - theirs
            self._change[sequence] = float(change.mean(axis=0).sum())
            block = np.abs(change).argmax(axis=0)  # [m] where each position changed most
            largest = np.argsort(-np.abs(change).max(axis=0), kind="stable")[:PLACES].tolist()
            self._places[sequence] = tuple(
                _Place(int(at[m]), first + int(block[m]), float(ours[block[m], m]), float(theirs[block[m], m]))
                for m in largest
            )

    def moved(self, comparison: Comparison, tokenizer: PreTrainedTokenizerBase, most: int) -> tuple[Json, ...]:
        """The groups whose pseudo-value of Delta_align is farthest from the mean, and their prompts that changed most.

        Args:
            comparison: the comparison.
            tokenizer: spells the tokens.
            most: prompts of each group.

        Returns:
            Nothing where groups have no pseudo-values. Otherwise for each group
              `group`, `delta_align`: its row in the page's table, and its pseudo-value;
              `prompts`: for each `number` (its place among the measured prompts, from 0), `text` (how it begins, with
                an ellipsis where it goes on), `tokens`, `positions` (measured ones), `delta_transport` (mean change in
                the terminal block, radians), `share` (of the sum over all prompts of the absolute changes), `places`;
              `places`: for each `position`, `token`, `before`, `after` (the text around it), `boundary`, and the steps
                that end there, `aligned` and `reference` (radians).
        """
        values = comparison.arrays["groups/delta_align"]
        if len(values) < 2 or not np.isfinite(values).all():
            return ()
        order = np.argsort(-np.abs(values - values.mean()), kind="stable")
        drops = self.plan.groups.drops
        total = sum(map(abs, self._change.values())) or 1.0
        groups = []
        for group in order[:GROUPS].tolist():
            members = [n for n in self._change if self.plan.sequences[n].group == drops[group]]
            members.sort(key=lambda n: (-abs(self._change[n]), n))
            prompts = [self._prompt(n, tokenizer, total) for n in members[:most]]
            groups.append({"group": group, "delta_align": float(values[group]), "prompts": prompts})
        return tuple(groups)

    def _prompt(self, number: int, tokenizer: PreTrainedTokenizerBase, total: float) -> Json:
        sequence = self.plan.sequences[number]
        positions = len(sequence.measured(self.plan.selector))
        return {
            "number": number,
            "text": _spelled(tokenizer, sequence.ids[:BEGINNING]) + " …" * (len(sequence.ids) > BEGINNING),
            "tokens": len(sequence.ids),
            "positions": positions,
            "delta_transport": self._change[number] / positions if positions else 0.0,
            "share": abs(self._change[number]) / total,
            "places": [
                {
                    "position": place.position,
                    "token": _spelled(tokenizer, sequence.ids[place.position : place.position + 1]),
                    "before": _spelled(tokenizer, sequence.ids[max(0, place.position - BEFORE) : place.position]),
                    "after": _spelled(tokenizer, sequence.ids[place.position + 1 : place.position + 1 + AFTER]),
                    "boundary": place.boundary,
                    "aligned": place.aligned,
                    "reference": place.reference,
                }
                for place in self._places[number]
            ],
        }


def _spelled(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int] | np.ndarray) -> str:
    return str(tokenizer.decode([int(each) for each in ids], clean_up_tokenization_spaces=False))
