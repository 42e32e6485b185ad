"""The settings of `spinal plan`."""

from __future__ import annotations

from dataclasses import dataclass, field

from spinal_jax.config.audit import BATCH_TOKENS, OVERWRITE
from spinal_jax.config.data_sheets import DEVICES
from spinal_jax.config.metrics import MetricsConfig
from spinal_jax.config.model import ModelConfig
from spinal_jax.config.parallel import ParallelConfig
from spinal_jax.config.record import about, require, require_above

MOST_PROMPTS, MOST_TOKENS = 1_000_000, 1 << 20  # of which each becomes an entry in memory


@dataclass(frozen=True)
class PlanConfig:
    """`spinal plan`."""

    model: ModelConfig
    device: str | None = field(
        default=None, metadata=about(f"{', '.join(DEVICES)}; null: any accelerator, and all of them compared")
    )
    devices: int = field(default=1, metadata=about("how many devices", "devices"))
    prompt_count: int = field(default=512, metadata=about("how many prompts", "prompts"))
    prompt_tokens: int = field(default=256, metadata=about("length of each prompt", "tokens"))
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    batch_tokens: int | None = field(default=None, metadata=about(BATCH_TOKENS, "tokens"))
    compile: bool = field(default=True, metadata=about("false: arithmetic alone, without the compiler's memory"))
    overwrite: bool = field(default=False, metadata=about(OVERWRITE))

    def __post_init__(self) -> None:
        names = f"null or one of {', '.join(DEVICES)}"
        require(self.device is None or self.device in DEVICES, "device", self.device, names)
        require(0 < self.devices <= 4096, "devices", self.devices, "a number from 1 to 4096")
        right = f"a number from 1 to {MOST_PROMPTS:,}"
        require(0 < self.prompt_count <= MOST_PROMPTS, "prompt_count", self.prompt_count, right)
        right = f"a number of tokens from 2 to {MOST_TOKENS:,}"
        require(1 < self.prompt_tokens <= MOST_TOKENS, "prompt_tokens", self.prompt_tokens, right)
        require_above(self, "batch_tokens", or_null=True)
