"""Many runs in one table and one page: what differs, what each came to, and nothing of a run that did not end."""

from __future__ import annotations

import csv
import html
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import pytest
from pyarrow import parquet

from spinal_jax.audit.trace import DepthTrace, save_trace
from spinal_jax.comparison.compare import compare_traces
from spinal_jax.comparison.record import save_comparison
from spinal_jax.errors import UserError
from spinal_jax.report import collect as write
from spinal_jax.report.collect import collect_runs
from spinal_jax.runs.find import find_runs
from spinal_jax.runs.table import run_rows, swept

from .test_report import Page
from .test_training_report import CONFIG, ends, write_run

__all__ = ["ends"]  # a fixture
Maker = Callable[..., DepthTrace]


def finish(folder: Path, command: str, config: Mapping[str, Any]) -> None:
    manifest = {"schema": "spinal-manifest/1", "command": command, "config": config, "files": []}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def folder(tmp_path: Path, make_trace: Maker, ends: tuple[DepthTrace, DepthTrace]) -> Path:
    """Two audits, a comparison, a training run, one that did not end, and what is no run."""
    work = tmp_path / "runs"
    for number in range(2):
        save_trace(make_trace(seed=number, name="<i>tiny</i>"), work / "sweep" / str(number))
        window = [0.1, 0.5 + number / 10]
        config = {"metrics": {"contraction": {"window": window}}, "model": {"source": "m"}, "overwrite": bool(number)}
        finish(work / "sweep" / str(number), "audit", config)
        (work / "sweep" / str(number) / "report.html").write_text("page")
    save_comparison(compare_traces(*ends), work / "compared")
    finish(work / "compared", "compare", {"model": {"source": "m"}})
    for name, seed in (("trained", 0), ("cut off", 1)):
        (work / name).mkdir()
        write_run(work / name, ends, [0, 0.2, 0.5, 0.8, 0.9, 1.0, 1.0], "sound")
        config = CONFIG | {"seed": seed}
        (work / name / "settings.json").write_text(json.dumps({"config": config}))
    finish(work / "trained", "train", CONFIG)
    (work / "notes").mkdir()
    (work / "notes" / "manifest.json").write_text('{"name": "web app"}')
    (work / "sweep" / "7" / ".writing-abc").mkdir(parents=True)
    return work


def test_the_table_has_a_row_for_each_run_and_a_column_for_what_differs(folder: Path) -> None:
    collect_runs([folder])
    with (folder / "runs.csv").open(newline="") as file:
        found = {row["run"]: row for row in csv.DictReader(file)}
    assert sorted(found) == ["compared", "cut off", "sweep/0", "sweep/1", "sweep/7", "trained"]
    assert {name: row["complete"] for name, row in found.items() if row["complete"] != "True"} == {
        "cut off": "False",
        "sweep/7": "False",
    }
    assert [found[f"sweep/{n}"]["metrics.contraction.window"] for n in range(2)] == ["[0.1, 0.5]", "[0.1, 0.6]"]
    assert found["trained"]["seed"] == "0"
    assert found["cut off"]["seed"] == "1"
    assert "overwrite" not in found["trained"]  # it changes nothing
    told = json.loads((folder / "trained" / "onset.json").read_text())
    assert float(found["trained"]["onset"]) == told["onset"]["step"]
    assert float(found["trained"]["kl"]) == told["records"][-1]["kl"]
    last = json.loads((folder / "trained" / "traces" / "step_000060" / "comparison.json").read_text())["summary"]
    for name in ("delta_align", "delta_align_low", "p_value"):
        assert float(found["trained"][name]) == last[name]
    numbers = {name: value for name, value in found["cut off"].items() if name not in ("run", "command", "complete")}
    assert {name for name, value in numbers.items() if value} <= set(swept(find_runs([folder])))


def test_parquet_holds_what_csv_holds(folder: Path, tmp_path: Path) -> None:
    collect_runs([folder], tmp_path / "out")
    found = parquet.read_table(tmp_path / "out" / "runs.parquet").to_pylist()
    runs = find_runs([folder])
    expected = run_rows(runs, {run.folder: run.folder.relative_to(folder).as_posix() for run in runs})
    assert [
        {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in row.items()}
        for row in expected
    ] == found


def test_without_pyarrow_the_table_is_csv_alone(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "has_parquet", lambda: False)
    files = collect_runs([folder], tmp_path / "out").files
    assert [file.name for file in files] == ["runs.csv", "index.html"]


