"""More than two checkpoints: each against its reference, strongest footprint first."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spinal_jax.comparison.record import Comparison, load_comparison
from spinal_jax.errors import UserError
from spinal_jax.files import plain, write_whole
from spinal_jax.wording import number

SCHEMA = "spinal-ranking/1"


@dataclass(frozen=True, eq=False, repr=False)
class Ranking:
    """Comparisons by falling Delta_align; those without a number last. Places whose intervals overlap are not told
    apart by it."""

    comparisons: tuple[Comparison, ...]

    def rows(self) -> list[dict[str, Any]]:
        """One dict per comparison: place, names, verdict, Delta_align with interval and p-value, its parts, and where
        the change lies by relative depth."""
        rows = []
        for place, comparison in enumerate(self.comparisons, 1):
            summary, where = comparison.summary, comparison.summary["localisation"]
            rows.append(
                {
                    "place": place,
                    "aligned": comparison.aligned["name"],
                    "reference": comparison.reference["name"],
                    "blocks": comparison.depth,
                    "verdict": comparison.verdict,
                    **{f"delta_align{end}": summary[f"delta_align{end}"] for end in ("", "_low", "_high")},
                    "p_value": summary["p_value"],
                    "delta_contraction": summary["delta_contraction"],
                    "delta_transport": summary["delta_transport"],
                    "coherence": summary["coherence"],
                    "spinal_score": summary["spinal_score"],
                    "contraction_centroid": where["delta_contraction"]["centroid"],
                    "transport_centroid": where["delta_transport"]["centroid"],
                    "holds": comparison.robustness["holds"],
                    "settings": comparison.robustness["of"],
                }
            )
        return rows

    def __repr__(self) -> str:
        lines = ["Ranking by Delta_align"]
        for row in self.rows():
            interval = f"{number(row['delta_align_low'])} to {number(row['delta_align_high'])}"
            lines.append(
                f"  {row['place']:>3}  {row['aligned']} against {row['reference']}: {number(row['delta_align'])} "
                f"({interval}), {row['verdict']}, sign holds in {row['holds']} of {row['settings']} settings"
            )
        return "\n".join(lines)


def rank(comparisons: Iterable[Comparison | str | os.PathLike[str]]) -> Ranking:
    """Ranks checkpoints of one run, or a family, each compared with the same reference or with its own.

    >>> spinal_jax.rank(["runs/dpo", "runs/ipo"])  # doctest: +SKIP

    Models of different depth may stand in one ranking: Delta_align is a mean over the last third of each, and centroids
    are relative depths. `rank(...).rows()` is one dict per comparison, which data frames take.

    Args:
        comparisons: each a `Comparison`, or a folder that holds comparison.json.

    Raises:
        UserError: none is given, or one is neither.
    """
    if isinstance(comparisons, (str, os.PathLike, Comparison)):
        raise UserError("one comparison is given; rank takes a list of them")
    loaded = [_comparison(each) for each in comparisons]
    if not loaded:
        raise UserError("no comparison is given; rank takes a list of comparisons or of their run folders")

    def key(comparison: Comparison) -> float:
        value = float(comparison.summary["delta_align"])
        return math.inf if math.isnan(value) else -value

    return Ranking(tuple(sorted(loaded, key=key)))


def _comparison(each: object) -> Comparison:
    if isinstance(each, Comparison):
        return each
    if isinstance(each, (str, os.PathLike)):
        return load_comparison(each)
    raise UserError(f"rank takes comparisons or the run folders of comparisons, not {type(each).__name__}")


def save_ranking(ranking: Ranking, folder: str | os.PathLike[str]) -> None:
    """Writes ranking.csv and ranking.json; each appears whole."""
    folder, rows = Path(folder), ranking.rows()
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()})
    write_whole(folder / "ranking.csv", table.getvalue().encode())
    document = {"schema": SCHEMA, "rows": [{key: plain(value) for key, value in row.items()} for row in rows]}
    write_whole(folder / "ranking.json", (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())
