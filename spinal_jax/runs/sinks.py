"""Experiment trackers: Weights & Biases, Trackio and MLflow, enabled by `logging=`."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Protocol

from spinal_jax.errors import UserError
from spinal_jax.jsontypes import ReadJson

PROJECT = "spinal"


class Sink(Protocol):
    """Receives the metrics of one run."""

    def scalar(self, step: int, tag: str, value: float) -> None:
        """Adds a number of a step."""
        ...

    def close(self) -> None:
        """Ends the run."""
        ...


class _Wandb:
    """Weights & Biases, and Trackio, which has the same interface."""

    def __init__(self, module: ModuleType, folder: Path, settings: Mapping[str, object]) -> None:
        self._module = module
        module.init(project=PROJECT, name=folder.name, config=dict(settings))

    def scalar(self, step: int, tag: str, value: float) -> None:
        self._module.log({tag: value}, step=step)

    def close(self) -> None:
        self._module.finish()


class _MLflow:
    """MLflow, with experiment PROJECT, the folder name as run name, and the server of MLFLOW_TRACKING_URI."""

    def __init__(self, module: ModuleType, folder: Path, settings: Mapping[str, object]) -> None:
        self._module = module
        module.set_experiment(PROJECT)
        module.start_run(run_name=folder.name)
        module.log_params({name: json.dumps(value)[:500] for name, value in settings.items()})

    def scalar(self, step: int, tag: str, value: float) -> None:
        self._module.log_metric(tag, value, step=step)

    def close(self) -> None:
        self._module.end_run()


def open_sink(service: str | None, folder: Path, settings: Mapping[str, object]) -> Sink | None:
    """Opens the sink of `logging=`; None if `service` is None.

    Args:
        service: wandb, trackio or mlflow.
        folder: of the run, whose name the run gets there.
        settings: flat, by dotted name.

    Raises:
        UserError: the service refuses the run. ImportError: its package is not installed, which the settings check.
    """
    if service is None:
        return None
    module = importlib.import_module(service)
    make: Callable[[ModuleType, Path, ReadJson], Sink] = _MLflow if service == "mlflow" else _Wandb
    try:
        return make(module, folder, settings)
    except Exception as error:
        raise UserError(f"logging={service} cannot start a run: {' '.join(str(error).split())[:300]}") from error


def send_summary(
    service: str | None, folder: Path, settings: Mapping[str, object], summary: Mapping[str, object]
) -> None:
    """Sends a summary as a run. Arguments and errors as in `open_sink`."""
    sink = open_sink(service, folder, settings)
    if sink is None:
        return
    try:
        for name, value in summary.items():
            if isinstance(value, float) and math.isfinite(value):
                sink.scalar(0, f"spinal/summary/{name}", value)
    finally:
        sink.close()
