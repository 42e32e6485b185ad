"""`spinal watch` on checkpoints of a tiny model: written by transformers here, and by TRL's DPO, full and LoRA."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import jax
import pytest
import torch
from torch.utils.tensorboard import SummaryWriter
from transformers import LlamaConfig, LlamaForCausalLM

from spinal_jax.models.formats.byte_level import byte_tokenizer
from spinal_jax.models.formats.convert import convert
from spinal_jax.models.formats.open import open_checkpoint

from .conftest import Spinal, Start

ASKED = ("prompts=world", "prompts.limit=48", "metrics.groups=6")


def tiny(folder: Path) -> Path:
    """A base of 2 layers with a tokenizer of bytes, as a Hugging Face folder."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train_with_trl(base: Path, out: Path, lora: bool) -> None:
    """Six DPO steps, a checkpoint after each second one."""
    import datasets
    import peft
    import trl
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = [{"prompt": f"Q{n}: ", "chosen": f"yes {n}", "rejected": f"no, not {n}"} for n in range(12)]
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.eos_token
    arguments: Any = trl.DPOConfig(
        output_dir=str(out),
        max_steps=6,
        save_steps=2,
        logging_steps=1,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    trl.DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(base),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=config,
    ).train()


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a watch that must be equal however often it was begun; event files hold times."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and "tfevents" not in path.name]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def audited(source: Path, step: int, folder: Path, spinal: Spinal) -> dict[str, bytes]:
    """The files of `spinal audit` of a checkpoint, trace.csv with the step of a watch in its column."""
    assert spinal("audit", f"model.source={source}", *ASKED, f"hydra.run.dir={folder}").code == 0
    heading, *lines = (folder / "trace.csv").read_text().splitlines()
    assert all(line.startswith("0,") for line in lines)
    return {
        "trace.csv": "".join(f"{line}\n" for line in (heading, *(f"{step}{line[1:]}" for line in lines))).encode(),
        **{name: (folder / name).read_bytes() for name in ("trace.json", "spectra.safetensors")},
    }


def write_checkpoints(root: Path, steps: tuple[int, ...], last: int, size: float = 0.03) -> None:
    """Weights that move further at every step, saved by transformers with what its Trainer leaves beside them."""
    model = LlamaForCausalLM.from_pretrained(tiny(root.with_name("base")))
    for step in steps:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += size * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
        folder = root / f"checkpoint-{step}"
        model.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        log = [{"step": n, "loss": 1 / n, "rewards/margins": 0.1 * n} for n in range(1, step + 1)]
        state = {"global_step": step, "max_steps": last, "log_history": log}
        (folder / "trainer_state.json").write_text(json.dumps(state))


KILLED = """
import os, signal
import spinal_jax.recording.series as series
saved = series.{name}
def kill_or(*arguments):
    if str(arguments[-1]).endswith({end!r}):
        os.kill(os.getpid(), signal.SIGKILL)
    return saved(*arguments)
series.{name} = kill_or
"""


def test_traces_are_audits_and_a_killed_watch_ends_in_the_same_files(
    spinal: Spinal, start: Start, tmp_path: Path
) -> None:
    """Compared with the first checkpoint; killed inside a trace, and again between the last trace and the page."""
    out, run, again = tmp_path / "out", tmp_path / "watch", tmp_path / "again"
    write_checkpoints(out, (2, 4, 6), last=6)
    half = out / "checkpoint-8"
    shutil.copytree(out / "checkpoint-6", half)
    weights = half / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])  # is being written
    (half / "trainer_state.json").unlink()
    (out / "checkpoint-10").mkdir()  # was just begun
    assert spinal("watch", str(out), *ASKED, "once=true", f"hydra.run.dir={run}").code == 0
    for step in (2, 4, 6):
        expected = audited(out / f"checkpoint-{step}", step, tmp_path / f"audit-{step}", spinal)
        written = {name: (run / "traces" / f"step_{step:06}" / name).read_bytes() for name in expected}
        assert written == expected, step
    saved = json.loads((run / "onset.json").read_text())
    assert [record["step"] for record in saved["records"]] == [2, 4, 6]
    assert saved["records"][0]["delta_align"] == 0
    assert 0 < saved["records"][1]["distance"] < saved["records"][2]["distance"]
    assert [record["rewards/margins"] for record in saved["records"]] == pytest.approx([0.2, 0.4, 0.6])
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 6
    assert (run / "report.html").exists()

    # Without once=true: the trainer's state says that its last step is done.
    asked = ("watch", str(out), *ASKED, f"hydra.run.dir={again}")
    alike = {  # as many devices as in this process, and its compiled programs
        "XLA_FLAGS": os.environ["XLA_FLAGS"],
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.values["jax_compilation_cache_dir"]),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    for name, end in (("save_comparison", "step_000004"), ("write_training_report", "again")):
        killed = start(*asked, before=KILLED.format(name=name, end=end), cwd=tmp_path, env=alike)
        told = killed.communicate()
        assert killed.returncode == -signal.SIGKILL, told
    assert (again / "traces" / "step_000006" / "trace.json").exists()
    assert not (again / "report.html").exists()
    assert spinal(*asked).code == 0
    assert contents(again) == contents(run)


