"""The table of the controlled quartet: python experiments/controlled/collect.py OUT experiments/controlled."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

COLUMNS = (
    *("arm", "seed", "accuracy_first", "accuracy_last", "margin_last", "kl_last"),
    *("delta_align", "low", "high", "p_value", "verdict", "onset", "destabilisation"),
)


def row(run: Path) -> dict[str, object]:
    """What one run came to."""
    arm, _, seed = run.name.rpartition("-")
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    told = json.loads((run / "onset.json").read_text(encoding="utf-8"))
    last = max((run / "traces").iterdir())
    found = json.loads((last / "comparison.json").read_text(encoding="utf-8"))["summary"]
    evaluated = [line for line in metrics if "eval_rewards/accuracies" in line]
    return {
        "arm": arm,
        "seed": seed,
        "accuracy_first": evaluated[0]["eval_rewards/accuracies"] if evaluated else "",
        "accuracy_last": evaluated[-1]["eval_rewards/accuracies"] if evaluated else "",
        "margin_last": evaluated[-1]["eval_rewards/margins"] if evaluated else "",
        "kl_last": told["records"][-1]["kl"],
        "delta_align": found["delta_align"],
        "low": found["delta_align_low"],
        "high": found["delta_align_high"],
        "p_value": found["p_value"],
        "verdict": found["verdict"],
        **{name: told[name]["step"] if told[name] else "" for name in ("onset", "destabilisation")},
    }


def collect(out: Path, into: Path) -> None:
    """runs.csv, one row a run, and records.csv, one row a trace."""
    runs = [
        run for run in sorted(out.iterdir()) if (run / "manifest.json").exists() and not run.name.startswith("base")
    ]
    with (into / "runs.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(row, runs))
    records = [
        {"run": run.name, **record}
        for run in runs
        for record in json.loads((run / "onset.json").read_text(encoding="utf-8"))["records"]
    ]
    names = dict.fromkeys(name for record in records for name in record)
    with (into / "records.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(names), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python experiments/controlled/collect.py OUT INTO")
    collect(Path(sys.argv[1]), Path(sys.argv[2]))
