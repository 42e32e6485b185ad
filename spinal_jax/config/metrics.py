"""What is measured, and in which variants."""

from __future__ import annotations

from dataclasses import dataclass, field

from spinal_jax.config.positions import Positions
from spinal_jax.config.record import about, require


@dataclass(frozen=True)
class ContractionConfig:
    """How fast the tail of a layer's spectrum decays: `metrics.contraction`."""

    window: tuple[float, float] = field(
        default=(0.10, 0.50),
        metadata=about("fitted ranks, as fractions [lo, hi] of min(N, d)"),
    )
    skip: int = field(
        default=1, metadata=about("first tokens of each sequence that do not count: attention sinks", "tokens")
    )
    center: bool = field(default=False, metadata=about("subtract the mean row first"))

    def __post_init__(self) -> None:
        low, high = self.window
        right = "two fractions [lo, hi] with 0 <= lo < hi <= 1"
        require(0 <= low < high <= 1, "metrics.contraction.window", list(self.window), right)
        require(self.skip >= 0, "metrics.contraction.skip", self.skip, "0 or more tokens")


TEMPERATURES = (1e-6, 1e6)  # logits divided by one stay within float32


@dataclass(frozen=True)
class TransportConfig:
    """How far the token distribution moves between layers: `metrics.transport`."""

    positions: str = field(
        default="last:4", metadata=about("measured positions of each sequence: last:K, response:K, stride:K or all")
    )
    temperature: float = field(default=1.0, metadata=about("temperature of the softmax"))
    top_k: int | None = field(
        default=None, metadata=about("most likely tokens kept, the rest in one bucket; null: the whole vocabulary")
    )

    def __post_init__(self) -> None:
        Positions.parse(self.positions)
        low, high = TEMPERATURES
        right = f"a number from {low:g} to {high:g}"
        require(low <= self.temperature <= high, "metrics.transport.temperature", self.temperature, right)
        require(self.top_k is None or self.top_k > 0, "metrics.transport.top_k", self.top_k, "null or a number above 0")


@dataclass(frozen=True)
class VariantsConfig:
    """Other settings measured in the same pass, kept in the trace's arrays: `metrics.variants`."""

    center: bool = field(default=True, metadata=about("contraction with the mean row subtracted"))
    skip: tuple[int, ...] = field(
        default=(), metadata=about("contraction with these numbers of skipped tokens, such as [0,4]")
    )
    positions: tuple[str, ...] | None = field(
        default=None,
        metadata=about("transport at last:K alone; null: K = 1, 2 and 4 where metrics.transport.positions has more"),
    )
    groups: bool = field(
        default=False,
        metadata=about("contraction variants without each group too, for intervals; each costs as much as the spectra"),
    )

    def __post_init__(self) -> None:
        for skip in self.skip:
            require(skip >= 0, "metrics.variants.skip", list(self.skip), "numbers of tokens, 0 or more")
        for text in self.positions or ():
            right = "a list of last:K, K a whole number above 0"
            kind, _, count = text.partition(":")
            good = kind == "last" and count.isascii() and count.isdigit() and int(count) > 0
            require(good, "metrics.variants.positions", list(self.positions or ()), right)


@dataclass(frozen=True)
class MetricsConfig:
    """What is measured: `metrics`."""

    contraction: ContractionConfig = field(default_factory=ContractionConfig)
    transport: TransportConfig = field(default_factory=TransportConfig)
    groups: int = field(default=16, metadata=about("groups of prompts, for the jackknife"))
    variants: VariantsConfig = field(default_factory=VariantsConfig)
    terminal: str | tuple[int, int] = field(
        default="third", metadata=about("terminal block: third (the last ceil(D / 3) blocks), last:K or [first, last]")
    )

    def __post_init__(self) -> None:
        require(2 <= self.groups <= 1024, "metrics.groups", self.groups, "a number from 2 to 1024")
        right = "third, last:K with K above 0, or [first, last] with 1 <= first <= last"
        require(self._has_terminal(), "metrics.terminal", self.terminal, right)
        for last in self.lasts:
            right = f"last:K of fewer tokens than metrics.transport.positions={self.transport.positions} measures"
            require(self._has(last), "metrics.variants.positions", list(self.variants.positions or ()), right)

    @property
    def lasts(self) -> tuple[int, ...]:
        """The K of each variant `last:K` of transport's positions."""
        if self.variants.positions is None:
            return tuple(k for k in (1, 2, 4) if self._has(k))
        return tuple(int(text.removeprefix("last:")) for text in self.variants.positions)

    def _has_terminal(self) -> bool:
        """Whether some depth has this terminal block."""
        if isinstance(self.terminal, tuple):
            return 1 <= self.terminal[0] <= self.terminal[1]
        kind, _, count = self.terminal.partition(":")
        return self.terminal == "third" or (kind == "last" and count.isascii() and count.isdigit() and int(count) > 0)

    def _has(self, last: int) -> bool:
        """Whether the last `last` tokens are some of those that transport measures."""
        base = Positions.parse(self.transport.positions)
        return base.kind == "all" or (base.kind == "last" and last < base.count)
