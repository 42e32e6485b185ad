"""The command line: `spinal COMMAND [setting=value ...]`. The only module that knows Hydra."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

from spinal_jax import help as pages
from spinal_jax.errors import UserError

if TYPE_CHECKING:
    from spinal_jax.api import Bar

FAILED, MISTAKE, SHORT = 1, 2, 3  # exit codes
Job = Callable[[dict[str, Any], Path], None]


def main() -> None:
    """Entry point. Exit codes: 0 done, 2 a mistake in what was asked, 3 evidence short of `assert`, 130 Ctrl-C, 143
    SIGTERM, 1 anything else."""
    signals = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, _stop) for number in signals}
    try:
        _run(sys.argv[1:])
    except UserError as error:
        _complain(str(error))
        sys.exit(MISTAKE)
    except Stopped as stopped:
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr)  # the terminal's own ^C
        _complain(f"{stopped}; {stopped.kept}")
        sys.stdout.flush()
        os._exit(128 + stopped.number)  # all is cleared up, and JAX may crash when Python ends with work in flight
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM."""

    def __init__(self, number: int):
        super().__init__("interrupted" if number == signal.SIGINT else "terminated")
        self.number = number
        self.kept = "nothing is kept of a run that was not finished"


def _stop(number: int, frame: FrameType | None) -> None:
    """Raises `Stopped`, once: what is left to do is clearing up."""
    if frame is not None and frame.f_code.co_name == "_xla_gc_callback":
        # JAX's hook into garbage collection, in which an exception is printed and lost: again in a moment.
        threading.Timer(0.01, signal.pthread_kill, (threading.main_thread().ident, number)).start()
        return
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    raise Stopped(number)


def _run(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage(), file=sys.stdout if arguments else sys.stderr)
        if not arguments:
            sys.exit(MISTAKE)
    elif arguments[0] == "--version":
        print(f"spinal {version('spinal-jax')}")
    elif arguments[0] not in COMMANDS:
        raise UserError(f"there is no command {arguments[0]!r}; there are {', '.join(COMMANDS)}")
    else:
        name, *arguments = arguments
        COMMANDS[name].run(name, arguments)


def _complain(message: str) -> None:
    """One line, whatever the message holds."""
    print(f"spinal: {' '.join(message.split())}", file=sys.stderr, flush=True)


def _report(command: str, arguments: list[str]) -> None:
    usage = f"spinal {command} {COMMANDS[command].takes}"
    if arguments in (["-h"], ["--help"]):
        print(f"usage: {usage}\n\n{COMMANDS[command].does}")
        return
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise UserError(f"{command} takes one run folder: {usage}")
    from spinal_jax.report import draw_report

    print(draw_report(arguments[0]))


def _audit(command: str, arguments: list[str]) -> None:
    _compose(command, arguments, _audit_job)


def _audit_job(settings: dict[str, Any], folder: Path) -> None:
    from spinal_jax import config, runs

    asked = config.build(config.AuditConfig, settings)
    runs.check_free(folder, asked.overwrite)
    from spinal_jax.api import run_audit
    from spinal_jax.report.page import write_report
    from spinal_jax.result import save_trace

    seconds: dict[str, float] = {}
    bar = _stages(seconds)
    trace = run_audit(asked, bar=bar, say=lambda line: print(line, file=sys.stderr))
    with runs.writing(folder, asked.overwrite) as scratch:
        with bar("report", 3, "part") as advance:
            save_trace(trace, scratch)
            advance(1)
            write_report(scratch)
            advance(1)
            runs.write_events(trace, scratch)
        runs.write_manifest(scratch, "audit", config.to_mapping(asked), runs.about_trace(trace), seconds)
    rate = trace.prompts["tokens"] / seconds["audit"]
    print(trace)
    print(f"  seconds   {', '.join(f'{k} {v:.1f}' for k, v in seconds.items())} ({rate:,.0f} tokens/s in the audit)")
    print(f"  report    {_shown(folder / 'report.html')}", flush=True)


def _compare(command: str, arguments: list[str]) -> None:
    # A checkpoint that is given by its trace has no source.
    _compose(command, arguments, _compare_job, optional=("model.source", "reference.source"))


