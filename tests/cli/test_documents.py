"""What the documents say to type is taken: Python blocks run, commands compose, links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from spinal_jax.cli.attribution_job import split_arguments
from spinal_jax.cli.commands import COMMANDS

from .test_compose import composing, record_of

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]


def blocks(document: Path, language: str) -> list[str]:
    """The fenced blocks of a language; "" for those that name none."""
    fences = re.findall(r"^```([^\n]*)\n(.*?)^```$", document.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [text for named, text in fences if named == language]


def commands(document: Path) -> list[list[str]]:
    """Every `spinal ...` of the document's blocks, as a shell splits it."""
    lines = "".join(blocks(document, "") + blocks(document, "bash")).replace("\\\n", " ").splitlines()

    def whole(part: str) -> bool:  # not the inside of a longer command's quotes
        return part.count("'") % 2 == part.count('"') % 2 == 0

    parts = [part.strip() for line in lines for part in re.split(r"; | &&? ?| \|\|? ", line)]
    parts = [re.sub(r"\$\w+", "1", part) for part in parts]  # a variable of the shell
    return [shlex.split(part, comments=True)[1:] for part in parts if part.startswith("spinal ") and whole(part)]


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if blocks(path, "python")], ids=lambda path: path.name)
def test_python_blocks_run(document: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks(document, "python"):
        exec(compile(block.replace('"FOLDER"', repr(str(model))), str(document), "exec"), names)
    assert names.keys() - {"__builtins__"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_commands_are_taken(document: Path) -> None:
    with composing() as settings:
        for words in commands(document):
            name, *arguments = words
            assert name in COMMANDS, words
            if name == "attribute" and "experiment=attribution" in arguments:
                name, arguments = "train", split_arguments(arguments)[0][:-1]  # without -m
            if COMMANDS[name].record is None or {"...", "-m"} & {*arguments}:
                continue  # folders, a sweep over lists, or a line that leaves something out
            found = settings(name, *(word for word in arguments if not word.startswith("hydra")))
            if not any("trace=" in word for word in arguments):
                record_of(name, found)


def test_there_are_commands_to_try() -> None:
    assert sum(len(commands(document)) for document in DOCUMENTS) > 20


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_relative_links_lead_to_files(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)\)", document.read_text(encoding="utf-8")):
        if not re.match(r"[a-z]+:", target):
            assert (document.parent / target).exists() or target == "../reference/columns.md", target


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_every_page_is_in_the_contents() -> None:
    contents = (ROOT / "docs" / "index.md").read_text(encoding="utf-8").splitlines()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.stem == "index" or page.stem in contents, f"name {page.name} in a toctree of docs/index.md"
