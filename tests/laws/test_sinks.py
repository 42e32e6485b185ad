"""Trackers get the same scalars as TensorBoard, and a tracker that fails costs nothing but its own record."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spinal_jax.config import AuditConfig, build
from spinal_jax.errors import UserError
from spinal_jax.runs.sinks import open_sink, send_summary
from spinal_jax.runs.tensorboard import Events


class Recorder(SimpleNamespace):
    """A tracker's module that keeps what it is called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        super().__init__()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))


@pytest.mark.parametrize("service", ["wandb", "trackio"])
def test_training_numbers_go_to_wandb_and_trackio(service: str, tmp_path: Path, monkeypatch: Any) -> None:
    module = Recorder()
    monkeypatch.setitem(sys.modules, service, module)
    events = Events(tmp_path, 0, open_sink(service, tmp_path / "my-run", {"seed": 1}))
    events.scalar(3, "train/loss", 0.5)
    events.scalar(4, "train/loss", float("nan"))
    events.close()
    assert module.calls == [
        ("init", (), {"project": "spinal", "name": "my-run", "config": {"seed": 1}}),
        ("log", ({"train/loss": 0.5},), {"step": 3}),
        ("finish", (), {}),
    ]


def test_a_summary_goes_to_mlflow(tmp_path: Path, monkeypatch: Any) -> None:
    module = Recorder()
    monkeypatch.setitem(sys.modules, "mlflow", module)
    send_summary("mlflow", tmp_path / "my-run", {"seed": 1}, {"delta_align": 0.2, "verdict": "x", "p": float("nan")})
    assert [name for name, *_ in module.calls] == ["set_experiment", "start_run", "log_params", "log_metric", "end_run"]
    assert module.calls[3] == ("log_metric", ("spinal/summary/delta_align", 0.2), {"step": 0})
    assert module.calls[2][1] == ({"seed": "1"},)


def test_a_tracker_that_fails_costs_its_own_record_alone(tmp_path: Path) -> None:
    class Broken:
        def scalar(self, step: int, tag: str, value: float) -> None:
            raise OSError("no network")

        def close(self) -> None:
            raise AssertionError("it is not called again")

    events = Events(tmp_path, 0, Broken())
    with pytest.warns(UserWarning, match="failed at step 1 and gets no more: no network"):
        events.scalar(1, "a", 1.0)
    events.scalar(2, "a", 2.0)
    events.close()


def test_a_tracker_that_is_not_installed_is_refused_before_anything_runs(monkeypatch: Any) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="logging=mlflow needs a package: pip install mlflow-skinny"):
        build(AuditConfig, {"model": {"source": "m"}, "logging": "mlflow"})
    with pytest.raises(UserError, match="logging"):
        build(AuditConfig, {"model": {"source": "m"}, "logging": "carrier pigeon"})


def test_a_service_that_refuses_a_run_is_one_sentence(tmp_path: Path, monkeypatch: Any) -> None:
    def init(**_: Any) -> None:
        raise RuntimeError("no API key\nconfigured")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    with pytest.raises(UserError, match="logging=wandb cannot start a run: no API key configured"):
        open_sink("wandb", tmp_path, {})
