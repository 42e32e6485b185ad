"""The command line: `spinal COMMAND [setting=value ...]`. The only module that imports Hydra."""

from __future__ import annotations

import os
import sys
from difflib import get_close_matches

from spinal_jax.jsontypes import ReadJson


def _end_at_once() -> NoReturn:
    os.write(2, b"spinal: interrupted; no work was in progress\n")
    os._exit(130)


try:
    from spinal_jax.cli.guard import guarded
except KeyboardInterrupt:  # before the guard was active
    _end_at_once()

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path
    from typing import Any, NoReturn

    from omegaconf import DictConfig

    from spinal_jax.cli.console import Outcome
    from spinal_jax.cli.registry import Command
    from spinal_jax.cli.sweep import Sweep


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 a check failed, 2 a usage error, 3 `assert` not met,
    70 an unforeseen error, 130 Ctrl-C, 143 SIGTERM."""
    try:
        guarded(lambda: _run(sys.argv[1:]))
    except KeyboardInterrupt:  # before or after that
        _end_at_once()


def _run(arguments: list[str]) -> int:
    """Runs the arguments and returns the exit code."""
    from spinal_jax.cli import help as pages
    from spinal_jax.cli.commands import COMMANDS
    from spinal_jax.cli.console import DONE, MISTAKE
    from spinal_jax.errors import UserError

    if not arguments:
        print(pages.usage(), file=sys.stderr)
        return MISTAKE
    name, *rest = arguments
    if name in ("-h", "--help"):
        print(pages.usage())
    elif name == "--version":
        from importlib.metadata import version

        print(f"spinal {version('spinal-jax')}")
    elif name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, 1)
        guess = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(COMMANDS)}"
        raise UserError(f"there is no command {name!r}{guess}")
    elif any(argument in ("-h", "--help") for argument in rest):
        print(pages.help_text(COMMANDS[name]))
    elif COMMANDS[name].record is None:
        if wrong := next((argument for argument in rest if argument.startswith("-")), None):
            raise UserError(f"{name} takes no option {wrong}: {COMMANDS[name].usage}")
        return COMMANDS[name].job(rest, COMMANDS[name].usage)
    elif COMMANDS[name].makes_runs_by is not None and any(argument.startswith("experiment=") for argument in rest):
        return _make_and_judge(COMMANDS[name], rest)
    else:
        return _compose(COMMANDS[name], rest)[0]
    return DONE


def _make_and_judge(command: Command, arguments: list[str]) -> int:
    """`spinal attribute experiment=FILE`: trains the runs in a sweep and, if all are complete, compares them. Returns
    the exit code."""
    from spinal_jax.cli.attribution_job import ARMS, arms_of, split_arguments
    from spinal_jax.cli.commands import COMMANDS
    from spinal_jax.cli.console import complain

    assert command.makes_runs_by is not None
    training, judging = split_arguments(arguments)
    given = {argument.partition("=")[0] for argument in judging}
    arms = set() if {"aligned", "control"} <= given else {*ARMS.values()}
    code, sweep = _compose(COMMANDS[command.makes_runs_by], training, arms)
    if sweep is None:
        return code  # the settings were printed only
    if code:
        complain("there is no attribution until all runs are complete; the same command passes over those that are")
        return code
    return _compose(command, arms_of(judging, sweep))[0]


def _compose(command: Command, arguments: list[str], arms: Collection[str] = ()) -> tuple[int, Path | None]:
    """Runs the command's job under Hydra, once or for each run of a sweep.

    Args:
        command: the command.
        arguments: its arguments.
        arms: files of conf/arm/, of which each run must have one; empty for no such check.

    Returns:
        The exit code, and the folder of the sweep if it is one.
    """
    from spinal_jax.cli import help as pages
    from spinal_jax.cli.arguments import hydras_arguments
    from spinal_jax.cli.console import DONE, MISTAKE, Stopped, complain, short_path, worst
    from spinal_jax.errors import UserError

    words = hydras_arguments(command, arguments)
    # Hydra then raises exceptions instead of printing them and exiting.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    import hydra
    from hydra.errors import HydraException

    sweeps: list[Sweep] = []
    ended: list[Outcome] = []
    begun: list[Path] = []  # folders of the composed runs

    def begin(sweep: DictConfig) -> None:
        from pathlib import Path

        from spinal_jax.cli.sweep import Sweep

        sweeps.append(Sweep(Path(sweep.hydra.sweep.dir), _runs_of(sweep)))

    _teach_omegaconf()
    _store(command)
    sys.argv = [f"spinal {command.name}", *words]
    _BEGIN.append(begin)
    try:
        task = _task(command, sweeps, begun, ended, arms)
        hydra.main(version_base="1.3", config_path=str(pages.conf_folder()), config_name=command.name)(task)()
        ended += sweeps[0].outcomes() if sweeps else []
    except UserError:
        raise
    except Exception as error:
        if begun:
            raise
        composing = isinstance(error, HydraException) or not isinstance(error, OSError)
        raise UserError(
            _hydras_words(error, command) if composing else f"the output folder cannot be made: {error}"
        ) from error
    except SystemExit as left:  # Hydra has printed the reason: -p names a group that is null
        return (MISTAKE if left.code else DONE), None
    except Stopped as stopped:
        if sweeps:
            stopped.kept = (
                f"the same command with hydra.sweep.dir={short_path(sweeps[0].folder)} passes over complete runs"
            )
        raise
    finally:
        _BEGIN.pop()
        if sweeps:
            sweeps[0].close()
    for outcome in ended:
        if outcome.message:
            complain(outcome.message)
    return worst(ended), sweeps[0].folder if sweeps else None


def _task(
    command: Command, sweeps: list[Sweep], begun: list[Path], ended: list[Outcome], arms: Collection[str]
) -> Callable[[DictConfig], None]:
    """The task function of Hydra: runs the job of the command on its record, in the folder of the run."""
    import contextlib
    import time
    from pathlib import Path

    from hydra.core.hydra_config import HydraConfig

    from spinal_jax.cli.console import Outcome, check_stopped
    from spinal_jax.cli.guard import describe_error
    from spinal_jax.errors import UserError

    started = time.time()

    def task(settings: DictConfig) -> None:
        run = HydraConfig.get()
        folder = Path(run.runtime.output_dir)
        begun.append(folder)

        def attempt() -> int:
            check_stopped()
            if arms and (arm := run.runtime.choices.get("arm")) not in arms:
                raise UserError(
                    f"the run has {f'arm {arm}' if arm else 'no arm'}, so that it is known neither as aligned nor as "
                    f"control; take an experiment of the arms {', '.join(sorted(arms))}, or give aligned= and control="
                )
            return _attempt(command, settings, folder)

        is_new = folder.stat().st_ctime >= started  # created by Hydra; other folders are kept
        try:
            if sweeps:
                told = list(run.overrides.task)
                sweeps[0].run(run.job.num, told, folder, attempt)
            else:
                ended.append(Outcome(0, attempt()))
        except Exception as error:
            ended.append(Outcome(0, *describe_error(error)))  # not raised, because Hydra would print it too
        finally:
            with contextlib.suppress(FileNotFoundError):  # another process of the run has removed it
                if is_new and not any(folder.iterdir()):
                    folder.rmdir()

    return task


def _attempt(command: Command, settings: DictConfig, folder: Path) -> int:
    """Runs the job on these settings and returns the exit code."""
    import contextlib

    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from spinal_jax.config.record import build
    from spinal_jax.errors import UserError
    from spinal_jax.runs.folder import held

    _teach_omegaconf()  # also in processes that a launcher has started
    assert command.record is not None
    try:
        if missing := sorted(OmegaConf.missing_keys(settings)):
            raise UserError(f"{missing[0]} is missing; give {missing[0]}=...")
        values = OmegaConf.to_container(settings, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(_hydras_words(error, command)) from error
    assert isinstance(values, dict)
    asked = build(command.record, {str(name): value for name, value in values.items()})
    # If several processes share a run, process 0 locks the folder later.
    alone = getattr(getattr(asked, "parallel", None), "coordinator", None) is None
    with held(folder) if command.keeps_run and alone else contextlib.nullcontext():
        return command.job(asked, folder)


def _store(command: Command) -> None:
    """Registers the configuration of the command with Hydra: defaults of the record, then group files."""
    from hydra.core.config_store import ConfigStore

    from spinal_jax.config.record import defaults_of, optional_parts

    assert command.record is not None
    date = "${now:%Y-%m-%d_%H-%M-%S}"
    groups = [{f"/{group}" if "@" in group else group: file} for group, file in command.groups.items()]
    logging = [{f"override hydra/{which}": "none"} for which in ("job_logging", "hydra_logging")]
    hydra = {
        "output_subdir": None,  # the resolved settings are in manifest.json
        "run": {"dir": f"runs/{command.name}/{date}" if command.keeps_run else "."},
        "sweep": {"dir": f"multirun/{command.name}/{date}", "subdir": "${hydra.job.num}"},
        "callbacks": {"spinal": {"_target_": f"{__name__}._on_sweep"}},
    }
    store = ConfigStore.instance()
    node = {"defaults": ["_self_", *groups, *logging], **defaults_of(command.record), "hydra": hydra}
    store.store(name=command.name, node=node)
    for part, record in optional_parts(command.record).items():
        store.store(group="settings", name=part, node=defaults_of(record))


def _teach_omegaconf() -> None:
    """Registers the resolver `${by:KEY,{a: 1, b: 2, else: 3}}`, which sets one setting by another."""
    from omegaconf import OmegaConf

    def by(key: str, values: ReadJson) -> Any:
        return values[key] if key in values else values["else"]

    OmegaConf.register_new_resolver("by", by, replace=True)


_BEGIN: list[Callable[[Any], None]] = []  # callbacks for the start of a sweep


def _on_sweep() -> Any:
    """The Hydra callback of a sweep, in the launching process."""
    from hydra.experimental.callback import Callback

    class OnSweep(Callback):
        def on_multirun_start(self, config: Any, **_: Any) -> None:
            _BEGIN[-1](config)

        def __reduce__(self) -> Any:  # pickled for worker processes, which start no sweep
            return _on_sweep, ()

    return OnSweep()


def _runs_of(sweep: DictConfig) -> list[list[str]] | None:
    """The settings of each run of Hydra's basic sweeper; None for another sweeper."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    if not sweep.hydra.sweeper._target_.endswith("BasicSweeper"):
        return None
    texts = [f"{name}={values}" for name, values in (sweep.hydra.sweeper.params or {}).items()]
    parser = OverridesParser.create(GlobalHydra.instance().config_loader())
    given = OmegaConf.to_container(sweep.hydra.overrides.task, resolve=False)  # ${hydra:...} differs between runs
    assert isinstance(given, list)
    (runs,) = BasicSweeper.split_arguments(parser.parse_overrides([*texts, *given]), None)
    return runs


