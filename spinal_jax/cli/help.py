"""Help texts, generated from the registry and the settings records."""

from __future__ import annotations

import difflib
import json
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from spinal_jax.cli.registry import COMMANDS, Command
from spinal_jax.config.record import REQUIRED, Setting, settings_of

MANY = 20  # names in a message
QUOTING = "a value that holds , = ( ) [ ] { } : or quotes needs quotes of its own: 'NAME=\"VALUE\"'"
HYDRA_HELP = """
  -m NAME=A,B,C         one run for each value, in folders under multirun/{command}/DATE_TIME
  hydra.sweep.dir=DIR   instead of that
  --cfg job             prints the settings and runs nothing
  --hydra-help          what else Hydra can do

{quoting}"""


def conf_folder() -> Path:
    """The folder of the YAML files: in the package of a wheel, next to it in a checkout."""
    package = Path(__file__).parent.parent
    return next(path for path in (package / "conf", package.parent / "conf") if (path / "model" / "any.yaml").exists())


def group_files(group: str) -> list[str]:
    """Names of the files of a group in conf/."""
    return sorted(file.stem for file in (conf_folder() / group).glob("*.yaml"))


def some_of(names: Sequence[str], asked: str) -> str:
    """The names, or of many the nearest to what was asked for."""
    if len(names) <= MANY:
        return ", ".join(names)
    word = asked.rpartition("/")[2]
    near = difflib.get_close_matches(word, names, n=5, cutoff=0.5) or [names[0], names[-1]]
    return f"{', '.join(near)} and {len(names) - len(near)} others, which --help lists"


def settings(command: Command) -> list[Setting]:
    """Every setting of a command."""
    return [] if command.record is None else list(settings_of(command.record))


def names_of(command: Command) -> list[str]:
    """All names that can be overridden: settings and groups of settings."""
    names = [setting.name for setting in settings(command)]
    parts = {name.rpartition(".")[0] for name in names if "." in name}
    return [*names, *parts, *(part for part in command.folders if part not in parts)]


def _wrap(text: str, first: str, rest: str) -> list[str]:
    """Lines of at most 118 characters, with an indent of the first and of the rest; words stay whole."""
    return textwrap.wrap(
        text, 118, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False, break_long_words=False
    )


def usage() -> str:
    """The text of `spinal --help`."""
    lines = ["usage: spinal COMMAND [setting=value ...]", ""]
    for command in COMMANDS.values():
        lines += _wrap(command.usage, "  ", " " * 9)
        lines += _wrap(command.does, " " * 6, " " * 6)
    return "\n".join([*lines, "", "`spinal COMMAND --help` lists its settings, `spinal --version` says which spinal."])


def help_text(command: Command) -> str:
    """The text of `spinal COMMAND --help`."""
    if command.record is None:
        return f"usage: {command.usage}\n\n{command.does}"
    first = f"usage: {command.usage} [setting=value ...]"
    lines = _wrap(first, "", " " * 7)
    lines += ["", *textwrap.wrap(command.does, 118), ""]
    lines.append(f"settings and their defaults ({REQUIRED}: to be given)")
    rows = list(_rows(command))
    name = max(len(row[0]) for row in rows)
    default = max(len(row[1]) for row in rows)
    indent = name + default + 6
    width = max(60, min(shutil.get_terminal_size((120, 24)).columns, 120) - indent)
    for row in rows:
        meaning = textwrap.wrap(row[2], width) or [""]
        lines.append(f"  {row[0]:<{name}}  {row[1]:<{default}}  {meaning[0]}".rstrip())
        lines += [" " * indent + line for line in meaning[1:]]
    lines += list(_groups(command, width + indent))
    lines += ["", "where it writes, and sweeps"]
    if command.keeps_run:
        lines.append(f"  hydra.run.dir=DIR     the run folder; runs/{command.name}/DATE_TIME unless said")
    return "\n".join(lines) + HYDRA_HELP.format(command=command.name, quoting=QUOTING[0].upper() + QUOTING[1:])


def default_text(value: object) -> str:
    """A default value as command-line text."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _rows(command: Command) -> Iterator[tuple[str, str, str]]:
    """Name, default and meaning of every setting, with a heading row for groups that are null by default."""
    part = ""
    for setting in settings(command):
        if setting.optional and (top := setting.name.partition(".")[0]) != part:
            part = top
            yield part, "null", f"nothing; with {part}={'|'.join(group_files(part))}:"
        text = setting.help
        if setting.choices:
            text += f": {', '.join(map(str, setting.choices[:-1]))} or {setting.choices[-1]}"
        yield setting.name, default_text(setting.default), text + (f" [{setting.unit}]" if setting.unit else "")


def _groups(command: Command, width: int) -> Iterator[str]:
    """The files of groups with more than one."""
    parts: dict[str, list[str]] = {}
    for part, folder in sorted(command.folders.items()):
        parts.setdefault(folder, []).append(part)
    choices = {folder: group_files(folder) for folder in parts}
    if any(len(files) > 1 for files in choices.values()):
        yield from ("", "groups of settings")
    for folder, names in parts.items():
        if len(choices[folder]) > 1:
            name = " or ".join(f"{part}=" for part in names)
            text = f"{name}{'| '.join(choices[folder])}"
            lines = textwrap.wrap(text, width - 2, subsequent_indent=" " * len(name), break_on_hyphens=False)
            yield from (f"  {line.replace('| ', '|')}" for line in lines)
