"""The registry of commands. `@command(...)` registers a function NAME_command as `spinal NAME`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Job = Callable[[Any, Any], int]  # (record, run folder) -> exit code; without a record: (arguments, usage) -> exit code


@dataclass(frozen=True)
class Command:
    """A command of the command line.

    Attributes:
        name: as in `spinal NAME`.
        job: (record, run folder) -> exit code; for a command on folders (arguments, usage) -> exit code.
        record: class of the settings; None for a command on folders.
        takes: required arguments, for the usage line.
        does: description in one sentence.
        groups: groups of conf/ with their default file, or None. `model@reference` sets `reference` from the files of
            `model`.
        positional: settings of positional arguments, in order.
        keeps_run: whether it writes a run folder, by default in runs/NAME.
        makes_runs_by: with `experiment=FILE`, the command whose sweep makes the runs first; None otherwise.
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
        """The usage line."""
        return f"spinal {self.name} {self.takes}"

    @property
    def folders(self) -> dict[str, str]:
        """Group of settings -> folder of conf/ with its files."""
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
    """Registers a job. Arguments as in `Command`."""

    def enter(job: Job) -> Job:
        name = job.__name__.removesuffix("_command")
        COMMANDS[name] = Command(name, job, record, takes, does, groups or {}, positional, keeps_run, makes_runs_by)
        return job

    return enter
