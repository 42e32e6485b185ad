"""A DPO step of this project against a plain PyTorch one: seconds and peak memory, and what a trace costs beside it.

    python benchmarks/train.py MODEL.gguf [--preferences HH.jsonl.gz] [--pairs 8] [--length 256] [--cases 0 1 5]

Every row is a process of its own on the same weights and the same pairs: random tokens of full length, or the pairs of
a file. All processes are ready before the clock runs; then they take turns, one step each, so that all rows meet the
same machine, whatever else it does. The PyTorch step is the one of a tutorial: Hugging Face's model, all sequences of
the batch padded to the longest and run at once, `log_softmax` over whole logits, AdamW; what the reference says of the
pairs is known to all sides before the clock runs. Seconds, of the clock and of the processors, are medians of the steps
after the first, which compiles; a ratio is the median over rounds of the ratio within a round.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# What is measured, by number: settings of `spinal train`, or other trainers. All are compared with the first measured.
PYTORCH, TRL = "plain PyTorch", "TRL"
CASES: dict[str, dict[str, Any]] = {
    PYTORCH: {},
    "all weights (default)": {},
    "all weights, remat=blocks": {"remat": "blocks"},
    "all weights, remat=none": {"remat": "none"},
    "all weights, micro_tokens=2048": {"micro_tokens": 2048},
    "LoRA of rank 16": {"lora": {"rank": 16, "alpha": 32.0}},
    "LoRA of rank 16, remat=blocks": {"lora": {"rank": 16, "alpha": 32.0}, "remat": "blocks"},
    TRL: {},
}
ANSWER = "answer: "


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
    parser.add_argument("--trace", action="store_true", help="also measure a trace of the default prompts")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        work(args)
        return
    names = [name for number, name in enumerate(CASES) if not args.cases or number in args.cases]
    with contextlib.ExitStack() as ends:  # if one row fails, no other runs on
        rows = []
        for name in names:
            rows.append(Row(name))
            ends.callback(rows[-1].process.kill)
        for number in range(args.steps + 1):
            for row in rows:
                print(f"step {number}, {row.name}: {row.step():.1f} s", file=sys.stderr)
        show({row.name: row.close() for row in rows})


class Row:
    """A process that makes the steps of one row, one at a time."""

    def __init__(self, name: str):
        print(f"preparing {name} ...", file=sys.stderr)
        self.name = name
        command = [sys.executable, __file__, *sys.argv[1:], "--case", name]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()  # once it is ready

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(ANSWER):
                return dict(json.loads(line.removeprefix(ANSWER)))
        raise SystemExit(f"{self.name} ended with exit code {self.process.wait()}")

    def step(self) -> float:
        """Makes a step and returns its seconds."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self._answer()["seconds"])

    def close(self) -> dict[str, Any]:
        """What was measured of all steps."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self._answer()


def work(args: argparse.Namespace) -> None:
    """The process of a row: a step for each line that comes in."""
    found: dict[str, Any] = {}
    if args.case in (PYTORCH, TRL):
        steps = run_torch(args) if args.case == PYTORCH else run_trl(args)
    else:
        steps = run_ours(args, CASES[args.case], args.trace, found)
    next(steps)
    seconds, processors, losses = [], [], []
    print(ANSWER + json.dumps({}), flush=True)
    for _ in sys.stdin:
        begin, used = time.perf_counter(), time.process_time()
        losses.append(next(steps))
        seconds.append(time.perf_counter() - begin)
        processors.append(time.process_time() - used)
        print(ANSWER + json.dumps({"seconds": seconds[-1]}), flush=True)
    found |= {"seconds": seconds[1:], "processors": processors[1:], "gib": peak(), "losses": losses}
    next(steps, None)
    print(ANSWER + json.dumps(found), flush=True)


def pairs_of(args: argparse.Namespace, tokenizer: Any, vocab: int) -> list[tuple[Sequence, Sequence]]:
    """The pairs, the same at every step."""
    if args.preferences is None:
        rng = np.random.default_rng(0)
        ids = rng.integers(0, vocab, (args.pairs, 2, args.length)).astype(np.int32)
        ids[:, 1, : args.length // 2] = ids[:, 0, : args.length // 2]
        return [(Sequence(a, args.length // 2), Sequence(b, args.length // 2)) for a, b in ids]
    from spinal_jax import data

    pairs = data.read_pairs(args.preferences, "hh", 2 * args.pairs)
    kept, _ = data.tokenise_pairs(pairs, tokenizer, args.length, False, "cut_prompt")
    return [(pair.chosen, pair.rejected) for pair in kept[: args.pairs]]


def peak() -> float:
    """The largest resident memory of this process, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def torch_model(args: argparse.Namespace) -> tuple[Any, Any]:
    """(Hugging Face's model in float32, its tokenizer)."""
    import torch
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
    return model, checkpoint.tokenizer()


def run_torch(args: argparse.Namespace) -> Iterator[float]:
    """The losses of plain steps; first 0, once all is ready."""
    import torch
    import torch.nn.functional as F

    model, tokenizer = torch_model(args)
    pairs = pairs_of(args, tokenizer, model.config.vocab_size)
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

    batch = [sequence for pair in pairs for sequence in pair]
    with torch.no_grad():
        reference = torch.cat([logp(batch[i : i + 2]) for i in range(0, len(batch), 2)])
    yield 0.0
    for _ in range(args.steps + 1):
        ratio = logp(batch) - reference
        loss = -F.logsigmoid(0.1 * (ratio[0::2] - ratio[1::2])).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        yield loss.item()


