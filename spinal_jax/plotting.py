"""The function behind `plot` of traces and comparisons, which the package sets: records stand below the reports."""

from __future__ import annotations

TYPE_CHECKING = False  # as typing's, which the command line does not import
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

draw: Callable[[Any, str | None], Any]  # a record and the name of a figure -> a matplotlib figure
