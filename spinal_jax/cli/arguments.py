"""Translates the arguments of a command into arguments of Hydra, and checks them."""

from __future__ import annotations

import os
import re
from pathlib import Path

from spinal_jax.cli import help as pages
from spinal_jax.cli.registry import Command
from spinal_jax.errors import UserError

# Options of Hydra with their allowed values; the first is the default.
INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
OPTIONS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("-m", "--multirun", "--resolve", "--hydra-help"), ()),
    **dict.fromkeys(("-c", "--cfg"), ("job", "hydra", "all")),
    **dict.fromkeys(("-i", "--info"), INFO),
}
PACKAGE = ("-p", "--package")
# What Hydra reads as a number, a truth value or nothing, so that it is no name of a file.
NO_FILE = re.compile(r"([-+]?(\d[\d_]*\.?\d*(e[-+]?\d+)?|inf|nan)|true|false|null|''|\"\"|)", re.IGNORECASE)


def hydras_arguments(command: Command, arguments: list[str]) -> list[str]:
    """The arguments for Hydra. Raises UserError for an unknown option or a malformed setting."""
    settings, options, sources = [], [], []
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        if argument.startswith("-"):
            options += _option(command, argument, waiting)
        elif "=" in argument or argument.startswith("~"):
            settings.append(_group(command, argument))
        else:
            sources.append(argument)
    if "--resolve" in options and not {"-c", "--cfg"} & {*options}:
        raise UserError("--resolve goes with --cfg job, which prints the settings; give both or neither")
    return [*_sources(command, sources, settings), *settings, *options]


def _option(command: Command, argument: str, waiting: list[str]) -> list[str]:
    """An option with its value, from `=` or from the next argument."""
    name, given, value = argument.partition("=")
    if name in PACKAGE:
        if not given and not waiting:
            raise UserError(f"{name} takes the name of a package of settings, such as {name} model")
        package = value if given else waiting.pop(0)
        if package not in (known := _packages(command)):
            raise UserError(f"{name} is {package!r}; it takes {', '.join(known)}")
        return [name, package]
    if name not in OPTIONS:
        raise UserError(
            f"there is no option {name}; settings are given as NAME=VALUE, see spinal {command.name} --help"
        )
    choices = OPTIONS[name]
    if not choices:
        if given:
            raise UserError(f"{name} takes no value, but {argument!r} gives one")
        return [name]
    if not given:
        follows = bool(waiting) and "=" not in waiting[0] and not waiting[0].startswith("-")
        value = waiting.pop(0) if follows and (waiting[0] in choices or name in ("-c", "--cfg")) else choices[0]
    if value not in choices:
        raise UserError(f"{name} is {value!r}; it takes {', '.join(choices)}")
    return [name, value]


def _packages(command: Command) -> list[str]:
    """Names of groups of settings, such as `metrics` and `metrics.transport`."""
    parts = [name.split(".")[:-1] for name in pages.names_of(command)]
    return ["_global_", *dict.fromkeys(".".join(part[:n]) for part in parts for n in range(1, len(part) + 1))]


def _group(command: Command, argument: str) -> str:
    """The argument; a choice `reference=FILE` for a group with the files of another becomes `model@reference=FILE`,
    because Hydra would treat it as a value."""
    name, _, file = argument.partition("=")
    folder = command.folders.get(name.rpartition("@")[2], name)
    groups = {group: choice for group, choice in command.groups.items() if group in (name, f"{folder}@{name}")}
    needed = any(choice is not None for choice in groups.values())
    files = [each.strip() for each in file.strip().removeprefix("[").removesuffix("]").split(",")]
    if groups and any(NO_FILE.fullmatch(each) and (needed or each != "null") for each in files):
        known = pages.some_of(pages.group_files(folder), file)
        raise UserError(f"{name} is {file!r}; it takes {known}, or settings as {name}.NAME=")
    if name == "hydra":
        raise UserError(
            f"{argument!r} would replace all of Hydra's own settings; set one of them, as hydra.run.dir=DIR"
        )
    return argument if folder == name or name not in command.folders else f"{folder}@{name}={file}"


def _sources(command: Command, sources: list[str], settings: list[str]) -> list[str]:
    """Names the positional arguments."""
    names = set(pages.names_of(command))
    given = {setting.partition("=")[0].replace(".trace", ".source") for setting in settings}
    free = [name for name in command.positional if name not in given]
    if wrong := next((word for word in sources if word in names and not os.path.exists(word)), None):
        raise UserError(f"{wrong!r} is the name of a setting; settings are given as NAME=VALUE")
    if len(sources) > len(free):
        takes = f"it takes {', '.join(free)} in this way" if free else "settings are given as NAME=VALUE"
        raise UserError(f"{command.name} does not know what {sources[len(free)]!r} is; {takes}")
    return [f"{_kind(name, source, names)}={quoted(source)}" for name, source in zip(free, sources, strict=False)]


def _kind(name: str, source: str, names: set[str]) -> str:
    """The setting of a positional source: `model.trace` for a run folder if the command has it."""
    trace = f"{name.removesuffix('.source')}.trace"
    is_run = any(os.path.isfile(Path(source) / file) for file in ("trace.json", "onset.json", "comparison.json"))
    return trace if trace in names and is_run else name


def quoted(text: str) -> str:
    """The text, quoted as a string value for Hydra."""
    body = re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), text)
    return "'" + body.replace("${", "\\${") + "'"
