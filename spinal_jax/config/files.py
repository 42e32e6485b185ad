"""The settings of `spinal convert`, `spinal export` and `spinal verify`."""

from __future__ import annotations

from dataclasses import dataclass, field

from spinal_jax.config.data import PromptsConfig
from spinal_jax.config.model import ModelConfig, SourceConfig
from spinal_jax.config.record import about, require

OUT = "folder to write"
OVERWRITE = "replace a checkpoint that was written there before"


@dataclass(frozen=True)
class ConvertConfig:
    """`spinal convert`."""

    model: SourceConfig
    out: str = field(metadata=about(OUT))
    overwrite: bool = field(default=False, metadata=about(OVERWRITE))


@dataclass(frozen=True)
class ExportConfig:
    """`spinal export`."""

    model: SourceConfig
    out: str = field(metadata=about(OUT))
    shard_gb: float = field(default=5.0, metadata=about("largest file of tensors", "10^9 bytes"))
    overwrite: bool = field(default=False, metadata=about(OVERWRITE))

    def __post_init__(self) -> None:
        require(0 < self.shard_gb < 1e9, "shard_gb", self.shard_gb, "a number of gigabytes above 0")


@dataclass(frozen=True)
class VerifyConfig:
    """`spinal verify`."""

    model: ModelConfig
    prompts: PromptsConfig = field(default_factory=lambda: PromptsConfig(limit=4, max_length=64))
    tolerance: float | None = field(
        default=None, metadata=about("relative error of residuals and logits; null: 1e-4, 2e-4 with experts")
    )
    kl_tolerance: float = field(
        default=1e-5, metadata=about("largest KL divergence from PyTorch's distribution at any position", "nats")
    )

    def __post_init__(self) -> None:
        right = "float32 here: rounding to bfloat16 would hide what is to be found"
        require(self.model.dtype == "float32", "model.dtype", self.model.dtype, right)
        require(self.tolerance is None or self.tolerance > 0, "tolerance", self.tolerance, "null or a number above 0")
        require(self.kl_tolerance > 0, "kl_tolerance", self.kl_tolerance, "a number of nats above 0")
