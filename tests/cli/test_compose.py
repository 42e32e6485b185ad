"""Every file of conf/, under every command that takes it, composes to settings that the command's record accepts."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from spinal_jax.cli import help as pages
from spinal_jax.cli import main as cli
from spinal_jax.cli.arguments import hydras_arguments
from spinal_jax.cli.commands import COMMANDS
from spinal_jax.cli.registry import Command
from spinal_jax.config.compare import CompareConfig
from spinal_jax.config.record import build
from spinal_jax.errors import UserError

CONF = pages.conf_folder()
COMPOSED = sorted(name for name, command in COMMANDS.items() if command.record is not None)
MODELS = sorted(file.stem for file in (CONF / "model").glob("*.yaml"))
NEEDED = {
    "train": ("preferences=world", "corpus=world", "model.source=given"),
    "attribute": ("aligned=[a,b]", "control=[c,d]"),
}  # what must be chosen, whatever the objective
HUB_ID = r"[\w-][\w.-]*/[\w-][\w.-]*"


@contextmanager
def composing(folder: Path = CONF) -> Iterator[Callable[..., dict[str, Any]]]:
    """`settings(command, argument, ...)`: what Hydra makes of them, with a text for each setting that is missing."""

    def settings(command: str, *arguments: str) -> dict[str, Any]:
        found = compose(command, hydras_arguments(COMMANDS[command], list(arguments)))
        for name in OmegaConf.missing_keys(found):
            OmegaConf.update(found, name, "given")
        values = OmegaConf.to_container(found, resolve=True)
        assert isinstance(values, dict)
        return {str(key): value for key, value in values.items()}

    cli._teach_omegaconf()
    for name in COMPOSED:
        cli._store(COMMANDS[name])
    with initialize_config_dir(str(folder), version_base="1.3"):
        yield settings


def record_of(name: str, settings: dict[str, Any]) -> Any:
    """The command's record; where a file or a checkpoint must be named, one is."""
    record = COMMANDS[name].record
    assert record is not None
    given = {**settings}
    for part in ("prompts", "preferences", "corpus"):
        unnamed = given.get(part) and given[part]["path"] is None and given[part].get("dataset") is None
        if unnamed and given[part]["format"] != "world":
            given[part] = {**given[part], "path": "given"}
    for side in ("model", "reference") if record is CompareConfig else ():
        given[side] = {**given[side], "source": given[side]["source"] or "given"}
    return build(record, given)


@pytest.mark.parametrize("command", COMPOSED)
def test_every_file_of_every_group_builds_the_record(command: str) -> None:
    with composing() as settings:
        needed = NEEDED.get(command, ())
        plain = settings(command, *needed)
        record_of(command, plain)
        for group, folder in COMMANDS[command].folders.items():
            files = sorted(file.stem for file in (CONF / folder).glob("*.yaml"))
            assert files
            for file in files:
                others = [argument for argument in needed if not argument.startswith((f"{group}=", f"{group}."))]
                chosen = settings(command, *others, f"{group}={file}")
                record = record_of(command, chosen)
                if folder == "model" and file != "any":
                    assert re.fullmatch(HUB_ID, getattr(record, group).source)
                    # A model says which checkpoint it is; how it is read stays the command's own.
                    free = {"source": None, "revision": None}
                    assert chosen[group] | free == plain[group] | free, file


def test_models_name_different_checkpoints_and_models_that_exist() -> None:
    texts = {name: (CONF / "model" / f"{name}.yaml").read_text() for name in MODELS if name != "any"}
    sources = [re.findall(r"^source: (\S+)$", text, re.MULTILINE) for text in texts.values()]
    assert all(len(found) == 1 for found in sources)
    revisions = [tuple(re.findall(r"^revision: (\S+)$", text, re.MULTILINE)) for text in texts.values()]
    assert len({(found[0], *revision) for found, revision in zip(sources, revisions, strict=True)}) == len(sources)
    for name, text in texts.items():
        for base in re.findall(r"^# Trained further from (\S+)\.$", text, re.MULTILINE):
            assert base in texts, name
            assert base != name


GROUPS = {"model": "any", "model@reference": "any"}


def test_a_second_group_is_filled_from_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[CompareConfig] = []
    pair = Command("pair", lambda asked, out: seen.append(asked) or 0, CompareConfig, "", "", GROUPS, keeps_run=False)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> CompareConfig:
        assert cli._compose(pair, list(arguments)) == (0, None)
        return seen[-1]

    found = run("model=zephyr-7b-dpo", "reference=zephyr-7b-sft", "reference.dtype=bfloat16")
    assert found.model.source == "alignment-handbook/zephyr-7b-dpo-full"
    assert found.model.dtype == "float32"
    sft = "alignment-handbook/zephyr-7b-sft-full"
    assert found.reference == replace(found.model, source=sft, dtype="bfloat16")
    assert run("model.source=m", "reference.source=r").reference.source == "r"
    with pytest.raises(UserError, match=r"Could not find 'model/nobody'"):
        run("model=phi-2", "reference=nobody")
    helped = pages.help_text(pair).splitlines()
    assert any(line.startswith("  reference.source ") for line in helped)
    assert sum("model= or reference=any|" in line for line in helped) == 1


def test_a_setting_may_follow_another() -> None:
    rates = {"0.3m": 3e-3, "3m": 3e-3, "10m": 1e-3, "1b": 2e-4}
    with composing() as settings:
        chosen = {size: settings("train", "experiment=scaling", "+arm=base", f"model.name={size}") for size in rates}
    assert {size: record_of("train", found).optimizer.learning_rate for size, found in chosen.items()} == rates


def test_a_file_that_is_no_yaml_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "conf"
    shutil.copytree(CONF, folder)
    (folder / "arm" / "mine.yaml").write_text("# @package _global_\nsteps: 4\nseed: 1: 2\n")
    monkeypatch.setattr(pages, "conf_folder", lambda: folder)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^conf/arm/mine.yaml, line 3: this is no YAML \(mapping values"):
        cli._compose(COMMANDS["train"], ["+arm=mine"])
