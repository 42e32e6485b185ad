"""The registry of commands. A command is one entry: `@command(...)` over its job, `NAME_command`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Job = Callable[[Any, Any], int]  # (record, run folder) -> exit code; without a record: (arguments, usage) -> exit code


@dataclass(frozen=True)
class Command:
    """What `spinal NAME` runs, and what `spinal --help` says of it.

    Attributes:
        name: of the command.
        job: (record, run folder) -> exit code; of a command that takes folders: (arguments, usage) -> exit code.
        record: the class of its settings; None for a command that takes folders.
        takes: what must be given, as the usage line shows it.
        does: one sentence.
        groups: folders of conf/ that set a part of the settings, each with the file chosen by default, or None.
            `model@reference` fills `reference` from the files of `model`.
        positional: the settings that arguments without a name set, in order.
        keeps_run: whether it writes a run folder, under runs/NAME unless told.
        makes_runs_by: the command that first makes its runs, a sweep, where `experiment=FILE` is given; None: nothing.
    """

    name: str
    job: Job
    record: type | None
    takes: str
    does: str
    groups: Mapping[str, str | None] = field(default_factory=dict)
    positional: tuple[str, ...] = ()
    keeps_run: bool = True
    makes_runs_by: str | None = None

    @property
    def usage(self) -> str:
        """`spinal NAME` with what it takes."""
        return f"spinal {self.name} {self.takes}"

    @property
    def folders(self) -> dict[str, str]:
        """The part of the settings that each group sets -> the folder of conf/ that holds the group's files."""
        parts = {group: group.partition("@") for group in self.groups}
        return {other or folder: folder for folder, _, other in parts.values()}


COMMANDS: dict[str, Command] = {}


def command(
    takes: str,
    does: str,
    record: type | None = None,
    groups: Mapping[str, str | None] | None = None,
    positional: tuple[str, ...] = (),
    keeps_run: bool = True,
    makes_runs_by: str | None = None,
) -> Callable[[Job], Job]:
    """Enters the job that follows into the registry. Arguments as the attributes of `Command`."""

    def enter(job: Job) -> Job:
        name = job.__name__.removesuffix("_command")
        COMMANDS[name] = Command(name, job, record, takes, does, groups or {}, positional, keeps_run, makes_runs_by)
        return job

    return enter
