"""What the studies' pages say in numbers is what their committed tables hold."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def page(study: str) -> str:
    """A README with its lines joined, so that a sentence may break anywhere."""
    return " ".join((EXPERIMENTS / study / "README.md").read_text(encoding="utf-8").split())


def table(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened))


def cell(text: str, places: int) -> str:
    """A number of a table as the pages round it; 0 without decimals where it is exactly that, nothing where unknown."""
    return "" if not text else f"{float(text):.{places}f}"


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_course_of_smollm2(kind: str) -> None:
    text = page("smollm2_hh")
    for record in table(EXPERIMENTS / "smollm2_hh" / kind / "records.csv"):
        if record["step"] == "0":
            continue
        cells = [record["step"], *(cell(record[name], 4) for name in ("delta_align", "delta_align_se"))]
        cells += [cell(record[f"eval_rewards/{name}"], 3) for name in ("margins", "accuracies")]
        row = " ".join(f"| {value}".rstrip() for value in [*cells, cell(record["kl"], 4)])
        assert f"{row} |" in text, row


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("file", ["comparison.json", "against_base.json"])
def test_the_verdicts_of_smollm2(kind: str, file: str) -> None:
    found = json.loads((EXPERIMENTS / "smollm2_hh" / kind / file).read_text(encoding="utf-8"))
    summary: dict[str, Any] = found["summary"]
    value, low, high = (f"{summary[f'delta_align{end}']:.4f}" for end in ("", "_low", "_high"))
    text, p = page("smollm2_hh"), summary["p_value"]
    assert re.search(rf"`Delta_align` (is )?{value}, (95 % )?interval {low} to {high}, p = {p:.2g}\b", text), value
    assert f"in {found['robustness']['holds']} of {found['robustness']['of']} settings" in text
    told = found["columns"]["delta_contraction_p_holm"]
    changed = sum(value is not None and value < 0.05 for value in told)
    assert f"at {changed} of {len(told)} boundaries" in text
    shares = {name: place["share"] for name, place in summary["localisation"].items()}
    assert f"{shares['policy_distance']:.0%}".replace("%", " %") in text
    if file == "against_base.json":
        assert f"{shares['gradient_norm']:.0%}".replace("%", " %") in text


def test_the_arms_of_the_controlled_world() -> None:
    lines = (EXPERIMENTS / "controlled" / "README.md").read_text(encoding="utf-8").splitlines()
    runs = table(EXPERIMENTS / "controlled" / "runs.csv")
    for arm in ("dpo", "shuffled", "sft", "hot"):
        some = [run for run in runs if run["arm"] == arm]
        row = next(line for line in lines if line.startswith(f"| `{arm}` |"))
        accuracy, deltas, kl, *counts = (part.strip() for part in row.strip("|").split("|")[1:])
        known = sorted(float(run["accuracy_last"]) for run in some if run["accuracy_last"])
        assert_ends(accuracy, known)
        assert deltas == ", ".join(f"{float(run['delta_align']):.3f}" for run in some)
        moved = sorted(float(run["kl_last"]) for run in some)
        if kl.startswith("below"):
            assert moved[-1] < float(kl.removeprefix("below"))
        else:
            assert_ends(kl, moved)
        significant = sum(float(run["p_value"]) < 0.05 for run in some)
        told = [significant, *(sum(run[name] != "" for run in some) for name in ("onset", "destabilisation"))]
        assert counts == [f"{count} of {len(some)}" for count in told]


def test_the_stand_ins_of_the_families() -> None:
    text = page("families")
    for row in table(EXPERIMENTS / "families" / "standin" / "families.csv"):
        value, low, high = (cell(row[f"delta_align{end}"], 4) for end in ("", "_low", "_high"))
        share, even = (f"{float(row[name]):.0%}".replace("%", " %") for name in ("policy_distance_share", "share_even"))
        words = " | ".join((f"`{row['pair']}`", value, f"{low} to {high}", row["verdict"], share, even))
        assert f"| {words} |" in text, row["pair"]


def assert_ends(text: str, values: list[float]) -> None:
    """`LOW to HIGH`, or the one number that all values are, rounded as the text has them; nothing of no values."""
    said = text.split(" to ") if text else []
    ends = [values[0], values[-1]][2 - len(said) :] if values else []
    assert [f"{end:.{len(number.partition('.')[2])}f}" for end, number in zip(ends, said, strict=True)] == said
