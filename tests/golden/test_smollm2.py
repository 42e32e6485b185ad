"""A real model: an audit of SmolLM2-135M-Instruct against numbers of Hugging Face PyTorch (reference_smollm2.py).

`make test` fetches the model; without it these tests fail.
"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from spinal_jax.audit.pipeline import run_audit
from spinal_jax.audit.trace import DepthTrace
from spinal_jax.config import AuditConfig, MetricsConfig, ModelConfig, PromptsConfig
from spinal_jax.config.metrics import VariantsConfig

from .reference_smollm2 import HERE, MODEL

REFERENCE = json.loads((HERE / "smollm2_shipped.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def trace() -> DepthTrace:
    prompts = PromptsConfig(limit=REFERENCE["prompts"], max_length=REFERENCE["max_length"])
    metrics = MetricsConfig(groups=2, variants=VariantsConfig(center=False))  # errors are not what is compared here
    return run_audit(AuditConfig(ModelConfig(str(MODEL)), prompts, metrics))


# The audit's forward is float32, the reference's float64: 30 blocks are some 1e-6 apart.
@pytest.mark.parametrize(
    ("column", "absolute", "relative"),
    [
        ("contraction", 1e-5, 0),
        ("fit_r2", 1e-5, 0),
        ("fit_quadratic", 1e-4, 0),
        ("resolved", 0, 0),
        ("spike", 1e-5, 0),
        ("effective_rank", 0, 1e-5),
        ("transport", 1e-4, 0),
        ("entropy", 1e-4, 0),
        ("curvature", 1e-4, 0),
    ],
)
def test_every_boundary(trace: DepthTrace, column: str, absolute: float, relative: float) -> None:
    assert trace.prompts["rows"] == REFERENCE["rows"] >= 4 * 576
    exact = [math.nan if value is None else value for value in REFERENCE["columns"][column]]
    np.testing.assert_allclose(trace.columns[column], exact, atol=absolute, rtol=relative)