def test_orbax_steps_and_metrics_of_tensorboard(spinal: Spinal, tmp_path: Path) -> None:
    """Steps that `spinal convert` wrote give the columns of the folders that it read; what was logged to TensorBoard is
    picked up, and the watch's own events, which lie below, are not."""
    folders, steps = tmp_path / "folders", tmp_path / "steps"
    write_checkpoints(folders, (2, 4), last=4)
    (folders / "runs").mkdir()
    with SummaryWriter(folders / "runs") as writer:
        for step in (1, 2, 3, 4):
            writer.add_scalar("train/rewards/margins", 0.25 * step, step)
            writer.add_scalar("eval/loss", 1 / step, step)
    for step in (2, 4):
        with contextlib.closing(open_checkpoint(str(folders / f"checkpoint-{step}"))) as checkpoint:
            convert(checkpoint, str(steps / str(step)))
        (folders / f"checkpoint-{step}" / "trainer_state.json").unlink()
    for root in (folders, steps):
        assert spinal("watch", str(root), *ASKED, "once=true", f"hydra.run.dir={root / 'watch'}").code == 0
    for step in (2, 4):
        for name in ("trace.csv", "comparison.csv"):
            found = [(root / "watch" / "traces" / f"step_{step:06}" / name).read_bytes() for root in (folders, steps)]
            assert found[0] == found[1], (step, name)
    for _ in range(2):  # a second look finds the first one's events
        lines = [json.loads(line) for line in (folders / "watch" / "metrics.jsonl").read_text().splitlines()]
        assert lines == [
            {"step": n, "eval_loss": pytest.approx(1 / n), "rewards/margins": 0.25 * n} for n in (1, 2, 3, 4)
        ]
        (folders / "watch" / "report.html").unlink()
        assert spinal("watch", str(folders), *ASKED, "once=true", f"hydra.run.dir={folders / 'watch'}").code == 0
    saved = json.loads((folders / "watch" / "onset.json").read_text())
    assert [record["rewards/margins"] for record in saved["records"]] == [0.5, 1.0]


def test_a_destabilised_run_is_acted_on_once_and_the_stop_file_ends_the_watch(spinal: Spinal, tmp_path: Path) -> None:
    """Training has not ended; the command makes the file for which the watch looks."""
    out, stop, told, script = (tmp_path / name for name in ("out", "stop", "told", "act.sh"))
    write_checkpoints(out, (2, 4, 6, 8), last=100, size=3.0)
    script.write_text(f'#!/bin/sh\necho "$SPINAL_STEP $SPINAL_EVIDENCE" >> {told}\ntouch {stop}\nexit 3\n')
    script.chmod(0o755)
    asked = (f"reference.source={tmp_path / 'base'}", f"stop_file={stop}", f"on_destabilisation={script}")
    ended = spinal("watch", str(out), *ASKED, *asked, "poll_seconds=0.1", f"hydra.run.dir={tmp_path / 'watch'}")
    assert ended.code == 0
    broke = json.loads((tmp_path / "watch" / "onset.json").read_text())["destabilisation"]
    known = broke["evidence"].partition(", and did so")[0]  # what follows grows with every further trace
    assert told.read_text().startswith(f"{broke['step']} {known}")
    assert told.read_text().count("\n") == 1
    assert "on_destabilisation ended with exit code 3" in ended.err
    assert [path.name for path in sorted((tmp_path / "watch" / "traces").iterdir())][-1] == "step_000008"


def test_a_vocabulary_that_training_changed_is_refused(spinal: Spinal, tmp_path: Path) -> None:
    """Distances of outputs would be over other tokens than the reference's."""
    out = tmp_path / "out"
    write_checkpoints(out, (2,), last=2)
    named = out / "checkpoint-2" / "tokenizer.json"
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    model = LlamaForCausalLM.from_pretrained(out / "checkpoint-2")
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(named.parent)
    tokenizer.save_pretrained(named.parent)
    asked = (f"reference.source={tmp_path / 'base'}", *ASKED, "once=true", f"hydra.run.dir={tmp_path / 'watch'}")
    ended = spinal("watch", str(out), *asked)
    assert ended.code == 2
    told = ended.err.splitlines()[-1]  # transformers shows progress before
    assert told.startswith("spinal: the vocabulary of ")
    assert "leave reference.source out" in told


@pytest.mark.filterwarnings("ignore")  # of the other libraries
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_trl_run_is_traced_from_outside(lora: bool, spinal: Spinal, tmp_path: Path) -> None:
    """Traces are those of `spinal audit` of what TRL saved, byte for byte."""
    base, out = tiny(tmp_path / "base"), tmp_path / "out"
    train_with_trl(base, out, lora)
    names = ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == names
    run = tmp_path / "watch"
    asked = (f"reference.source={base}", *ASKED, "once=true")
    assert spinal("watch", str(out), *asked, f"hydra.run.dir={run}").code == 0
    saved = json.loads((run / "onset.json").read_text())
    assert [record["step"] for record in saved["records"]] == [2, 4, 6]
    assert (run / "report.html").exists()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "rewards/margins"} <= {name for line in lines for name in line}
    for step, name in zip((2, 4, 6), names, strict=True):
        expected = audited(out / name, step, tmp_path / f"audit-{step}", spinal)
        assert {file: (run / "traces" / f"step_{step:06}" / file).read_bytes() for file in expected} == expected, step
