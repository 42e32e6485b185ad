"""Groups of prompts: near-duplicates stay together, found as exactly as by comparing every pair."""

from __future__ import annotations

import itertools
import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spinal_jax.config.positions import Positions
from spinal_jax.data import read_prompts
from spinal_jax.data.packing import TokenSequence, plan_batches
from spinal_jax.stats import near_duplicates
from spinal_jax.stats.groups import Groups, assign_groups, group_of
from spinal_jax.stats.near_duplicates import Dialogue, components

WORDS = st.sampled_from([f"w{i}" for i in range(12)])
TURN = st.tuples(st.sampled_from(["user", "assistant", "system"]), st.lists(WORDS, max_size=12).map(" ".join))


def user(text: str) -> Dialogue:
    return (("user", text),)


def grams(turns: Dialogue) -> set[tuple[str, ...]]:
    spoken = [t for t in turns if t[0] != "system"]
    words = [word for role, content in spoken for word in (role, *re.findall(r"\w+", content.lower()))]
    return {tuple(words[i : i + 3]) for i in range(len(words) - 2)} or {tuple(words)}


def by_every_pair(dialogues: list[Dialogue]) -> list[int]:
    """The rule of docs/method.md, by comparing every prompt with every other."""
    sets = [grams(turns) for turns in dialogues]
    firsts = [next((t for t in turns if t[0] != "system"), ("", "")) for turns in dialogues]
    parent = list(range(len(sets)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    for i, j in itertools.combinations(range(len(sets)), 2):
        alike = 10 * len(sets[i] & sets[j]) > 3 * len(sets[i] | sets[j])
        if alike or (firsts[i] == firsts[j] and firsts[i][1].strip()):
            parent[root(i)] = root(j)
    numbers: dict[int, int] = {}
    return [numbers.setdefault(root(i), len(numbers)) for i in range(len(sets))]


@given(st.lists(st.lists(TURN, max_size=4).map(tuple), min_size=1, max_size=40))
def test_components_are_those_of_comparing_every_pair(dialogues: list[Dialogue]) -> None:
    assert components(dialogues).tolist() == by_every_pair(dialogues)


@pytest.mark.parametrize("seed", range(6))
def test_components_of_edited_copies(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chains of copies, each edited a little, around the threshold, with a phrase that all prompts begin with; some of
    them as where there are very many prompts and words."""
    if seed > 2:
        monkeypatch.setattr(near_duplicates, "_PACKED", 0)
        monkeypatch.setattr(near_duplicates, "_BLOCK", 500)
        monkeypatch.setattr(near_duplicates, "_TABLE", 11)
    rng = random.Random(seed)
    words = [f"w{i}" for i in range(300)]
    originals = [rng.choices(words, k=rng.randint(0, 40)) for _ in range(30)]
    dialogues = []
    for _ in range(250):
        copy = list(rng.choice(originals))
        for place in rng.sample(range(len(copy)), k=min(len(copy), rng.randint(0, 8))):
            copy[place] = rng.choice(words)
        dialogues.append(user(" ".join(["please", "answer", "this", "question", *copy])))
    found = components(dialogues).tolist()
    assert found == by_every_pair(dialogues)
    assert 1 < len(set(found)) < len(found)


def test_the_threshold_itself_does_not_join() -> None:
    """6 of 20 3-grams are shared: a similarity of 0.3, and not above it."""
    first = " ".join(f"a{i}" for i in range(13))  # 12 grams with the role
    shared = " ".join(f"a{i}" for i in range(7))
    exactly = user(f"{shared} " + " ".join(f"b{i}" for i in range(8)))
    assert len(grams(user(first)) & grams(exactly)) * 20 == 6 * len(grams(user(first)) | grams(exactly)) == 6 * 20
    assert components([user(first), exactly]).tolist() == [0, 1]
    closer = user(f"{shared} " + " ".join(f"b{i}" for i in range(7)))
    assert components([user(first), closer]).tolist() == [0, 0]


def test_case_and_punctuation_do_not_tell_prompts_apart_and_system_turns_do_not_join_them() -> None:
    assert components([user("How do I, um, FLY?"), user("how do i um fly")]).tolist() == [0, 0]
    system = ("system", "You are a helpful assistant who answers at length and with care.")
    apart = [(system, *user("Where do herons nest?")), (system, *user("Name a metal."))]
    assert components(apart).tolist() == [0, 1]
    first = ("user", "Hello there")
    joined = [(first, ("assistant", "x"), ("user", "a b c d")), (first, ("assistant", "y z"), ("user", "e f g h"))]
    assert components(joined).tolist() == [0, 0]


def test_no_prompt_and_blank_prompts() -> None:
    assert components([]).tolist() == []
    assert components([(), ()]).tolist() == [0, 0]  # nothing tells them apart
    assert components([user("a"), user("b"), user("a")]).tolist() == [0, 1, 0]


def test_no_shipped_prompt_is_like_another() -> None:
    prompts = read_prompts(None).prompts
    assert components([prompt.turns for prompt in prompts]).tolist() == list(range(len(prompts)))


@given(st.permutations(range(12)))
def test_a_component_falls_into_one_group_whatever_the_order(order: list[int]) -> None:
    texts = [f"{animal} lives in the {place} by the old mill" for animal in "abcd" for place in "xyz"]
    texts = [text if number % 5 else f"question {number}" for number, text in enumerate(texts)]
    group, component = assign_groups(texts, [user(t) for t in texts], 1024)
    moved = [texts[i] for i in order]
    other, _ = assign_groups(moved, [user(t) for t in moved], 1024)
    assert other.tolist() == group[list(order)].tolist()
    for number in set(component.tolist()):
        (held,) = set(group[component == number].tolist())
        assert held == group_of(min(t for t, c in zip(texts, component, strict=True) if c == number), 1024)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 4)), min_size=1, max_size=12), st.integers(0, 3))
def test_a_plan_knows_what_its_groups_hold(parts: list[tuple[int, int]], skip: int) -> None:
    sequences = [TokenSequence(np.arange(size, dtype=np.int32), group) for size, group in parts]
    work = plan_batches(sequences, Positions.parse("last:2"), skip, 64, groups=6)
    rows = [sum(max(0, size - skip) for size, group in parts if group == g) for g in range(6)]
    assert work.groups.rows.tolist() == work.rows_by_group(skip).tolist() == rows
    assert work.groups.positions.tolist() == [sum(min(2, s) for s, group in parts if group == g) for g in range(6)]
    assert work.rows_by_group(skip + 1).sum() == sum(max(0, size - skip - 1) for size, _ in parts)
    longest = max(0, *(size - skip for size, _ in parts))
    assert work.largest_prompt_share == (longest / sum(rows) if any(rows) else 0)
    assert work.groups.largest_share == (max(rows) / sum(rows) if any(rows) else 0)


def test_groups_that_are_left_out() -> None:
    groups = Groups(rows=np.array([3.0, 0, 2]), positions=np.array([1.0, 1, 1]))
    assert (groups.used.tolist(), groups.drops.tolist()) == ([0, 2], [0, 2])
    alone = Groups(rows=np.array([3.0, 0]), positions=np.array([1.0, 1]))
    assert (alone.used.tolist(), alone.drops.tolist()) == ([0], [])


# The hash


def test_groups_are_pinned() -> None:
    """Runs of different releases and machines are paired by group; Python's own hash differs in every process."""
    assert [group_of(text, 16) for text in ("", "hello", "grüße 🍅")] == [4, 13, 12]
    assert group_of("hello", 1) == 0


@given(st.text(max_size=40), st.integers(1, 1000))
@settings(max_examples=40)
def test_any_text_has_one_group(text: str, groups: int) -> None:
    assert 0 <= group_of(text, groups) < groups
    assert group_of(text, groups) == group_of(text, groups)


def test_groups_are_roughly_even() -> None:
    """Counts of 8000 texts in 16 groups, 500 expected each: chi-squared with 15 degrees of freedom is below 37.7 with
    probability 0.999, and the texts are fixed."""
    counts = np.bincount([group_of(f"prompt number {i}", 16) for i in range(8000)], minlength=16)
    assert np.sum((counts - 500) ** 2 / 500) < 37.7
