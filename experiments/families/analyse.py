"""The table and the figure of the families: python experiments/families/analyse.py SWEEP OUT."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).parent))
import figure

from spinal_jax.comparison.record import Comparison, load_comparison
from spinal_jax.files import table, write_whole
from spinal_jax.report.figures import png_bytes
from spinal_jax.runs.find import find_runs
from spinal_jax.stats.signflip import holm

# Between these pairs lies DPO and nothing else, as conf/pair/ says; between the others, more.
DPO_ALONE = frozenset(
    {
        "llama-3-8b",
        "olmo-2-1b",
        "olmo-2-7b",
        "olmo-3-7b",
        "olmo-3-7b-think",
        "olmoe-1b-7b",
        "phi-2",
        "tulu-3-8b",
        "zephyr-7b",
    }
)
VERDICTS = ("toward contraction", "toward expansion", "differs, direction not robust", "no detectable change")
PLACES = ("delta_contraction", "delta_transport", "policy_distance", "gradient_norm")
Row = dict[str, Any]


def row_of(pair: str, found: Comparison) -> Row:
    """What one pair came to."""
    summary, where = found.summary, found.summary["localisation"]
    row: Row = {
        "pair": pair,
        "dpo_alone": pair in DPO_ALONE,
        **{side: getattr(found, side)["name"] for side in ("aligned", "reference")},
        "family": found.aligned["family"],
        "blocks": found.depth,
        "verdict": found.verdict,
        **{f"delta_align{end}": summary[f"delta_align{end}"] for end in ("", "_low", "_high")},
        "p_value": summary["p_value"],
        "p_holm": math.nan,
        "holds": found.robustness["holds"],
        "settings": found.robustness["of"],
        "delta_contraction": summary["delta_contraction"],
        "delta_transport": summary["delta_transport"],
        "policy_distance": float(found.columns["policy_distance"][-1]),  # of what the two put out
        "share_even": where["policy_distance"]["share_even"],
    }
    for name in PLACES:
        row |= {f"{name}_share{end}": where[name][f"share{end}"] for end in ("", "_low", "_high")}
    return row | {name: summary[name] for name in ("coherence", "spinal_score")}


def signs(rows: Iterable[Row]) -> list[Row]:
    """How often Delta_align is above 0, with the p-value of a two-sided sign test, and in how many pairs the policy
    distance lies in the terminal block more than evenly: for the pairs with DPO alone, and for all."""
    rows = list(rows)
    lines = []
    for among, some in (("DPO alone", [row for row in rows if row["dpo_alone"]]), ("all", rows)):
        known = [row["delta_align"] for row in some if math.isfinite(row["delta_align"])]
        if known:
            above = sum(value > 0 for value in known)
            p = float(stats.binomtest(above, len(known)).pvalue)
            beyond = sum(row["policy_distance_share_low"] > row["share_even"] for row in some)
            told = {word: sum(row["verdict"] == word for row in some) for word in VERDICTS}
            line = {"among": among, "pairs": len(known), "above_0": above, "p_value": p}
            lines.append(line | told | {"policy_beyond_even": beyond})
    return lines


def analyse(sweep: Path, out: Path) -> None:
    """families.csv, signs.csv and the figure."""
    runs = find_runs([sweep])
    if incomplete := [run.folder.name for run in runs if not run.complete]:
        sys.exit(f"not complete, so nothing is analysed: {', '.join(incomplete)}; start the sweep again")
    found = {run.folder.name: load_comparison(run.folder) for run in runs if run.command == "compare"}
    pairs = sorted(found, key=lambda pair: (pair not in DPO_ALONE, pair))
    rows = [row_of(pair, found[pair]) for pair in pairs]
    for row, p in zip(rows, holm(np.array([row["p_value"] for row in rows])), strict=True):
        row["p_holm"] = float(p)
    out.mkdir(parents=True, exist_ok=True)
    for name, lines in (("families", rows), ("signs", signs(rows))):
        write_whole(out / f"{name}.csv", table(lines).encode())
    drawn = figure.draw(rows, [found[pair] for pair in pairs])
    write_whole(out / "families.png", png_bytes(drawn))
    for row in rows:
        print(
            f"  {row['pair']:<20} {row['delta_align']:+.4f} ({row['delta_align_low']:+.4f} to "
            f"{row['delta_align_high']:+.4f}), {row['verdict']}, policy distance "
            f"{row['policy_distance_share']:.0%} terminal (even {row['share_even']:.0%})"
        )
    print(f"  table and figure in {out}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python experiments/families/analyse.py SWEEP OUT")
    analyse(Path(sys.argv[1]), Path(sys.argv[2]))
