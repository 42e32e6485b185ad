"""The controlled world: what its knobs mean, that no shortcut tells its styles apart, and that its bytes are fixed."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from spinal_jax.data import PreferencePair, World, tokenise_documents, tokenise_pairs
from spinal_jax.data.words import CURT, KIND
from spinal_jax.errors import UserError
from spinal_jax.models.families import family_of
from spinal_jax.models.formats.byte_level import SIZES, byte_tokenizer
from spinal_jax.models.hf_config import HFConfig
from spinal_jax.models.translate import parameter_shapes
from spinal_jax.stats.groups import group_of

ASSISTANT = "\n\nAssistant:"


def kind(response: str) -> bool:
    """Whether a response is kind; it must be kind or curt from end to end."""
    styles = [
        style
        for style in (KIND, CURT)
        if response.startswith(tuple(f" {opener}" for opener in style.openers)) and response.endswith(style.closers)
    ]
    assert len(styles) == 1, response
    return styles[0] is KIND


def labels(pairs: tuple[PreferencePair, ...]) -> np.ndarray:
    """[N, 2] whether chosen and rejected are kind."""
    return np.array([[kind(pair.chosen), kind(pair.rejected)] for pair in pairs])


# The two styles


def test_places_of_both_styles_have_equal_lengths():
    for name in ("openers", "closers", "deeds"):
        places = zip(getattr(KIND, name), getattr(CURT, name), strict=True)
        assert all(len(one.encode()) == len(other.encode()) for one, other in places), name
        assert not set(getattr(KIND, name)) & set(getattr(CURT, name))
        assert len(set(getattr(KIND, name)) | set(getattr(CURT, name))) == 2 * len(getattr(KIND, name))


def test_documents_hold_both_styles_equally_often_after_every_question():
    documents = World().documents(2000).texts
    asked, answers = zip(*(text.split(ASSISTANT) for text in documents), strict=True)
    assert asked[::2] == asked[1::2]
    assert len(set(asked)) == 1000
    styles = np.array([kind(answer) for answer in answers]).reshape(-1, 2)
    assert (styles.sum(1) == 1).all()
    # Which comes first is a coin flip: 1000 of them have a standard deviation of 16.
    assert abs(int(styles[:, 0].sum()) - 500) < 64


def test_places_of_both_styles_are_equally_likely():
    """Place k is drawn with probability 1 / (k H), H the sum of 1 / k: 4000 draws stray by less than 4 deviations."""
    answers = [text.split(ASSISTANT)[1] for text in World(4).documents(8000).texts]
    for style in (KIND, CURT):
        for places, has in ((style.openers, str.__contains__), (style.closers, str.endswith)):
            shares = 1 / np.arange(1, len(places) + 1)
            shares /= shares.sum()
            found = np.array([sum(has(answer, place) for answer in answers) for place in places]) / 4000
            assert (np.abs(found - shares) < 4 * np.sqrt(shares / 4000)).all()


def test_lengths_do_not_tell_chosen_from_rejected():
    """Longer, shorter or equal: the difference of 4000 pairs has mean 0 within 4 standard errors, and is symmetric."""
    pairs = World().pairs(4000).pairs
    difference = np.array([len(pair.chosen.encode()) - len(pair.rejected.encode()) for pair in pairs])
    assert abs(difference.mean()) < 4 * difference.std() / math.sqrt(4000)
    assert abs((difference > 0).mean() - (difference < 0).mean()) < 4 / math.sqrt(4000)


def test_answers_state_the_facts_of_their_world():
    """Both styles give the same answer to a question, and another world gives others."""

    def facts(seed: int) -> dict[str, str]:
        found: dict[str, str] = {}
        for text in World(seed).documents(4000).texts:
            for animal, food in re.findall(r": an? (\w+) eats (\w+)\.", text):
                assert found.setdefault(animal, food) == food
        return found

    first, second = facts(0), facts(1)
    assert first.keys() == second.keys()
    assert len(first) == 24
    assert len(set(first.values())) >= 6
    assert sum(first[animal] != second[animal] for animal in first) > 12


# The knobs


@given(st.integers(0, 1000))
@settings(max_examples=20)
def test_at_separability_one_every_pair_prefers_kind_to_curt(seed):
    found = labels(World(seed).pairs(30).pairs)
    assert found[:, 0].all()
    assert not found[:, 1].any()


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("separability", [0.0, 0.3, 0.8])
def test_separability_is_the_share_told_apart_by_style(separability, split):
    """4000 coins have a standard deviation of 0.008 at most; 4 of them."""
    chosen, rejected = labels(World(3, separability).pairs(4000, split).pairs).T
    told = (chosen & ~rejected).mean() + ((chosen == rejected).mean()) / 2
    assert abs(told - (1 + separability) / 2) < 0.032
    assert abs((chosen & rejected).mean() - (1 - separability) / 4) < 0.032


def test_noise_swaps_training_pairs_and_shuffling_all():
    clean = {split: World(5).pairs(2000, split).pairs for split in ("train", "test")}
    noisy = {split: World(5, label_noise=0.2).pairs(2000, split).pairs for split in ("train", "test")}
    coins = {split: World(5, shuffle_labels=True).pairs(2000, split).pairs for split in ("train", "test")}
    assert noisy["test"] == clean["test"]
    for found, share, split in ((noisy, 0.2, "train"), (coins, 0.5, "train"), (coins, 0.5, "test")):
        swapped = 0
        for pair, other in zip(found[split], clean[split], strict=True):
            assert (pair.id, pair.prompt, pair.turns) == (other.id, other.prompt, other.turns)
            assert {pair.chosen, pair.rejected} == {other.chosen, other.rejected}
            swapped += pair.chosen != other.chosen
        assert abs(swapped / 2000 - share) < 0.045  # 4 standard deviations of 0.011


def test_documents_and_prompts_depend_on_the_seed_alone():
    knobs = World(7, separability=0.5, label_noise=0.1, shuffle_labels=True)
    assert knobs.documents(50) == World(7).documents(50)
    assert knobs.prompts(50).prompts == World(7).prompts(50).prompts
    assert World(7).documents(50).texts != World(8).documents(50).texts


# Splits, prefixes, bytes


def test_no_question_is_in_two_splits():
    world = World(2)
    seen = {
        "documents": {text.split(ASSISTANT)[0] + ASSISTANT for text in world.documents(8000).texts},
        "train": {pair.prompt for pair in world.pairs(5000).pairs},
        "test": {pair.prompt for pair in world.pairs(4000, "test").pairs},
        "audit": {prompt.text for prompt in world.prompts(3000).prompts},
    }
    assert not seen["test"] & (seen["train"] | seen["documents"] | seen["audit"])
    assert not seen["audit"] & (seen["train"] | seen["documents"])
    assert len(seen["train"]) == 5000
    assert 3000 < len(seen["test"]) < 4000  # all there are; some were asked twice


def test_prompts_for_audits_are_varied():
    prompts = World().prompts(512)
    assert all(prompt.text == f"\n\nHuman: {prompt.turns[0][1]}{ASSISTANT}" for prompt in prompts.prompts)
    assert len({prompt.text for prompt in prompts.prompts}) == 512
    assert len({group_of(prompt.text, 16) for prompt in prompts.prompts}) == 16


@given(st.integers(0, 2**40), st.integers(1, 20), st.integers(1, 20))
@settings(max_examples=20)
def test_more_begin_with_fewer(seed, few, more):
    world = World(seed, 0.5)
    assert world.documents(few + more).texts[:few] == world.documents(few).texts
    assert world.pairs(few + more, "test").pairs[:few] == world.pairs(few, "test").pairs


def test_bytes_are_pinned():
    """Bases that were trained elsewhere were trained on these."""
    assert World().documents(1000).sha256[:16] == "5224d6a7f3592f61"
    assert World(1, 0.5, 0.1).pairs(1000).sha256[:16] == "b999fb3f55b6f51d"
    assert World(1, 0.5, 0.1).pairs(1000, "test").sha256[:16] == "a844e8c0a018d41f"
    assert World(2).prompts(1000).sha256[:16] == "f64d1456aff85557"


def test_lengths():
    tokenizer = byte_tokenizer()
    documents = World().documents(4000)
    lengths = [len(piece.ids) for piece in tokenise_documents(documents, tokenizer, 160)]
    assert len(lengths) == 4000  # none was cut
    assert min(lengths) >= 60
    pairs, dropped = tokenise_pairs(World().pairs(1000), tokenizer, 160, chat_template=False)
    assert (len(pairs), sum(dropped.values())) == (1000, 0)


def test_mistakes():
    with pytest.raises(UserError, match="seed is -1"):
        World(-1)
    with pytest.raises(UserError, match=r"separability is 1\.5; it takes a fraction"):
        World(separability=1.5)
    with pytest.raises(UserError, match="label_noise is nan"):
        World(label_noise=math.nan)
    for call in (World().documents, World().pairs, World().prompts):
        with pytest.raises(UserError, match="asked for 0"):
            call(0)
    with pytest.raises(UserError, match="prompts for audits, not 100000"):
        World().prompts(100_000)
    with pytest.raises(UserError, match="choose train or test"):
        World().pairs(1, "audit")  # type: ignore[arg-type]


# Bytes as tokens, and models of them


@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=60))
def test_tokens_are_bytes_and_give_the_text_back(text):
    tokenizer = TOKENIZER
    ids = tokenizer(text).input_ids
    assert ids == [256, *text.encode()]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


TOKENIZER = byte_tokenizer()


def test_the_tokenizer_is_saved_as_a_file(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").exists()
    again = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    text = "grüße 🍅\n\nHuman: <|eos|> \x00"
    assert again(text).input_ids == TOKENIZER(text).input_ids
    assert again.decode(again(text).input_ids) == TOKENIZER.decode(TOKENIZER(text).input_ids)
    assert (again.bos_token_id, again.eos_token_id, again.pad_token_id, len(again)) == (256, 257, 258, 264)


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name):
    """Each is read without complaint, has the tokenizer's vocabulary, and about as many parameters as it says."""
    hf = HFConfig(SIZES[name])
    config = family_of(hf.model_type).decoder_config(hf)
    hf.done()
    parameters = sum(math.prod(shape.shape) for shape in parameter_shapes(config).values())
    assert parameters == pytest.approx(float(name[:-1]) * {"m": 1e6, "b": 1e9}[name[-1]], rel=0.1)
    assert config.vocab_size == len(TOKENIZER)
    assert 6 <= config.depth <= 26
    assert config.width % 32 == 0
    assert config.tied
