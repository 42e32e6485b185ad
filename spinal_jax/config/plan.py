"""The settings of `spinal plan` as a frozen record."""

from __future__ import annotations

from dataclasses import dataclass, field

from spinal_jax.config import MetricsConfig, ModelConfig, ParallelConfig, require
from spinal_jax.parallel.devices import DEVICES


@dataclass(frozen=True)
class PlanConfig:
    """`spinal plan`."""

    model: ModelConfig
    device: str | None = None  # a name of DEVICES; null: the same accelerator, whatever it may be
    devices: int = 1
    prompt_count: int = 512
    prompt_tokens: int = 256  # of each prompt
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    batch_tokens: int | None = None  # tokens computed at a time; null: by device
    compile: bool = True  # false: the arithmetic alone
    overwrite: bool = False  # replace a complete run

    def __post_init__(self) -> None:
        names = f"null or one of {', '.join(DEVICES)}"
        require(self.device is None or self.device in DEVICES, "device", self.device, names)
        require(0 < self.devices <= 4096, "devices", self.devices, "a number from 1 to 4096")
        require(self.prompt_count > 0, "prompt_count", self.prompt_count, "a number above 0")
        require(self.prompt_tokens > 1, "prompt_tokens", self.prompt_tokens, "2 or more tokens")
        require(
            self.batch_tokens is None or self.batch_tokens > 0, "batch_tokens", self.batch_tokens, "null or above 0"
        )
