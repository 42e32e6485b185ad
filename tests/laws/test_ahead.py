"""What a thread makes ahead comes in order, no further ahead than asked for, and its errors come where they belong."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from spinal_jax.data.ahead import ahead


def test_items_come_in_order_and_the_thread_ends() -> None:
    before = threading.active_count()
    with ahead(range(100)) as items:
        assert list(items) == list(range(100))
    assert threading.active_count() == before


def test_an_error_comes_after_what_was_made_before_it() -> None:
    def items() -> Iterator[int]:
        yield 0
        yield 1
        raise ValueError("the third")

    found = []
    with ahead(items()) as some, pytest.raises(ValueError, match="the third"):
        found.extend(some)  # which keeps what came before
    assert found == [0, 1]


def test_no_more_is_made_than_is_asked_for() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(1000):
            made.append(number)
            yield number

    with ahead(items(), count=2) as some:
        assert next(some) == 0
    assert len(made) <= 1 + 2 + 1  # used, waiting, and the one that found no room
