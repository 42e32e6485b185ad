"""Packing: every token computed once, every measured position found, every accumulator free before it is used again."""

from __future__ import annotations

from collections import Counter

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spinal_jax.config.positions import Positions
from spinal_jax.data.packing import SLOTS, Plan, TokenBatch, TokenSequence, plan_batches
from spinal_jax.errors import UserError

SELECTORS = ["last:1", "last:4", "stride:1", "stride:7", "all", "response:1", "response:3"]


def pool(sizes: list[int], groups: list[int], starts: list[float] | None = None) -> list[TokenSequence]:
    """Sequences whose tokens are all different, so that each is found again wherever it went."""
    ends = np.cumsum(sizes)
    starts = starts or [0.5] * len(sizes)
    return [
        TokenSequence(np.arange(end - size, end, dtype=np.int32), group, round(size * start))
        for size, end, group, start in zip(sizes, ends, groups, starts, strict=True)
    ]


def expected_positions(selector: str, size: int, response: int) -> list[int]:
    """What docs/method.md says of a selector, by going through the positions one by one."""
    kind, _, count = selector.partition(":")
    if kind == "all":
        return list(range(size))
    if kind == "last":
        return [t for t in range(size) if size - t <= int(count)]
    if kind == "stride":
        return [t for t in range(size) if (t + 1) % int(count) == 0]
    return [t for t in range(size) if t + 1 < size and t + 1 >= response][: int(count)]  # t predicts token t + 1


def check(work: Plan, selector: str, skip: int) -> None:
    """All that must hold of a plan, read from the batches that it gives."""
    owner = {int(token): n for n, s in enumerate(work.sequences) for token in s.ids}
    seen: Counter[int] = Counter()
    seen_runs: dict[int, list[int]] = {}  # run -> batches with rows of it
    shapes = set()
    batches = list(work)
    assert len(batches) == len(work.batches)
    for number, (packed, batch) in enumerate(zip(work.batches, batches, strict=True)):
        batch = jax.tree.map(np.asarray, batch)
        assert batch.tokens.shape == (packed.height, packed.length)
        shapes.add((batch.tokens.shape, batch.measured.shape))
        counted, expected = np.zeros(batch.tokens.shape), Counter()
        used: dict[int, int] = {}  # slot -> run
        for b, row in enumerate(batch.segments):
            size = np.flatnonzero(row)[-1] + 1 if row.any() else 0
            assert (np.diff(row[:size]) >= 0).all()
            assert list(dict.fromkeys(row[:size])) == list(range(1, (row.max() if size else 0) + 1))
            if size:
                run = packed.runs[b]
                seen_runs.setdefault(run, []).append(number)
                assert batch.slots[b] == work.runs[run].slot
                assert used.setdefault(int(batch.slots[b]), run) == run  # two groups never share an accumulator
            for segment in range(1, row.max() + 1):
                at = np.flatnonzero(row == segment)
                which = owner[int(batch.tokens[b, at[0]])]
                sequence = work.sequences[which]
                seen[which] += 1
                assert batch.tokens[b, at].tolist() == sequence.ids.tolist()
                assert batch.positions[b, at].tolist() == list(range(len(at)))
                assert (batch.lengths[b, at] == len(at)).all()
                assert sequence.group == work.runs[run].group
                counted[b, at[skip:]] = 1
                assert sequence.response_start is not None
                for t in expected_positions(selector, len(at), sequence.response_start):
                    expected[b * packed.length + int(at[t]), sequence.group] += 1
        assert (batch.counted == counted).all()
        real = batch.measured_weight > 0
        assert set(batch.measured_weight.tolist()) <= {0.0, 1.0}
        found = zip(batch.measured[real].tolist(), batch.measured_group[real].tolist(), strict=True)
        assert Counter(found) == expected
        assert ((batch.measured >= 0) & (batch.measured < batch.tokens.size)).all()
        assert len(set(packed.runs)) <= SLOTS
    assert seen == Counter(range(len(work.sequences)))
    check_runs(work, seen_runs)
    assert work.tokens == sum(int((b.segments > 0).sum()) for b in batches)
    assert work.padded_tokens == sum(b.tokens.size for b in batches)
    assert work.rows == sum(int(b.counted.sum()) for b in batches)
    assert work.positions == sum(int(b.measured_weight.sum()) for b in batches)
    assert work.waste == pytest.approx(1 - work.tokens / work.padded_tokens)


