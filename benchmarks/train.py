"""A DPO step of this project against a plain PyTorch one: seconds and peak memory, and what a trace costs beside it.

    python benchmarks/train.py MODEL.gguf [--preferences HH.jsonl.gz] [--pairs 8] [--length 256]

Every row is a process of its own on the same weights and the same pairs: random tokens of full length, or the pairs of
a file. The PyTorch step is the one of a tutorial: Hugging Face's model, all sequences of the batch padded to the
longest and run at once, `log_softmax` over whole logits, AdamW; what the reference says of the pairs is known to both
sides before the clock runs. Seconds are the median of the steps after the first, which compiles.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# What is measured: (name, settings of `spinal train`); None is PyTorch, which all others are compared with.
CASES: dict[str, dict[str, Any] | None] = {
    "plain PyTorch": None,
    "all weights (default)": {},
    "all weights, remat=blocks": {"remat": "blocks"},
    "all weights, remat=none": {"remat": "none"},
    "all weights, micro_tokens=2048": {"micro_tokens": 2048},
    "LoRA of rank 16": {"lora": {"rank": 16, "alpha": 32.0}},
    "LoRA of rank 16, remat=blocks": {"lora": {"rank": 16, "alpha": 32.0}, "remat": "blocks"},
}
TRACED = "all weights (default)"


class Sequence(NamedTuple):
    """A prompt and its response."""

    ids: np.ndarray
    start: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--preferences", help="HH pairs; without, random tokens of full length")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4, help="that are timed")
    parser.add_argument("--cases", type=int, nargs="*", help="numbers of the rows to measure; all")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        settings = CASES[args.case]
        found = run_torch(args) if settings is None else run_ours(args, settings, args.case == TRACED)
        print(json.dumps(found))
        return
    names = [name for number, name in enumerate(CASES) if not args.cases or number in args.cases]
    show({name: child(name) for name in names})


def child(name: str) -> dict[str, Any]:
    """Runs this file again for one row."""
    print(f"running {name} ...", file=sys.stderr)
    command = [sys.executable, __file__, *sys.argv[1:], "--case", name]
    found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])
    print(f"  {found['seconds']:.1f} s a step, {found['gib']:.2f} GiB", file=sys.stderr)
    return found


def pairs_of(args: argparse.Namespace, tokenizer: Any, vocab: int) -> list[tuple[Sequence, Sequence]]:
    """The pairs of all steps."""
    count = args.pairs * (args.steps + 1)
    if args.preferences is None:
        rng = np.random.default_rng(0)
        ids = rng.integers(0, vocab, (count, 2, args.length)).astype(np.int32)
        ids[:, 1, : args.length // 2] = ids[:, 0, : args.length // 2]
        return [(Sequence(a, args.length // 2), Sequence(b, args.length // 2)) for a, b in ids]
    from spinal_jax import data

    pairs = data.read_pairs(args.preferences, "hh", 2 * count)
    kept, _ = data.tokenise_pairs(pairs, tokenizer, args.length, False, "cut_prompt")
    return [(pair.chosen, pair.rejected) for pair in kept[:count]]


def peak() -> float:
    """The largest resident memory of this process, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def run_torch(args: argparse.Namespace) -> dict[str, Any]:
    """The plain step."""
    import torch
    import torch.nn.functional as F
    from transformers import AutoConfig, LlamaForCausalLM

    from spinal_jax.models.formats.open import open_checkpoint

    checkpoint = open_checkpoint(args.model)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(checkpoint.config))
        config = AutoConfig.from_pretrained(folder)
    model = LlamaForCausalLM(config)
    state = {name: torch.from_numpy(checkpoint.tensor(name).astype(np.float32)) for name in checkpoint.names()}
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    del state
    pairs = pairs_of(args, checkpoint.tokenizer(), config.vocab_size)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0)

    def logp(batch: list[Sequence]) -> Any:
        longest = max(len(s.ids) for s in batch)
        tokens = torch.zeros((len(batch), longest), dtype=torch.long)
        mask, answer = torch.zeros_like(tokens), torch.zeros((len(batch), longest - 1))
        for row, sequence in enumerate(batch):
            size = len(sequence.ids)
            tokens[row, :size], mask[row, :size] = torch.from_numpy(sequence.ids.astype(np.int64)), 1
            answer[row, sequence.start - 1 : size - 1] = 1
        logits = model(input_ids=tokens, attention_mask=mask).logits[:, :-1]
        every = torch.log_softmax(logits.float(), -1)
        return (every.gather(-1, tokens[:, 1:, None])[..., 0] * answer).sum(-1)

    batches = [pairs[i : i + args.pairs] for i in range(0, len(pairs), args.pairs)]
    flat = [[s for pair in batch for s in pair] for batch in batches]
    with torch.no_grad():
        reference = [torch.cat([logp(batch[i : i + 2]) for i in range(0, len(batch), 2)]) for batch in flat]
    seconds, losses = [], []
    for batch, known in zip(flat, reference, strict=True):
        begin = time.perf_counter()
        ratio = logp(batch) - known
        loss = -F.logsigmoid(0.1 * (ratio[0::2] - ratio[1::2])).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        seconds.append(time.perf_counter() - begin)
        losses.append(loss.item())
    return {"seconds": float(np.median(seconds[1:])), "gib": peak(), "losses": losses}


