"""The settings of `spinal audit`."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import Literal

from spinal_jax.config.data import PromptsConfig
from spinal_jax.config.metrics import MetricsConfig
from spinal_jax.config.model import ModelConfig
from spinal_jax.config.parallel import AuditParallelConfig
from spinal_jax.config.record import about, require_above
from spinal_jax.errors import UserError

BATCH_TOKENS = "tokens computed at a time on each device that shares rows; null: by device"
OVERWRITE = "replace a complete run in the output folder"
LOGGING = "experiment tracker that gets the numbers beside TensorBoard; null: none"
Tracker = Literal["wandb", "trackio", "mlflow"]
PACKAGES = {"wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow-skinny"}


def require_tracker(service: Tracker | None) -> None:
    """Raises UserError unless the package of the tracker is installed."""
    if service is not None and importlib.util.find_spec(service) is None:
        raise UserError(f"logging={service} needs a package: pip install {PACKAGES[service]}")


@dataclass(frozen=True)
class AuditConfig:
    """`spinal audit`."""

    model: ModelConfig
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    parallel: AuditParallelConfig = field(default_factory=AuditParallelConfig)
    batch_tokens: int | None = field(default=None, metadata=about(BATCH_TOKENS, "tokens"))
    checkpoint_every: int | None = field(
        default=None,
        metadata=about(
            "batches between saves, from which the same command resumes after a kill; null: none", "batches"
        ),
    )
    logging: Tracker | None = field(default=None, metadata=about(LOGGING))
    overwrite: bool = field(default=False, metadata=about(OVERWRITE))

    def __post_init__(self) -> None:
        require_tracker(self.logging)
        require_above(self, "batch_tokens", "checkpoint_every", or_null=True)
