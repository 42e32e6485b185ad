"""The settings of `spinal train` as frozen records."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from spinal_jax.config import MetricsConfig, ModelConfig, ParallelConfig, PreferencesConfig, PromptsConfig, require
from spinal_jax.errors import UserError


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is minimised (docs/method.md)."""

    kind: Literal["dpo", "sft", "lm"]
    loss: Literal["sigmoid", "cdpo", "robust", "ipo", "hinge"] = "sigmoid"  # of dpo
    beta: float = 0.1  # strength of the pull towards the reference
    label_smoothing: float = 0.0  # probability that a label is wrong, of cdpo and robust
    reference: Literal["cached", "live"] = "cached"  # log-probabilities computed once, or beside each step
    cache: str | None = None  # folder of cached log-probabilities; null: the user's cache folder

    def __post_init__(self) -> None:
        require(self.beta > 0, "objective.beta", self.beta, "a number above 0")
        right = "a probability below 0.5, the share of labels that are wrong"
        require(0 <= self.label_smoothing < 0.5, "objective.label_smoothing", self.label_smoothing, right)
        right = f"0 with objective.loss={self.loss}: only cdpo and robust smooth labels"
        smooths = self.loss in ("cdpo", "robust")
        require(self.label_smoothing == 0 or smooths, "objective.label_smoothing", self.label_smoothing, right)


@dataclass(frozen=True)
class CorpusConfig:
    """Which documents `lm` trains on."""

    path: str | None = None
    format: Literal["text", "jsonl", "world"] = "text"
    field: str = "text"  # of a jsonl row
    limit: int | None = None  # documents
    held_out: int = 0  # last documents, kept from training and used to evaluate
    max_length: int = 256  # tokens; longer documents are cut into pieces
    seed: int = 0  # of the world

    def __post_init__(self) -> None:
        right = "the path of a file" if self.format != "world" else "null: the world is generated"
        require((self.path is None) == (self.format == "world"), "corpus.path", self.path, right)
        require(self.limit is None or self.limit > 0, "corpus.limit", self.limit, "a number above 0, or null")
        require(self.held_out >= 0, "corpus.held_out", self.held_out, "0 or more documents")
        require(self.max_length > 1, "corpus.max_length", self.max_length, "2 or more tokens")


@dataclass(frozen=True)
class OptimizerConfig:
    """optax, as TRL's defaults have it."""

    name: Literal["adamw", "adafactor", "lion", "sgd"] = "adamw"
    learning_rate: float = 1e-6
    schedule: Literal["linear", "cosine", "constant"] = "linear"  # to 0 at the last step
    warmup_steps: int = 0  # of rising from 0
    weight_decay: float = 0.0  # of matrices; not of norms and biases
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip: float | None = 1.0  # largest norm of the gradient; null: any

    def __post_init__(self) -> None:
        for name in ("learning_rate", "eps"):
            value = getattr(self, name)
            require(value > 0, f"optimizer.{name}", value, "a number above 0")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name}", value, "a number from 0 to below 1")
        require(self.warmup_steps >= 0, "optimizer.warmup_steps", self.warmup_steps, "0 or more steps")
        require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "0 or more")
        require(self.clip is None or self.clip > 0, "optimizer.clip", self.clip, "null or a number above 0")


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters in place of all weights."""

    rank: int = 0  # 0: all weights are trained
    alpha: float = 16.0  # their scale is alpha / rank
    targets: tuple[str, ...] = ("all-linear",)

    def __post_init__(self) -> None:
        require(self.rank >= 0, "lora.rank", self.rank, "0 to train all weights, or the rank of the adapters")
        require(self.alpha > 0, "lora.alpha", self.alpha, "a number above 0")
        require(len(self.targets) > 0, "lora.targets", list(self.targets), "names of layers, or all-linear")


@dataclass(frozen=True)
class TrainConfig:
    """`spinal train`."""

    model: ModelConfig
    objective: ObjectiveConfig
    preferences: PreferencesConfig | None = None
    corpus: CorpusConfig | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)  # that the traces are measured on
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    steps: int | None = None  # null: as many as `epochs` have
    epochs: float = 1.0
    batch_size: int = 8  # pairs or documents a step
    micro_tokens: int | None = None  # tokens computed at a time, gradients being accumulated; null: by device
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # of forward and backward; trained weights are float32
    # What the backward pass computes again and does not keep; null: all_but_linear on a CPU, else blocks.
    remat: Literal["none", "all_but_linear", "blocks"] | None = None
    seed: int = 0  # of the order of examples and of new weights
    log_every: int = 1
    eval_every: int | tuple[int, ...] | None = None  # steps between evaluations, or which; null: the first and last
    eval_examples: int | None = None  # held-out examples that are evaluated, the first ones; null: all
    trace_every: int | tuple[int, ...] | None = None  # steps between traces, or which; null: a twentieth of the time
    save_every: int | None = None  # null: a quarter of the run
    max_to_keep: int | None = 2  # checkpoints; null: all
    keep: Literal["last", "best_before_onset"] = "last"
    stop_on_destabilisation: bool = False
    until_eval_loss: float | None = None  # end at the first evaluation whose loss is at most this
    overwrite: bool = False  # replace a complete run

    def __post_init__(self) -> None:
        for name in ("steps", "micro_tokens", "eval_examples", "save_every", "max_to_keep"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "null or a number above 0")
        for name in ("batch_size", "log_every", "epochs"):
            value = getattr(self, name)
            require(value > 0, name, value, "a number above 0")
        for name in ("eval_every", "trace_every"):
            every = getattr(self, name)
            sound = min(every, default=0) >= 0 if isinstance(every, tuple) else every is None or every > 0
            require(sound, name, every, "null, a number above 0, or a list of steps")
        data = self.corpus if self.objective.kind == "lm" else self.preferences
        evaluates = data is None or data.held_out > 0
        right = "null where nothing is held out: the loss of held-out examples ends the run"
        require(self.until_eval_loss is None or evaluates, "until_eval_loss", self.until_eval_loss, right)
        if self.objective.kind == "lm" and self.corpus is None:
            raise UserError("objective=lm trains on documents; give corpus=world, or corpus=text corpus.path=FILE")
        if self.objective.kind != "lm" and self.preferences is None:
            raise UserError(
                f"objective={self.objective.kind} trains on preference pairs; give preferences=world, or "
                "preferences=hh or jsonl with preferences.path=FILE"
            )
        if self.lora.rank == 0:
            right = (
                "float32 when all weights are trained; compute_dtype=bfloat16 computes in bfloat16 and keeps them so"
            )
            require(self.model.dtype == "float32", "model.dtype", self.model.dtype, right)
