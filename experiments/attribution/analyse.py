"""The tables and the figure of the attribution study, from its runs' saved files:
python experiments/attribution/analyse.py [SIZE ...], from the folder of the repository."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path

import numpy as np

from spinal_jax.comparison.attribution import MIN_RUNS, Attribution, attribute, judge_effect, save_attribution
from spinal_jax.comparison.record import load_comparison
from spinal_jax.files import table, write_whole
from spinal_jax.report.attribution import write_attribution_report

HERE = Path(__file__).parent
ARMS = ("dpo", "shuffled", "sft")


def main(sizes: list[str]) -> None:
    for size in sizes:
        runs, place = Path("runs/attribution") / size, HERE / size
        place.mkdir(exist_ok=True)
        dpo, shuffled, sft = (complete(runs, arm) for arm in ARMS)
        against = {"shuffled": attribute(dpo, shuffled, beside=sft), "sft": attribute(dpo, sft)}
        with tempfile.TemporaryDirectory() as scratch:
            for control, found in against.items():
                save_attribution(found, scratch)
                shutil.copyfile(Path(scratch) / "effects.csv", place / f"effects_{control}.csv")
                write(place / f"boundaries_{control}.csv", boundaries(found))
                if control == "shuffled":
                    write_attribution_report(scratch)
                    shutil.copyfile(Path(scratch) / "attribution.csv", place / "runs.csv")
                    shutil.copyfile(Path(scratch) / "figures" / "runs.png", place / "runs.png")
        main = against["shuffled"]
        write(place / "correlations.csv", [{"number": n, **drop_text(c)} for n, c in main.correlations.items()])
        if len(shuffled) >= 2 * MIN_RUNS:
            write(place / "halves.csv", halves(main.arm("control", "delta_align")))
        write(place / "alone.csv", [alone(Path(str(run["folder"]))) for run in main.runs])
        print(size, main.sentence, against["sft"].sentence, sep="\n")


def complete(runs: Path, arm: str) -> list[str]:
    """The folders of an arm's runs that have ended."""
    return [str(file.parent) for file in sorted(runs.glob(f"{arm}-*/manifest.json"))]


def write(file: Path, rows: list[dict[str, object]]) -> None:
    write_whole(file, table(rows).encode())


def drop_text(record: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in record.items() if name != "sentence"}


def boundaries(found: Attribution) -> list[dict[str, object]]:
    """A row a number and boundary."""
    return [
        {"number": name, "boundary": at, **{key: values[at] for key, values in columns.items()}}
        for name, columns in found.boundaries.items()
        for at in range(len(columns["p"]))
    ]


def halves(control: np.ndarray) -> list[dict[str, object]]:
    """The verdict of either half of the controls against the other, for every split into two halves."""
    rows: list[dict[str, object]] = []
    for half in combinations(range(len(control)), len(control) // 2):
        rest = [at for at in range(len(control)) if at not in half]
        found, margin, verdict = judge_effect(control[list(half)], control[rest])
        row: dict[str, object] = {"half": " ".join(map(str, half)), "effect": found.value, "low": found.low}
        rows.append(row | {"high": found.high, "margin": margin, "verdict": verdict})
    return rows


def alone(folder: Path) -> dict[str, object]:
    """What a run's own comparison says, whose interval and p-value are over prompts."""
    summary = load_comparison(max((folder / "traces").iterdir())).summary
    names = ("delta_align", "delta_align_low", "delta_align_high", "p_value", "verdict")
    return {"run": folder.name, **{name: summary[name] for name in names}}


if __name__ == "__main__":
    main(sys.argv[1:] or ["0.3m", "1m"])
