"""The settings of `spinal attribute`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from spinal_jax.config.audit import OVERWRITE
from spinal_jax.config.record import about, require, require_above


@dataclass(frozen=True)
class AttributeAssertConfig:
    """`assert`: requirements on the result; the command exits with code 3 if they are not met."""

    verdict: Literal["attributable", "equivalent", "undecided"] | None = field(
        default=None, metadata=about("the verdict")
    )


@dataclass(frozen=True)
class AttributeConfig:
    """`spinal attribute`."""

    aligned: tuple[str, ...] = field(
        metadata=about("folders of aligned runs, or patterns such as runs/dpo-*: training runs, comparisons or audits")
    )
    control: tuple[str, ...] = field(
        metadata=about("folders of control runs of the same base and budget, as on shuffled labels")
    )
    beside: tuple[str, ...] = field(default=(), metadata=about("folders of a third arm, which is shown and not tested"))
    base: str | None = field(
        default=None, metadata=about("run folder of the base's trace; null: as the runs themselves say")
    )
    step: int | None = field(default=None, metadata=about("step of the runs whose trace is taken; null: the last"))
    margin: float | None = field(
        default=None,
        metadata=about("margin of Delta_align; null: the 95 % quantile of |Delta_align| over the controls"),
    )
    same_base: bool = field(default=True, metadata=about("false: every run may have a base of its own"))
    assert_: AttributeAssertConfig = field(default_factory=AttributeAssertConfig)
    overwrite: bool = field(default=False, metadata=about(OVERWRITE))

    def __post_init__(self) -> None:
        require_above(self, "margin", or_null=True)
        right = "a list of run folders, or of patterns"
        for name in ("aligned", "control"):
            require(len(getattr(self, name)) > 0, name, list(getattr(self, name)), right)
