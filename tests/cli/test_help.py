"""What `spinal --help` says, made from the records, and that no file of conf/ states a default again."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from importlib.metadata import version

import pytest
from omegaconf import OmegaConf

from spinal_jax.cli import help as pages
from spinal_jax.cli.commands import COMMANDS
from spinal_jax.config import AuditConfig, ModelConfig, build
from spinal_jax.config.record import REQUIRED, defaults_of, optional_parts, settings_of, to_mapping

from .conftest import Spinal


def names_of(record: type, prefix: str = "") -> Iterator[str]:
    hints = typing.get_type_hints(record)
    for field in fields(record):
        if is_dataclass(hints[field.name]):
            yield from names_of(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def test_help_names_every_command(spinal: Spinal) -> None:
    for option in ("-h", "--help"):
        outcome = spinal(option)
        assert (outcome.code, outcome.err) == (0, "")
        for name, command in COMMANDS.items():
            assert f"spinal {name} {command.takes}" in " ".join(outcome.out.split())
    assert spinal("--version").out == f"spinal {version('spinal-jax')}\n"
    assert "usage: spinal report DIR" in spinal("report", "--help").out


def test_help_of_audit_lists_every_setting_once(spinal: Spinal) -> None:
    outcome = spinal("audit", "--help")
    assert (outcome.code, outcome.err) == (0, "")
    listed = [line.split()[0] for line in outcome.out.splitlines() if line.startswith("  ") and line[2] != " "]
    for name in names_of(AuditConfig):
        assert listed.count(name) == 1, name
    assert "hydra.run.dir=DIR" in outcome.out
    assert "prompts=default|hh" in outcome.out.replace("\n", "")
    assert max(map(len, outcome.out.splitlines())) <= 120


RECORDS = {name: command.record for name, command in COMMANDS.items() if command.record is not None}


@pytest.mark.parametrize("name", RECORDS)
def test_every_setting_has_help_and_is_shown(name: str) -> None:
    text = pages.help_text(COMMANDS[name])
    assert max(map(len, text.splitlines())) <= 120
    for setting in settings_of(RECORDS[name]):
        assert setting.help, setting.name
        assert not setting.help.endswith("."), setting.name
        assert any(line.startswith(f"  {setting.name} ") for line in text.splitlines())


def test_the_defaults_that_hydra_gets_are_those_of_the_records() -> None:
    found = defaults_of(AuditConfig)
    assert found["model"]["source"] == REQUIRED
    found["model"]["source"] = "m"
    assert found == to_mapping(AuditConfig(ModelConfig("m")))
    assert build(AuditConfig, found) == AuditConfig(ModelConfig("m"))


@pytest.mark.parametrize("name", RECORDS)
def test_no_file_of_a_group_states_a_default_again(name: str) -> None:
    command = COMMANDS[name]
    parts = {**defaults_of(RECORDS[name]), **{k: defaults_of(v) for k, v in optional_parts(RECORDS[name]).items()}}
    for part, folder in command.folders.items():
        for file in pages.group_files(folder) if part in parts else []:
            said = OmegaConf.to_container(OmegaConf.load(pages.conf_folder() / folder / f"{file}.yaml"))
            assert isinstance(said, dict)
            for key, value in said.items():
                # `kind` and `format` are what the file is chosen for.
                if key not in ("defaults", "kind", "format"):
                    assert parts[part][key] != value, f"{folder}/{file}.yaml: {key}"


def test_settings_can_be_printed(spinal: Spinal) -> None:
    outcome = spinal("audit", "model.source=m", "prompts.limit=3", "--cfg", "job")
    assert outcome.code == 0
    printed = OmegaConf.create(outcome.out)
    assert (printed.model.source, printed.prompts.limit, printed.overwrite) == ("m", 3, False)