def check_runs(work: Plan, seen: dict[int, list[int]]) -> None:
    """Visits end where they say, hold a group's rows of one length class, and do not meet in their accumulator."""
    assert set(seen) == set(range(len(work.runs)))
    for run, batches in seen.items():
        assert work.runs[run].last_batch == max(batches)
        assert 0 <= work.runs[run].slot < SLOTS
    for one in seen:
        for other in seen:
            if one < other and work.runs[one].slot == work.runs[other].slot:
                assert min(seen[other]) > work.runs[one].last_batch  # it has been read, so it starts from nothing
    classes = [(work.batches[batches[0]].length, work.runs[v].group) for v, batches in seen.items()]
    assert len(set(classes)) == len(classes)


SEQUENCES = st.lists(
    st.tuples(st.integers(1, 60) | st.sampled_from([1, 2, 127, 128, 129, 512]), st.integers(0, 5), st.floats(0, 1)),
    min_size=1,
    max_size=30,
)


@settings(max_examples=150)
@given(SEQUENCES, st.sampled_from(SELECTORS), st.integers(0, 3), st.sampled_from([1, 64, 300, 2048]))
def test_every_token_is_computed_once_and_every_position_measured_once(
    parts: list[tuple[int, int, float]], selector: str, skip: int, batch_tokens: int
) -> None:
    sizes, groups, starts = map(list, zip(*parts, strict=True))
    work = plan_batches(pool(sizes, groups, starts), Positions.parse(selector), skip, batch_tokens, slots=SLOTS)
    check(work, selector, skip)
    assert len({(b.height, b.length, b.measured) for b in work.batches}) == 1  # one length class, one compiled step
    for packed in work.batches:
        assert packed.height * packed.length <= max(batch_tokens, packed.length)


@settings(max_examples=15)
@given(st.lists(st.sampled_from([5, 512, 513, 700, 2048, 2100]), min_size=1, max_size=12), st.integers(1, 3))
def test_long_sequences_get_shapes_of_their_own(sizes: list[int], groups: int) -> None:
    work = plan_batches(
        pool(sizes, [n % groups for n in range(len(sizes))]), Positions.parse("last:4"), 1, 2048, slots=SLOTS
    )
    check(work, "last:4", 1)
    classes = {512 if size <= 512 else 2048 if size <= 2048 else 8192 for size in sizes}
    assert len({(b.height, b.length, b.measured) for b in work.batches}) == len(classes)
    for packed in work.batches:
        assert packed.length <= 512 or packed.length % 512 == 0  # attention goes by blocks of 512 queries


@pytest.mark.parametrize("most", [128, 256, 512])
@pytest.mark.parametrize("batch_tokens", [2048, 16384])
def test_padding_is_below_a_tenth_of_the_tokens(most: int, batch_tokens: int) -> None:
    rng = np.random.default_rng(most)
    # Dialogue prompts: lengths of a log-normal kind, a median of 90 tokens, the long ones cut.
    sizes = np.clip(np.exp(rng.normal(4.5, 0.8, size=512)), 5, most).astype(int).tolist()
    work = plan_batches(
        pool(sizes, rng.integers(0, 16, size=512).tolist()), Positions.parse("last:4"), 1, batch_tokens, slots=SLOTS
    )
    assert work.waste < 0.10


def test_rows_and_measured_positions_are_shared_evenly_between_batches() -> None:
    """Half of the prompts are short, and each group's rows are packed from its longest prompt to its shortest."""
    rng = np.random.default_rng(0)
    sizes = [*rng.integers(13, 31, 256).tolist(), *rng.integers(100, 129, 256).tolist()]
    work = plan_batches(pool(sizes, rng.integers(0, 16, 512).tolist()), Positions.parse("last:4"), 1, 2048)
    padding = sum(packed.height - len(packed.rows) for packed in work.batches)
    assert padding < len(work.batches)
    assert sum(packed.measured for packed in work.batches) < 1.3 * work.positions


