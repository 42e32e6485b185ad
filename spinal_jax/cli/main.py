"""The command line: `spinal COMMAND [setting=value ...]`. The only module that knows Hydra."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from spinal_jax.cli import help as pages
from spinal_jax.cli import jobs
from spinal_jax.cli.console import MISTAKE, Outcome, Stopped, complain, shown, stop, worst
from spinal_jax.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from spinal_jax.cli.sweep import Sweep

Job = Callable[[dict[str, Any], Path], int]  # (settings, run folder) -> exit code


def main() -> None:
    """Entry point. Exit codes: 0 done, 2 a mistake in what was asked, 3 evidence short of `assert`, 130 Ctrl-C, 143
    SIGTERM, 1 anything else."""
    signals = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in signals}
    try:
        _run(sys.argv[1:])
    except UserError as error:
        complain(str(error))
        sys.exit(MISTAKE)
    except Stopped as stopped:
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr)  # the terminal's own ^C
        complain(f"{stopped}; {stopped.kept}")
        sys.stdout.flush()
        os._exit(128 + stopped.number)  # all is cleared up, and JAX may crash when Python ends with work in flight
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
        if COMMANDS[name].takes_folders:
            _take(name, arguments)
        else:
            _compose(name, arguments, COMMANDS[name].job, COMMANDS[name].optional)


def _take(command: str, arguments: list[str]) -> None:
    """Runs a command that takes folders, not settings."""
    about = COMMANDS[command]
    usage = f"spinal {command} {about.takes}"
    if arguments in (["-h"], ["--help"]):
        print(f"usage: {usage}\n\n{about.does}")
        return
    if wrong := next((argument for argument in arguments if argument.startswith("-")), None):
        raise UserError(f"{command} takes no option {wrong}: {usage}")
    if code := about.job(arguments, usage):
        sys.exit(code)


class Command(NamedTuple):
    """What `spinal NAME` runs, and what `spinal --help` says of it."""

    job: Callable[[Any, Any], int]  # a Job, or with folders in place of settings: (arguments, usage) -> exit code
    takes: str
    does: str
    optional: tuple[str, ...] = ()  # settings that are null where nothing is given
    takes_folders: bool = False


COMMANDS = {
    "audit": Command(jobs.audit, "model.source=FOLDER|FILE.gguf|HUB_ID", "The depth trace of one checkpoint."),
    "compare": Command(
        jobs.compare,
        "model.source=ALIGNED reference.source=BASE | model.trace=RUN reference.trace=RUN",
        "What alignment changed between two checkpoints, where, and how sure that is; exit code 3 short of `assert`.",
        ("model.source", "reference.source"),  # a checkpoint that is given by its trace has no source
    ),
    "train": Command(
        jobs.train,
        "objective=dpo|sft|lm model.source=CHECKPOINT preferences=hh preferences.path=FILE",
        "Trains a checkpoint and records its footprint on the way; a killed run goes on when the command is run again.",
    ),
    "convert": Command(
        jobs.convert,
        "model.source=FOLDER|FILE.gguf|HUB_ID out=DIR",
        "A checkpoint as an Orbax folder, to be named by model.source=DIR; a killed one goes on when run again.",
    ),
    "export": Command(
        jobs.export,
        "model.source=FOLDER|FILE.gguf|HUB_ID out=DIR",
        "A checkpoint as a Hugging Face folder of safetensors.",
    ),
    "verify": Command(
        jobs.verify,
        "model.source=FOLDER|FILE.gguf|HUB_ID",
        "Compares a checkpoint, layer by layer, with Hugging Face's PyTorch model; exit code 1 if they differ.",
    ),
    "plan": Command(
        jobs.plan,
        "model=NAME devices=N device=v5e",
        "Memory, work and time of an audit beforehand, and whether it fits: no weights, no accelerator.",
    ),
    "report": Command(
        jobs.report,
        "DIR",
        "Draws figures and page of a finished run again, from its saved files alone.",
        takes_folders=True,
    ),
    "collect": Command(
        jobs.collect,
        "DIR... [out=DIR]",
        "Joins all runs below folders into one table (runs.csv, runs.parquet) and one page (index.html).",
        takes_folders=True,
    ),
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
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import MarkedYAMLError

    started = time.time()
    sweeps: list[Sweep] = []
    ended: list[Outcome] = []
    folders: list[Path] = []

    def begin(sweep: DictConfig) -> None:
        from spinal_jax.cli.sweep import Sweep

        sweeps.append(Sweep(Path(sweep.hydra.sweep.dir), _runs_of(sweep)))

    def attempt(settings: DictConfig, folder: Path) -> int:
        _teach_omegaconf()  # also where a launcher has started another process
        try:
            missing = sorted(OmegaConf.missing_keys(settings))
            for name in (name for name in missing if name in optional):
                OmegaConf.update(settings, name, None)
            if missing := [name for name in missing if name not in optional]:
                raise UserError(f"{missing[0]} is missing; give {missing[0]}=...")
            return job(OmegaConf.to_container(settings, resolve=True), folder)  # type: ignore[arg-type]
        except OmegaConfBaseException as error:
            raise UserError(_hydras_words(error, command)) from error

    def task(settings: DictConfig) -> None:
        run = HydraConfig.get()
        folder = Path(run.runtime.output_dir)
        folders.append(folder)
        is_new = folder.stat().st_ctime >= started  # Hydra has made it; otherwise it stays, empty or not
        try:
            if sweeps:
                sweeps[0].run(run.job.num, list(run.overrides.task), folder, lambda: attempt(settings, folder))
            else:
                ended.append(Outcome(0, attempt(settings, folder)))
        except UserError as error:
            ended.append(Outcome(0, MISTAKE, str(error)))  # kept from Hydra, which would print its own words first
        finally:
            with contextlib.suppress(FileNotFoundError):  # another process that shares the run has been here
                if is_new and not any(folder.iterdir()):
                    folder.rmdir()

    _teach_omegaconf()
    groups = pages.groups_of(command)
    words = [_in_hydras_words(argument, groups) for argument in arguments]
    settings_end = max((at for at, word in enumerate(words, 1) if "=" in word and word[0] != "-"), default=len(words))
    words.insert(settings_end, f"+hydra.callbacks.spinal._target_={__name__}._on_sweep")  # argparse wants them together
    sys.argv = [f"spinal {command}", *words]
    _BEGIN.append(begin)
    try:
        hydra.main(version_base="1.3", config_path=str(pages.conf_folder()), config_name=command)(task)()
        ended += sweeps[0].outcomes() if sweeps else []
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_hydras_words(error, command)) from error
    except MarkedYAMLError as error:
        mark = error.problem_mark
        at = f"{shown(Path(mark.name))}, line {mark.line + 1}: " if mark else ""
        raise UserError(f"{at}this is no YAML ({error.problem})") from error
    except OSError as error:
        if folders:
            raise
        raise UserError(f"the output folder cannot be made: {error}") from error
    except Stopped as stopped:
        if sweeps:
            stopped.kept = f"the same command with hydra.sweep.dir={shown(sweeps[0].folder)} passes over complete runs"
        raise
    finally:
        _BEGIN.pop()
        if sweeps:
            sweeps[0].close()
    for outcome in ended:
        if outcome.message:
            complain(outcome.message)
    if code := worst(ended):
        sys.exit(code)


def _teach_omegaconf() -> None:
    """`${by:KEY,{a: 1, b: 2, else: 3}}` in a configuration: one setting by another, as a learning rate by the size."""
    from omegaconf import OmegaConf

    def by(key: str, values: Mapping[str, Any]) -> Any:
        return values[key] if key in values else values["else"]

    OmegaConf.register_new_resolver("by", by, replace=True)


_BEGIN: list[Callable[[Any], None]] = []  # what is to be done at the start of a sweep, by whoever waits for one


def _on_sweep() -> Any:
    """What Hydra calls at the turns of a sweep, in the process that launches its runs."""
    from hydra.experimental.callback import Callback

    class OnSweep(Callback):
        def on_multirun_start(self, config: Any, **_: Any) -> None:
            _BEGIN[-1](config)

        def __reduce__(self) -> Any:  # it goes along to worker processes, which begin no sweep
            return _on_sweep, ()

    return OnSweep()


def _runs_of(sweep: DictConfig) -> list[list[str]] | None:
    """The settings of each run that Hydra's own sweeper will make of its arguments; None for another sweeper."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    if not sweep.hydra.sweeper._target_.endswith("BasicSweeper"):
        return None
    texts = [f"{name}={values}" for name, values in (sweep.hydra.sweeper.params or {}).items()]
    parser = OverridesParser.create(GlobalHydra.instance().config_loader())
    given = OmegaConf.to_container(sweep.hydra.overrides.task, resolve=False)  # ${hydra:...} is each run's own
    assert isinstance(given, list)
    (runs,) = BasicSweeper.split_arguments(parser.parse_overrides([*texts, *given]), None)
    return runs


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