def test_the_page_lists_links_draws_and_escapes(folder: Path, tmp_path: Path) -> None:
    collect_runs([folder], tmp_path / "out")
    text = (tmp_path / "out" / "index.html").read_text()
    page = Page(text)
    assert "<i>tiny" not in text
    links = [link for link in re.findall(r'<a href="([^"]+)"', text) if not link.startswith("#")]
    assert links == ["../runs/sweep/0/report.html", "../runs/sweep/1/report.html"]
    assert text.count('class="terminal"') == 2  # the incomplete ones
    (data,) = re.findall(r'<script type="application/json" id="data-overlay">(.*?)</script>', text)
    for panel in json.loads(data)["panels"]:
        assert [line["label"] for line in panel["lines"]] == ["sweep/0", "sweep/1", "trained"]
    assert not page.open  # every element is closed
    again = tmp_path / "again" / "index.html"
    collect_runs([folder], again.parent)
    assert again.read_text() == text


def test_names_of_runs_are_text_and_their_links_lead_to_them(tmp_path: Path, make_trace: Maker) -> None:
    """Names that a browser would take for a scheme, a fragment or markup, that matplotlib would leave out of a legend,
    and one that is no UTF-8."""
    names = ["javascript:alert(1)", "x#y%41", "_smoke", "a?b=c&d", "<b>\"'", "$\\frac{$", os.fsdecode(b"\xff\xfe")]
    for number, name in enumerate(names):
        run = tmp_path / "runs" / name
        save_trace(make_trace(seed=number), run)
        finish(run, "audit", {"model": {"source": name}})
        (run / "report.html").write_text("page")
    collect_runs([tmp_path / "runs"])
    text = (tmp_path / "runs" / "index.html").read_text()
    links = [html.unescape(link) for link in re.findall(r'<a href="([^"]+)"', text) if not link.startswith("#")]
    there = {os.fsencode(tmp_path / "runs" / name / "report.html") for name in names}
    at = os.fsencode(tmp_path / "runs") + b"/"
    assert {at + unquote_to_bytes(link.removeprefix("./")) for link in links} == there
    assert all(link.startswith("./") for link in links)
    (data,) = re.findall(r'<script type="application/json" id="data-overlay">(.*?)</script>', text)
    assert all(len(panel["lines"]) == len(names) for panel in json.loads(data)["panels"])
    assert not Page(text).open
    with (tmp_path / "runs" / "runs.csv").open(newline="") as file:
        assert {row["run"] for row in csv.DictReader(file)} == {*names[:-1], "\\udcff\\udcfe"}
    assert parquet.read_table(tmp_path / "runs" / "runs.parquet").num_rows == len(names)


def test_the_same_run_named_twice_is_one(folder: Path, tmp_path: Path) -> None:
    once = collect_runs([folder], tmp_path / "one")
    twice = collect_runs([folder, folder / "sweep", folder / "trained"], tmp_path / "two")
    assert len(once.runs) == len(twice.runs) == 6
    assert (tmp_path / "one" / "runs.csv").read_text() == (tmp_path / "two" / "runs.csv").read_text()


@pytest.mark.parametrize(
    ("prepare", "folders", "out", "words"),
    [
        (None, ["nowhere"], None, "nowhere is no folder"),
        (None, ["notes"], None, "no run in or below"),
        (None, ["sweep", "trained"], None, "2 folders are given, so say where the table goes: out=DIR"),
        ("runs.csv", ["sweep"], "trained", "is not of spinal collect"),
        ("index.html", ["sweep"], "trained", "is not of spinal collect"),
        ("a FIFO", ["sweep"], "trained", "is not of spinal collect"),
    ],
)
def test_mistakes(prepare: str | None, folders: list[str], out: str | None, words: str, folder: Path) -> None:
    if prepare == "a FIFO":
        os.mkfifo(folder / str(out) / "index.html")
    elif prepare is not None:
        (folder / str(out) / prepare).write_text("mine")
    with pytest.raises(UserError, match=re.escape(words)):
        collect_runs([folder / name for name in folders], None if out is None else folder / out)
    if prepare is not None and prepare != "a FIFO":
        assert (folder / str(out) / prepare).read_text() == "mine"


def test_a_complete_run_that_cannot_be_read_is_named(folder: Path) -> None:
    (folder / "sweep" / "0" / "trace.json").write_text("{")
    with pytest.raises(UserError, match=r"sweep/0/trace.json"):
        collect_runs([folder])
