"""Takes from a training run what this study keeps: python experiments/smollm2_hh/collect.py RUN OUT."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path

FIGURES = ("course.png", "over_training.png")


def collect(run: Path, out: Path) -> None:
    """metrics.jsonl, onset.json, two figures and the last comparison with step 0 as they are, and the records of
    onset.json as records.csv."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("metrics.jsonl", "onset.json", *(f"figures/{name}" for name in FIGURES)):
        shutil.copyfile(run / name, out / Path(name).name)
    last = max((run / "traces").iterdir())
    shutil.copyfile(last / "comparison.json", out / "comparison.json")
    records = json.loads((run / "onset.json").read_text(encoding="utf-8"))["records"]
    columns = sorted({name for record in records for name in record} - {"step"})
    with (out / "records.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["step", *columns], lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python experiments/smollm2_hh/collect.py RUN OUT")
    collect(Path(sys.argv[1]), Path(sys.argv[2]))
