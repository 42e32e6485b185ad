"""The accelerator benchmark runs at toy size on a CPU, and the rule says which models cuDNN's attention computes."""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import pytest

from spinal_jax.models.attention import why_not_fused
from spinal_jax.models.config import LatentAttention

FILE = Path(__file__).parents[2] / "benchmarks" / "accelerator.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("accelerator_benchmark", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("section", ["ceilings", "attention", "audit 8B", "dpo"])
def test_a_section_runs_at_toy_size(section: str, benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.run(section, True)
    said = capsys.readouterr().out
    assert said.startswith("## ")
    assert f"jax {jax.__version__}" in said
    assert said.count("|---|") >= 1


def test_a_section_that_fails_is_named_and_the_tables_before_it_are_kept(tmp_path: Path, benchmark: ModuleType) -> None:
    out = tmp_path / "tables.md"
    benchmark.write(out, "one")
    benchmark.write(out, "two")
    assert out.read_text() == "one\ntwo\n"
    wrong = [sys.executable, str(FILE), "--sections", "none"]
    assert subprocess.run(wrong, capture_output=True).returncode == 2


def test_cudnn_computes_what_it_can(benchmark: ModuleType) -> None:
    llama, bfloat16 = benchmark.decoder_config(benchmark.TINY["llama"]), jnp.dtype(jnp.bfloat16)
    assert why_not_fused(llama, bfloat16, "gpu") is None
    latent = LatentAttention(query_rank=16, key_value_rank=20, nope_dim=8, rope_dim=4, value_dim=8)
    reasons = {
        "this is a cpu": why_not_fused(llama, bfloat16, "cpu"),
        "this is a tpu": why_not_fused(llama, bfloat16, "tpu"),
        "float32": why_not_fused(llama, jnp.dtype(jnp.float32), "gpu"),
        "soft-cap": why_not_fused(benchmark.decoder_config(benchmark.TINY["gemma2"]), bfloat16, "gpu"),
        "latent": why_not_fused(dataclasses.replace(llama, latent=latent), bfloat16, "gpu"),
        "256 features": why_not_fused(dataclasses.replace(llama, head_dim=256), bfloat16, "gpu"),
        "block to block": why_not_fused(dataclasses.replace(llama, scale_by_depth=True), bfloat16, "gpu"),
    }
    for words, reason in reasons.items():
        assert reason is not None, words
        assert words in reason
