"""Traces during training run on the mesh that trains, and find what one device finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import spinal_jax
from spinal_jax.audit.devices import OnMesh
from spinal_jax.config import build
from spinal_jax.config.training import TrainConfig
from spinal_jax.errors import UserError

# Sums over devices come in another order: roundings of float32.
CLOSE = 1e-5
SETTINGS: dict[str, Any] = {
    "model": {"source": "random:0.3m@1"},
    "preferences": {"format": "world", "limit": 24},
    "prompts": {"format": "world", "limit": 24},
    "metrics": {"groups": 4},
    "optimizer": {"name": "sgd", "learning_rate": 0.1},
    "steps": 2,
    "batch_size": 4,
    "trace_every": 2,
}


def test_traces_during_training_are_shared_by_the_mesh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of 8 devices holds an eighth of the Gram sums; spectra and columns are those of one device."""
    shares: list[float] = []
    make = OnMesh.grams

    def counted(self: OnMesh, *sizes: Any) -> Any:
        grams = make(self, *sizes)
        shares.extend(x.addressable_shards[0].data.size / x.size for each in grams for x in each.second)
        return grams

    monkeypatch.setattr(OnMesh, "grams", counted)
    for name, (data, fsdp, tensor) in {"one": (1, 1, 1), "mesh": (2, 2, 2)}.items():
        settings = {**SETTINGS, "parallel": {"data": data, "fsdp": fsdp, "tensor": tensor}}
        settings["objective"] = {"cache": str(tmp_path / "cache" / name)}
        trained = spinal_jax.train(tmp_path / name, progress=False, **settings)
        assert shares == [1 / 8] * len(shares)
        assert bool(shares) == (name == "mesh")
        assert (trained.step, trained.folder) == (2, tmp_path / name)
        assert (trained.folder / "manifest.json").exists()
        assert f"trained   2 steps: loss {trained.metrics['loss']:.4g}" in str(trained)
    for step in ("step_000000", "step_000002"):
        one, mesh = (spinal_jax.load_trace(tmp_path / name / "traces" / step) for name in ("one", "mesh"))
        for column, values in one.columns.items():
            np.testing.assert_allclose(mesh.columns[column], values, rtol=CLOSE, atol=CLOSE, err_msg=f"{step} {column}")
        top = one.arrays["singular_values"].max()
        for name in ("singular_values", "groups/singular_values"):
            np.testing.assert_allclose(mesh.arrays[name], one.arrays[name], atol=CLOSE * top, err_msg=name)


def test_python_refuses_what_the_command_line_refuses(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no setting step; there are model, "):
        spinal_jax.train(tmp_path, **SETTINGS, step=3)
    with pytest.raises(UserError, match="a config is given, and steps too; give one of them"):
        spinal_jax.train(tmp_path, build(TrainConfig, SETTINGS), steps=3)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file cannot be made: "):
        spinal_jax.train(tmp_path / "file", **SETTINGS)
