"""Prefetching: a thread produces the next items while the current one is used."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class _Failed:
    error: BaseException


_END = object()


@contextlib.contextmanager
def ahead(items: Iterable[T], count: int = 2) -> Iterator[Iterator[T]]:
    """Iterates over the items, with up to `count` of them prefetched by a thread.

    An exception of the producer is raised at the item that failed. The thread ends with the context.
    """
    made: queue.Queue[object] = queue.Queue(count)
    left = threading.Event()

    def put(item: object) -> bool:
        while not left.is_set():
            with contextlib.suppress(queue.Full):
                made.put(item, timeout=0.1)
                return True
        return False

    def make() -> None:
        try:
            for item in items:
                if not put(item):
                    return
            put(_END)
        except BaseException as error:
            put(_Failed(error))

    def used() -> Iterator[T]:
        while (item := made.get()) is not _END:
            if isinstance(item, _Failed):
                raise item.error
            yield item  # type: ignore[misc]

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    try:
        yield used()
    finally:
        left.set()
        thread.join()
