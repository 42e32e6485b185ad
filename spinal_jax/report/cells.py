"""Formats numbers and names for pages."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from markupsafe import Markup

from spinal_jax.report.sections import Cell, Facts, Tile, number_key
from spinal_jax.wording import decimals, plus_minus


def cell(text: str, key: float = math.nan, half: str = "") -> Cell:
    """A cell that sorts by a number; NaN sorts last."""
    return Cell(text, number_key(key), half)


def word(value: object) -> Cell:
    """A cell that sorts by its text; None is an en dash and sorts last."""
    return Cell("–") if value is None else Cell(str(value), str(value))


def measured(value: float, half: float = math.nan, unit: str = "") -> Cell:
    """A number with the half-width of its interval."""
    text, _, width = plus_minus(value, half).partition(" ± ")
    return cell(f"{text} {unit}".rstrip() if math.isfinite(value) else "–", value, width)


def number_cells(
    values: np.ndarray, halves: np.ndarray | None = None, most: int = 5, marked: np.ndarray | None = None
) -> list[Cell]:
    """Cells of a column, with decimals by the size of its median.

    Args:
      values: [N].
      halves: [N] half-widths of intervals, NaN if there is none.
      most: maximum number of decimals.
      marked: bool [N] values with an asterisk.
    """
    halves = np.full(len(values), np.nan) if halves is None else halves
    marked = np.zeros(len(values), bool) if marked is None else marked
    places = min(max(_places(values, 3), _places(halves, 1)), most)
    cells = []
    for value, half, star in zip(values.tolist(), halves.tolist(), marked.tolist(), strict=True):
        rounded = round(value, places) + 0.0  # which is never a negative zero
        text = f"{rounded:,.{places}f}".replace("-", "−") + "*" * star if math.isfinite(value) else "–"
        cells.append(cell(text, value, f"{half:.{places}f}" if math.isfinite(half) else ""))
    return cells


def by_row(columns: Sequence[Sequence[Cell]]) -> list[list[Cell]]:
    """Columns of cells as rows."""
    return [list(row) for row in zip(*columns, strict=True)]


def tile(label: str, value: float, half: float = math.nan, unit: str = "", note: str = "") -> Tile:
    """A tile with a number, or "not measured"."""
    text, _, width = plus_minus(value, half).partition(" ± ")
    return Tile(label, text, width, unit, note if math.isfinite(value) else "not measured")


def ends(low: float, high: float) -> str:
    """An interval in words with equal decimals; an en dash where there is none."""
    if not math.isfinite(low) or not math.isfinite(high):
        return "–"
    places = min(max(decimals(low), decimals(high), decimals(high - low, 2) if high > low else 0), 5)
    return f"{low:.{places}f} to {high:.{places}f}".replace("-", "−")


def percent(share: float) -> str:
    """A share as a whole number of per cent."""
    return f"{100 * share:.0f} %"


def describe_positions(selector: str) -> str:
    """A position selector, such as last:4, in words."""
    name, _, count = selector.partition(":")
    words = {
        "last": f"the last {count} tokens of each prompt" if count != "1" else "the last token of each prompt",
        "response": f"the first {count} positions that predict a response token",
        "stride": f"every {count}th token of each prompt",
        "all": "every token of each prompt",
    }
    return words.get(name, selector)


def name_boundaries(boundaries: Iterable[int]) -> str:
    """Boundaries in words, with runs joined: `boundary 3`, or `boundaries 3, 12-18`."""
    runs: list[list[int]] = []
    for at in sorted(boundaries):
        if runs and at == runs[-1][1] + 1:
            runs[-1][1] = at
        else:
            runs.append([at, at])
    several = len(runs) > 1 or runs[0][0] < runs[0][1]
    return ("boundaries " if several else "boundary ") + ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in runs)


def code(text: object) -> Markup:
    """Text in a code font."""
    return Markup("<code>{}</code>").format(text)


def sha256_markup(sha256: str | None, missing: str = "no hash") -> str | Markup:
    """A hash as markup."""
    return Markup('sha256 <code class="hash">{}</code>').format(sha256) if sha256 else missing


def environment_facts(values: Mapping[str, object]) -> Facts:
    """The environment of a measurement, sorted by name; nested records on one line."""

    def text(value: object) -> str:
        if isinstance(value, Mapping):
            return ", ".join(f"{name} {value[name]}" for name in sorted(value))
        return str(value)

    return Facts([(name, text(values[name])) for name in sorted(values)])


def _places(values: np.ndarray, digits: int) -> int:
    """Decimals that show the median to `digits` significant digits."""
    seen = np.abs(values[np.isfinite(values) & (np.abs(values) > 1e-9)])
    return decimals(float(np.median(seen)), digits) if len(seen) else 0
