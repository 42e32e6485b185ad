"""Two checkpoints from their sources to what they are compared by."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spinal_jax.audit import pipeline
from spinal_jax.comparison.checkpoints import Footprint, compare_models, run_footprint
from spinal_jax.comparison.compare import compare
from spinal_jax.config import AuditConfig, CompareConfig, build
from spinal_jax.errors import UserError
from spinal_jax.models.decoder import Decoder

BASE, OTHER = "random:0.3m@0", "random:0.3m@1"
TEXTS = [f"{'Why and how? ' * (1 + n % 5)}What of {n}" for n in range(48)]
METRICS = {"groups": 4}


def asked(model: str, reference: str, **more: Any) -> CompareConfig:
    return build(
        CompareConfig, {"model": {"source": model}, "reference": {"source": reference}, "metrics": METRICS} | more
    )


@pytest.fixture
def preferences(tmp_path: Path) -> dict[str, Any]:
    file = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"Say {n}", "chosen": f" {n}, gladly", "rejected": f" no {n * 7}"} for n in range(9)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": str(file), "format": "jsonl"}


@pytest.fixture(scope="module")
def found() -> Footprint:
    return run_footprint(asked(OTHER, BASE), TEXTS)


@pytest.mark.parametrize(("source", "side"), [(OTHER, "aligned"), (BASE, "reference")])
def test_each_trace_is_its_own_audit(found: Footprint, source: str, side: str) -> None:
    alone = pipeline.run_audit(build(AuditConfig, {"model": {"source": source}, "metrics": METRICS}), TEXTS)
    trace = getattr(found, side)
    assert (trace.model, trace.prompts, trace.settings) == (alone.model, alone.prompts, alone.settings)
    for name, values in alone.columns.items():
        # The vocabulary is walked in other chunks: float32 sums of another order.
        np.testing.assert_allclose(trace.columns[name], values, atol=1e-4, err_msg=name)
    assert trace.arrays.keys() == alone.arrays.keys()


def test_what_both_give_enters_the_comparison(found: Footprint, preferences: dict[str, Any]) -> None:
    both = run_footprint(asked(OTHER, BASE, preferences=preferences, beta=0.2), TEXTS).both
    result = compare(found.aligned, found.reference, both)
    distance = result.columns["policy_distance"]
    assert (distance > 0.05).all()
    assert (result.columns["policy_distance_low"] < distance).all()
    norms = result.columns["gradient_norm"][1:]
    assert (norms > 0).all()
    assert both.pairs is not None
    assert both.pairs.sum() == 9
    assert 0 < result.summary["gradient_concentration"] < 1
    assert np.isfinite(result.summary["spinal_score"])
    assert set(result.summary["gradient_apart"]) == {"embedding", "final_norm", "unembedding"}


def test_a_checkpoint_against_itself_is_exactly_unchanged() -> None:
    itself = run_footprint(asked(BASE, BASE), TEXTS)
    result = compare(itself.aligned, itself.reference, itself.both)
    for name in ("contraction", "transport", "entropy", "curvature", "effective_rank"):
        assert not np.nan_to_num(result.columns[f"delta_{name}"]).any(), name
    assert not result.columns["policy_distance"].any()
    assert result.verdict == "no detectable change"


def test_a_notebook_compares_in_one_call(found: Footprint) -> None:
    result = compare_models(OTHER, BASE, TEXTS, settings={"metrics": METRICS}, progress=False)
    expected = compare(found.aligned, found.reference, found.both)
    assert result.to_json() == expected.to_json()


def test_models_of_different_depth_by_relative_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    deeper = "random:1m@0"
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "load", loaded)
        with pytest.raises(UserError, match=r"9 blocks and .* 6; align=relative"):
            run_footprint(asked(deeper, BASE), TEXTS)
    measured = run_footprint(asked(deeper, BASE, align="relative"), TEXTS)
    assert measured.both.policy_distance is None
    assert compare(measured.aligned, measured.reference, align="relative").depth == 9


def loaded(*_: object) -> Decoder:
    raise AssertionError("weights were loaded")


def test_tokenizers_that_differ_are_refused_before_weights_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "load", loaded)
    really = pipeline.data.token_ids
    seen: list[Any] = []

    def shifted(prompt: Any, tokenizer: Any, *more: Any) -> np.ndarray:
        """As if the second tokenizer numbered its tokens another way."""
        if tokenizer not in seen:
            seen.append(tokenizer)
        return really(prompt, tokenizer, *more) + seen.index(tokenizer)

    monkeypatch.setattr("spinal_jax.comparison.checkpoints.data.token_ids", shifted)
    with pytest.raises(UserError, match="tokenizers differ: prompt 0 becomes"):
        run_footprint(asked(OTHER, BASE), TEXTS)


def test_vocabularies_that_differ_are_refused_before_weights_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "load", loaded)
    really = pipeline.opened

    def opened(config: Any) -> Any:
        return Padded(really(config)) if config.source == BASE else really(config)

    monkeypatch.setattr(pipeline, "opened", opened)
    with pytest.raises(UserError, match=r"vocabulary of (\d+) tokens .* one of (?!\1)\d+; only checkpoints that share"):
        run_footprint(asked(OTHER, BASE), TEXTS)


class Padded:
    """An opened checkpoint whose vocabulary is longer by 64."""

    def __init__(self, inner: Any):
        self.inner = inner

    def __enter__(self) -> Any:
        checkpoint, family, decoder = self.inner.__enter__()
        return checkpoint, family, dataclasses.replace(decoder, vocab_size=decoder.vocab_size + 64)

    def __exit__(self, *error: object) -> Any:
        return self.inner.__exit__(*error)


@pytest.mark.parametrize(
    ("model", "reference", "more", "words"),
    [
        ({"trace": "a"}, {"source": "b"}, {}, "give both alike"),
        ({"trace": "a"}, {"trace": "b"}, {"preferences": {"path": "p"}}, "preferences"),
        ({"source": "a"}, {"source": "b"}, {"beta": 0}, "beta"),
    ],
)
def test_settings_that_do_not_go_together(
    model: dict[str, Any], reference: dict[str, Any], more: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        build(CompareConfig, {"model": model, "reference": reference} | more)