def _compare_job(settings: dict[str, Any], folder: Path) -> None:
    from spinal_jax import config, runs

    asked = config.build(config.CompareConfig, settings)
    runs.check_free(folder, asked.overwrite)
    from spinal_jax.compare import Weights, compare, shortfalls
    from spinal_jax.comparison import save_comparison
    from spinal_jax.ranking import rank, save_ranking
    from spinal_jax.report.comparison import write_comparison_report
    from spinal_jax.result import load_trace, save_trace

    weights = Weights(asked.score.delta, asked.score.coherence, asked.score.gradient)
    seconds: dict[str, float] = {}
    bar = _stages(seconds)
    both = None
    if asked.model.trace is not None and asked.reference.trace is not None:
        aligned, reference = load_trace(asked.model.trace), load_trace(asked.reference.trace)
    else:
        from spinal_jax.footprint import run_footprint

        measured = run_footprint(asked, bar=bar, say=lambda line: print(line, file=sys.stderr))
        aligned, reference, both = measured.aligned, measured.reference, measured.both
    references = [load_trace(run) for run in asked.other_references] or [reference] * len(asked.others)
    more = [load_trace(run) for run in asked.others]
    pairs = [(aligned, reference), *zip(more, references, strict=True)]
    found = []
    with bar("compare", len(pairs), "pair") as advance:
        for pair in pairs:
            extras = both if pair[0] is aligned else None
            found.append(compare(*pair, extras, align=asked.align, same_prompts=asked.same_prompts, weights=weights))
            advance(1)
    first, *others = found
    with runs.writing(folder, asked.overwrite) as scratch:
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
        runs.write_manifest(scratch, "compare", config.to_mapping(asked), runs.about_comparison(first), seconds)
    print(first)
    if others:
        print(rank(found))
    print(f"  report    {_shown(folder / 'report.html')}", flush=True)
    if short := shortfalls(first, **config.to_mapping(asked.assert_)):
        _complain(f"the evidence falls short of assert: {'; '.join(short)}")
        sys.exit(SHORT)


def _train(command: str, arguments: list[str]) -> None:
    _compose(command, arguments, _train_job)


def _train_job(settings: dict[str, Any], folder: Path) -> None:
    from spinal_jax import config, runs
    from spinal_jax.train.config import TrainConfig

    asked = config.build(TrainConfig, settings)
    from spinal_jax.report.training import write_training_report
    from spinal_jax.train.loop import Diverged
    from spinal_jax.train.run import run_train

    seconds: dict[str, float] = {}
    bar = _stages(seconds)
    try:
        trained = run_train(asked, folder, bar, say=lambda line: print(line, file=sys.stderr))
    except Diverged as error:
        _complain(f"{error}; the state before it is saved in {_shown(folder / 'checkpoints')}")
        sys.exit(FAILED)
    except Stopped as stopped:
        stopped.kept = "the same command goes on from the last checkpoint"
        raise
    with bar("report", 1, "page") as advance:
        write_training_report(folder)
        advance(1)
    runs.write_manifest(folder, "train", config.to_mapping(asked), runs.about_trace(trained.trace), seconds)
    print(trained)
    print(f"  seconds   {', '.join(f'{k} {v:.1f}' for k, v in seconds.items())}")
    print(f"  report    {_shown(folder / 'report.html')}", flush=True)


def _convert(command: str, arguments: list[str]) -> None:
    _compose(command, arguments, _convert_job)


def _convert_job(settings: dict[str, Any], folder: Path) -> None:
    from spinal_jax import config

    asked = config.build(config.ConvertConfig, settings)
    from spinal_jax.models.checkpoint import open_checkpoint
    from spinal_jax.models.convert import convert

    model = asked.model
    with contextlib.closing(open_checkpoint(model.source, model.revision)) as checkpoint:
        out = convert(
            checkpoint,
            asked.out,
            dtype=model.dtype,
            ignore_keys=model.ignore_keys,
            overwrite=asked.overwrite,
            bar=_stages({}),
        )
    print(_shown(out), flush=True)


def _export(command: str, arguments: list[str]) -> None:
    _compose(command, arguments, _export_job)


