"""The depth trace as a record: exact round trips, stable bytes, refusals in one sentence, Student's intervals."""

from __future__ import annotations

import csv
import functools
import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t as student

from spinal_jax.audit.trace import SECTIONS, DepthTrace, load_trace, save_trace
from spinal_jax.errors import UserError
from spinal_jax.files import LARGEST
from spinal_jax.wording import number, plus_minus

Maker = Callable[..., DepthTrace]


@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.floats(-LARGEST, LARGEST) | st.just(math.nan), min_size=7, max_size=7))
def test_json_round_trip_keeps_every_bit_and_every_nan(make_trace: Maker, values: list[float]) -> None:
    trace = make_trace()
    trace = replace(trace, columns={**trace.columns, "entropy": np.array(values)})
    back = DepthTrace.from_json(trace.to_json(), trace.arrays)
    for name, column in trace.columns.items():
        np.testing.assert_array_equal(back.columns[name], column)
    assert back.to_json() == trace.to_json()
    assert back.model == trace.model
    assert back.warnings == trace.warnings
    assert back.terminal == trace.terminal


def test_json_is_strict_ordered_and_does_not_depend_on_the_order_of_the_input(make_trace: Maker) -> None:
    trace = make_trace(groups=1)
    text = trace.to_json()
    document = json.loads(text, parse_constant=pytest.fail)
    assert list(document) == [
        "schema", "model", "prompts", "settings", "boundaries", "columns", "summary", "environment", "warnings",
    ]  # fmt: skip
    assert document["schema"] == "spinal-trace/2"
    assert document["boundaries"] == 7
    assert list(document["columns"]) == list(SECTIONS["columns"])
    assert document["columns"]["transport"][0] is None
    assert document["summary"]["contraction_se"] is None
    assert text.endswith("}\n")
    shuffled = {name: dict(reversed(list(getattr(trace, name).items()))) for name in SECTIONS}
    assert replace(trace, **shuffled).to_json() == text


def test_infinity_is_never_written(make_trace: Maker) -> None:
    trace = make_trace()
    broken = replace(trace, columns={**trace.columns, "entropy": np.full(7, np.inf)})
    with pytest.raises(ValueError, match="JSON"):
        broken.to_json()


@pytest.mark.parametrize("groups", [2, 16])
def test_intervals_are_students_t(groups: int, make_trace: Maker) -> None:
    trace = make_trace(groups=groups)
    low, high = trace.interval("contraction")
    half = student.ppf(0.975, groups - 1) * trace.columns["contraction_se"]
    np.testing.assert_allclose(low, trace.columns["contraction"] - half, rtol=1e-12)
    np.testing.assert_allclose(high, trace.columns["contraction"] + half, rtol=1e-12)
    ends = student.interval(0.95, groups - 1, trace.summary["transport"], trace.summary["transport_se"])
    np.testing.assert_allclose(trace.summary_interval("transport"), ends, rtol=1e-12)


def test_intervals_are_cut_at_what_definitions_allow(make_trace: Maker) -> None:
    trace = make_trace()
    wide = {**trace.columns, "transport_se": np.full(7, 5.0), "effective_rank_se": np.full(7, 5.0)}
    trace = replace(trace, columns=wide, summary={**trace.summary, "coherence": 0.9, "coherence_se": 0.2})
    low, high = trace.interval("transport")
    assert (low[1:] == 0).all()
    assert (high[1:] == math.pi).all()
    assert (trace.interval("effective_rank")[0] == 1).all()
    low, high = trace.summary_interval("coherence")
    assert low == pytest.approx(0.9 - 0.2 * student.ppf(0.975, 15))
    assert high == 1


def test_one_group_has_no_interval_and_a_column_without_error_is_refused(make_trace: Maker) -> None:
    trace = make_trace(groups=1)
    assert np.isnan(trace.interval("contraction")).all()
    assert np.isnan(trace.summary_interval("coherence")).all()
    with pytest.raises(UserError, match=r"'resolved' has no standard error.*contraction, spike, effective_rank"):
        trace.interval("resolved")
    with pytest.raises(UserError, match="'terminal' has no standard error"):
        trace.summary_interval("terminal")


def test_a_saved_trace_comes_back_whole_and_saving_twice_gives_equal_bytes(tmp_path: Path, make_trace: Maker) -> None:
    trace = make_trace()
    strided = {**trace.arrays, "groups/rank": np.arange(12.0).reshape(3, 4).T}
    trace = replace(trace, arrays=strided)
    save_trace(trace, tmp_path / "a")
    save_trace(trace, tmp_path / "b")
    names = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert names == ["spectra.safetensors", "trace.csv", "trace.json"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    for path in (tmp_path / "a", tmp_path / "a" / "trace.json"):
        back = load_trace(path)
        assert back.to_json() == trace.to_json()
        for name, array in trace.arrays.items():
            np.testing.assert_array_equal(back.arrays[name], array)
    assert back.singular_values is not None
    assert back.group_singular_values is not None


def test_a_trace_without_arrays_leaves_no_stale_spectra(tmp_path: Path, make_trace: Maker) -> None:
    save_trace(make_trace(), tmp_path)
    save_trace(make_trace(spectra=False), tmp_path)
    assert not (tmp_path / "spectra.safetensors").exists()
    assert load_trace(tmp_path).singular_values is None


def test_csv_is_long_form_with_one_row_per_metric_and_boundary(tmp_path: Path, make_trace: Maker) -> None:
    trace = make_trace()
    save_trace(trace, tmp_path, step=40)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "trace.csv").read_text())))
    metrics = [name for name in trace.columns if not name.endswith("_se")]
    assert list(rows[0]) == ["step", "boundary", "relative_depth", "metric", "value", "low", "high"]
    assert [(row["metric"], row["boundary"]) for row in rows] == [(m, str(at)) for m in metrics for at in range(7)]
    assert {row["step"] for row in rows} == {"40"}
    cell = {(row["metric"], int(row["boundary"])): row for row in rows}
    assert float(cell["transport", 3]["value"]) == trace.columns["transport"][3]
    assert float(cell["transport", 3]["high"]) == trace.interval("transport")[1][3]
    assert float(cell["transport", 3]["relative_depth"]) == 0.5
    assert cell["transport", 0]["value"] == cell["transport", 0]["low"] == cell["resolved", 3]["high"] == ""


