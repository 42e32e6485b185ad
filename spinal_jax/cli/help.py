"""What `spinal COMMAND --help` says, made from the YAML files of conf/ and the comments in them."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

QUOTING = "a value that holds , = ( ) [ ] { } : or quotes needs quotes of its own: 'NAME=\"VALUE\"'"
HYDRA_HELP = """
  -m NAME=A,B,C         one run for each value, in folders under multirun/{command}/DATE_TIME
  hydra.sweep.dir=DIR   instead of that
  --cfg job             prints the settings and runs nothing
  --hydra-help          what else Hydra can do

{quoting}"""


def conf_folder() -> Path:
    """Where the YAML files lie: inside an installed wheel, beside the package in a checkout."""
    package = Path(__file__).parent.parent
    return next(path for path in (package / "conf", package.parent / "conf") if (path / "audit.yaml").exists())


class Setting(NamedTuple):
    """One line of a YAML file of conf/."""

    name: str  # dotted
    default: str
    meaning: str


_LINE = re.compile(r"( *)(\w+):(?: +(.+?))??(?: +# (.+))?")
_GROUP = re.compile(r" +- /?(\w+)(?:@([\w.]+))?: (\w+)")


def groups_of(command: str) -> dict[str, str]:
    """What is set from files of conf/, such as `reference` -> the folder of those files, such as `model`."""
    lines = (conf_folder() / f"{command}.yaml").read_text(encoding="utf-8").splitlines()
    return {found[2] or found[1]: found[1] for line in lines if (found := _GROUP.fullmatch(line))}


def settings_of(file: Path, prefix: str = "") -> Iterator[Setting]:
    """The settings of a YAML file of conf/ and of the groups it begins with, with the comments beside them."""
    above: list[tuple[int, str]] = [(-1, prefix)]  # indent and dotted name of the mappings around a line
    for line in file.read_text(encoding="utf-8").splitlines():
        if group := _GROUP.fullmatch(line):
            if group[3] == "null":  # nothing, unless it is chosen
                continue
            yield from settings_of(conf_folder() / group[1] / f"{group[3]}.yaml", f"{group[2] or group[1]}.")
        elif found := _LINE.fullmatch(line):
            indent, key = len(found[1]), found[2]
            if indent == 0 and key == "hydra":
                return
            while above[-1][0] >= indent:
                above.pop()
            if found[3] is None:
                above.append((indent, f"{above[-1][1]}{key}."))
            else:
                yield Setting(f"{above[-1][1]}{key}", found[3], found[4] or "")


def _listed(name: str, options: list[str], width: int) -> list[str]:
    """`  name=this|that`, in as many lines as it takes."""
    text = f"{name}{'| '.join(options)}"
    lines = textwrap.wrap(text, width - 2, subsequent_indent=" " * len(name), break_on_hyphens=False)
    return [f"  {line.replace('| ', '|')}" for line in lines]


def names_of(command: str) -> list[str]:
    """Every name that can be overridden: settings and the groups they lie in."""
    names = [setting.name for setting in settings_of(conf_folder() / f"{command}.yaml")]
    return [*names, *{name.rpartition(".")[0] for name in names if "." in name}]


def help_text(command: str, takes: str, does: str) -> str:
    """What `spinal COMMAND --help` prints."""
    # What a file says itself overrides what its groups say.
    settings = [*{setting.name: setting for setting in settings_of(conf_folder() / f"{command}.yaml")}.values()]
    name, default = (max(len(setting[column]) for setting in settings) for column in (0, 1))
    indent = name + default + 6
    width = max(60, min(shutil.get_terminal_size((120, 24)).columns, 120) - indent)
    lines = [f"usage: spinal {command} {takes} [setting=value ...]", "", does, ""]
    lines.append("settings and their defaults (???: to be given)")
    for setting in settings:
        meaning = textwrap.wrap(setting.meaning, width) or [""]
        lines.append(f"  {setting.name:<{name}}  {setting.default:<{default}}  {meaning[0]}".rstrip())
        lines += [" " * indent + line for line in meaning[1:]]
    groups: dict[str, list[str]] = {}
    for group, folder in sorted(groups_of(command).items()):
        groups.setdefault(folder, []).append(group)
    options = {folder: sorted(file.stem for file in (conf_folder() / folder).glob("*.yaml")) for folder in groups}
    if any(len(files) > 1 for files in options.values()):
        lines += ["", "groups of settings"]
    for folder, names in groups.items():
        if len(options[folder]) > 1:
            lines += _listed(" or ".join(f"{name}=" for name in names), options[folder], width + indent)
    lines += ["", "where it writes, and sweeps"]
    if f"dir: runs/{command}/" in (conf_folder() / f"{command}.yaml").read_text(encoding="utf-8"):
        lines.append(f"  hydra.run.dir=DIR     the run folder; runs/{command}/DATE_TIME unless said")
    rest = HYDRA_HELP.format(command=command, quoting=QUOTING[0].upper() + QUOTING[1:])
    return "\n".join(lines) + rest
