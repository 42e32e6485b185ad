"""Measures two checkpoints on the same tokens: their traces and the quantities that need both models."""

from __future__ import annotations

import contextlib
import gc
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import jax
import numpy as np
from jax.sharding import Mesh

from spinal_jax import data
from spinal_jax.audit import pipeline
from spinal_jax.audit.devices import Devices, devices_of
from spinal_jax.audit.grouped_prompts import common_groups
from spinal_jax.audit.measure import keep_reference, measure
from spinal_jax.audit.measurement import Measurement
from spinal_jax.audit.trace import DepthTrace
from spinal_jax.comparison.compare import BothModels
from spinal_jax.comparison.preference_gradient import (
    PreferenceGradient,
    log_probabilities,
    preference_gradient,
    shape_for,
)
from spinal_jax.comparison.prompt_steps import PromptSteps
from spinal_jax.config import CompareConfig, ComparedConfig, ModelConfig, PreferencesConfig
from spinal_jax.config.training import ObjectiveConfig
from spinal_jax.data.vocabulary import Vocabulary
from spinal_jax.errors import NotLeader, UserError
from spinal_jax.metrics.depth import terminal_block
from spinal_jax.models.config import DecoderConfig
from spinal_jax.models.decoder import Decoder
from spinal_jax.models.formats.base import Checkpoint
from spinal_jax.models.formats.open import adapter_base
from spinal_jax.models.translate import Family
from spinal_jax.objectives.examples import pair_sets
from spinal_jax.objectives.responses import Example, Shape
from spinal_jax.parallel.agreement import own_part
from spinal_jax.parallel.device_defaults import pair_tokens
from spinal_jax.parallel.distributed import check_same
from spinal_jax.parallel.mesh import row_multiple
from spinal_jax.progress import Bar, no_bar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class MeasuredPair:
    """Two measured checkpoints: arguments of `compare_traces`."""

    aligned: DepthTrace
    reference: DepthTrace
    both: BothModels
    left_out: tuple[int, int] = (0, 0)  # number of tokens of each vocabulary that the other does not have
    steps: PromptSteps | None = None  # if config.keep_prompts is set
    tokenizer: PreTrainedTokenizerBase | None = None  # to decode `steps`


@dataclass(frozen=True)
class _Side:
    """One of the two checkpoints."""

    config: ModelConfig
    checkpoint: Checkpoint
    family: Family
    decoder: DecoderConfig
    bar: Bar

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.checkpoint.tokenizer()

    def load(self, devices: Devices) -> tuple[Decoder, str]:
        """The weights and their SHA-256."""
        return pipeline.load_hashed(self.checkpoint, self.family, self.decoder, self.config.dtype, self.bar, devices)

    @property
    def name(self) -> str:
        return self.config.name or pipeline.model_name(self.config.source)


@dataclass(frozen=True)
class _Pairs:
    """Tokenised preference pairs with their groups."""

    examples: tuple[Example, ...]
    groups: tuple[int, ...]
    shape: Shape