def _hydras_words(error: Exception, command: Command) -> str:
    """The message of Hydra in one sentence, with a remedy if it is known."""
    import difflib
    import re
    from pathlib import Path

    from hydra.errors import MissingConfigException, OverrideParseException
    from yaml import MarkedYAMLError

    from spinal_jax.cli import help as pages
    from spinal_jax.cli.console import short_path

    if isinstance(error, MarkedYAMLError):
        mark = error.problem_mark
        at = f"{short_path(Path(mark.name))}, line {mark.line + 1}: " if mark else ""
        return f"{at}this is no YAML ({error.problem})"
    lines = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()]
    first, *others = lines or [type(error).__name__]
    if isinstance(error, OverrideParseException):
        reason = others[0] if first.startswith("Error parsing override") and others else first
        return f"{error.override!r} cannot be read as NAME=VALUE ({reason}); {pages.QUOTING}"
    if isinstance(error, MissingConfigException) and error.options:
        return f"{first}; there are {pages.some_of(error.options, str(error.missing_cfg_file))}"
    if wrong := re.search(r"Could not override '([^']+)'", first):
        names, group = pages.names_of(command), wrong[1].rpartition(".")[0]
        close = [name for name in difflib.get_close_matches(wrong[1], names, n=1) if name != group]
        beside = [name for name in names if group and name.rpartition(".")[0] == group]
        known = f"there are {', '.join(beside)}" if beside else f"spinal {command.name} --help lists the settings"
        hint = f"did you mean {close[0]}?" if close else known
        return f"Could not override {wrong[1]!r}: there is no such setting; {hint}"
    if first.startswith("Ambiguous value"):
        return f"{first}: add -m to sweep over the values, or quote them to have one text"
    where = next((line for line in others if line.startswith("full_key: ")), "")
    return f"{where.removeprefix('full_key: ')}: {first}" if where else f"the settings cannot be composed: {first}"


if __name__ == "__main__":
    main()