GONE = object()


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("schema", "spinal-trace/3", "schema 'spinal-trace/3'; this version of spinal_jax reads 'spinal-trace/2'"),
        ("schema", "spinal-trace/1", "schema 'spinal-trace/1': its contraction .* measure again with spinal audit"),
        ("schema", GONE, "schema None; this version of spinal_jax reads 'spinal-trace/2'"),
        ("columns", GONE, "it has no columns"),
        ("warnings", GONE, "it has no warnings"),
        ("columns entropy", GONE, "columns has no entropy"),
        ("prompts rows", GONE, "prompts has no rows"),
        ("columns entropy", [1.0], r"column entropy has shape \(1,\)"),
        ("columns entropy", "high", "column entropy is not a list of numbers and nulls"),
        ("columns entropy", [True] * 7, "column entropy is not a list of numbers and nulls"),
        ("boundaries", 8, "it says 8 boundaries, its columns have 7"),
        ("summary terminal", [3, 9], r"terminal block 3\.\.9 does not lie within boundaries 1\.\.6"),
        ("summary terminal", None, "malformed"),
        ("summary contraction_se", "wide", "summary contraction_se is not a number or null"),
        ("model", 5, "malformed"),
    ],
)
def test_malformed_traces_are_refused_in_one_sentence(
    path: str, value: object, sentence: str, tmp_path: Path, make_trace: Maker
) -> None:
    document = json.loads(make_trace().to_json())
    *parents, last = path.split()
    section = functools.reduce(lambda part, key: part[key], parents, document)
    section[last] = value
    if value is GONE:
        del section[last]
    (tmp_path / "trace.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=sentence) as caught:
        load_trace(tmp_path)
    assert str(tmp_path / "trace.json") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"), [("{", "not valid JSON"), ("[1]", "schema None"), ("", "not valid JSON")]
)
def test_other_files_are_not_taken_for_a_trace(text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        DepthTrace.from_json(text)


def test_missing_and_unreadable_files_are_refused(tmp_path: Path, make_trace: Maker) -> None:
    for path in (tmp_path, tmp_path / "nothing", tmp_path / "trace.json"):
        with pytest.raises(UserError, match="no trace at"):
            load_trace(path)
    save_trace(make_trace(), tmp_path)
    (tmp_path / "spectra.safetensors").write_bytes(b"not a tensor")
    with pytest.raises(UserError, match=r"spectra\.safetensors cannot be read"):
        load_trace(tmp_path)
    save_trace(make_trace(depth=3), tmp_path / "other")
    (tmp_path / "spectra.safetensors").write_bytes((tmp_path / "other" / "spectra.safetensors").read_bytes())
    with pytest.raises(UserError, match="does not fit 7 boundaries"):
        load_trace(tmp_path)
    (tmp_path / "trace.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot be read"):
        load_trace(tmp_path)


def test_a_trace_cannot_be_changed_by_accident(make_trace: Maker) -> None:
    trace = make_trace()
    with pytest.raises(ValueError, match="read-only"):
        trace.columns["contraction"][0] = 1
    with pytest.raises(AttributeError):
        trace.warnings = ()  # type: ignore[misc]


def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_trace: Maker
) -> None:
    save_trace(make_trace(), tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def refuse(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        save_trace(make_trace(seed=1), tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.58234, "0.582"), (25.68, "25.7"), (1234.5, "1,234"), (-0.0512, "−0.0512"), (0.0, "0.00"), (3e-7, "3.00e−07"),
     (math.nan, "–")],
)  # fmt: skip
def test_numbers_have_three_significant_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_a_value_and_its_half_interval_share_their_decimals() -> None:
    assert plus_minus(0.582, 0.0091) == "0.582 ± 0.009"
    assert plus_minus(25.68, 0.66) == "25.7 ± 0.7"
    assert plus_minus(25.68, 0.004) == "25.680 ± 0.004"
    assert plus_minus(0.582, math.nan) == "0.582"
    assert plus_minus(0.5, 0.0) == "0.500 ± 0.000"


@pytest.mark.parametrize("depth", [1, 2, 30])
def test_the_trace_shows_itself(depth: int, make_trace: Maker) -> None:
    trace = make_trace(depth=depth, name="<script>alert(1)</script>")
    first, last = trace.terminal
    assert repr(trace).startswith("DepthTrace of <script>")
    assert f"boundaries {first}..{last}: contraction {trace.summary['contraction']:.3f} ±" in repr(trace)
    assert "few rows" in repr(trace)
    page = trace._repr_html_()
    assert "<script>" not in page
    assert page.count("<polyline") == (5 if depth == 1 else 6)