def measure_checkpoints(
    config: CompareConfig,
    texts: Sequence[str] | None = None,
    bar: Bar | None = None,
    say: Callable[[str], None] | None = None,
) -> MeasuredPair:
    """Measures both checkpoints of the settings, with one model in memory at a time.

    The reference runs first. Its unembedding, its spectra and, in a scratch file, its hidden states at the measured
    positions are kept; one pass over the vocabulary then processes both models.

    Args:
        config: the settings.
        texts: prompts in place of `config.prompts.path`.
        bar: opens progress bars.
        say: called with a start-up line for each checkpoint.

    Raises:
        UserError: different tokenizers, vocabularies or (unless `config.align` is "relative") depths, and the errors of
            `run_audit`; raised before weights are loaded, unless it is that processes have different weights.
    """
    bar = bar or no_bar
    prompts = pipeline.read_prompt_set(config.prompts, texts)
    config = with_reference(config)
    with _opened(config.model, "aligned", bar) as ours, _opened(config.reference, "reference", bar) as theirs:
        _check(config, ours, theirs, prompts)
        larger = max((ours, theirs), key=lambda side: (side.decoder.depth + 1) * side.decoder.width**2)
        choice = pipeline.choose_devices(config.parallel, larger.decoder, larger.config.dtype, config.metrics)
        devices = devices_of(choice)
        home = pipeline.audit_gram_home(larger.decoder, larger.config.dtype, config.metrics, devices)
        work = pipeline.plan_prompts(
            prompts,
            ours.tokenizer,
            ours.decoder,
            config.prompts,
            config.metrics,
            config.batch_tokens,
            devices,
            home.slots,
            others=[theirs.decoder],
        )
        vocabularies = [Vocabulary.of(side.tokenizer, side.decoder.vocab_size) for side in (ours, theirs)]
        shared = vocabularies[0].shared(vocabularies[1])
        left_out = (len(vocabularies[0]) - len(shared), len(vocabularies[1]) - len(shared))
        work = replace(work, vocabulary=shared)
        mesh = None if devices.shards is None else devices.shards.mesh
        pairs = None if config.preferences is None else _read_pairs(config, ours.tokenizer, (ours, theirs), mesh)
        for side in (ours, theirs):
            pipeline.check_processes_agree(side.checkpoint, side.tokenizer, work, choice)
        if say:
            for side in (ours, theirs):
                say(pipeline.start_line(side.name, side.config.dtype, side.decoder, work, choice, home))
        about = pipeline.prompts_record(prompts, config.prompts)

        def traced(side: _Side, digest: str, measurement: Measurement) -> DepthTrace:
            asked, revision = side.config, side.checkpoint.revision
            model = pipeline.model_record(side.name, asked.source, revision, asked.dtype, digest)
            return pipeline.depth_trace(model, about, side.decoder, config.metrics, work, measurement)

        joint = ours.decoder.depth == theirs.decoder.depth
        steps = None
        if config.keep_prompts and joint:
            steps = PromptSteps(work, terminal_block(ours.decoder.depth, config.metrics.terminal))
        with contextlib.ExitStack() as stack:
            weights, their_digest = theirs.load(devices)
            if joint:
                kept = stack.enter_context(keep_reference(weights, work, config.metrics, theirs.bar, devices=devices))
                reference = None
            else:
                kept = reference = None
                with contextlib.suppress(NotLeader):  # raised again by the second model
                    reference = measure(weights, work, config.metrics, theirs.bar, devices=devices)
            known = at_reference = None
            if pairs is not None:
                with theirs.bar("log-probabilities", len(pairs.examples), "pair") as advance:
                    known = log_probabilities(weights, pairs.examples, pairs.shape, advance, mesh)
                at_reference = _gradient(config, weights, pairs, known, theirs.bar, mesh)
            del weights
            gc.collect()  # frees the first model before the second is loaded
            weights, our_digest = ours.load(devices)
            aligned = None
            with contextlib.suppress(NotLeader):  # processes that do not lead still take part in the gradient
                aligned = measure(weights, work, config.metrics, ours.bar, kept, devices, watch=steps)
                reference = kept.measurement if kept is not None else reference
        of_pairs = None
        if pairs is not None and known is not None:
            of_pairs = _gradient(config, weights, pairs, known, ours.bar, mesh)
        if aligned is None:
            raise NotLeader
        assert reference is not None
        both = _both(aligned, of_pairs, at_reference)
        traces = traced(ours, our_digest, aligned), traced(theirs, their_digest, reference)
        return MeasuredPair(*traces, both, left_out, steps, ours.tokenizer)


def _gradient(
    config: CompareConfig,
    weights: Decoder,
    pairs: _Pairs,
    known: np.ndarray,
    bar: Bar,
    mesh: Mesh | None,
) -> PreferenceGradient:
    """The preference gradient with these weights as the policy; `known`: log-probabilities under the reference."""
    with bar("gradient", len(pairs.examples), "pair") as advance:
        objective = ObjectiveConfig("dpo", beta=config.beta)
        return preference_gradient(weights, pairs.examples, pairs.groups, known, objective, pairs.shape, advance, mesh)


def _both(
    measurement: Measurement, gradient: PreferenceGradient | None, at_reference: PreferenceGradient | None
) -> BothModels:
    policy = measurement.policy
    both = BothModels()
    if policy is not None:
        both = replace(
            both,
            policy_distance=policy.distance,
            policy_distance_without=policy.distance_without,
            kl=policy.divergence,
            kl_without=policy.divergence_without,
        )
    if gradient is not None and at_reference is not None:
        both = replace(
            both,
            gradient_norm=gradient.blocks,
            gradient_norm_without=gradient.blocks_without,
            reference_gradient_norm=at_reference.blocks,
            reference_gradient_norm_without=at_reference.blocks_without,
            pairs=gradient.pairs,
            gradient_apart=gradient.apart,
            reward_accuracy=gradient.accuracy,
            reward_accuracy_without=gradient.accuracy_without,
            reward_margin=gradient.margin,
            reward_margin_without=gradient.margin_without,
        )
    return both


