"""The accelerator benchmark runs at toy size on a CPU; which models kernels of attention compute, and that they do."""

from __future__ import annotations

import dataclasses
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from spinal_jax.config import ParallelConfig
from spinal_jax.models.attention import allowed, attend
from spinal_jax.models.config import DecoderConfig, LatentAttention
from spinal_jax.models.fused_attention import ALONE, attend_cudnn, attend_splash, kernel_of
from spinal_jax.parallel.mesh import make_mesh

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        yield importlib.import_module("benchmarks.accelerator.__main__")


@pytest.mark.parametrize("section", ["correctness", "ceilings", "attention", "audit 8B", "dpo"])
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
    wrong = [sys.executable, "-m", "benchmarks.accelerator", "--sections", "none"]
    assert subprocess.run(wrong, cwd=ROOT, capture_output=True).returncode == 2


def reason(config: DecoderConfig, dtype: Any, backend: str, mesh: Mesh | None = None) -> str:
    found = kernel_of(config, jnp.dtype(dtype), backend, mesh)
    assert found.kernel == "xla"
    return found.why


def test_kernels_compute_what_they_can(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    common = importlib.import_module("benchmarks.accelerator.common")
    llama, gemma = (common.decoder_config(common.TINY[name]) for name in ("llama", "gemma2"))
    latent = LatentAttention(query_rank=16, key_value_rank=20, nope_dim=8, rope_dim=4, value_dim=8)
    half = jnp.bfloat16
    assert "where cuDNN is installed" in reason(llama, half, "gpu")
    with monkeypatch.context() as on_gpu:
        on_gpu.setattr(jax, "default_backend", lambda: "gpu")
        assert kernel_of(llama, jnp.dtype(half), "gpu", ALONE) == ("cudnn", "")
        for backend in ("gpu", "tpu"):
            assert "not known how" in reason(llama, half, backend)  # there are eight devices
            by_heads = make_mesh(ParallelConfig(1, 1, 8))
            assert "2 key heads are not shared evenly by 8" in reason(llama, half, backend, by_heads)
    for config in (llama, gemma, dataclasses.replace(llama, head_dim=256)):
        assert kernel_of(config, jnp.dtype(half), "tpu", ALONE) == ("splash", "")
    assert "this is a cpu" in reason(llama, half, "cpu")
    assert "soft-cap" in reason(gemma, half, "gpu")
    assert "256 features" in reason(dataclasses.replace(llama, head_dim=256), half, "gpu")
    for backend in ("gpu", "tpu"):
        assert "float32" in reason(llama, jnp.float32, backend)
        assert "latent" in reason(dataclasses.replace(llama, latent=latent), half, backend)
        assert "learnt sinks" in reason(dataclasses.replace(llama, sinks=True), half, backend)
        assert "block to block" in reason(dataclasses.replace(llama, scale_by_depth=True), half, backend)


@pytest.mark.parametrize("masked", [False, True])
def test_devices_compute_attention_by_cudnn_on_rows_and_heads_of_their_own(
    masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward; XLA computes on a CPU what cuDNN would."""
    plain = jax.nn.dot_product_attention
    seen: list[tuple[int, ...]] = []

    def on_cpu(q: Any, *others: Any, implementation: str, **settings: Any) -> Any:
        assert implementation == "cudnn"
        seen.append(q.shape)
        return plain(q, *others, implementation="xla", **settings)

    monkeypatch.setattr(jax.nn, "dot_product_attention", on_cpu)
    rng = np.random.default_rng(0)
    q, k, v, g = (jnp.asarray(rng.normal(size=(8, 24, count, 16)), jnp.float32) for count in (4, 2, 2, 4))
    segments = jnp.asarray(rng.integers(1, 3, (8, 24)).cumsum(axis=1) // 9, jnp.int32)
    mask = allowed(segments, jnp.arange(24, dtype=jnp.int32), jnp.int32(7)) if masked else None

    def attended(mesh: Mesh | None) -> Any:
        return jax.vjp(lambda *rows: attend_cudnn(*rows, segments, scale=0.3, mask=mask, mesh=mesh), q, k, v)

    wanted, wanted_by = attended(None)
    found, found_by = attended(make_mesh(ParallelConfig(2, 2, 2)))
    assert set(seen) == {(8, 24, 4, 16), (2, 24, 2, 16)}
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    for ours, theirs in zip(found_by(g), wanted_by(g), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    exact = attend(q, k, v, segments, window=jnp.int32(7) if masked else None, scale=0.3, softcap=None)
    np.testing.assert_allclose(found, exact, atol=1e-5)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "length", "windows", "softcap", "sharded"),
    [
        (4, 2, 128, (0, 0), None, True),
        (2, 2, 200, (0, 24), 20.0, False),
        (2, 2, 200, (0, 24), 20.0, True),
        (4, 1, 256, (24, 24), None, False),
    ],
)
def test_the_splash_kernel_is_attention(
    heads: int, kv_heads: int, length: int, windows: tuple[int, ...], softcap: float | None, sharded: bool
) -> None:
    """Forward and backward by the kernel's own arithmetic, which JAX carries out on a CPU."""
    mesh = make_mesh(ParallelConfig(1, 4, 2)) if sharded else None
    rows, dim = 4 if sharded else 1, 64
    rng = np.random.default_rng(0)
    shapes = [(rows, length, count, dim) for count in (heads, kv_heads, kv_heads)]
    q, k, v, g = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in (*shapes, shapes[0]))
    segments = jnp.broadcast_to(
        jnp.asarray([1] * (length // 3) + [2] * (length - length // 3 - 7) + [0] * 7), (rows, length)
    )
    for window in sorted(set(windows)):
        here = jnp.int32(window) if any(windows) else None
        real = (segments > 0)[..., None, None]

        def plain(q: Any, k: Any, v: Any, here: Any = here, real: Any = real) -> Any:
            out = attend(q, k, v, segments, window=here, scale=0.125, softcap=softcap)
            return jnp.where(real, out, 0)

        def splash(q: Any, k: Any, v: Any, here: Any = here, real: Any = real) -> Any:
            out = attend_splash(
                q,
                k,
                v,
                segments,
                windows=windows,
                window=here,
                scale=0.125,
                softcap=softcap,
                mesh=mesh,
                interpret=True,
            )
            return jnp.where(real, out, 0)

        wanted, wanted_by = jax.vjp(plain, q, k, v)
        found, found_by = jax.vjp(splash, q, k, v)
        np.testing.assert_allclose(found, wanted, atol=2e-5)
        for ours, theirs in zip(found_by(g), wanted_by(g), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-4)