def run_ours(args: argparse.Namespace, settings: dict[str, Any], traced: bool) -> dict[str, Any]:
    """This project's step, and a trace where that is asked for."""
    import jax.numpy as jnp

    from spinal_jax.audit import pipeline
    from spinal_jax.config import build
    from spinal_jax.config.training import TrainConfig
    from spinal_jax.models import lora
    from spinal_jax.objectives.examples import Examples
    from spinal_jax.objectives.responses import micro_batches
    from spinal_jax.objectives.step import TrainState, make_steps
    from spinal_jax.parallel.mesh import make_mesh, shard_parameters, shard_rows
    from spinal_jax.train import reference as references
    from spinal_jax.train.loop import Task, optimise
    from spinal_jax.train.optimizer import optimizer, schedule
    from spinal_jax.train.run import micro_shape, split

    asked = {
        "model": {"source": args.model},
        "objective": {"kind": "dpo"},
        "preferences": {"path": args.preferences or "random tokens", "format": "hh"},
        "batch_size": args.pairs,
        "optimizer": {"schedule": "constant"},
        **settings,
    }
    config = build(TrainConfig, asked)
    mesh = make_mesh(config.parallel)
    with pipeline.opened(config.model) as (checkpoint, family, decoder):
        tokenizer = checkpoint.tokenizer()
        model = pipeline.load(checkpoint, family, decoder, "float32")
    pairs = tuple(pairs_of(args, tokenizer, decoder.vocab_size))
    examples = Examples(pairs, (), tuple(range(len(pairs))), "benchmark", "", {})
    stop = args.steps + 1
    if config.lora.rank:
        lora.attach(model, config.lora.rank, config.lora.alpha, config.lora.targets, 0)
    parts, parameters, fixed = split(model, config, mesh)
    del model
    method, shape = optimizer(config.optimizer, stop), micro_shape(config, decoder, examples, stop, mesh)
    steps = make_steps(
        parts, decoder, config.objective, method, dtype="float32", remat=config.remat or "all_but_linear"
    )

    def score(batch: Any, parameters: Any = parameters) -> np.ndarray:
        return np.asarray(steps.score(parameters, fixed, shard_rows(batch, mesh)))

    logp = references.score_examples(pairs, config.batch_size, shape, score, lambda amount: None)
    del score
    state = TrainState(parameters, shard_parameters(method.init(parameters), mesh), jnp.int32(0))
    del parameters
    task = Task(
        config, steps, fixed, examples, shape, mesh, schedule(config.optimizer, stop), lambda n: logp[n], None, None
    )
    seconds, losses, begin = [], [], time.perf_counter()
    for done in optimise(task, state, 0, stop):
        seconds.append(time.perf_counter() - begin)
        losses.append(done.metrics["loss"])
        state, begin = done.state, time.perf_counter()
    found: dict[str, Any] = {"seconds": float(np.median(seconds[1:])), "gib": peak(), "losses": losses}
    found["computed"] = shape.rows * shape.length * len(list(micro_batches(pairs[: args.pairs], shape, None)))
    if traced:
        found |= trace_costs(config, examples, parts.assemble({**fixed, **state.parameters}), tokenizer, decoder)
    return found


def trace_costs(config: Any, examples: Any, model: Any, tokenizer: Any, decoder: Any) -> dict[str, Any]:
    """Seconds of a trace of the default pool, and how many steps lie between two of them by default."""
    from spinal_jax.audit import pipeline
    from spinal_jax.train.folder import TrainingFolder
    from spinal_jax.train.history import History
    from spinal_jax.train.run import trace_interval

    prompts = pipeline.read_prompt_set(config.prompts)
    pool = pipeline.plan_prompts(prompts, tokenizer, decoder, config.prompts, config.metrics)
    about = (
        pipeline.model_record("benchmark", "benchmark", None, "float32", ""),
        pipeline.prompts_record(prompts, config.prompts),
    )
    with tempfile.TemporaryDirectory() as folder:
        out = TrainingFolder(Path(folder) / "run", {"config": {}}, False)
        history = History(model, pool, config.metrics, about, out, pipeline.bars(False))
        out.go_on(0)
        seconds = []
        for step in range(2):
            begin = time.perf_counter()
            history.add(step, model, {})
            seconds.append(time.perf_counter() - begin)
        history.close()
        out.close()
    return {
        "trace": seconds[-1],
        "interval": trace_interval(pool, examples, config.batch_size),
        "prompts": len(pool.sequences),
    }


def show(found: dict[str, dict[str, Any]]) -> None:
    """The table, in Markdown."""
    plain = found.get("plain PyTorch")
    print("| one DPO step | seconds | peak GiB | seconds / PyTorch | memory / PyTorch |\n|---|---|---|---|---|")
    for name, row in found.items():
        ratios = ["", ""] if plain is None else [f"{row[key] / plain[key]:.2f}" for key in ("seconds", "gib")]
        print(f"| {name} | {row['seconds']:.1f} | {row['gib']:.2f} | {' | '.join(ratios)} |")
    if plain is not None:
        first = [row["losses"][0] for row in found.values()]
        print(f"\nThe losses of the first step lie from {min(first):.6f} to {max(first):.6f}; ln 2 is 0.693147.")
    if (traced := found.get(TRACED)) is not None:
        share = traced["trace"] / (traced["trace"] + traced["interval"] * traced["seconds"])
        print(
            f"A trace of the default pool, {traced['prompts']} prompts, takes {traced['trace']:.1f} s; one every "
            f"{traced['interval']} steps, the default here, takes {share:.1%} of the time."
        )


if __name__ == "__main__":
    main()