def with_reference(config: CompareConfig) -> CompareConfig:
    """The settings with a reference. The default reference of an adapter is its base.

    Raises:
        UserError: no reference is given and the aligned model is not an adapter.
    """
    if config.reference.source is not None or config.model.source is None:
        return config
    source, revision = adapter_base(config.model.source, config.model.revision, config.model.base)
    reference = replace(config.reference, source=source, revision=revision, dtype=config.model.dtype)
    return replace(config, reference=reference)


@contextlib.contextmanager
def _opened(asked: ComparedConfig, role: str, bar: Bar) -> Iterator[_Side]:
    assert asked.source is not None
    config = ModelConfig(
        source=asked.source,
        revision=asked.revision,
        base=asked.base,
        dtype=asked.dtype,
        name=asked.name,
        ignore_keys=asked.ignore_keys,
    )
    with pipeline.opened(config) as (checkpoint, family, decoder):
        yield _Side(config, checkpoint, family, decoder, lambda what, total, unit: bar(f"{what} {role}", total, unit))


def _check(config: CompareConfig, ours: _Side, theirs: _Side, prompts: data.PromptSet) -> None:
    """Raises UserError if the two cannot be compared."""
    if (a := ours.decoder.depth) != (b := theirs.decoder.depth) and config.align == "equal":
        raise UserError(
            f"{ours.name} has {a} blocks and {theirs.name} {b}; align=relative compares models of different depth by "
            "relative position"
        )
    if config.keep_prompts and a != b:
        raise UserError(
            f"keep_prompts is {config.keep_prompts}, but {ours.name} has {a} blocks and {theirs.name} {b}; steps are "
            "compared at equal depth alone: leave keep_prompts at 0"
        )
    tokenizers = ours.tokenizer, theirs.tokenizer
    for number in own_part(len(prompts.prompts)):
        prompt = prompts.prompts[number]  # without chat templates, which may differ; that of the aligned model is used
        a, b = (data.token_ids(prompt, each, config.prompts.max_length, False) for each in tokenizers)
        if not np.array_equal(a, b):
            raise UserError(
                f"the tokenizers differ: prompt {number} becomes {_shown(a)} with that of {ours.name} and {_shown(b)} "
                f"with that of {theirs.name}; only checkpoints that share a tokenizer can be compared"
            )


def _shown(ids: np.ndarray) -> str:
    return f"{len(ids)} tokens ({' '.join(map(str, ids[-4:]))} at the end)"


def _read_pairs(
    config: CompareConfig, tokenizer: PreTrainedTokenizerBase, sides: Sequence[_Side], mesh: Mesh | None
) -> _Pairs:
    """The preference pairs, grouped by their prompts."""
    asked: PreferencesConfig | None = config.preferences
    assert asked is not None
    pair_set = pair_sets(asked)[0]
    kept, _ = data.tokenise_pairs(pair_set, tokenizer, asked.max_length, asked.chat_template, asked.overlong)
    asked_for = {pair.id: pair for pair in pair_set.pairs}
    prompts = [asked_for[pair.id] for pair in kept]
    examples = tuple((pair.chosen, pair.rejected) for pair in kept)
    longest = max(len(sequence.ids) for example in examples for sequence in example)
    for side in sides:
        if side.decoder.learned_positions and longest > side.decoder.max_positions:
            raise UserError(
                f"a preference pair has {longest} tokens, but {side.name} has {side.decoder.max_positions} positions; "
                "choose a smaller preferences.max_length"
            )
    digest = hashlib.sha256()
    for sequence in (sequence for example in examples for sequence in example):
        digest.update(np.array([sequence.start, len(sequence.ids), *sequence.ids], "<i8").tobytes())
    check_same({"preference pairs": digest.hexdigest()})
    groups, _ = common_groups([p.prompt for p in prompts], [p.turns for p in prompts], config.metrics.groups)
    most = config.batch_tokens or pair_tokens(jax.default_backend()) * (1 if mesh is None else row_multiple(mesh))
    return _Pairs(examples, tuple(groups.tolist()), shape_for(examples, most, mesh))
