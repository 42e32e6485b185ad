"""Which checkpoint a command reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from spinal_jax.config.record import about, require

SOURCE = "hub id, Hugging Face folder, PEFT adapter folder, .gguf file, converted folder, or random:SIZE@SEED"
REVISION = "branch, tag or commit of a hub id, or a training step such as step-1000"
BASE = "of a PEFT adapter: its base model; null: as adapter_config.json names it"
DTYPE = "dtype of weights and forward pass; statistics are float32 or better"
NAME = "name in reports; null: from the source"
IGNORE_KEYS = "keys of config.json that are known to change nothing"


@dataclass(frozen=True)
class ModelConfig:
    """Which checkpoint, and how it computes: `model`."""

    source: str = field(metadata=about(SOURCE))
    revision: str | None = field(default=None, metadata=about(REVISION))
    base: str | None = field(default=None, metadata=about(BASE))
    dtype: Literal["float32", "bfloat16"] = field(default="float32", metadata=about(DTYPE))
    name: str | None = field(default=None, metadata=about(NAME))
    ignore_keys: tuple[str, ...] = field(default=(), metadata=about(IGNORE_KEYS))

    def __post_init__(self) -> None:
        require(bool(self.source.strip()), "model.source", self.source, "a hub id, a folder or a .gguf file")


@dataclass(frozen=True)
class ComparedConfig:
    """One of two checkpoints to compare: the run folder of its audit, or the checkpoint itself."""

    trace: str | None = field(
        default=None, metadata=about("run folder of an audit, or of a training run, instead of a source")
    )
    step: int | None = field(
        default=None, metadata=about("step of a training run whose trace is taken; null: the last")
    )
    source: str | None = field(default=None, metadata=about(SOURCE))
    revision: str | None = field(default=None, metadata=about(REVISION))
    base: str | None = field(default=None, metadata=about(BASE))
    dtype: Literal["float32", "bfloat16"] = field(default="float32", metadata=about(DTYPE))
    name: str | None = field(default=None, metadata=about(NAME))
    ignore_keys: tuple[str, ...] = field(default=(), metadata=about(IGNORE_KEYS))


@dataclass(frozen=True)
class SourceConfig:
    """Which checkpoint, and in which dtype it is written again."""

    source: str = field(metadata=about(SOURCE))
    revision: str | None = field(default=None, metadata=about(REVISION))
    base: str | None = field(default=None, metadata=about(BASE))
    dtype: Literal["float32", "bfloat16"] | None = field(
        default=None, metadata=about("dtype of what is written; null: as the source has it")
    )
    name: str | None = field(default=None, metadata=about("not used here; ready-made models state it"))
    ignore_keys: tuple[str, ...] = field(default=(), metadata=about(IGNORE_KEYS))

    def __post_init__(self) -> None:
        require(bool(self.source.strip()), "model.source", self.source, "a hub id, a folder or a .gguf file")
