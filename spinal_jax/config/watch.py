"""The settings of `spinal watch`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from spinal_jax.config.data import PromptsConfig
from spinal_jax.config.metrics import MetricsConfig
from spinal_jax.config.model import BASE, DTYPE, IGNORE_KEYS, REVISION, SOURCE
from spinal_jax.config.parallel import AuditParallelConfig
from spinal_jax.config.record import about, require

DAY = 86400  # seconds


@dataclass(frozen=True)
class WatchedReferenceConfig:
    """The checkpoint that all others are compared with."""

    source: str | None = field(default=None, metadata=about(f"{SOURCE}; null: the first checkpoint of the folder"))
    revision: str | None = field(default=None, metadata=about(REVISION))
    base: str | None = field(default=None, metadata=about(BASE))


@dataclass(frozen=True)
class WatchConfig:
    """`spinal watch`."""

    dir: str = field(metadata=about("folder into which a trainer writes checkpoints (checkpoint-N, step_N or N)"))
    reference: WatchedReferenceConfig = field(default_factory=WatchedReferenceConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    parallel: AuditParallelConfig = field(default_factory=AuditParallelConfig)
    dtype: Literal["float32", "bfloat16"] = field(default="float32", metadata=about(DTYPE))
    base: str | None = field(default=None, metadata=about(BASE))
    ignore_keys: tuple[str, ...] = field(default=(), metadata=about(IGNORE_KEYS))
    warmup_steps: int = field(
        default=0, metadata=about("linear warm-up steps of the trainer, which are no wobble of the optimiser", "steps")
    )
    poll_seconds: float = field(default=30.0, metadata=about("time between looks at the folder", "s"))
    settle_seconds: float = field(
        default=10.0,
        metadata=about("time without change after which a checkpoint without trainer_state.json is complete", "s"),
    )
    once: bool = field(default=False, metadata=about("measure the checkpoints that are there, and end"))
    stop_file: str | None = field(default=None, metadata=about("end when this file exists"))
    on_destabilisation: str | None = field(
        default=None,
        metadata=about("shell command that is run once when the run destabilises; SPINAL_STEP holds the step"),
    )

    def __post_init__(self) -> None:
        require(bool(self.dir.strip()), "dir", self.dir, "the folder of a training run")
        require(0 < self.poll_seconds <= DAY, "poll_seconds", self.poll_seconds, f"a number above 0, at most {DAY}")
        require(self.settle_seconds >= 0, "settle_seconds", self.settle_seconds, "0 or more seconds")
        require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "0 or more steps")
