"""Which prompts moved a comparison: their parts add up to the change of transport, on whatever devices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from spinal_jax.audit.devices import Devices, OneDevice, OnMesh, OnReplicas
from spinal_jax.audit.measure import keep_reference, measure
from spinal_jax.comparison.compare import compare_traces
from spinal_jax.comparison.prompt_steps import GROUPS, PLACES, PromptSteps
from spinal_jax.comparison.record import MOVED, Comparison, load_comparison, save_comparison
from spinal_jax.config import ParallelConfig
from spinal_jax.config.positions import Positions
from spinal_jax.data.packing import Plan, plan_batches
from spinal_jax.errors import UserError
from spinal_jax.metrics.depth import terminal_block
from spinal_jax.models.decoder import Decoder
from spinal_jax.parallel.mesh import make_mesh
from spinal_jax.parallel.placement import Replicas, Shards
from spinal_jax.report.comparison import render_comparison_report

from .planted import Truth, simulated
from .test_trace import config, pool

TERMINAL = (2, 3)  # boundaries


class Spelling:
    """A tokenizer that only spells; every 7th token would be a tag."""

    def decode(self, ids: list[int], clean_up_tokenization_spaces: bool) -> str:
        return "".join("<script>" if each % 7 == 0 else f"{each} " for each in ids)


def watched(devices: Devices, models: tuple[Decoder, Decoder], positions: str) -> tuple[Plan, PromptSteps, Any, Any]:
    settings = config(positions=positions)
    work = plan_batches(pool(), Positions.parse(positions), 1, 96 * devices.rows, devices.rows)
    steps = PromptSteps(work, TERMINAL)
    with keep_reference(models[1], work, settings, devices=devices) as kept:
        found = measure(models[0], work, settings, reference=kept, watch=steps)
        return work, steps, found, kept.measurement


@pytest.fixture(scope="module")
def models(make_decoder: Callable[..., Decoder]) -> tuple[Decoder, Decoder]:
    assert terminal_block(3, "last:2") == TERMINAL
    return make_decoder(0, depth=3), make_decoder(1, depth=3)


@pytest.fixture(scope="module")
def alone(models: tuple[Decoder, Decoder]) -> tuple[Plan, PromptSteps, Any, Any]:
    return watched(OneDevice(), models, "last:4")


def test_the_parts_of_the_prompts_are_the_change_of_transport(alone: tuple[Plan, PromptSteps, Any, Any]) -> None:
    """Summed over all prompts, and over those of a group against the sums without it."""
    work, steps, found, reference = alone
    first, last = TERMINAL
    at = slice(first, last + 1)
    count, groups = work.positions, work.groups
    whole = (found.whole.columns["transport"] - reference.whole.columns["transport"])[at].mean()
    np.testing.assert_allclose(sum(steps._change.values()) / count, whole, atol=1e-6)
    for place, group in enumerate(groups.drops):
        others = sum(change for n, change in steps._change.items() if work.sequences[n].group != group)
        left = (found.without[place].columns["transport"] - reference.without[place].columns["transport"])[at].mean()
        np.testing.assert_allclose(others / (count - groups.positions[group]), left, atol=1e-6)


@pytest.mark.parametrize("where", ["mesh", "replicas"])
def test_on_several_devices(
    alone: tuple[Plan, PromptSteps, Any, Any], models: tuple[Decoder, Decoder], where: str
) -> None:
    devices = OnMesh(Shards(make_mesh(ParallelConfig(2, 2, 2)), ("tensor",))) if where == "mesh" else None
    _, steps, *_ = watched(devices or OnReplicas(Replicas.all()), models, "last:4")
    expected = alone[1]
    assert steps._change.keys() == expected._change.keys()
    for number, change in expected._change.items():
        assert steps._change[number] == pytest.approx(change, abs=1e-5)
        for mine, other in zip(steps._places[number], expected._places[number], strict=True):
            assert (mine.aligned - mine.reference) == pytest.approx(other.aligned - other.reference, abs=1e-5)


@pytest.fixture(scope="module")
def compared(alone: tuple[Plan, PromptSteps, Any, Any]) -> Comparison:
    """A comparison of as many groups as the plan has; what its pseudo-values are does not matter here."""
    work, steps, *_ = alone
    traces = next(simulated(Truth(np.full(4, 1.0), np.array([0, 0, 0.1, 0.2]), np.zeros(4)), 1, 5))
    found = compare_traces(*traces)
    values = np.linspace(-1, 1, len(work.groups.drops)) ** 3
    found = replace(found, arrays={**found.arrays, "groups/delta_align": values})
    return replace(found, moved=steps.moved(found, Spelling(), 2))  # type: ignore[arg-type]


def test_the_groups_farthest_from_the_mean_come_first(
    alone: tuple[Plan, PromptSteps, Any, Any], compared: Comparison
) -> None:
    work, steps, *_ = alone
    values = compared.arrays["groups/delta_align"]
    shown = [group["group"] for group in compared.moved]
    assert shown == np.argsort(-np.abs(values - values.mean()), kind="stable")[:GROUPS].tolist()
    for group in compared.moved:
        assert 0 < len(group["prompts"]) <= 2
        of_group = {n for n, s in enumerate(work.sequences) if s.group == work.groups.drops[group["group"]]}
        changes = sorted((abs(steps._change[n]) for n in of_group), reverse=True)
        got = [abs(p["delta_transport"]) * p["positions"] for p in group["prompts"]]
        np.testing.assert_allclose(got, changes[: len(got)], rtol=1e-12)
        for prompt in group["prompts"]:
            sequence = work.sequences[prompt["number"]]
            places = prompt["places"]
            assert len(places) == min(PLACES, prompt["positions"])
            sizes = [abs(place["aligned"] - place["reference"]) for place in places]
            assert sizes == sorted(sizes, reverse=True)
            for place in places:
                assert TERMINAL[0] <= place["boundary"] <= TERMINAL[1]
                assert place["position"] in sequence.measured(work.selector)
                assert place["token"] == Spelling().decode([int(sequence.ids[place["position"]])], False)


def test_they_are_saved_beside_the_comparison_and_shown_as_text(compared: Comparison, tmp_path: Path) -> None:
    save_comparison(compared, tmp_path)
    back = load_comparison(tmp_path)
    assert back.moved == compared.moved
    assert "moved" not in (tmp_path / "comparison.json").read_text()
    assert load_file(tmp_path / "comparison.safetensors").keys() == compared.arrays.keys()
    page = render_comparison_report(back)
    assert "Tokens that changed most" in page
    assert "&lt;script&gt;" in page
    assert page.count("<script>") == render_comparison_report(replace(back, moved=())).count("<script>")
    save_comparison(replace(compared, moved=()), tmp_path)
    assert not (tmp_path / MOVED).exists()


@pytest.mark.parametrize(
    "text", ["[]", '{"schema": "spinal-prompts/9"}', '{"schema": "spinal-prompts/1", "groups": [1]}']
)
def test_a_file_of_prompts_that_cannot_be_read_is_named(compared: Comparison, tmp_path: Path, text: str) -> None:
    save_comparison(compared, tmp_path)
    (tmp_path / MOVED).write_text(text)
    with pytest.raises(UserError, match=MOVED):
        load_comparison(tmp_path)
