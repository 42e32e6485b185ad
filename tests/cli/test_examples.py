"""The examples of depth traces in other training loops, end to end on a tiny Llama."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from .conftest import Spinal
from .test_watch import ASKED, tiny

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> dict[str, Any]:
    """The names that an example defines."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("examples") / "base")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("examples") / "prompts.jsonl"
    rows = [{"prompt": f"Question {n}: what is {n} plus {n * n}?"} for n in range(48)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def steps_of(folder: Path) -> list[int]:
    """Steps that have a trace, where the page is there and the last trace differs from the first."""
    records = json.loads((folder / "onset.json").read_text())["records"]
    assert records[0]["distance"] == 0 < records[-1]["distance"]
    assert (folder / "report.html").exists()
    return [record["step"] for record in records]


def test_a_model_of_ones_own(base: Path, texts: Path, tmp_path: Path) -> None:
    """Its logits are those of transformers; both loops begin with the same trace, for both models are the same."""
    own, ours = example("nnx_optax"), example("decoder_optax")
    tokens = np.arange(40).reshape(2, 20)
    with torch.no_grad():
        expected = LlamaForCausalLM.from_pretrained(base)(torch.tensor(tokens)).logits.numpy()
    found = np.asarray(own["load"](base)(jnp.asarray(tokens, jnp.int32)))
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    with jax.numpy_dtype_promotion("standard"):  # the tests of the package promote nothing; nnx.Optimizer does
        own["main"](str(base), str(tmp_path / "own"), "10", str(texts))
        ours["main"](str(base), str(tmp_path / "ours"), "10", str(texts))
    assert steps_of(tmp_path / "own") == steps_of(tmp_path / "ours") == [0, 10]
    first = [(tmp_path / name / "traces" / "step_000000" / "trace.csv").read_bytes() for name in ("own", "ours")]
    assert first[0] == first[1]
    assert len((tmp_path / "own" / "metrics.jsonl").read_text().splitlines()) == 10


@pytest.mark.tunix
@pytest.mark.filterwarnings("ignore")  # of the other libraries
def test_tunix(base: Path, texts: Path, tmp_path: Path) -> None:
    with jax.numpy_dtype_promotion("standard"):
        example("tunix_dpo")["main"](str(base), str(tmp_path / "out"), "10", str(texts))
    assert steps_of(tmp_path / "out") == [0, 10]


@pytest.mark.filterwarnings("ignore")  # of the other libraries
def test_a_callback_watches_a_run_of_trl(base: Path, tmp_path: Path, spinal: Spinal) -> None:
    """Adapters, measured while they are trained, in a process of its own; nothing is left for a later look."""
    run, out = example("trl_dpo"), tmp_path / "out"
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"Q{n}: ", "chosen": f"yes {n}", "rejected": f"no, not {n}"} for n in range(12)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings: dict[str, Any] = {
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    traces = run["DepthTraces"](str(base), *ASKED)
    run["train"](str(base), str(pairs), str(out), 2, traces, **settings)
    records = json.loads((out / "watch" / "onset.json").read_text())["records"]
    assert [record["step"] for record in records] == [2, 4]
    assert records[0]["distance"] > 0
    assert "rewards/margins" in records[0]
    assert (out / "watch" / "report.html").exists()
