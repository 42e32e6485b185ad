"""Small made-up traces for the tests of their file forms, figures and page."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from spinal_jax.audit.trace import SECTIONS, DepthTrace
from spinal_jax.metrics.tail import EPS32


@pytest.fixture(scope="session")
def make_trace() -> Callable[..., DepthTrace]:
    return _make_trace


def _make_trace(
    depth: int = 6, groups: int = 16, name: str = "tiny", width: int = 32, spectra: bool = True, seed: int = 0
) -> DepthTrace:
    """A trace with power-law spectra of known exponents and made-up columns beside them."""
    rng = np.random.default_rng(seed)
    alpha = 0.6 + 0.4 * rng.random(depth + 1)
    singular_values = 100 * np.arange(1, width + 1.0) ** -alpha[:, None]
    first, last = depth - math.ceil(depth / 3) + 1, depth
    columns = {name: 0.5 + rng.random(depth + 1) for name in SECTIONS["columns"]}
    columns |= {"contraction": alpha, "fit_r2": np.ones(depth + 1), "resolved": np.full(depth + 1, float(width))}
    columns["fit_quadratic"] = 0.1 * rng.normal(size=depth + 1)
    for column in SECTIONS["columns"]:
        if column.endswith("_se"):
            columns[column] = 0.02 + 0.01 * rng.random(depth + 1) if groups > 1 else np.full(depth + 1, np.nan)
    for column in ("transport", "transport_se", "curvature", "curvature_se"):
        columns[column][0] = np.nan
    columns["curvature"][-1] = columns["curvature_se"][-1] = np.nan
    se = 0.01 if groups > 1 else math.nan
    summary = {key: se if key.endswith("_se") else float(rng.random()) for key in SECTIONS["summary"]}
    arrays = {"singular_values": singular_values, "groups/singular_values": np.stack([singular_values] * groups)}
    described = (name, "a/folder", None, "llama", 9, depth, width, 99, 99, "cd", "float32", "ab")
    settings = ((0.1, 0.5), 1, False, "last:4", None, 1.0, groups, (4, 16), EPS32, "third")
    return DepthTrace(
        model=dict(zip(SECTIONS["model"], described, strict=True)),
        prompts=dict(
            zip(SECTIONS["prompts"], ("pool.txt", "text", 8, 1, groups, 300, 200, 32, 128, False, "cd"), strict=True)
        ),
        settings=dict(zip(SECTIONS["settings"], settings, strict=True)),
        columns=columns,
        summary=summary | {"terminal": (first, last), "degrees_of_freedom": groups - 1},
        environment={"numpy": "2", "mesh": {"data": 1}},
        warnings=("few rows: N = 200, 4d = 128",),
        arrays=arrays if spectra else {},
    )
