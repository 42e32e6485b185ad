"""Pages that are made from the code: every setting, every column of a result, and the example page."""

from __future__ import annotations

import json
from pathlib import Path

from spinal_jax.cli.commands import COMMANDS
from spinal_jax.comparison.record import load_comparison
from spinal_jax.config.record import REQUIRED, settings_of
from spinal_jax.metrics.columns import TRACE, Column
from spinal_jax.report import render_comparison_report


def write_reference(folder: Path) -> None:
    """Writes settings.md and columns.md into the folder, where they differ from what is there."""
    for name, text in (("settings.md", settings()), ("columns.md", columns())):
        page = folder / name
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")


def write_example(numbers: Path, folder: Path) -> None:
    """Writes comparison.html into the folder: the page of the comparison whose saved numbers are in `numbers`."""
    others = [load_comparison(place) for place in sorted((numbers / "others").iterdir())]
    folder.mkdir(exist_ok=True)
    page = render_comparison_report(load_comparison(numbers), others)
    (folder / "comparison.html").write_text(page, encoding="utf-8")


def settings() -> str:
    """Every setting of every command with default, unit and help, from the records that both API and commands build."""
    lines = ["# Settings", "", "Made from the settings records; `spinal COMMAND --help` prints the same.", ""]
    for command in COMMANDS.values():
        if command.record is None:
            continue
        lines += [f"## spinal {command.name}", "", command.does, "", "```", command.usage, "```", ""]
        lines += ["| setting | default | unit | |", "| --- | --- | --- | --- |"]
        for setting in settings_of(command.record):
            default = "required" if setting.default == REQUIRED else f"`{json.dumps(setting.default)}`"
            help = setting.help + (f" One of {', '.join(map(str, setting.choices))}." if setting.choices else "")
            lines.append(f"| `{setting.name}` | {_cell(default)} | {_cell(setting.unit)} | {_cell(help)} |")
        lines.append("")
    return "\n".join(lines)


def columns() -> str:
    """Every column of a depth trace with unit, weight, equation and source, from `metrics.columns`."""
    lines = ["# Columns", "", "What a depth trace holds at each boundary. Made from `spinal_jax.metrics.columns`.", ""]
    lines += ["| column | unit | counted by | definition | source | error | compared |", "| --- " * 7 + "|"]
    lines += [_row(column) for column in TRACE]
    return "\n".join([*lines, "", "The letters are those of [Method](../method.md).", ""])


def _row(column: Column) -> str:
    yes = {True: "yes", False: ""}
    cells = [f"`{column.name}`", column.unit, column.counted_by, f"`{column.equation}`", column.source]
    return f"| {' | '.join(map(_cell, [*cells, yes[column.error], yes[column.compared]]))} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
