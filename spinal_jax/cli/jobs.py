"""What each command does with its settings: from a plain mapping to files in a run folder and an exit code.

Libraries are imported where they are used, so that a mistake in the settings is told at once.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spinal_jax.cli.console import DONE, FAILED, SHORT, Stopped, complain, shown, stages
from spinal_jax.errors import UserError

if TYPE_CHECKING:
    from spinal_jax.config import AuditParallelConfig


def audit(settings: dict[str, Any], folder: Path) -> int:
    from spinal_jax import config

    asked = config.build(config.AuditConfig, settings)
    return _together("audit", asked.parallel, settings, folder)


def compare(settings: dict[str, Any], folder: Path) -> int:
    from spinal_jax import config

    asked = config.build(config.CompareConfig, settings)
    return _together("compare", asked.parallel, settings, folder)


def _together(job: str, parallel: AuditParallelConfig, settings: dict[str, Any], folder: Path) -> int:
    """Runs a job of `SHARED`, with other processes where the settings say so."""
    if parallel.coordinator is not None:
        from spinal_jax.cli import processes
        from spinal_jax.parallel import mesh

        place = mesh.place_of(parallel)
        if place.processes > 1:
            return processes.share(job, settings, folder, place, parallel.start_timeout)
    return SHARED[job](settings, folder, True)


def work(descriptor: int) -> None:
    """What a worker of several processes does: the job that comes over this file descriptor."""
    from spinal_jax.cli.processes import serve

    serve(descriptor, SHARED)


def _audit(settings: dict[str, Any], folder: Path, leads: bool) -> int:
    """`audit` in one process, which writes the folder if it is the one that leads."""
    from spinal_jax import config
    from spinal_jax.runs import folder as run_folder

    asked = config.build(config.AuditConfig, settings)
    goes_on = asked.checkpoint_every is not None and run_folder.unfinished(folder)
    if leads:
        run_folder.check_free(folder, asked.overwrite or goes_on, config.to_mapping(asked))
    from spinal_jax.audit.pipeline import run_audit
    from spinal_jax.audit.trace import save_trace
    from spinal_jax.report.figures import figures, png_bytes
    from spinal_jax.report.page import write_report
    from spinal_jax.runs.tensorboard import write_events

    seconds: dict[str, float] = {}
    bar = stages(seconds)
    try:
        trace = run_audit(asked, bar=bar, say=lambda line: print(line, file=sys.stderr), folder=folder)
    except Stopped as stopped:
        if asked.checkpoint_every is not None and run_folder.unfinished(folder):
            stopped.kept = "the same command goes on from what was saved last"
        raise
    with run_folder.writing(folder, asked.overwrite or goes_on) as scratch:
        with bar("report", 3, "part") as advance:
            save_trace(trace, scratch)
            advance(1)
            write_report(scratch)
            advance(1)
            images = {name: png_bytes(figure, dpi=100) for name, figure in figures(trace).items()}
            write_events(trace, scratch, config.to_mapping(asked), images)
        run_folder.write_manifest(scratch, "audit", config.to_mapping(asked), run_folder.about_trace(trace), seconds)
    if (folder / run_folder.PROGRESS).exists():
        shutil.rmtree(folder / run_folder.PROGRESS)
    rate = trace.prompts["tokens"] / seconds["audit"]
    print(trace)
    print(f"  seconds   {', '.join(f'{k} {v:.1f}' for k, v in seconds.items())} ({rate:,.0f} tokens/s in the audit)")
    print(f"  report    {shown(folder / 'report.html')}", flush=True)
    return DONE


def _compare(settings: dict[str, Any], folder: Path, leads: bool) -> int:
    """`compare` in one process, which writes the folder if it is the one that leads."""
    from spinal_jax import config
    from spinal_jax.runs import folder as run_folder

    asked = config.build(config.CompareConfig, settings)
    if leads:
        run_folder.check_free(folder, asked.overwrite, config.to_mapping(asked))
    from spinal_jax.audit.trace import load_trace, save_trace
    from spinal_jax.comparison.compare import Weights, compare, shortfalls
    from spinal_jax.comparison.ranking import rank, save_ranking
    from spinal_jax.comparison.record import save_comparison
    from spinal_jax.report.comparison import write_comparison_report
    from spinal_jax.runs.tensorboard import write_comparison_events

    weights = Weights(asked.score.delta, asked.score.coherence, asked.score.gradient)
    seconds: dict[str, float] = {}
    bar = stages(seconds)
    both = None
    if asked.model.trace is not None and asked.reference.trace is not None:
        aligned, reference = load_trace(asked.model.trace), load_trace(asked.reference.trace)
    else:
        from spinal_jax.comparison.checkpoints import run_footprint

        measured = run_footprint(asked, bar=bar, say=lambda line: print(line, file=sys.stderr))
        aligned, reference, both = measured.aligned, measured.reference, measured.both
    references = [load_trace(run) for run in asked.other_references] or [reference] * len(asked.others)
    more = [load_trace(run) for run in asked.others]
    if asked.names:
        called = zip((aligned, *more), asked.names, strict=True)
        aligned, *more = (replace(trace, model={**trace.model, "name": name}) for trace, name in called)
    pairs = [(aligned, reference), *zip(more, references, strict=True)]
    found = []
    with bar("compare", len(pairs), "pair") as advance:
        for pair in pairs:
            extras = both if pair[0] is aligned else None
            found.append(compare(*pair, extras, align=asked.align, same_prompts=asked.same_prompts, weights=weights))
            advance(1)
    first, *others = found
    with run_folder.writing(folder, asked.overwrite) as scratch:
        if asked.model.source is not None:
            save_trace(aligned, scratch / "aligned")
            save_trace(reference, scratch / "reference")
        save_comparison(first, scratch)
        for number, other in enumerate(others, 1):
            save_comparison(other, scratch / "others" / str(number))
        if others:
            save_ranking(rank(found), scratch)
        with bar("report", 1, "page") as advance:
            write_comparison_report(scratch)
            advance(1)
        write_comparison_events(first, scratch, config.to_mapping(asked))
        run_folder.write_manifest(
            scratch, "compare", config.to_mapping(asked), run_folder.about_comparison(first), seconds
        )
    print(first)
    if others:
        print(rank(found))
    print(f"  report    {shown(folder / 'report.html')}", flush=True)
    if short := shortfalls(first, **config.to_mapping(asked.assert_)):
        complain(f"the evidence falls short of assert: {'; '.join(short)}")
        return SHORT
    return DONE


# Jobs that several processes can share: (settings, folder, whether this is the process that leads) -> exit code.
SHARED: dict[str, Callable[[dict[str, Any], Path, bool], int]] = {"audit": _audit, "compare": _compare}


def train(settings: dict[str, Any], folder: Path) -> int:
    from spinal_jax import config
    from spinal_jax.config.training import TrainConfig
    from spinal_jax.runs import folder as run_folder

    asked = config.build(TrainConfig, settings)
    if not asked.overwrite:
        run_folder.check_incomplete(folder, config.to_mapping(asked))
    from spinal_jax.report.training import write_training_report
    from spinal_jax.train.loop import Diverged
    from spinal_jax.train.run import run_train

    seconds: dict[str, float] = {}
    bar = stages(seconds)
    try:
        trained = run_train(asked, folder, bar, say=lambda line: print(line, file=sys.stderr))
    except Diverged as error:
        complain(f"{error}; the state before it is saved in {shown(folder / 'checkpoints')}")
        return FAILED
    except Stopped as stopped:
        stopped.kept = "the same command goes on from the last checkpoint"
        raise
    with bar("report", 1, "page") as advance:
        write_training_report(folder)
        advance(1)
    run_folder.write_manifest(folder, "train", config.to_mapping(asked), run_folder.about_trace(trained.trace), seconds)
    print(trained)
    print(f"  seconds   {', '.join(f'{k} {v:.1f}' for k, v in seconds.items())}")
    print(f"  report    {shown(folder / 'report.html')}", flush=True)
    return DONE


def convert(settings: dict[str, Any], folder: Path) -> int:
    from spinal_jax import config

    asked = config.build(config.ConvertConfig, settings)
    from spinal_jax.models.formats.convert import convert
    from spinal_jax.models.formats.open import open_checkpoint

    model = asked.model
    with contextlib.closing(open_checkpoint(model.source, model.revision)) as checkpoint:
        out = convert(
            checkpoint,
            asked.out,
            dtype=model.dtype,
            ignore_keys=model.ignore_keys,
            overwrite=asked.overwrite,
            bar=stages({}),
        )
    print(shown(out), flush=True)
    return DONE


def export(settings: dict[str, Any], folder: Path) -> int:
    from spinal_jax import config

    asked = config.build(config.ExportConfig, settings)
    from spinal_jax.models.formats.export import export
    from spinal_jax.models.formats.open import open_checkpoint

    model = asked.model
    with contextlib.closing(open_checkpoint(model.source, model.revision)) as checkpoint:
        out = export(
            checkpoint,
            asked.out,
            dtype=model.dtype,
            ignore_keys=model.ignore_keys,
            shard_bytes=int(asked.shard_gb * 1e9),
            overwrite=asked.overwrite,
            bar=stages({}),
        )
    print(shown(out), flush=True)
    return DONE


def verify(settings: dict[str, Any], folder: Path) -> int:
    from spinal_jax import config

    asked = config.build(config.VerifyConfig, settings)
    from spinal_jax.verify import verify

    result = verify(asked, stages({}))
    print(result, flush=True)
    if not result.passed:
        return FAILED
    return DONE


def plan(settings: dict[str, Any], folder: Path) -> int:
    from spinal_jax import config
    from spinal_jax.config.plan import PlanConfig
    from spinal_jax.runs import folder as run_folder

    asked = config.build(PlanConfig, settings)
    run_folder.check_free(folder, asked.overwrite, config.to_mapping(asked))
    from spinal_jax.plan.plan import FILE, make_plan

    seconds: dict[str, float] = {}
    with stages(seconds)("plan", 1, "plan") as advance:
        found = make_plan(asked)
        advance(1)
    with run_folder.writing(folder, asked.overwrite) as scratch:
        found.save(scratch)
        run_folder.write_manifest(scratch, "plan", config.to_mapping(asked), found.about(), seconds)
    print(found)
    print(f"written to {shown(folder / FILE)}", flush=True)
    return DONE


def report(arguments: list[str], usage: str) -> int:
    if len(arguments) != 1:
        raise UserError(f"report takes one run folder: {usage}")
    from spinal_jax.report import draw_report

    print(draw_report(arguments[0]))
    return DONE


def collect(arguments: list[str], usage: str) -> int:
    out = [argument.removeprefix("out=") for argument in arguments if argument.startswith("out=")]
    folders = [argument for argument in arguments if not argument.startswith("out=")]
    if not folders or len(out) > 1:
        raise UserError(f"collect takes folders that hold runs, and one out=DIR at most: {usage}")
    from spinal_jax.report.collect import collect

    print(collect(folders, *out))
    return DONE