@pytest.mark.parametrize(("count", "length", "shards"), [(48, 128, 1), (48, 128, 8), (512, 256, 256)])
def test_few_prompts_do_not_fill_a_large_batch_with_padding(count: int, length: int, shards: int) -> None:
    sequences = pool([length] * count, [n % 16 for n in range(count)])
    work = plan_batches(sequences, Positions.parse("last:4"), 1, 16384 * shards, shards)
    assert (len(work.batches), work.waste) == (1, 0)


def test_a_prompt_beyond_the_last_length_class_is_refused() -> None:
    with pytest.raises(UserError, match=r"131073 tokens.*prompts\.max_length"):
        plan_batches([TokenSequence(np.zeros(131073, np.int32), 0)], Positions.parse("all"), 1, 2048)


def test_equal_pools_give_equal_plans() -> None:
    rng = np.random.default_rng(0)
    sequences = pool(rng.integers(1, 80, size=40).tolist(), rng.integers(0, 4, size=40).tolist())
    first, second = (plan_batches(sequences, Positions.parse("last:4"), 1, 512) for _ in range(2))
    assert first.batches == second.batches
    assert first.runs == second.runs


def test_a_batch_is_a_tree_of_arrays() -> None:
    (batch,) = plan_batches(pool([9], [0]), Positions.parse("last:4"), 1, 64)
    leaves, shape = jax.tree.flatten(batch)
    dtypes = {name: np.asarray(value).dtype.name for name, value in vars(batch).items()}
    assert len(leaves) == len(dtypes) == 9
    assert isinstance(jax.tree.unflatten(shape, leaves), TokenBatch)
    floats = {name for name, dtype in dtypes.items() if dtype == "float32"}
    assert floats == {"counted", "measured_weight"}
    assert set(dtypes.values()) == {"float32", "int32"}


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("size", [1, 2, 6, 7, 8, 20])
@pytest.mark.parametrize("response", [0, 1, 5, 19])
def test_selectors_name_the_positions_of_the_method(selector: str, size: int, response: int) -> None:
    response = min(response, size)
    assert Positions.parse(selector).of(size, response).tolist() == expected_positions(selector, size, response)


def test_selectors_by_hand() -> None:
    sequence = TokenSequence(np.arange(10, dtype=np.int32), 0, response_start=6)
    chosen = {
        text: sequence.measured(Positions.parse(text)).tolist() for text in ("last:3", "stride:4", "response:2", "all")
    }
    assert chosen == {"last:3": [7, 8, 9], "stride:4": [3, 7], "response:2": [5, 6], "all": list(range(10))}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "last",
        "last:",
        "last:0",
        "last:-1",
        "last:1.5",
        "last:x",
        "last:4:2",
        "first:4",
        "all:3",
        "Last:4",
        "last:٣",
    ],
)
def test_a_wrong_selector_is_refused_with_what_would_be_right(text: str) -> None:
    with pytest.raises(UserError, match=r"metrics\.transport\.positions .* last:K, response:K, stride:K") as error:
        Positions.parse(text)
    assert repr(text) in str(error.value)


def test_the_response_selector_needs_responses() -> None:
    with pytest.raises(UserError, match=r"response:2.*no responses"):
        Positions.parse("response:2").of(5, None)


def test_every_group_has_a_slot_of_its_own_where_nothing_leaves() -> None:
    """Padding names the slot of the last row, so that it is no group of its own."""
    groups = [n % 7 for n in range(40)]
    work = plan_batches(pool([20] * 40, groups), Positions.parse("last:4"), 1, 400, groups=9)
    assert (work.slots, work.leaves) == (9, False)
    assert all(run.slot == run.group for run in work.runs)
    assert work.groups_at_once == max(len(set(batch.slots.tolist())) for batch in work) > 2
