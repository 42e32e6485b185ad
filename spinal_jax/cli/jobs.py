"""The commands audit, compare and train: from a settings record to files in a run folder and an exit code.

Libraries are imported inside functions, so that mistakes in settings are reported quickly.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from spinal_jax import config
from spinal_jax.cli.console import DONE, FAILED, SHORT, Stopped, complain, say, short_path, stages
from spinal_jax.cli.registry import command
from spinal_jax.config.training import TrainConfig
from spinal_jax.errors import NotLeader
from spinal_jax.jsontypes import Json

SharedJob = Callable[[Json, Path, bool], int]  # (settings, folder, whether this process leads) -> exit code


@command(
    "SOURCE | model.source=FOLDER|FILE.gguf|HUB_ID",
    "The depth trace of one checkpoint.",
    config.AuditConfig,
    {"model": "any", "prompts": "default", "metrics": "default"},
    ("model.source",),
)
def audit_command(asked: config.AuditConfig, folder: Path) -> int:
    return _together(_audit, asked, folder)


@command(
    "ALIGNED BASE | model.source=ALIGNED reference.source=BASE | model.trace=RUN reference.trace=RUN",
    "What changed between two checkpoints, where in depth, and how sure that is; exit code 3 short of `assert`.",
    config.CompareConfig,
    {
        "model": "any",
        "model@reference": "any",
        "prompts": "default",
        "preferences": None,
        "metrics": "default",
        "pair": None,
        "study": None,
    },
    ("model.source", "reference.source"),
)
def compare_command(asked: config.CompareConfig, folder: Path) -> int:
    return _together(_compare, asked, folder)


def _together(job: SharedJob, asked: config.AuditConfig | config.CompareConfig | TrainConfig, folder: Path) -> int:
    """Runs a job, in several processes if the settings say so."""
    if asked.parallel.coordinator is None:
        return job(config.to_mapping(asked), folder, True)
    from spinal_jax.cli.together import together
    from spinal_jax.parallel.distributed import cluster_spec
    from spinal_jax.runs.folder import held

    place, settings = cluster_spec(asked.parallel), config.to_mapping(asked)

    def own() -> int:
        if place.process != 0:
            return job(settings, folder, False)
        folder.mkdir(parents=True, exist_ok=True)  # another process may have removed it
        with held(folder):
            return job(settings, folder, True)

    return own() if place.processes == 1 else together(place, settings, asked.parallel.start_timeout, folder, own)


def _audit(settings: Json, folder: Path, leads: bool) -> int:
    """`audit_command` in one process, which writes the folder if it is the one that leads."""
    from spinal_jax.runs import folder as run_folder

    asked = config.build(config.AuditConfig, settings)
    goes_on = asked.checkpoint_every is not None and run_folder.has_progress(folder)
    if leads:
        run_folder.check_free(folder, asked.overwrite or goes_on, config.to_mapping(asked))
    from spinal_jax.audit.pipeline import run_audit
    from spinal_jax.audit.trace import save_trace
    from spinal_jax.report.figures import figures, png_bytes
    from spinal_jax.report.page import write_report
    from spinal_jax.runs.sinks import send_summary
    from spinal_jax.runs.tensorboard import hyperparameters, write_events

    seconds: dict[str, float] = {}
    bar = stages(seconds)
    try:
        trace = run_audit(asked, bar=bar, say=say if leads else None, folder=folder)
    except Stopped as stopped:
        if asked.checkpoint_every is not None and run_folder.has_progress(folder):
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
    send_summary(asked.logging, folder, hyperparameters(config.to_mapping(asked)), trace.summary)
    rate = trace.prompts["tokens"] / seconds["audit"]
    print(trace)
    print(f"  seconds   {', '.join(f'{k} {v:.1f}' for k, v in seconds.items())} ({rate:,.0f} tokens/s in the audit)")
    print(f"  report    {short_path(folder / 'report.html')}", flush=True)
    return DONE


def _compare(settings: Json, folder: Path, leads: bool) -> int:
    """`compare_command` in one process, which writes the folder if it is the one that leads."""
    from spinal_jax.runs import folder as run_folder

    asked = config.build(config.CompareConfig, settings)
    if leads:
        run_folder.check_free(folder, asked.overwrite, config.to_mapping(asked))
    from spinal_jax.audit.trace import save_trace
    from spinal_jax.comparison.flow import run_compare
    from spinal_jax.comparison.ranking import rank, save_ranking
    from spinal_jax.comparison.record import save_comparison
    from spinal_jax.comparison.verdict import comparison_shortfalls
    from spinal_jax.report.comparison import write_comparison_report
    from spinal_jax.runs.sinks import send_summary
    from spinal_jax.runs.tensorboard import hyperparameters, write_comparison_events

    seconds: dict[str, float] = {}
    bar = stages(seconds)
    compared = run_compare(asked, bar=bar, say=say if leads else None)
    first, others = compared.comparison, compared.others
    found = [first, *others]
    with run_folder.writing(folder, asked.overwrite) as scratch:
        if compared.measured:
            save_trace(compared.aligned, scratch / "aligned")
            save_trace(compared.reference, scratch / "reference")
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
    send_summary(asked.logging, folder, hyperparameters(config.to_mapping(asked)), first.summary)
    print(first)
    if others:
        print(rank(found))
    print(f"  report    {short_path(folder / 'report.html')}", flush=True)
    if short := comparison_shortfalls(first, **config.to_mapping(asked.assert_)):
        complain(f"the evidence falls short of assert: {'; '.join(short)}")
        return SHORT
    return DONE


@command(
    "objective=dpo|sft|lm model.source=CHECKPOINT preferences=hh preferences.path=FILE",
    "Trains a checkpoint and records its depth traces on the way; a killed run resumes when the command is run again.",
    TrainConfig,
    {
        "model": "any",
        "objective": "dpo",
        "preferences": None,
        "corpus": None,
        "prompts": "default",
        "metrics": "default",
        "experiment": None,
    },
    ("model.source",),
)
def train_command(asked: TrainConfig, folder: Path) -> int:
    return _together(_train, asked, folder)


def _train(settings: Json, folder: Path, leads: bool) -> int:
    """`train_command` in one process, which prints if it is the one that leads."""
    from spinal_jax.runs import folder as run_folder

    asked = config.build(TrainConfig, settings)
    if leads and not asked.overwrite:
        run_folder.check_incomplete(folder, config.to_mapping(asked))
    from spinal_jax.train.loop import Diverged
    from spinal_jax.train.run import run_train

    try:
        trained = run_train(asked, folder, stages({}), say)
    except Diverged as error:
        if not leads:
            raise NotLeader from error
        complain(f"{error}; the state before it is saved in {short_path(folder / 'checkpoints')}")
        return FAILED
    except Stopped as stopped:
        stopped.kept = "the same command goes on from the last checkpoint"
        raise
    print(trained)
    print(f"  seconds   {', '.join(f'{k} {v:.1f}' for k, v in trained.seconds.items())}")
    print(f"  report    {short_path(folder / 'report.html')}", flush=True)
    return DONE
