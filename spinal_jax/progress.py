"""Progress of long work: how a function that takes time reports it, and bars that show it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

Advance = Callable[[int], None]  # reports that an amount of work is done
Bar = Callable[[str, int, str], contextlib.AbstractContextManager[Advance]]  # opens a bar: (description, total, unit)
Say = Callable[[str], None]  # shows one line


def no_bar(description: str, total: int, unit: str) -> contextlib.AbstractContextManager[Advance]:
    """A `Bar` that shows nothing."""
    return contextlib.nullcontext(lambda amount: None)


def bars(show: bool) -> Bar:
    """A `Bar` that draws with tqdm, or nothing if `show` is false."""
    from tqdm.auto import tqdm

    @contextlib.contextmanager
    def bar(description: str, total: int, unit: str) -> Iterator[Advance]:
        with tqdm(
            total=total, desc=description, unit=unit, unit_scale=total > 10_000, disable=not show, leave=False
        ) as shown:
            yield lambda amount: (shown.update(amount), None)[1]

    return bar
