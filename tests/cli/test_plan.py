"""`spinal plan` on the command line: tables, plan.json, and one sentence for each mistake."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from spinal_jax.config.data_sheets import DEVICES

from .conftest import Spinal


def test_a_plan_over_four_virtual_devices(spinal: Spinal, tmp_path: Path) -> None:
    asked = ("model.source=random:0.3m", "devices=4", "parallel.tensor=2", "device=v5e", "prompt_tokens=64")
    outcome = spinal("plan", *asked, "hydra.run.dir=run")
    assert (outcome.code, outcome.err) == (0, "")
    for words in ("4 x TPU v5e, mesh 2 x 1 x 2", "parameters", "Gram sums", "fits", "seconds"):
        assert words in outcome.out
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["schema"] == "spinal-plan/2"
    assert {name: plan["mesh"][name] for name in ("data", "fsdp", "tensor")} == {"data": 2, "fsdp": 1, "tensor": 2}
    assert plan["devices"]["v5e"]["fits"] is True
    assert plan["memory"]["peak"] >= plan["memory"]["parameters"] > 0
    assert plan["compiled"]["forward"]["temporaries"] > 0
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert (manifest["command"], manifest["files"]) == ("plan", ["plan.json"])
    assert spinal("plan", *asked, "hydra.run.dir=run").refusal("complete run", "overwrite=true")


def test_without_a_device_all_accelerators_are_compared(spinal: Spinal, model: Path, tmp_path: Path) -> None:
    (tmp_path / "shape").mkdir()
    (tmp_path / "shape" / "config.json").write_text((model / "config.json").read_text())  # and no weights
    outcome = spinal("plan", "model.source=shape", "compile=false", "hydra.run.dir=run")
    assert outcome.code == 0, outcome.err
    for name, device in DEVICES.items():
        assert name == "cpu" or f"{device.title}  " in outcome.out
    assert "not compiled" in outcome.out
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["memory"] is None
    assert set(plan["devices"]) == set(DEVICES) - {"cpu"}


def test_what_does_not_fit_is_said(spinal: Spinal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DEVICES, "v5e", dataclasses.replace(DEVICES["v5e"], memory=2**20))
    outcome = spinal("plan", "model.source=random:1m", "device=v5e", "prompt_count=4", "batch_tokens=64")
    assert outcome.code == 0
    found = re.search(r"DOES NOT FIT, devices=(\d+) parallel.fsdp=(\d+) parallel.tensor=(\d+) would \(", outcome.out)
    assert found is not None
    devices, fsdp, tensor = map(int, found.groups())
    assert devices == fsdp * tensor
    assert "Gram sums in host memory" in outcome.out


def test_an_adapter_is_planned_as_its_base(spinal: Spinal, model: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    (adapter / "base").mkdir(parents=True)
    (adapter / "base" / "config.json").write_text((model / "config.json").read_text())
    for base, code in (("base", 0), (str(adapter), 2)):
        (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
        outcome = spinal("plan", "model.source=adapter", "compile=false", f"hydra.run.dir=run{code}")
        assert outcome.code == code, outcome
        assert code == 0 or outcome.refusal("is an adapter itself")
    spinal("plan", "adapter/base", "model.base=other").refusal("base 'other'", "not an adapter")
    spinal("plan", "adapter/base", "model.revision=step-5").refusal("revision 'step-5'")


def test_too_few_prompts_are_said(spinal: Spinal) -> None:
    outcome = spinal("plan", "model=llama-3-70b", "device=h100", "compile=false", "prompt_count=4")
    assert "memory: not compiled" in outcome.out
    assert "fewer than 4 d = 32,768" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("model=llama-3-8b", "device=b200"), ("device is 'b200'", "v5e", "h100", "cpu")),
        (("model=llama-3-8b", "devices=6", "parallel.tensor=4"), ("tensor 4", "devices=6")),
        (("model=llama-3-8b", "devices=0"), ("devices is 0", "1 to 4096")),
        (("model.source=empty", "prompt_count=9223372036854775807"), ("prompt_count is", "1,000,000")),
        (("model.source=empty", "prompt_tokens=9223372036854775807"), ("prompt_tokens is", "1,048,576")),
        (("model.source=nowhere",), ("no model 'nowhere'", "config.json", "llama-3-8b")),
        (("model.source=owner/unknown",), ("owner/unknown", "does not come with spinal")),
        (("model.source=empty",), ("empty", "config.json")),
        ((), ("model.source is missing",)),
    ],
)
def test_a_mistake_is_one_sentence(
    spinal: Spinal,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    words: tuple[str, ...],
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    spinal("plan", *arguments).refusal(*words)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_mistake_in_sharding_shows_on_a_laptop(spinal: Spinal) -> None:
    asked = ("model=smollm2-135m", "devices=5", "parallel.tensor=5", "batch_tokens=256", "prompt_count=2")
    spinal("plan", *asked).refusal("would lie whole on each of 5 devices")
