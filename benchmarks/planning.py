"""What it takes to plan an audit of many prompts, without a model: seconds of each stage, and peak memory.

    python benchmarks/planning.py [--prompts 10000 100000 1000000] [--words 256] [--repeated 0.1] [--clock process]

Prompts are `--words` words each, drawn from 50,000 by Zipf's law, and a word is a token. A share `--repeated` of them
repeats another prompt but for its last words, as near-duplicates do. Each number of prompts runs in a process of its
own; memory is the largest resident set of that process, and what it was when only the texts were made. With `--clock
process`, seconds are those of all cores together, to which other work on the machine adds little.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from spinal_jax import data
from spinal_jax.audit.grouped_prompts import GroupedPrompts, batches_sha256, tokens_sha256
from spinal_jax.config import MetricsConfig
from spinal_jax.data.packing import TokenSequence
from spinal_jax.data.vocabulary import Vocabulary
from spinal_jax.stats.groups import assign_groups

VOCABULARY, BATCH_TOKENS, ROWS = 50_000, 1 << 17, 16
GIB = 2**30
CLOCKS = {"wall": time.perf_counter, "process": time.process_time}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--words", type=int, default=256)
    parser.add_argument("--repeated", type=float, default=0.1)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(measured(args.prompts[0], args.words, args.repeated, CLOCKS[args.clock]))
        return
    print("| prompts | tokens to ids | groups | packing | hashes | first batch | together | peak memory | of texts |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for count in args.prompts:
        shape = ["--prompts", str(count), "--words", str(args.words), "--repeated", str(args.repeated)]
        subprocess.run([sys.executable, __file__, "--one", *shape, "--clock", args.clock], check=True)


def measured(count: int, words: int, repeated: float, clock: Callable[[], float]) -> str:
    """A line of the table."""
    seconds: dict[str, float] = {}

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        begin = clock()
        yield
        seconds[name] = clock() - begin

    prompts = data.prompts_of(texts(count, words, repeated))
    before = peak()
    tokenizer = word_tokenizer()
    with stage("tokens to ids"):
        tokens = data.tokenise_prompts(prompts, tokenizer, words, False)
    with stage("groups"):
        group, _ = assign_groups([p.text for p in tokens.prompts], [p.turns for p in tokens.prompts], 16)
    with stage("packing"):
        pool = GroupedPrompts(
            sequences=tuple(TokenSequence(ids, each) for ids, each in zip(tokens.ids, group.tolist(), strict=True)),
            settings=MetricsConfig(),
            vocabulary=Vocabulary.of(tokenizer, VOCABULARY),
            counts={},
            notes=(),
        )
        plan = pool.pack(BATCH_TOKENS, ROWS, None)
    with stage("hashes"):
        tokens_sha256(plan.sequences)
        batches_sha256(plan)
    with stage("first batch"):
        next(plan.filled())
    cells = [f"{count:,}", *(f"{value:.2f} s" for value in seconds.values()), f"{sum(seconds.values()):.1f} s"]
    return f"| {' | '.join(cells)} | {peak() / GIB:.2f} GiB | {before / GIB:.2f} GiB |"


def texts(count: int, words: int, repeated: float) -> list[str]:
    """Prompts of so many words."""
    rng = np.random.default_rng(0)
    names = np.array([f"w{number}" for number in range(VOCABULARY)], object)
    likelihood = 1 / np.arange(1, VOCABULARY + 1)
    ends = np.cumsum(likelihood / likelihood.sum())
    found: list[str] = []
    for number in range(count):
        drawn = names[np.minimum(np.searchsorted(ends, rng.random(words)), VOCABULARY - 1)].tolist()
        if number and rng.random() < repeated:
            drawn[: words - 8] = found[int(rng.integers(number))].split()[: words - 8]
        found.append(" ".join(drawn))
    return found


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word."""
    vocabulary = {f"w{number}": number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def peak() -> int:
    """Bytes of the largest resident set so far."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


if __name__ == "__main__":
    main()
