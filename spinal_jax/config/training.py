"""The settings of `spinal train`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from spinal_jax.config.audit import LOGGING, OVERWRITE, Tracker, require_tracker
from spinal_jax.config.data import CorpusConfig, PreferencesConfig, PromptsConfig
from spinal_jax.config.metrics import MetricsConfig
from spinal_jax.config.model import ModelConfig
from spinal_jax.config.parallel import ProcessesConfig
from spinal_jax.config.record import about, require, require_above
from spinal_jax.errors import UserError

# Largest decay rate of a moment in bfloat16. Its 8 bits drop a relative change below 2^-9, so the moment stands still
# while a gradient differs from it by less than 2^-9 / (1 - decay): 4 % here, but 200 % at 0.999.
COARSEST = 0.95
# Bounds beyond any use: what is due is listed by step, and a batch by example.
MOST_STEPS, MOST_BATCH, MOST_RANK = 10_000_000, 1 << 20, 1 << 16


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is minimised (docs/method.md): `objective`."""

    kind: Literal["dpo", "sft", "lm"] = field(
        default="dpo", metadata=about("preference optimisation, supervised fine-tuning, language modelling")
    )
    loss: Literal["sigmoid", "cdpo", "robust", "ipo", "hinge"] = field(
        default="sigmoid", metadata=about("loss of dpo on the log-probability ratios")
    )
    beta: float = field(default=0.1, metadata=about("strength of the KL constraint to the reference, of dpo"))
    label_smoothing: float = field(default=0.0, metadata=about("probability that a label is wrong, of cdpo and robust"))
    reference: Literal["cached", "live"] = field(
        default="cached", metadata=about("the reference's log-probabilities: computed once, or at each step")
    )
    cache: str | None = field(
        default=None, metadata=about("folder of cached log-probabilities; null: in the user's cache folder")
    )

    def __post_init__(self) -> None:
        require(self.beta > 0, "objective.beta", self.beta, "a number above 0")
        right = "a probability below 0.5, the share of labels that are wrong"
        require(0 <= self.label_smoothing < 0.5, "objective.label_smoothing", self.label_smoothing, right)
        right = f"0 with objective.loss={self.loss}: only cdpo and robust smooth labels"
        smooths = self.loss in ("cdpo", "robust")
        require(self.label_smoothing == 0 or smooths, "objective.label_smoothing", self.label_smoothing, right)


