"""What a notebook does with a record: columns by name, data frames, figures, saving."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from spinal_jax.audit.trace import DepthTrace, load_trace
from spinal_jax.errors import UserError

Maker = Callable[..., DepthTrace]


def test_columns_by_name(make_trace: Maker) -> None:
    trace = make_trace()
    np.testing.assert_array_equal(trace["contraction"], trace.columns["contraction"])
    with pytest.raises(UserError, match="there is no column 'alpha'; there are contraction, contraction_se"):
        trace["alpha"]


def test_a_data_frame_has_a_row_per_boundary(make_trace: Maker) -> None:
    trace = make_trace()
    for frame in (trace.to_pandas(), trace.to_polars()):
        assert list(frame.columns) == ["boundary", "relative_depth", *trace.columns]
        assert len(frame) == trace.boundaries
        np.testing.assert_array_equal(frame["transport"].to_numpy(), trace["transport"])
        assert frame["relative_depth"].to_list()[-1] == 1


def test_a_library_that_is_not_there_is_named(make_trace: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "polars", None)
    with pytest.raises(UserError, match="to_polars needs polars: pip install polars"):
        make_trace().to_polars()


def test_figures_by_name(make_trace: Maker) -> None:
    trace = make_trace()
    assert trace.plot().axes
    assert trace.plot()._repr_png_().startswith(b"\x89PNG")
    assert trace.plot("entropy").axes[0].get_ylabel() == "entropy (nats)"
    with pytest.raises(UserError, match="there is no figure 'alpha'; there are depth, curve, spectra, entropy"):
        trace.plot("alpha")


def test_saving(make_trace: Maker, tmp_path: Path) -> None:
    trace = make_trace()
    trace.save(tmp_path)
    assert load_trace(tmp_path).to_json() == trace.to_json()
