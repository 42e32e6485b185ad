"""Depth traces of a TRL run: a callback starts `spinal watch` beside the training and waits for it at the end.

    python examples/trl_dpo.py MODEL PAIRS.jsonl OUT [LORA_RANK]

PAIRS.jsonl has a prompt, a chosen and a rejected response a line. OUT gets TRL's checkpoints, whole weights or
adapters, and under OUT/watch the traces, onset.json and report.html. The callback works with every trainer that is
built on `transformers.Trainer`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments
from trl import DPOConfig, DPOTrainer

WATCH = [sys.executable, "-c", "from spinal_jax.cli.main import main; main()", "watch"]


class DepthTraces(TrainerCallback):
    """Measures every checkpoint that the trainer saves, in a process of its own."""

    def __init__(self, reference: str, *settings: str):
        """`reference` is the model that training starts from; `settings` are those of `spinal watch`."""
        self.asked = [f"reference.source={reference}", "poll_seconds=1", *settings]
        self.stop: Path | None = None
        self.process: subprocess.Popen[bytes] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the watch."""
        out = Path(str(args.output_dir))
        out.mkdir(parents=True, exist_ok=True)
        self.stop = out / "training_has_ended"
        self.stop.unlink(missing_ok=True)
        settings = [*self.asked, f"stop_file={self.stop}", f"hydra.run.dir={out / 'watch'}"]
        self.process = subprocess.Popen([*WATCH, str(out), *settings])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Lets the watch measure what is left, and waits for it."""
        assert self.stop is not None
        assert self.process is not None
        self.stop.touch()
        if code := self.process.wait():
            raise RuntimeError(f"spinal watch ended with exit code {code}")


def train(model: str, pairs: str, out: str, rank: int, traces: DepthTraces, **settings: Any) -> None:
    """DPO of all weights, or of adapters of a rank above 0."""
    peft = None
    if rank:
        from peft import LoraConfig

        peft = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model),
        args=DPOConfig(output_dir=out, **settings),
        train_dataset=load_dataset("json", data_files=pairs, split="train"),
        processing_class=tokenizer,
        peft_config=peft,
        callbacks=[traces],
    ).train()


def main(model: str, pairs: str, out: str, rank: str = "0") -> None:
    train(model, pairs, out, int(rank), DepthTraces(model), save_steps=50, logging_steps=1)


if __name__ == "__main__":
    main(*sys.argv[1:])