@dataclass(frozen=True)
class OptimizerConfig:
    """optax, with TRL's defaults: `optimizer`."""

    name: Literal["adamw", "adafactor", "lion", "sgd"] = field(default="adamw", metadata=about("update rule"))
    learning_rate: float = field(default=1e-6, metadata=about("peak learning rate"))
    schedule: Literal["linear", "cosine", "constant"] = field(
        default="linear", metadata=about("decay of the learning rate to 0 at the last step")
    )
    warmup_steps: int = field(default=0, metadata=about("linear warm-up steps", "steps"))
    weight_decay: float = field(default=0.0, metadata=about("decoupled weight decay of matrices"))
    beta1: float = field(default=0.9, metadata=about("Adam beta1"))
    beta2: float = field(default=0.999, metadata=about("Adam beta2"))
    eps: float = field(default=1e-8, metadata=about("Adam epsilon"))
    first_moment: Literal["float32", "bfloat16"] = field(
        default="float32", metadata=about("dtype of the mean of gradients, of adamw, lion and sgd")
    )
    clip: float | None = field(
        default=1.0, metadata=about("gradient clipping threshold (global norm); null: no clipping")
    )

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
        if self.first_moment == "bfloat16":
            has_one = self.name != "adafactor"
            require(has_one, "optimizer.first_moment", self.first_moment, "float32 with adafactor, which has no moment")
            name = "beta2" if self.name == "lion" else "beta1"
            right = f"at most {COARSEST} with first_moment=bfloat16, which rounds smaller changes away"
            require(getattr(self, name) <= COARSEST, f"optimizer.{name}", getattr(self, name), right)


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters in place of all weights: `lora`."""

    rank: int = field(default=0, metadata=about("rank of the adapters; 0: all weights are trained"))
    alpha: float = field(default=16.0, metadata=about("the adapters are scaled by alpha / rank"))
    targets: tuple[str, ...] = field(
        default=("all-linear",), metadata=about("layers with adapters: all-linear, or names such as q_proj")
    )

    def __post_init__(self) -> None:
        right = f"0 to train all weights, or the rank of the adapters, at most {MOST_RANK}"
        require(0 <= self.rank <= MOST_RANK, "lora.rank", self.rank, right)
        require(self.alpha > 0, "lora.alpha", self.alpha, "a number above 0")
        require(len(self.targets) > 0, "lora.targets", list(self.targets), "names of layers, or all-linear")


@dataclass(frozen=True)
class OnsetConfig:
    """How onset and destabilisation are detected (docs/method.md)."""

    control: str | None = field(
        default=None,
        metadata=about("folder of a matched control run, whose wobble is the optimiser's noise; null: this run's own"),
    )


@dataclass(frozen=True)
class TrainConfig:
    """`spinal train`."""

    model: ModelConfig
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    preferences: PreferencesConfig | None = None
    corpus: CorpusConfig | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    onset: OnsetConfig = field(default_factory=OnsetConfig)
    parallel: ProcessesConfig = field(default_factory=ProcessesConfig)
    steps: int | None = field(default=None, metadata=about("optimiser steps; null: as many as epochs have", "steps"))
    epochs: float = field(default=1.0, metadata=about("passes over the examples"))
    batch_size: int = field(default=8, metadata=about("pairs or documents in a step"))
    micro_tokens: int | None = field(
        default=None,
        metadata=about("tokens computed at a time, gradients being accumulated; null: by device", "tokens"),
    )
    compute_dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata=about("dtype of forward and backward pass; trained weights are float32")
    )
    remat: Literal["none", "all_but_linear", "blocks"] | None = field(
        default=None,
        metadata=about("what the backward pass recomputes; null: all_but_linear on a CPU, blocks elsewhere"),
    )
    seed: int = field(default=0, metadata=about("seed of the order of examples and of new weights"))
    log_every: int = field(default=1, metadata=about("steps between logged metrics", "steps"))
    eval_every: int | tuple[int, ...] | None = field(
        default=None, metadata=about("steps between evaluations, or a list of steps; null: first and last step")
    )
    eval_examples: int | None = field(
        default=None, metadata=about("held-out examples that are evaluated, the first ones; null: all")
    )
    trace_every: int | tuple[int, ...] | None = field(
        default=None,
        metadata=about(
            "steps between traces, or a list of steps; null: about a twentieth of the time is spent on them"
        ),
    )
    save_every: int | None = field(
        default=None, metadata=about("steps between checkpoints; null: a quarter of the run", "steps")
    )
    max_to_keep: int | None = field(default=2, metadata=about("checkpoints that are kept; null: all"))
    keep: Literal["last", "best_before_onset"] = field(
        default="last", metadata=about("which step's weights are the result: the last, or the last healthy one")
    )
    stop_on_destabilisation: bool = field(default=False, metadata=about("end the run where it destabilises"))
    until_eval_loss: float | None = field(
        default=None, metadata=about("end the run at the first evaluation with a held-out loss of at most this")
    )
    logging: Tracker | None = field(default=None, metadata=about(LOGGING))
    overwrite: bool = field(default=False, metadata=about(OVERWRITE))

    def __post_init__(self) -> None:
        require_tracker(self.logging)
        require_above(self, "steps", "micro_tokens", "eval_examples", "save_every", "max_to_keep", or_null=True)
        require_above(self, "batch_size", "log_every", "epochs")
        require(self.batch_size <= MOST_BATCH, "batch_size", self.batch_size, f"a number from 1 to {MOST_BATCH:,}")
        require((self.steps or 1) <= MOST_STEPS, "steps", self.steps, f"null or a number from 1 to {MOST_STEPS:,}")
        require(0 <= self.seed < 2**32, "seed", self.seed, "a number from 0 to 2^32 - 1")
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
