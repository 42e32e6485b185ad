"""What `spinal --help` says, and that the YAML files behind it and the records agree."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from importlib.metadata import version

from omegaconf import OmegaConf

from spinal_jax.cli import help as pages
from spinal_jax.cli import main as cli
from spinal_jax.config import AuditConfig, ModelConfig, build

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
        for name, command in cli.COMMANDS.items():
            assert f"spinal {name} {command.takes}" in outcome.out
    assert spinal("--version").out == f"spinal {version('spinal-jax')}\n"
    assert "usage: spinal report DIR" in spinal("report", "--help").out


def test_help_of_audit_lists_every_setting_once(spinal: Spinal) -> None:
    outcome = spinal("audit", "--help")
    assert (outcome.code, outcome.err) == (0, "")
    listed = [line.split()[0] for line in outcome.out.splitlines() if line.startswith("  ") and line.strip()]
    for name in names_of(AuditConfig):
        assert listed.count(name) == 1, name
    assert "hydra.run.dir=DIR" in outcome.out
    assert "prompts=default|hh" in outcome.out
    assert max(map(len, outcome.out.splitlines())) <= 120


def test_the_defaults_in_yaml_are_those_of_the_records() -> None:
    dots = [f"{setting.name}={setting.default}" for setting in pages.settings_of(pages.conf_folder() / "audit.yaml")]
    settings = OmegaConf.from_dotlist(["model.source=m" if dot == "model.source=???" else dot for dot in dots])
    assert build(AuditConfig, OmegaConf.to_container(settings)) == AuditConfig(ModelConfig("m"))  # type: ignore[arg-type]


def test_settings_can_be_printed(spinal: Spinal) -> None:
    outcome = spinal("audit", "model.source=m", "prompts.limit=3", "--cfg", "job")
    assert outcome.code == 0
    printed = OmegaConf.create(outcome.out)
    assert (printed.model.source, printed.prompts.limit, printed.overwrite) == ("m", 3, False)
