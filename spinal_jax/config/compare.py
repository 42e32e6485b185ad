"""The settings of `spinal compare`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from spinal_jax.config.audit import BATCH_TOKENS, LOGGING, OVERWRITE, Tracker, require_tracker
from spinal_jax.config.data import PreferencesConfig, PromptsConfig
from spinal_jax.config.metrics import MetricsConfig
from spinal_jax.config.model import ComparedConfig
from spinal_jax.config.parallel import AuditParallelConfig
from spinal_jax.config.record import about, require, require_above
from spinal_jax.errors import UserError


@dataclass(frozen=True)
class ScoreConfig:
    """`score`: weights of the parts of the SPINALScore."""

    delta: float = field(default=1 / 3, metadata=about("weight of Delta_align"))
    coherence: float = field(default=1 / 3, metadata=about("weight of the aligned model's coherence"))
    gradient: float = field(
        default=1 / 3, metadata=about("weight of the terminal block's share of the preference gradient")
    )

    def __post_init__(self) -> None:
        for name in ("delta", "coherence", "gradient"):
            require(getattr(self, name) >= 0, f"score.{name}", getattr(self, name), "a weight of 0 or more")


@dataclass(frozen=True)
class AssertConfig:
    """`assert`: requirements on the result; the command exits with code 3 if they are not met."""

    verdict: (
        Literal[
            "toward contraction",
            "toward expansion",
            "differs, direction not robust",
            "no detectable change",
            "undetermined",
        ]
        | None
    ) = field(default=None, metadata=about("the verdict"))
    delta_align_low: float | None = field(
        default=None, metadata=about("least lower end of the 95 % interval of Delta_align")
    )
    delta_align_high: float | None = field(
        default=None, metadata=about("greatest upper end of the 95 % interval of Delta_align")
    )
    p_value: float | None = field(default=None, metadata=about("greatest p-value"))
    spinal_score_low: float | None = field(
        default=None, metadata=about("least lower end of the 95 % interval of the SPINALScore")
    )
    spinal_gain_low: float | None = field(
        default=None, metadata=about("least lower end of the 95 % interval of the gain of the SPINALScore")
    )
    holds: float | None = field(
        default=None, metadata=about("least share of the robustness grid in which the sign of Delta_align holds")
    )

    def __post_init__(self) -> None:
        for name in ("p_value", "holds"):
            value = getattr(self, name)
            require(value is None or 0 <= value <= 1, f"assert.{name}", value, "null or a number from 0 to 1")


@dataclass(frozen=True)
class CompareConfig:
    """`spinal compare`."""

    model: ComparedConfig
    reference: ComparedConfig
    others: tuple[str, ...] = field(
        default=(), metadata=about("more run folders of aligned models, ranked with the model")
    )
    other_references: tuple[str, ...] = field(
        default=(), metadata=about("run folder of the reference of each of others; []: the reference")
    )
    names: tuple[str, ...] = field(
        default=(), metadata=about("names of the model and of each of others; []: as their traces say")
    )
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    preferences: PreferencesConfig | None = None
    beta: float = field(default=0.1, metadata=about("beta of the DPO loss whose gradient is taken"))
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    align: Literal["equal", "relative"] = field(
        default="equal", metadata=about("relative: models of different depth are compared by relative depth")
    )
    same_prompts: bool = field(
        default=True, metadata=about("false: the two traces saw different prompts, as in a control")
    )
    score: ScoreConfig = field(default_factory=ScoreConfig)
    assert_: AssertConfig = field(default_factory=AssertConfig)
    parallel: AuditParallelConfig = field(default_factory=AuditParallelConfig)
    batch_tokens: int | None = field(default=None, metadata=about(BATCH_TOKENS, "tokens"))
    keep_prompts: int = field(
        default=0,
        metadata=about(
            "prompts of each of the groups that moved the result most to keep with their text, and with the tokens at "
            "which the two models' steps differ most; costs one more walk through the vocabulary a batch"
        ),
    )
    logging: Tracker | None = field(default=None, metadata=about(LOGGING))
    overwrite: bool = field(default=False, metadata=about(OVERWRITE))

    def __post_init__(self) -> None:
        require_tracker(self.logging)
        for name in ("model", "reference"):
            side: ComparedConfig = getattr(self, name)
            if side.trace is None and side.source is None and name == "reference" and self.model.source is not None:
                continue  # default: the base of an adapter
            if (side.trace is None) == (side.source is None):
                both = f"{name}.trace is {side.trace!r} and {name}.source is {side.source!r}; give one of them"
                neither = f"{name} is missing; give {name}.trace=RUN of an audit, or {name}.source=CHECKPOINT"
                raise UserError(neither if side.trace is None else both)
            right = f"null with {name}.source: only a training run has traces of several steps"
            require(side.step is None or side.source is None, f"{name}.step", side.step, right)
        sources = self.model.source is not None, self.model.source is not None and self.reference.trace is None
        if sources[0] != (self.reference.trace is None):
            kind, other = ("source", "trace") if self.model.source is not None else ("trace", "source")
            one, two = getattr(self.model, kind), getattr(self.reference, other)
            raise UserError(f"model.{kind} is {one!r} but reference.{other} is {two!r}; give both alike")
        right = "null with saved traces: the preference gradient needs both models (model.source, reference.source)"
        require(self.preferences is None or all(sources), "preferences", "given", right)
        coordinator = self.parallel.coordinator
        right = "null with saved traces: comparing them takes one process"
        require(coordinator is None or all(sources), "parallel.coordinator", coordinator, right)
        require(self.keep_prompts >= 0, "keep_prompts", self.keep_prompts, "0 or more prompts")
        right = "0 with saved traces: the steps of each prompt need both models (model.source, reference.source)"
        require(self.keep_prompts == 0 or all(sources), "keep_prompts", self.keep_prompts, right)
        right = "0 where several processes share the run: one process keeps the steps"
        require(self.keep_prompts == 0 or coordinator is None, "keep_prompts", self.keep_prompts, right)
        require_above(self, "beta")
        require_above(self, "batch_tokens", or_null=True)
        right = "as many folders as others, or none"
        fits = len(self.other_references) in (0, len(self.others))
        require(fits, "other_references", list(self.other_references), right)
        right = "a name for the model and one for each of others, or none"
        require(len(self.names) in (0, 1 + len(self.others)), "names", list(self.names), right)
