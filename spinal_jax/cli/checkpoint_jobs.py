"""Commands on checkpoints, plans, reports and collections of runs.

Libraries are imported inside functions, so that mistakes in settings are reported quickly.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from spinal_jax import config
from spinal_jax.cli.console import DONE, FAILED, short_path, stages
from spinal_jax.cli.registry import command
from spinal_jax.config.plan import PlanConfig
from spinal_jax.errors import UserError
from spinal_jax.files import malformed


@command(
    "SOURCE out=DIR",
    "A checkpoint as an Orbax folder, to be named by model.source=DIR; a killed conversion resumes when run again.",
    config.ConvertConfig,
    {"model": "any"},
    ("model.source",),
    keeps_run=False,
)
def convert_command(asked: config.ConvertConfig, folder: Path) -> int:
    from spinal_jax.models.formats.convert import convert
    from spinal_jax.models.formats.open import open_checkpoint

    model = asked.model
    with contextlib.closing(open_checkpoint(model.source, model.revision, model.base)) as checkpoint:
        out = convert(
            checkpoint,
            asked.out,
            dtype=model.dtype,
            ignore_keys=model.ignore_keys,
            overwrite=asked.overwrite,
            bar=stages({}),
        )
    print(short_path(out), flush=True)
    return DONE


@command(
    "SOURCE out=DIR",
    "A checkpoint as a Hugging Face folder of safetensors.",
    config.ExportConfig,
    {"model": "any"},
    ("model.source",),
    keeps_run=False,
)
def export_command(asked: config.ExportConfig, folder: Path) -> int:
    from spinal_jax.models.formats.export import export
    from spinal_jax.models.formats.open import open_checkpoint

    model = asked.model
    with contextlib.closing(open_checkpoint(model.source, model.revision, model.base)) as checkpoint:
        out = export(
            checkpoint,
            asked.out,
            dtype=model.dtype,
            ignore_keys=model.ignore_keys,
            shard_bytes=int(asked.shard_gb * 1e9),
            overwrite=asked.overwrite,
            bar=stages({}),
        )
    print(short_path(out), flush=True)
    return DONE


@command(
    "SOURCE",
    "Compares a checkpoint, layer by layer, with Hugging Face's PyTorch model; exit code 1 if they differ.",
    config.VerifyConfig,
    {"model": "any", "prompts": "default"},
    ("model.source",),
    keeps_run=False,
)
def verify_command(asked: config.VerifyConfig, folder: Path) -> int:
    from spinal_jax.verify import verify

    result = verify(asked, stages({}))
    print(result, flush=True)
    if not result.passed:
        return FAILED
    return DONE


@command(
    "model=NAME devices=N device=v5e",
    "Memory, work and time of an audit, and whether it fits, from config.json alone: no weights, no accelerator.",
    PlanConfig,
    {"model": "any", "metrics": "default"},
    ("model.source",),
)
def plan_command(asked: PlanConfig, folder: Path) -> int:
    from spinal_jax.runs import folder as run_folder

    run_folder.check_free(folder, asked.overwrite, config.to_mapping(asked))
    from spinal_jax.plan.plan import make_plan
    from spinal_jax.plan.record import FILE
    from spinal_jax.plan.text import plan_text

    seconds: dict[str, float] = {}
    with stages(seconds)("plan", 1, "plan") as advance:
        found = make_plan(asked)
        advance(1)
    with run_folder.writing(folder, asked.overwrite) as scratch:
        found.save(scratch)
        run_folder.write_manifest(scratch, "plan", config.to_mapping(asked), found.about(), seconds)
    print(plan_text(found))
    print(f"written to {short_path(folder / FILE)}", flush=True)
    return DONE


@command("DIR", "Draws figures and page of a finished run again, from its saved files alone.")
def report_command(arguments: list[str], usage: str) -> int:
    if len(arguments) != 1:
        raise UserError(f"report takes one run folder: {usage}")
    from spinal_jax.report import draw_report

    folder = Path(arguments[0])
    with malformed(folder):
        print(short_path(draw_report(folder)))
    return DONE


@command(
    "DIR... [out=DIR]",
    "Joins all runs below folders into one table (runs.csv, runs.parquet) and one page (index.html).",
)
def collect_command(arguments: list[str], usage: str) -> int:
    out = [argument.removeprefix("out=") for argument in arguments if argument.startswith("out=")]
    folders = [argument for argument in arguments if not argument.startswith("out=")]
    if not folders or len(out) > 1:
        raise UserError(f"collect takes folders that hold runs, and one out=DIR at most: {usage}")
    from spinal_jax.report.collect import collect_runs

    with malformed("one of the runs"):
        print(collect_runs(folders, *out))
    return DONE


@command("bash|zsh|fish", 'A script that completes commands and settings: eval "$(spinal completion bash)".')
def completion_command(arguments: list[str], usage: str) -> int:
    from spinal_jax.cli.completion import SHELLS, script

    if len(arguments) != 1:
        raise UserError(f"completion takes one of {', '.join(SHELLS)}: {usage}")
    print(script(arguments[0]))
    return DONE