def run_trl(args: argparse.Namespace) -> Iterator[float]:
    """The losses of TRL's steps, whose trainer runs in a thread of its own; first 0, once all is ready."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    model, tokenizer = torch_model(args)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    go, done = threading.Semaphore(0), threading.Semaphore(0)
    losses: list[float] = []

    class Turns(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *arguments: Any, **kwargs: Any) -> None:
            done.release()
            go.acquire()

        def on_log(self, *arguments: Any, logs: dict[str, float], **kwargs: Any) -> None:
            losses.append(logs.get("loss", float("nan")))

        def on_train_end(self, *arguments: Any, **kwargs: Any) -> None:
            done.release()

    class Tokenised(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *arguments: Any) -> Any:
            return dataset

    rows = [
        {
            "prompt_ids": chosen.ids[: chosen.start].tolist(),
            "chosen_ids": chosen.ids[chosen.start :].tolist(),
            "rejected_ids": rejected.ids[rejected.start :].tolist(),
        }
        for chosen, rejected in pairs_of(args, tokenizer, model.config.vocab_size)
    ]
    with tempfile.TemporaryDirectory() as folder:
        settings = DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=args.pairs,
            max_steps=args.steps + 1,
            learning_rate=1e-6,
            max_length=None,
            precompute_ref_log_probs=True,
            precompute_ref_batch_size=1,
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        torch.manual_seed(0)
        trainer = Tokenised(
            model=model,
            args=settings,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[Turns()],
        )
        threading.Thread(target=trainer.train, daemon=True).start()
        done.acquire()
        yield 0.0
        for _ in range(args.steps + 1):
            go.release()
            done.acquire()
            yield losses[-1]


def run_ours(
    args: argparse.Namespace, settings: dict[str, Any], traced: bool, found: dict[str, Any]
) -> Iterator[float]:
    """The losses of this project's steps; first 0, once all is ready. At the end a trace, where that is asked for, is
    noted in `found`."""

    from spinal_jax.audit import pipeline
    from spinal_jax.config import build
    from spinal_jax.config.training import TrainConfig
    from spinal_jax.models import lora
    from spinal_jax.objectives.examples import Examples
    from spinal_jax.objectives.step import make_steps
    from spinal_jax.parallel.mesh import make_mesh, shard_rows
    from spinal_jax.train import reference as references
    from spinal_jax.train.loop import Task, optimise
    from spinal_jax.train.optimizer import optimizer, schedule
    from spinal_jax.train.run import begin, micro_shape, split_parameters

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
    parts, parameters, fixed = split_parameters(model, config, mesh)
    del model
    method, shape = optimizer(config.optimizer, stop), micro_shape(config, decoder, examples, stop, mesh)
    steps = make_steps(
        parts, decoder, config.objective, method, dtype="float32", remat=config.remat or "all_but_linear"
    )

    def score(batch: Any, parameters: Any = parameters) -> np.ndarray:
        return np.asarray(steps.score(parameters, fixed, shard_rows(batch, mesh)))

    logp = references.score_examples(pairs, config.batch_size, shape, score, lambda amount: None)
    del score
    state = begin(parameters, method, mesh)
    del parameters
    task = Task(
        config, steps, fixed, examples, shape, mesh, schedule(config.optimizer, stop), lambda n: logp[n], None, None
    )
    yield 0.0
    for done in optimise(task, state, 0, stop):
        state = done.state
        yield done.metrics["loss"]
    if traced:
        found |= trace_costs(config, examples, parts.assemble({**fixed, **state.parameters}), tokenizer, decoder)


def trace_costs(config: Any, examples: Any, model: Any, tokenizer: Any, decoder: Any) -> dict[str, Any]:
    """Seconds in which a trace of the default prompts is measured, and how many steps lie between two by default."""
    from spinal_jax.audit import pipeline
    from spinal_jax.audit.measure import keep_reference, measure
    from spinal_jax.train.run import trace_interval

    prompts = pipeline.read_prompt_set(config.prompts)
    pool = pipeline.plan_prompts(prompts, tokenizer, decoder, config.prompts, config.metrics)
    reference = keep_reference(model, pool, config.metrics, alone=True)
    begin = time.perf_counter()
    measure(model, pool, config.metrics, None, reference)
    seconds = time.perf_counter() - begin
    reference.close()
    interval = trace_interval(pool, examples, config.batch_size)
    return {"trace": seconds, "interval": interval, "prompts": len(pool.sequences)}


def show(found: dict[str, dict[str, Any]]) -> None:
    """The table, in Markdown."""
    plain = next(iter(found.values()))
    first = next(iter(found))
    print(f"| one DPO step | seconds | CPU seconds | peak GiB | of {first}: seconds | CPU seconds | memory |")
    print("|---|---|---|---|---|---|---|")
    for name, row in found.items():
        medians = " | ".join(f"{np.median(row[key]):.1f}" for key in ("seconds", "processors"))
        ratios = [np.median(np.divide(row[key], plain[key])) for key in ("seconds", "processors")]
        ratios.append(row["gib"] / plain["gib"])
        print(f"| {name} | {medians} | {row['gib']:.2f} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |")
    losses = [row["losses"][0] for row in found.values()]
    print(f"\nThe losses of the first step lie from {min(losses):.6f} to {max(losses):.6f}; ln 2 is 0.693147.")
    for name, row in found.items():
        if "trace" in row:
            share = row["trace"] / (row["trace"] + row["interval"] * np.median(row["seconds"]))
            print(
                f"{name}: a trace of the default pool, {row['prompts']} prompts, takes {row['trace']:.1f} s; one every "
                f"{row['interval']} steps, the default here, takes {share:.1%} of the time."
            )


if __name__ == "__main__":
    main()
