"""Every column stands once: what it is, and what files, tables and comparisons make of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from spinal_jax.audit.trace import SECTIONS, UNITS
from spinal_jax.metrics.columns import PAIR, SUMMARY, TRACE, Column, column, names

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("each", [*TRACE, *SUMMARY, *PAIR], ids=lambda c: c.name)
def test_a_column_says_what_it_is(each: Column) -> None:
    assert each.unit in ("", "rad", "nats")
    assert each.label
    assert each.equation
    assert each.source
    assert each.bounds[0] < each.bounds[1]
    assert not each.compared or each.error  # what is subtracted has an error


def test_sections_and_units_of_a_trace_are_those_of_its_columns() -> None:
    assert SECTIONS["columns"] == names(TRACE)
    assert SECTIONS["summary"] == ("terminal", *names(SUMMARY), "degrees_of_freedom")
    assert {name: UNITS.get(name, "") for name in SECTIONS["columns"] if not name.endswith("_se")} == {
        each.name: each.unit for each in TRACE
    }
    assert names(TRACE[:2]) == ("contraction", "contraction_se", "fit_r2")
    with pytest.raises(KeyError):
        column("alpha")


# A new column is an entry of TRACE and its value in `audit.measurement.depth_curve`.
# The test uses traces with made-up values.
PROGRAM = """
from spinal_jax.metrics import columns

new = columns.Column(name="torsion", label="torsion", unit="rad", counted_by="positions", equation="t", source="a test",
                     compared=True)
columns.TRACE += (new,)
columns._BY_NAME["torsion"] = new

from spinal_jax.report.page import render_report
from tests.laws.conftest import _make_trace

trace = _make_trace()
assert "torsion_se" in trace.to_json()
assert {"torsion"} & {row["metric"] for row in trace.rows()}
assert "torsion" in trace.to_pandas()
assert "torsion" in trace._repr_html_()
assert "torsion" in render_report(trace)
"""


def test_a_new_column_goes_everywhere_from_its_entry() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
