"""How an audit's time grows with prompts, depth and vocabulary.

    python benchmarks/scaling.py [--repeats 3] [--prompts 64 256 1024 4096] [--depths 6 12 24 48]
                                 [--vocabularies 8192 32768 131072 262144]

Decoders of random weights, 64 wide, on prompts of 128 random tokens in batches of 1,024, through the `measure` of every
audit. Each case runs once to be compiled and then in turn with the others, so that a slow minute of the machine falls
on all; seconds are medians, and compilation is what the first run took longer. "Batches" is everything up to the last
Gram sum, "spectra" what the host then makes of the sums, which no prompt adds to. With --clock process, seconds are
those of this process on all cores together, to which other work on the machine adds little.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from flax import nnx

from spinal_jax.audit.measure import measure
from spinal_jax.config import MetricsConfig
from spinal_jax.config.positions import Positions
from spinal_jax.data.packing import Plan, TokenSequence, plan_batches
from spinal_jax.models.decoder import Decoder
from spinal_jax.models.families import read_model
from spinal_jax.models.formats.byte_level import SIZES

CLOCKS = {"wall": time.perf_counter, "process": time.process_time}
LENGTH, BATCH_TOKENS = 128, 1024
SETTINGS = MetricsConfig()


@dataclass
class Case:
    """One model on one pool, and how long it took each time."""

    model: Decoder
    work: Plan
    clock: Callable[[], float]
    first: float = 0.0  # seconds, compilation included
    batches: list[float] = field(default_factory=list)
    spectra: list[float] = field(default_factory=list)

    def run(self) -> None:
        @contextlib.contextmanager
        def bar(what: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
            begin = self.clock()
            yield lambda amount: None
            {"audit": self.batches, "spectra": self.spectra}[what].append(self.clock() - begin)

        measure(self.model, self.work, SETTINGS, bar)

    def compile(self) -> None:
        """The first run, which counts for nothing else."""
        begin = self.clock()
        measure(self.model, self.work, SETTINGS)
        self.first = self.clock() - begin

    @property
    def compiling(self) -> float:
        return self.first - float(np.median(np.add(self.batches, self.spectra)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--prompts", type=int, nargs="+", default=[64, 256, 1024, 4096])
    parser.add_argument("--depths", type=int, nargs="+", default=[6, 12, 24, 48])
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[8192, 32768, 131072, 262144])
    args = parser.parse_args()
    pools = {count: pool(count) for count in {args.prompts[0], *args.prompts}}
    least, small = pools[args.prompts[0]], decoder(args.depths[0], args.vocabularies[0])
    clock = CLOCKS[args.clock]
    by_prompts = {count: Case(small, pools[count], clock) for count in args.prompts}
    by_depth = {depth: Case(decoder(depth, args.vocabularies[0]), least, clock) for depth in args.depths}
    by_vocabulary = {size: Case(decoder(args.depths[0], size), least, clock) for size in args.vocabularies}
    for cases in (by_prompts, by_depth, by_vocabulary):
        timed(list(cases.values()), args.repeats)
    show(by_prompts, by_depth, by_vocabulary)


def decoder(depth: int, vocabulary: int) -> Decoder:
    """Random weights in the shape of the smallest model of bytes, but for its depth and vocabulary."""
    sizes: dict[str, Any] = {"num_hidden_layers": depth, "vocab_size": vocabulary}
    return Decoder(read_model({**SIZES["0.3m"], **sizes})[1], rngs=nnx.Rngs(0))


def pool(count: int) -> Plan:
    """Prompts of equal length in batches of one shape, whatever their number."""
    ids = np.random.default_rng(0).integers(0, 256, (count, LENGTH), np.int32)
    sequences = [TokenSequence(each, number % SETTINGS.groups) for number, each in enumerate(ids)]
    found = plan_batches(sequences, Positions.parse(SETTINGS.transport.positions), 1, BATCH_TOKENS)
    assert {(b.height * b.length, b.measured) for b in found.batches} == {(BATCH_TOKENS, 4 * BATCH_TOKENS // LENGTH)}
    return found


def timed(cases: Sequence[Case], repeats: int) -> None:
    """Runs every case once, and then all in turn."""
    jax.clear_caches()
    for case in cases:
        case.compile()
    for _ in range(repeats):
        for case in cases:
            case.run()


def show(prompts: dict[int, Case], depths: dict[int, Case], vocabularies: dict[int, Case]) -> None:
    """The tables in Markdown, and how far each is from flat or from a line."""
    each = [1e3 * np.median(case.batches) / count for count, case in prompts.items()]
    print("| prompts | batches, s | ms a prompt | spectra, s |\n|---|---|---|---|")
    for (count, case), cost in zip(prompts.items(), each, strict=True):
        print(f"| {count:,} | {np.median(case.batches):.2f} | {cost:.2f} | {np.median(case.spectra):.2f} |")
    print(f"\nCost of a prompt, most prompts against fewest: {each[-1] / each[0]:.2f}.\n")
    print("| blocks | batches, s | spectra, s | compilation, s |\n|---|---|---|---|")
    for depth, case in depths.items():
        print(f"| {depth} | {np.median(case.batches):.2f} | {np.median(case.spectra):.2f} | {case.compiling:.1f} |")
    compiled = [case.compiling for case in depths.values()]
    print(f"\nBatches in blocks: {line(depths)}.")
    print(f"Compilation, most blocks against fewest: {compiled[-1] / compiled[0]:.2f}.\n")
    print("| vocabulary | batches, s | compilation, s |\n|---|---|---|")
    for size, case in vocabularies.items():
        print(f"| {size:,} | {np.median(case.batches):.2f} | {case.compiling:.1f} |")
    print(f"\nBatches in vocabulary: {line(vocabularies)}.")


def line(cases: dict[int, Case]) -> str:
    """The least-squares line of the seconds of batches, and how well it fits."""
    x, y = np.array(list(cases), float), np.array([np.median(case.batches) for case in cases.values()])
    slope, start = np.polyfit(x, y, 1)
    off = y - (start + slope * x)
    r2 = 1 - float(off @ off) / float(((y - y.mean()) ** 2).sum())
    most = f"{np.abs(off / y).max():.0%}".replace("%", " %")
    return f"{start:.2f} s and {1e3 * slope:.3g} ms for each more, R^2 {r2:.4f}, at most {most} off"


if __name__ == "__main__":
    main()