def _export_job(settings: dict[str, Any], folder: Path) -> None:
    from spinal_jax import config

    asked = config.build(config.ExportConfig, settings)
    from spinal_jax.models.checkpoint import open_checkpoint
    from spinal_jax.models.export import export

    model = asked.model
    with contextlib.closing(open_checkpoint(model.source, model.revision)) as checkpoint:
        out = export(
            checkpoint,
            asked.out,
            dtype=model.dtype,
            ignore_keys=model.ignore_keys,
            shard_bytes=int(asked.shard_gb * 1e9),
            overwrite=asked.overwrite,
            bar=_stages({}),
        )
    print(_shown(out), flush=True)


def _verify(command: str, arguments: list[str]) -> None:
    _compose(command, arguments, _verify_job)


def _verify_job(settings: dict[str, Any], folder: Path) -> None:
    from spinal_jax import config

    asked = config.build(config.VerifyConfig, settings)
    from spinal_jax.verify import verify

    result = verify(asked, _stages({}))
    print(result, flush=True)
    if not result.passed:
        sys.exit(FAILED)


BAR = "{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt}, {rate_fmt}, {remaining} left"


def _stages(seconds: dict[str, float]) -> Bar:
    """Bars on standard error where that is a terminal; how long each stood goes into `seconds` under its name."""
    from tqdm import tqdm

    @contextlib.contextmanager
    def stage(what: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        begin = time.perf_counter()
        with tqdm(
            total=total,
            desc=what,
            unit=unit,
            unit_scale=total > 10_000,
            bar_format=BAR,
            ncols=shutil.get_terminal_size().columns - 4,  # room for ^C, so that it starts no new line
            leave=False,
            disable=None,  # unless a terminal
        ) as bar:

            def advance(amount: int) -> None:
                bar.update(amount)

            yield advance
        seconds[what] = round(seconds.get(what, 0.0) + time.perf_counter() - begin, 3)

    return stage


def _shown(path: Path) -> str:
    """The path as one would type it here."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


class Command(NamedTuple):
    """What `spinal NAME` runs, and what `spinal --help` says of it."""

    run: Callable[[str, list[str]], None]
    takes: str
    does: str


COMMANDS = {
    "audit": Command(_audit, "model.source=FOLDER|FILE.gguf|HUB_ID", "The depth trace of one checkpoint."),
    "compare": Command(
        _compare,
        "model.source=ALIGNED reference.source=BASE | model.trace=RUN reference.trace=RUN",
        "What alignment changed between two checkpoints, where, and how sure that is; exit code 3 short of `assert`.",
    ),
    "train": Command(
        _train,
        "objective=dpo|sft|lm model.source=CHECKPOINT preferences=hh preferences.path=FILE",
        "Trains a checkpoint and records its footprint on the way; a killed run goes on when the command is run again.",
    ),
    "convert": Command(
        _convert,
        "model.source=FOLDER|FILE.gguf|HUB_ID out=DIR",
        "A checkpoint as an Orbax folder, to be named by model.source=DIR; a killed one goes on when run again.",
    ),
    "export": Command(
        _export, "model.source=FOLDER|FILE.gguf|HUB_ID out=DIR", "A checkpoint as a Hugging Face folder of safetensors."
    ),
    "verify": Command(
        _verify,
        "model.source=FOLDER|FILE.gguf|HUB_ID",
        "Compares a checkpoint, layer by layer, with Hugging Face's PyTorch model; exit code 1 if they differ.",
    ),
    "report": Command(_report, "DIR", "Draws figures and page of a finished run again, from its saved files alone."),
}


def _usage() -> str:
    lines = ["usage: spinal COMMAND [setting=value ...]", ""]
    for name, command in COMMANDS.items():
        lines += [f"  spinal {name} {command.takes}", f"      {command.does}"]
    return "\n".join([*lines, "", "`spinal COMMAND --help` lists its settings, `spinal --version` says which spinal."])


# What Hydra takes beside settings.
HYDRA_OPTIONS = {"-m", "--multirun", "-c", "--cfg", "-p", "--package", "--resolve", "-i", "--info", "--hydra-help"}


def _compose(command: str, arguments: list[str], job: Job, optional: tuple[str, ...] = ()) -> None:
    """Runs `job(settings, output folder)` under Hydra, once or for each run of a sweep. What is `optional` and missing
    is null."""
    options = [argument.partition("=")[0] for argument in arguments if argument.startswith("-")]
    if "-h" in options or "--help" in options:
        print(pages.help_text(command, COMMANDS[command].takes, COMMANDS[command].does))
        return
    if unknown := next((option for option in options if option not in HYDRA_OPTIONS), None):
        raise UserError(f"there is no option {unknown}; settings are given as NAME=VALUE, see spinal {command} --help")
    # Hydra then lets exceptions through instead of printing them and exiting by itself.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    started = time.time()
    mistakes: list[str] = []
    folders: list[Path] = []

    def task(settings: DictConfig) -> None:
        run = HydraConfig.get()
        folder = Path(run.runtime.output_dir)
        folders.append(folder)
        is_new = folder.stat().st_ctime >= started  # Hydra has made it; otherwise it stays, empty or not
        overrides = " ".join(run.overrides.task) if run.mode == RunMode.MULTIRUN else ""
        if overrides:
            print(f"run {run.job.num}: {overrides}", file=sys.stderr)
        try:
            missing = sorted(OmegaConf.missing_keys(settings))
            for name in (name for name in missing if name in optional):
                OmegaConf.update(settings, name, None)
            if missing := [name for name in missing if name not in optional]:
                raise UserError(f"{missing[0]} is missing; give {missing[0]}=...")
            job(OmegaConf.to_container(settings, resolve=True), folder)  # type: ignore[arg-type]
        except (UserError, OmegaConfBaseException) as error:
            # Kept from Hydra, which would print its own words first. The rest of a sweep runs on.
            message = str(error) if isinstance(error, UserError) else _hydras_words(error, command)
            mistakes.append(f"{message} (run {run.job.num}: {overrides})" if overrides else message)
        finally:
            if is_new and not any(folder.iterdir()):
                folder.rmdir()

    groups = pages.groups_of(command)
    sys.argv = [f"spinal {command}", *(_in_hydras_words(argument, groups) for argument in arguments)]
    try:
        hydra.main(version_base="1.3", config_path=str(pages.conf_folder()), config_name=command)(task)()
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_hydras_words(error, command)) from error
    except OSError as error:
        if folders:
            raise
        raise UserError(f"the output folder cannot be made: {error}") from error
    for mistake in mistakes:
        _complain(mistake)
    if mistakes:
        sys.exit(MISTAKE)


def _hydras_words(error: Exception, command: str) -> str:
    """Hydra's own message in one sentence, with what would be right where that can be told."""
    from hydra.errors import MissingConfigException, OverrideParseException

    first, *others = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()]
    if isinstance(error, OverrideParseException):
        reason = others[0] if first.startswith("Error parsing override") else first
        return f"{error.override!r} cannot be read as NAME=VALUE ({reason}); {pages.QUOTING}"
    if isinstance(error, MissingConfigException) and error.options:
        return f"{first}; there are {', '.join(error.options)}"
    if wrong := re.search(r"Could not override '([^']+)'", first):
        names, group = pages.names_of(command), wrong[1].rpartition(".")[0]
        close = [name for name in difflib.get_close_matches(wrong[1], names, n=1) if name != group]
        beside = [name for name in names if group and name.rpartition(".")[0] == group]
        known = f"there are {', '.join(beside)}" if beside else f"spinal {command} --help lists the settings"
        hint = f"did you mean {close[0]}?" if close else known
        return f"Could not override {wrong[1]!r}: there is no such setting; {hint}"
    if first.startswith("Ambiguous value"):
        return f"{first}: add -m to sweep over the values, or quote them to have one text"
    where = next((line for line in others if line.startswith("full_key: ")), "")
    return f"{where.removeprefix('full_key: ')}: {first}" if where else first


def _in_hydras_words(argument: str, groups: dict[str, str]) -> str:
    """The argument, and where it chooses a file for a group that borrows another's, `reference=FILE`, with that
    other's name, `model@reference=FILE`: Hydra would take what was written for a text to put in the group's place."""
    name, equals, file = argument.partition("=")
    folder = groups.get(name, name)
    return argument if folder == name or not equals else f"{folder}@{name}={file}"


if __name__ == "__main__":
    main()
