"""`Recorder`: traces of parameters in memory, whatever names they go by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spinal_jax.audit import pipeline
from spinal_jax.config import MetricsConfig, ModelConfig
from spinal_jax.errors import UserError
from spinal_jax.models.decoder import Decoder
from spinal_jax.models.formats.memory import MemoryCheckpoint
from spinal_jax.models.parts import take_apart
from spinal_jax.recording.recorder import Recorder

SOURCE = "random:0.3m@1"
PROMPTS = [f"Question {n}: what is {n} plus {n * n}? Think of {n % 7} things first." for n in range(30)]


@pytest.fixture(scope="module")
def base() -> tuple[Decoder, dict[str, Any]]:
    with pipeline.opened(ModelConfig(source=SOURCE)) as (checkpoint, family, decoder):
        return pipeline.load(checkpoint, family, decoder, "float32"), checkpoint.config


def test_an_optax_loop_is_traced_and_names_make_no_difference(
    base: tuple[Decoder, dict[str, Any]], tmp_path: Path
) -> None:
    """Ten lines of optax; the same parameters under our names and under Hugging Face's give the same columns."""
    parts, params = take_apart(base[0])
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, base[0].config.vocab_size, (4, 32)), jnp.int32)
    method = optax.sgd(0.5)
    state = method.init(params)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            model = parts.assemble(params)
            logits = model.lens(model.forward(tokens)[0])[:, :-1]
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        changes, state_after = method.update(gradient, state)
        return optax.apply_updates(params, changes), state_after, value

    def as_hugging_face(params: Any) -> dict[str, np.ndarray]:
        memory = MemoryCheckpoint("memory", base[1], params, None)  # type: ignore[arg-type]
        return {name: memory.tensor(name) for name in memory.names()}

    settings = MetricsConfig(groups=6)
    ours = Recorder(SOURCE, PROMPTS, folder=tmp_path / "ours", every=2, metrics=settings)
    theirs = Recorder(SOURCE, PROMPTS, folder=tmp_path / "hf", every=2, metrics=settings, mapping=as_hugging_face)
    taken = []
    for number in range(5):
        taken.append(ours(number, params, metrics={"loss": 1.0 / (1 + number)}))
        theirs(number, params)
        params, state, _ = step(params, state)
    ours.close()
    theirs.close()
    assert taken == [True, False, True, False, True]
    told = json.loads((tmp_path / "ours" / "onset.json").read_text())
    assert [record["step"] for record in told["records"]] == [0, 2, 4]
    assert told["records"][0]["delta_align"] == 0
    assert told["records"][2]["distance"] > 0
    assert (tmp_path / "ours" / "report.html").exists()
    for name in ("trace.csv", "comparison.csv"):
        at = Path("traces/step_000004") / name
        assert (tmp_path / "ours" / at).read_bytes() == (tmp_path / "hf" / at).read_bytes()
    assert len((tmp_path / "ours" / "metrics.jsonl").read_text().splitlines()) == 5
    with pytest.raises(UserError, match="other settings"):
        Recorder(SOURCE, PROMPTS, folder=tmp_path / "ours", every=2, metrics=MetricsConfig(groups=7))


def test_parameters_of_another_shape_are_refused(base: tuple[Decoder, dict[str, Any]], tmp_path: Path) -> None:
    params = dict(take_apart(base[0])[1])
    params["final_norm.weight"] = jnp.ones(3, jnp.float32)
    with (
        Recorder(SOURCE, PROMPTS, folder=tmp_path / "run", metrics=MetricsConfig(groups=6)) as recorder,
        pytest.raises(UserError, match=r"final_norm.weight has shape \(3,\)"),
    ):
        recorder(0, params)


def test_a_recording_goes_on_where_it_was_cut_off(base: tuple[Decoder, dict[str, Any]], tmp_path: Path) -> None:
    """The same files as of one recording, and none where the first traced parameters were not those of the model."""
    start = take_apart(base[0])[1]
    settings = MetricsConfig(groups=6)

    def at(step: int, scale: float = 1.0) -> dict[str, jax.Array]:
        return {name: x * scale * (1 + 0.01 * step * ("mlp" in name)) for name, x in start.items()}

    def record(folder: Path, steps: range, scale: float = 1.0) -> list[int]:
        with Recorder(SOURCE, PROMPTS, folder=folder, every=2, metrics=settings) as recorder:
            return [step for step in steps if recorder(step, at(step, scale), metrics={"loss": 1.0 / (1 + step)})]

    def files(folder: Path) -> dict[str, bytes]:
        found = [path for path in sorted(folder.rglob("*")) if path.is_file() and "tfevents" not in path.name]
        return {str(path.relative_to(folder)): path.read_bytes() for path in found if path.name != "report.html"}

    assert record(tmp_path / "whole", range(5)) == [0, 2, 4]
    assert record(tmp_path / "cut", range(3)) == [0, 2]
    assert record(tmp_path / "cut", range(1, 5)) == [4]  # from a checkpoint of step 1
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert record(tmp_path / "other", range(1), scale=1.1) == [0]
    with pytest.raises(UserError, match=r"its first trace, of step 0, is not that of random:0\.3m@1"):
        record(tmp_path / "other", range(2, 3), scale=1.1)
