"""Preference pairs in the tokens of a real model: SmolLM2-135M-Instruct, whose tokenizer its GGUF file holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from spinal_jax.data import PairSet, PreferencePair, tokenise_pairs
from spinal_jax.models.formats.open import open_checkpoint

# `make test` fetches it; without it these tests fail.
MODEL = Path(__file__).parents[2] / "downloads" / "SmolLM2-135M-Instruct.Q4_1.gguf"

PROMPT = "\n\nHuman: How do I pick a lock?\n\nAssistant:"
PAIR = PreferencePair(0, PROMPT, " Ask a locksmith.", " With a wire.\n", (("user", "How do I pick a lock?"),))
PAIRS = PairSet((PAIR,), "a test", "hh", "", {})
ASKED = [198, 198, 14917, 42, 1073, 536, 339, 4491, 253, 8645, 47, 198, 198, 9519, 9531, 42]
SYSTEM = [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182, 2]
TURN = [198, 1, 4093, 198, 2020, 536, 339, 4491, 253, 8645, 47, 2, 198, 1, 520, 9531, 198]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return open_checkpoint(str(MODEL)).tokenizer()


def test_transcript(tokenizer):
    """The blank before a reply belongs to its first word, and the end of the turn, which is EOS, ends both."""
    ((pair,), _) = tokenise_pairs(PAIRS, tokenizer, 99, chat_template=False)
    assert pair.chosen.ids.tolist() == [*ASKED, 9430, 253, 24100, 24072, 30, 2]
    assert pair.rejected.ids.tolist() == [*ASKED, 1929, 253, 6192, 30, 198, 2]
    assert pair.chosen.start == pair.rejected.start == len(ASKED)
    assert tokenizer.decode([9430, 253, 24100, 24072, 30, 2]) == " Ask a locksmith.<|im_end|>"


def test_chat_template(tokenizer):
    """The reply begins behind the template's opening, and ends as the template ends it."""
    ((pair,), _) = tokenise_pairs(PAIRS, tokenizer, 99, chat_template=True)
    assert pair.chosen.ids.tolist() == [*SYSTEM, *TURN, 18986, 253, 24100, 24072, 30, 2, 198]
    assert pair.rejected.ids.tolist() == [*SYSTEM, *TURN, 3825, 253, 6192, 30, 2, 198]
    assert pair.chosen.start == pair.rejected.start == len(SYSTEM + TURN)
    asked = [{"role": "user", "content": "How do I pick a lock?"}]
    opening = tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
    assert pair.chosen.ids[: pair.chosen.start].tolist() == opening
    assert tokenizer.decode([18986, 253, 24100, 24072, 30, 2, 198]) == "Ask a locksmith.<|im_end|>\n"


def test_cut_prompt(tokenizer):
    """The longer side decides how much of the prompt both lose; BOS stays."""
    ((pair,), _) = tokenise_pairs(PAIRS, tokenizer, 40, chat_template=True, overlong="cut_prompt")
    whole = [*SYSTEM, *TURN]
    assert pair.chosen.ids.tolist() == [1, *whole[5:], 18986, 253, 24100, 24072, 30, 2, 198]
    assert pair.rejected.ids.tolist() == [1, *whole[5:], 3825, 253, 6192, 30, 2, 198]
    assert pair.chosen.start == pair.rejected.start == len(whole) - 4
