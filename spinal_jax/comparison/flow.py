"""The one flow of a comparison, which `spinal compare` and `spinal_jax.compare` both run."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spinal_jax.audit.trace import DepthTrace
from spinal_jax.comparison.compare import BothModels, compare_traces
from spinal_jax.comparison.record import Comparison
from spinal_jax.comparison.score import Weights
from spinal_jax.comparison.sources import holds_trace, saved_trace
from spinal_jax.errors import UserError
from spinal_jax.progress import Bar, Say, bars, no_bar

if TYPE_CHECKING:
    from spinal_jax.config import CompareConfig, ComparedConfig

TraceSource = DepthTrace | str | os.PathLike[str]
IN_MEMORY = "(a trace in memory)"  # what the settings say in place of a path
# Settings of the command that say what becomes of a comparison, and not what it is.
OF_THE_COMMAND = ("others", "other_references", "names", "assert", "overwrite")


@dataclass(frozen=True)
class Compared:
    """What `run_compare` found.

    Attributes:
        comparison: of the model with the reference.
        others: of each of `others` with its reference, in their order.
        aligned, reference: the traces behind `comparison`.
        measured: whether they were measured here, and not read from run folders.
    """

    comparison: Comparison
    others: tuple[Comparison, ...]
    aligned: DepthTrace
    reference: DepthTrace
    measured: bool


def run_compare(
    config: CompareConfig,
    texts: Sequence[str] | None = None,
    bar: Bar | None = None,
    say: Say | None = None,
    traces: tuple[DepthTrace | None, DepthTrace | None] = (None, None),
) -> Compared:
    """Compares what `config` names: two checkpoints, which are measured first, or two saved traces.

    Args:
        config: the settings.
        texts: prompts in place of `config.prompts.path`; of checkpoints only.
        bar: opens a progress bar for (what, how much, unit) and gives the function that advances it.
        say: called with a start-up line for each checkpoint.
        traces: in place of what `config.model.trace` and `config.reference.trace` name.

    Raises:
        UserError: for anything the caller can mend, in one sentence.
    """
    bar = bar or no_bar
    both: BothModels | None = None
    left_out = (0, 0)
    found = None
    measured = config.model.source is not None
    if measured:
        from spinal_jax.comparison.checkpoints import measure_checkpoints

        found = measure_checkpoints(config, texts, bar, say)
        aligned, reference, both, left_out = found.aligned, found.reference, found.both, found.left_out
    else:
        if texts is not None:
            raise UserError("prompts are given, but saved traces were measured on theirs; leave prompts out")
        aligned, reference = (
            trace or _trace_of(side) for trace, side in zip(traces, (config.model, config.reference), strict=True)
        )
        sides = ((aligned, config.model.trace), (reference, config.reference.trace))
        aligned, reference = _told_apart(sides) if not config.names else (aligned, reference)
    references = [saved_trace(run) for run in config.other_references] or [reference] * len(config.others)
    more = [saved_trace(run) for run in config.others]
    if config.names:
        aligned, *more = (
            replace(trace, model={**trace.model, "name": name})
            for trace, name in zip((aligned, *more), config.names, strict=True)
        )
    pairs = [(aligned, reference), *zip(more, references, strict=True)]
    weights = Weights(config.score.delta, config.score.coherence, config.score.gradient)
    comparisons = []
    with bar("compare", len(pairs), "pair") as advance:
        for number, pair in enumerate(pairs):
            extras, missing = (both, left_out) if number == 0 else (None, (0, 0))
            how = {"align": config.align, "same_prompts": config.same_prompts, "left_out": missing}
            comparisons.append(compare_traces(*pair, extras, weights=weights, **how))
            advance(1)
    first, *others = comparisons
    if found is not None and found.steps is not None and found.tokenizer is not None:
        first = replace(first, moved=found.steps.moved(first, found.tokenizer, config.keep_prompts))
    return Compared(first, tuple(others), aligned, reference, measured)


def compare(
    aligned: TraceSource,
    reference: TraceSource,
    prompts: str | os.PathLike[str] | Sequence[str] | None = None,
    *,
    preferences: str | os.PathLike[str] | None = None,
    step: int | tuple[int | None, int | None] | None = None,
    align: str | None = None,
    same_prompts: bool | None = None,
    beta: float | None = None,
    dtype: str | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Comparison:
    """How `aligned` differs from `reference`, where, and how sure that is.

    Both are saved traces (a `DepthTrace`, the run folder of an audit or of a training run, a trace.json), or both are
    checkpoints (hub id, folder, .gguf file), which are then measured on the same tokens.

    >>> spinal_jax.compare("runs/dpo", "runs/base").verdict  # doctest: +SKIP
    'differs, direction not robust'

    Every keyword that is None has the default of the setting.

    Args:
        aligned, reference: what is compared.
        prompts: of checkpoints: a file of JSON lines with a `prompt`, a list of texts, or None for the prompt set that
            ships with the package.
        preferences: of checkpoints: a file of Anthropic HH pairs, for the preference gradient, implicit rewards and the
            SPINALScore.
        step: of training runs: whose trace is taken, of both or of (aligned, reference); None takes the last.
        align: "relative" compares models of different depth by relative depth.
        same_prompts: False compares traces of different prompts, as a control.
        beta: of the DPO loss on `preferences`.
        dtype: of weights and forward, float32 or bfloat16.
        settings: more, as `spinal compare` takes them: {"prompts": {"limit": 64}, "score": {"gradient": 0}}. A setting
            that is also given by keyword must agree with it.
        progress: show progress bars.

    Raises:
        UserError: for anything the caller can mend, in one sentence.
    """
    from spinal_jax.config import CompareConfig, build, merged

    given: dict[str, Any] = copy.deepcopy(dict(settings or {}))
    if kept := [name for name in OF_THE_COMMAND if name in given]:
        raise UserError(
            f"settings has {kept[0]}, which belongs to the command spinal compare; spinal_jax.compare gives the "
            "comparison of one pair"
        )
    for name, side in (("aligned", aligned), ("reference", reference)):
        if not isinstance(side, (DepthTrace, str, os.PathLike)):
            raise UserError(
                f"{name} is a {type(side).__name__}; it takes a DepthTrace, a run folder, or a checkpoint (hub id, "
                "folder, .gguf file). A decoder in memory is first measured with spinal_jax.audit"
            )
    saved = [isinstance(side, DepthTrace) or holds_trace(side) for side in (aligned, reference)]
    if any(saved) and not all(saved):
        trace, model = ("aligned", "reference") if saved[0] else ("reference", "aligned")
        raise UserError(
            f"{trace} is a saved trace and {model} is a checkpoint; give two traces, of the same prompts, or two "
            "checkpoints"
        )
    steps = step if isinstance(step, tuple) else (step, step)
    if len(steps) != 2:
        raise UserError(f"step is {step!r}; it takes one step, or one of the aligned and one of the reference")
    asked: dict[str, Any] = {"align": align, "same_prompts": same_prompts, "beta": beta}
    for name, side, at in zip(("model", "reference"), (aligned, reference), steps, strict=True):
        if all(saved):
            asked[name] = {"trace": IN_MEMORY if isinstance(side, DepthTrace) else os.fspath(side), "step": at}
        else:
            asked[name] = {"source": os.fspath(side), "dtype": dtype, "step": at}  # type: ignore[arg-type]
    named = isinstance(prompts, (str, os.PathLike))
    if named:
        asked["prompts"] = {"path": os.fspath(prompts)}  # type: ignore[arg-type]
    if preferences is not None:
        asked["preferences"] = {"path": os.fspath(preferences)}
    config = build(CompareConfig, merged(given, asked))
    texts = None if named or prompts is None else list(prompts)
    bar = None
    if not all(saved):
        bar = bars(progress)
    elif named or preferences is not None:
        what = "prompts" if named else "preferences"
        raise UserError(f"{what} are given, but saved traces were measured on theirs; leave {what} out")
    traces = tuple(side if isinstance(side, DepthTrace) else None for side in (aligned, reference))
    return run_compare(config, texts, bar, traces=(traces[0], traces[1])).comparison


def _trace_of(side: ComparedConfig) -> DepthTrace:
    assert side.trace is not None
    return saved_trace(side.trace, side.step)


def _told_apart(sides: Sequence[tuple[DepthTrace, str | None]]) -> list[DepthTrace]:
    """Traces with the names of their run folders where their own are equal, such as the last step of two runs."""
    folders = [Path(folder or IN_MEMORY).resolve().name for _, folder in sides]
    names = [str(trace.model["name"]) for trace, _ in sides]
    if len({*names}) == len(names) or len({*folders}) < len(folders) or IN_MEMORY in folders:
        return [trace for trace, _ in sides]
    return [
        replace(trace, model={**trace.model, "name": f"{folder} ({name})"})
        for (trace, _), folder, name in zip(sides, folders, names, strict=True)
    ]
