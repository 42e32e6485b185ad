"""Two checkpoints from their sources to what they are compared by."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import spinal_jax
from spinal_jax import data
from spinal_jax.audit import grouped_prompts, pipeline
from spinal_jax.audit.trace import save_trace
from spinal_jax.comparison import checkpoints
from spinal_jax.comparison.checkpoints import MeasuredPair, measure_checkpoints
from spinal_jax.comparison.compare import compare_traces
from spinal_jax.comparison.record import save_comparison
from spinal_jax.comparison.score import Weights
from spinal_jax.config import AuditConfig, CompareConfig, MetricsConfig, ModelConfig, PromptsConfig, build
from spinal_jax.data.vocabulary import Vocabulary
from spinal_jax.errors import UserError
from spinal_jax.models.decoder import Decoder
from spinal_jax.models.formats.memory import MemoryCheckpoint

BASE, OTHER = "random:0.3m@0", "random:0.3m@1"
_RNG = np.random.default_rng(0)
# Of words that no two texts share in order, so that each is a prompt of its own.
TEXTS = [" ".join("".join(_RNG.choice(list("aeioulmnrst"), 5)) for _ in range(4 + 3 * (n % 5))) for n in range(48)]
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
def found() -> MeasuredPair:
    return measure_checkpoints(asked(OTHER, BASE), TEXTS)


@pytest.mark.parametrize(("source", "side"), [(OTHER, "aligned"), (BASE, "reference")])
def test_each_trace_is_its_own_audit(found: MeasuredPair, source: str, side: str) -> None:
    alone = pipeline.run_audit(build(AuditConfig, {"model": {"source": source}, "metrics": METRICS}), TEXTS)
    trace = getattr(found, side)
    assert (trace.model, trace.prompts, trace.settings) == (alone.model, alone.prompts, alone.settings)
    for name, values in alone.columns.items():
        # The vocabulary is walked in other chunks: float32 sums of another order.
        np.testing.assert_allclose(trace.columns[name], values, atol=1e-4, err_msg=name)
    assert trace.arrays.keys() == alone.arrays.keys()


def test_what_both_give_enters_the_comparison(found: MeasuredPair, preferences: dict[str, Any]) -> None:
    both = measure_checkpoints(asked(OTHER, BASE, preferences=preferences, beta=0.2), TEXTS).both
    result = compare_traces(found.aligned, found.reference, both)
    distance = result.columns["policy_distance"]
    assert (distance > 0.05).all()
    assert (result.columns["policy_distance_low"] < distance).all()
    norms = result.columns["gradient_norm"][1:]
    assert (norms > 0).all()
    assert both.pairs is not None
    assert both.pairs.sum() == 9
    assert 0 < result.summary["gradient_concentration"] < 1
    assert "boundaries and coherence needs 4" in result.summary["undefined"]["spinal_score"]
    assert 0 <= result.summary["reward_accuracy"] <= 1
    assert np.isfinite([result.summary["reward_margin_low"], result.summary["kl_low"]]).all()
    assert result.summary["output_distance"] == distance[-1]
    itself = measure_checkpoints(asked(BASE, BASE, preferences=preferences, beta=0.2), TEXTS)
    none = compare_traces(itself.aligned, itself.reference, itself.both, weights=Weights(0.5, 0.0, 0.5)).summary
    # The gain of a model against itself is 0 by definition; coherence needs a deeper model.
    assert (none["spinal_gain"], none["spinal_gain_low"], none["spinal_gain_high"]) == (0, 0, 0)
    assert none["spinal_score"] > 0.1
    assert (none["reward_accuracy"], none["reward_margin"]) == (0, 0)
    assert set(result.summary["gradient_apart"]) == {"embedding", "final_norm", "unembedding"}


def test_a_checkpoint_against_itself_is_exactly_unchanged() -> None:
    itself = measure_checkpoints(asked(BASE, BASE), TEXTS)
    result = compare_traces(itself.aligned, itself.reference, itself.both)
    for name in ("contraction", "transport", "entropy", "curvature", "effective_rank"):
        assert not np.nan_to_num(result.columns[f"delta_{name}"]).any(), name
    assert not result.columns["policy_distance"].any()
    assert result.verdict == "no detectable change"


def test_a_notebook_compares_in_one_call(found: MeasuredPair) -> None:
    more = {"metrics": METRICS, "score": {"gradient": 0.0}, "reference": {"name": "base"}}
    result = spinal_jax.compare(OTHER, BASE, TEXTS, settings=more, progress=False)
    reference = dataclasses.replace(found.reference, model={**found.reference.model, "name": "base"})
    expected = compare_traces(found.aligned, reference, found.both, weights=Weights(gradient=0.0))
    assert result.to_json() == expected.to_json()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"settings": {"align": "relative", "beta": -1}}, "beta is -1"),
        ({"settings": {"prompts": "x"}}, "prompts is 'x'; it takes settings such as prompts.path"),
        ({"settings": {"model": {"source": "other"}}}, "model.source='other', but '.*' is given too"),
        ({"settings": {"score": {"delta": -1.0}}}, "score.delta"),
        ({"settings": {"assert": {"verdict": "undetermined"}}}, "assert, which belongs to the command"),
        ({"settings": {"nonsense": 1}}, "there is no setting nonsense"),
        ({"align": "sideways"}, "align is 'sideways'"),
        ({"step": (1, 2, 3)}, "one of the aligned and one of the reference"),
        ({"step": 3}, "model.step is 3"),
    ],
)
def test_a_notebooks_mistake_is_one_sentence(how: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        spinal_jax.compare(OTHER, BASE, TEXTS, progress=False, **how)


def test_saved_traces_and_training_runs_are_compared_by_their_folders(found: MeasuredPair, tmp_path: Path) -> None:
    save_trace(found.reference, tmp_path / "base")
    for step, trace in ((0, found.reference), (3, found.aligned)):
        save_trace(trace, tmp_path / "run" / "traces" / f"step_{step:06}")
    expected = compare_traces(found.aligned, found.reference).to_json()
    run, base = tmp_path / "run", tmp_path / "base"
    assert spinal_jax.compare(run, base).to_json() == expected
    assert spinal_jax.compare(run, base / "trace.json").to_json() == expected
    assert spinal_jax.compare(run, run, step=(3, 0)).to_json() == expected
    assert spinal_jax.compare(found.aligned, base).to_json() == expected
    assert spinal_jax.compare(run, base, step=None, settings={"align": "relative"}).settings["align"] == "relative"
    for arguments, how, words in (
        ((run, base), {"step": (7, None)}, "no trace of step 7; there are traces of steps 0, 3"),
        ((run, base), {"step": 3}, "base is no training run"),
        ((run, BASE), {}, "aligned is a saved trace and reference is a checkpoint"),
        ((run, base), {"prompts": "x"}, "prompts are given, but saved traces"),
        ((run, base), {"prompts": ["x"]}, "prompts are given, but saved traces"),
        ((run, base), {"preferences": "x"}, "it takes null with saved traces"),
    ):
        with pytest.raises(UserError, match=words):
            spinal_jax.compare(*arguments, **how)
    save_comparison(compare_traces(found.aligned, found.reference), tmp_path / "compared")
    save_trace(found.aligned, tmp_path / "compared" / "aligned")
    with pytest.raises(UserError, match=r"holds a comparison, not a trace; give .*compared/aligned"):
        spinal_jax.compare(tmp_path / "compared", base)


def test_models_of_different_depth_by_relative_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    deeper = "random:1m@0"
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "load", loaded)
        with pytest.raises(UserError, match=r"9 blocks and .* 6; align=relative"):
            measure_checkpoints(asked(deeper, BASE), TEXTS)
    measured = measure_checkpoints(asked(deeper, BASE, align="relative"), TEXTS)
    assert measured.both.policy_distance is None
    assert compare_traces(measured.aligned, measured.reference, align="relative").depth == 9


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
        measure_checkpoints(asked(OTHER, BASE), TEXTS)


def test_prompts_are_tokenised_and_grouped_once_for_both_models(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def counted(name: str, really: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: calls.append(name) or really(*arguments)

    monkeypatch.setattr(grouped_prompts, "assign_groups", counted("group", grouped_prompts.assign_groups))
    monkeypatch.setattr(grouped_prompts.data, "tokenise_prompts", counted("tokenise", data.tokenise_prompts))
    monkeypatch.setattr(MemoryCheckpoint, "tokenizer", counted("tokenizer", MemoryCheckpoint.tokenizer))
    measure_checkpoints(asked(OTHER, BASE), TEXTS)
    assert sorted(calls) == ["group", "tokenise", "tokenizer", "tokenizer"]


def test_every_model_must_suit_the_prompts() -> None:
    with pipeline.opened(ModelConfig(BASE)) as (checkpoint, _, decoder):
        for other, words in (
            (dataclasses.replace(decoder, vocab_size=3), r"makes token \d+, but the model has 3"),
            (dataclasses.replace(decoder, learned_positions=True, max_positions=7), "the model has 7 positions"),
            (dataclasses.replace(decoder, width=8), "of 8 features leave fewer than 8 singular values"),
        ):
            texts, settings = data.prompts_of(TEXTS), MetricsConfig(groups=4)
            with pytest.raises(UserError, match=words):
                pipeline.plan_prompts(texts, checkpoint.tokenizer(), decoder, PromptsConfig(), settings, others=[other])


def fewer(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """The second vocabulary that is read lacks its last `count` tokens."""
    really, seen = Vocabulary.of, []

    def of(tokenizer: Any, rows: int) -> Vocabulary:
        whole = really(tokenizer, rows)
        seen.append(whole)
        return whole if len(seen) != 2 else Vocabulary(dict(list(whole.token_of.items())[:-count]), rows)

    monkeypatch.setattr(checkpoints, "Vocabulary", SimpleNamespace(of=of))


def test_different_vocabularies_are_compared_over_the_tokens_they_share(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measure_checkpoints(asked(OTHER, BASE), TEXTS)
    fewer(monkeypatch, 2)
    pair = measure_checkpoints(asked(OTHER, BASE), TEXTS)
    assert pair.left_out == (2, 0)
    tokens = whole.aligned.model["vocabulary_tokens"] - 2
    assert [trace.model["vocabulary_tokens"] for trace in (pair.aligned, pair.reference)] == [tokens, tokens]
    assert pair.aligned.model["vocabulary_sha256"] != whole.aligned.model["vocabulary_sha256"]
    result = compare_traces(pair.aligned, pair.reference, pair.both, left_out=pair.left_out)
    assert result.summary["vocabulary"] == {"tokens": tokens, "left_out_aligned": 2, "left_out_reference": 0}
    assert any(f"over the {tokens} tokens that both vocabularies share: 2 of" in line for line in result.warnings)
    np.testing.assert_array_equal(pair.aligned.columns["contraction"], whole.aligned.columns["contraction"])
    assert not np.array_equal(pair.aligned.columns["entropy"], whole.aligned.columns["entropy"])
    with pytest.raises(UserError, match=r"the vocabulary's tokens is .* measures both over the tokens that they share"):
        compare_traces(pair.aligned, whole.reference)


def test_vocabularies_that_share_too_little_are_refused_before_weights_are_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pipeline, "load", loaded)
    fewer(monkeypatch, 20)
    with pytest.raises(UserError, match=r"leaves out .* of one; only checkpoints that share 99% of their tokens"):
        measure_checkpoints(asked(OTHER, BASE), TEXTS)


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
