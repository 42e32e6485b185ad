"""Training from what a user names to a trained, traced checkpoint in a run folder."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from spinal_jax.audit import pipeline
from spinal_jax.audit.trace import DepthTrace
from spinal_jax.comparison.onset import MAX_DISTANCE, Rules, Series, control_wobble, load_control, no_onset_sentence
from spinal_jax.config import to_mapping
from spinal_jax.config.training import TrainConfig
from spinal_jax.data.packing import Plan
from spinal_jax.errors import UserError
from spinal_jax.models import lora
from spinal_jax.models.config import DecoderConfig
from spinal_jax.models.formats.base import Checkpoint
from spinal_jax.models.formats.export import export
from spinal_jax.models.formats.memory import MemoryCheckpoint
from spinal_jax.models.parts import Parts, cast, take_apart
from spinal_jax.objectives.examples import Examples, read_examples
from spinal_jax.objectives.responses import (
    TRIED_STEPS,
    Example,
    ResponseBatch,
    Shape,
    choose_shape,
    longest_unit,
    shareable,
)
from spinal_jax.objectives.step import Arrays, Steps, TrainState, make_steps, zeroed_adapters
from spinal_jax.parallel.mesh import AXES, make_mesh, row_multiple, shard_parameters, shard_rows
from spinal_jax.train import reference as references
from spinal_jax.train.checkpoints import Checkpoints
from spinal_jax.train.folder import CHECKPOINTS, MODEL, TrainingFolder
from spinal_jax.train.history import History
from spinal_jax.train.loop import Diverged, Lookup, Task, evaluate, optimise
from spinal_jax.train.optimizer import optimizer, schedule

CPU_MICRO_TOKENS, ACCELERATOR_MICRO_TOKENS = 1024, 16384
# By how much the loss of the first step may differ from ln 2, the reference having been computed in another order.
FIRST_LOSS = {"float32": 1e-4, "bfloat16": 2e-2}
SAVES = 4  # parts of a run after each of which there is a checkpoint, where nothing is said
# Where nothing is said, traces come so often that they take about a twentieth of the time. In passes over a token: an
# audit is one forward, the lens and the spectra, a step a forward, another in the backward pass, and that.
TRACE_SHARE, TRACE_PASSES, STEP_PASSES = 0.05, 2.0, 4.0

Say = Callable[[str], None]


@dataclass(frozen=True)
class Trained:
    """What a run came to."""

    step: int  # how many updates the exported model has had
    metrics: dict[str, float]  # of the last step
    trace: DepthTrace  # the last one
    onset: dict[str, Any]  # what onset.json holds

    def __str__(self) -> str:
        shown = ("loss", "eval_loss", "rewards/margins", "eval_rewards/margins", "eval_rewards/accuracies")
        numbers = ", ".join(f"{name} {self.metrics[name]:.4g}" for name in shown if name in self.metrics)
        lines = [str(self.trace), f"  trained   {self.step} steps: {numbers}"]
        began, broke = self.onset["onset"], self.onset["destabilisation"]
        lines.append(f"  onset     {began['evidence'] if began else no_onset_sentence(self.onset)}")
        lines.append(f"  breaks    {broke['evidence'] if broke else 'No destabilisation'}")
        return "\n".join(lines)


def run_train(config: TrainConfig, folder: Path, bar: pipeline.Bar | None = None, say: Say | None = None) -> Trained:
    """Trains what `config` says into `folder`, going on where a run with the same settings was cut off.

    Args:
        config: the settings.
        folder: the run's, with the parts that `spinal_jax.train.folder` names.
        bar: opens progress bars.
        say: gets the start-up line and notable events.

    Raises:
        UserError: for anything the caller can mend.
        Diverged: the loss or a gradient is not finite. The state before that step is saved.
    """
    bar, say = bar or pipeline.bars(False), say or (lambda line: None)
    mesh = make_mesh(config.parallel)
    with contextlib.ExitStack() as stack:
        checkpoint, family, decoder = stack.enter_context(pipeline.opened(config.model))
        tokenizer = checkpoint.tokenizer()
        examples = read_examples(config, tokenizer, decoder)
        stop = config.steps or math.ceil(config.epochs * len(examples.train) / config.batch_size)
        shape = micro_shape(config, decoder, examples, stop, mesh)
        prompts = pipeline.read_prompt_set(config.prompts)
        pool = pipeline.plan_prompts(prompts, tokenizer, decoder, config.prompts, config.metrics)
        name, weights = config.model.name or pipeline.model_name(config.model.source), checkpoint.sha256()
        records = (
            pipeline.model_record(name, config.model.source, checkpoint.revision, config.model.dtype, weights),
            pipeline.prompts_record(prompts, config.prompts),
        )
        traces = due(config.trace_every or trace_interval(pool, examples, config.batch_size), stop)
        rules = onset_rules(config, traces)
        say(_start_line(name, config, decoder, examples, shape, stop, mesh))
        started_with = {
            "config": to_mapping(config),
            "weights": weights,
            "examples": references.fingerprint("", "", (*examples.train, *examples.held_out)),
            "prompts": prompts.sha256,
            "control": rules.control,
        }
        out = stack.enter_context(contextlib.closing(TrainingFolder(folder, started_with, config.overwrite)))

        model = pipeline.load(checkpoint, family, decoder, config.model.dtype, bar)
        if config.lora.rank:
            lora.attach(model, config.lora.rank, config.lora.alpha, config.lora.targets, config.seed)
        parts, parameters, fixed = split(model, config, mesh)
        del model
        method = optimizer(config.optimizer, stop)
        with jax.numpy_dtype_promotion("standard"):  # as in `make_steps`
            state = TrainState(parameters, shard_parameters(method.init(parameters), mesh), jnp.int32(0))
        remat = config.remat or ("all_but_linear" if jax.default_backend() == "cpu" else "blocks")
        steps = make_steps(parts, decoder, config.objective, method, dtype=config.compute_dtype, remat=remat)
        train, held_out, live = _reference(config, steps, parameters, fixed, examples, shape, mesh, stop, weights, bar)
        rate = schedule(config.optimizer, stop)
        task = Task(config, steps, fixed, examples, shape, mesh, rate, train, held_out, live)
        first = parts.assemble({**fixed, **parameters})
        history = stack.enter_context(
            contextlib.closing(History(first, pool, config.metrics, records, out, bar, rules))
        )
        del first, parameters
        saved = stack.enter_context(contextlib.closing(Checkpoints(folder / CHECKPOINTS, config.max_to_keep)))
        if saved.steps:
            state = saved.load(saved.steps[-1], state)
            say(f"going on from step {saved.steps[-1]} of {stop}")
        out.go_on(int(state.step))
        history.recall()
        try:
            state, metrics = _course(task, state, stop, traces, parts, history, saved, out, bar, say)
        except Diverged as error:
            saved.save(error.step, error.state)
            raise
        kept, state = _chosen(config, state, history, saved, say)
        _export(checkpoint, parts, {**fixed, **state.parameters}, folder / MODEL, name, bar)
        return Trained(kept, metrics, history.last, history.detected)


def split(model: Any, config: TrainConfig, mesh: Mesh) -> tuple[Parts, Arrays, Arrays]:
    """(structure, parameters that are trained, float32, and those that are not), each placed on the mesh."""
    parts, arrays = take_apart(model)
    trained = parts.paths(nnx.LoRAParam if config.lora.rank else nnx.Param)
    parameters = cast({name: arrays[name] for name in sorted(trained)}, jnp.float32)
    fixed = {name: x for name, x in arrays.items() if name not in trained}
    return parts, shard_parameters(parameters, mesh), shard_parameters(fixed, mesh)


def micro_shape(config: TrainConfig, decoder: DecoderConfig, examples: Examples, stop: int, mesh: Mesh) -> Shape:
    """The shape of micro-batches that suits the first steps."""
    micro = config.micro_tokens or (CPU_MICRO_TOKENS if jax.default_backend() == "cpu" else ACCELERATOR_MICRO_TOKENS)
    steps = [examples.step(n, config.batch_size, config.seed)[1] for n in range(min(stop, TRIED_STEPS))]
    shares_up_to = shareable(decoder) if config.objective.kind == "dpo" else 0
    longest = longest_unit((*examples.train, *examples.held_out), shares_up_to)
    return choose_shape(steps, longest, micro, row_multiple(mesh), shares_up_to)


def due(every: int | tuple[int, ...], stop: int) -> frozenset[int]:
    """At which of the steps 0 to `stop` something is due that is asked for `every` so often: always at 0 and `stop`. Of
    a list of steps, at these and at 0."""
    if isinstance(every, tuple):
        return frozenset({0, *(step for step in every if step <= stop)})
    return frozenset({*range(0, stop, every), stop})


def trace_interval(pool: Plan, examples: Examples, batch_size: int) -> int:
    """Steps between traces that cost about TRACE_SHARE of the training."""
    tokens = sum(len(sequence.ids) for example in examples.train for sequence in example)
    step = STEP_PASSES * batch_size * tokens / len(examples.train)
    return math.ceil(TRACE_PASSES * pool.padded_tokens / (TRACE_SHARE * step))


def onset_rules(config: TrainConfig, traces: frozenset[int]) -> Rules:
    """How onset and destabilisation are detected. Distance from step 0 counts only where step 0 is worth staying near:
    not for language modelling, and not from random weights.

    Raises:
        UserError: the control run has too few traces, or other distances between them than this run.
    """
    near = config.objective.kind != "lm" and not config.model.source.startswith("random:")
    control: dict[Series, float] | None = None
    if config.onset.control is not None:
        records, warmup = load_control(Path(config.onset.control).expanduser())
        control = control_wobble(records, warmup)
        theirs, ours = (float(np.median(np.diff(steps))) for steps in ([r.step for r in records], sorted(traces)))
        if theirs != ours:
            raise UserError(
                f"onset.control={config.onset.control} has a trace every {theirs:g} steps and this run every {ours:g}; "
                f"wobble compares at equal distances only: set trace_every={theirs:g}"
            )
    return Rules(config.optimizer.warmup_steps, control, MAX_DISTANCE if near else None)


def _start_line(
    name: str, config: TrainConfig, decoder: DecoderConfig, examples: Examples, shape: Shape, stop: int, mesh: Mesh
) -> str:
    objective = config.objective
    what = f"dpo ({objective.loss}, beta {objective.beta:g})" if objective.kind == "dpo" else objective.kind
    method = f"LoRA of rank {config.lora.rank}" if config.lora.rank else "all weights"
    sizes = " x ".join(str(mesh.shape[axis]) for axis in AXES)
    return (
        f"{name}: {decoder.family}, {decoder.depth} blocks of {decoder.width} | {what}, {method}, "
        f"{config.compute_dtype} | {jax.devices()[0].device_kind} x {jax.device_count()}, mesh {sizes} | "
        f"{len(examples.train):,} examples, {len(examples.held_out):,} held out, {sum(examples.dropped.values()):,} "
        f"left out | {stop:,} steps of {config.batch_size}, micro-batches of {shape.rows} x {shape.length} tokens"
    )


def _reference(
    config: TrainConfig,
    steps: Steps,
    parameters: Arrays,
    fixed: Arrays,
    examples: Examples,
    shape: Shape,
    mesh: Mesh,
    stop: int,
    weights: str,
    bar: pipeline.Bar,
) -> tuple[Lookup | None, Lookup | None, Arrays | None]:
    """Where log-probabilities under the reference come from: of training and of held-out examples, or the parameters of
    a reference that is computed beside each step."""
    if config.objective.kind != "dpo":
        return None, None, None
    if config.objective.reference == "live":
        base = zeroed_adapters(parameters) if config.lora.rank else parameters
        return None, None, jax.tree.map(jnp.copy, base)  # the parameters themselves are consumed by the first step

    def score(batch: ResponseBatch) -> np.ndarray:
        return np.asarray(steps.score(parameters, fixed, shard_rows(batch, mesh)))

    def cached(some: Sequence[Example], wanted: Sequence[int]) -> Lookup:
        name = references.fingerprint(weights, config.compute_dtype, some)
        file = references.cache_folder(config.objective.cache) / f"{name}.safetensors"
        logp = references.cached(file, len(some), len(some[0]))
        if unknown := [i for i in wanted if np.isnan(logp[i]).any()]:
            with bar("reference", len(unknown), "example") as advance:
                chosen = [some[i] for i in unknown]
                logp[unknown] = references.score_examples(chosen, config.batch_size, shape, score, advance)
            references.keep(file, logp)
        return lambda numbers: logp[list(numbers)]

    # In the order in which the run meets them, so that examples are packed as they will be.
    seen = list(dict.fromkeys(i for n in range(stop) for i in examples.step(n, config.batch_size, config.seed)[0]))
    held_out = examples.held_out
    return cached(examples.train, seen), cached(held_out, range(len(held_out))) if held_out else None, None


def _course(
    task: Task,
    state: TrainState,
    stop: int,
    traces: frozenset[int],
    parts: Parts,
    history: History,
    saved: Checkpoints,
    out: TrainingFolder,
    bar: pipeline.Bar,
    say: Say,
) -> tuple[TrainState, dict[str, float]]:
    """All steps that are left, and between them a checkpoint, an evaluation and a trace where they are due."""
    config, start = task.config, int(state.step)
    saves = due(config.save_every or -(-stop // SAVES), stop) - {0}
    if config.keep == "best_before_onset":
        saves |= traces
    evaluations = due(config.eval_every or stop, stop) | {stop} if task.examples.held_out else frozenset()
    logged = traces | saves | evaluations  # the step before: it stands beside a trace, also where a run goes on there
    last: dict[str, float] = {
        name: value for name, value in out.before.items() if isinstance(value, float) and not name.startswith("eval_")
    }

    def pause(step: int, state: TrainState) -> tuple[dict[str, float], str]:
        """What is due before step `step`: what was evaluated, and why the run is to end, or ""."""
        if step in saves:
            saved.save(step, state)
        found = evaluate(task, state.parameters) if step in evaluations else {}
        reached = config.until_eval_loss is not None and found.get("eval_loss", math.inf) <= config.until_eval_loss
        if step not in traces and not reached:
            return found, ""
        beside = {name: value for name, value in {**last, **found}.items() if "rewards/" in name}
        told = history.add(step, parts.assemble({**task.fixed, **state.parameters}), beside)
        saved.protect(told["healthy"])
        if reached:
            return found, f"the held-out loss is {found['eval_loss']:.4g}"
        broke = told["destabilisation"] if config.stop_on_destabilisation else None
        return found, broke["evidence"] if broke else ""

    with bar("train", stop, "step") as advance:
        advance(start)
        found, ends = pause(start, state)
        if not ends:
            for done in optimise(task, state, start, stop):
                state = done.state
                if done.number == 0:
                    _check_first(config, done.metrics)
                last = done.metrics
                if found or done.number % config.log_every == 0 or done.number + 1 in logged:
                    blocks = [float(norm) for norm in done.norms.blocks]
                    out.metrics(done.number, {**last, **found, "block_grad_norms": blocks})
                advance(1)
                found, ends = pause(done.number + 1, state)
                if ends:
                    break
    step = int(state.step)
    if found:
        out.metrics(step, found)
    if ends:
        say(f"stopped after step {step} of {stop}: {ends}")
    elif config.until_eval_loss is not None:
        say(f"the held-out loss has not come down to {config.until_eval_loss:g} in {stop} steps")
    saved.save(step, state)
    saved.wait()
    return state, {**last, **found}


def _check_first(config: TrainConfig, metrics: dict[str, float]) -> None:
    """At step 0 policy and reference are one: the sigmoid loss is ln 2. AssertionError where it is not."""
    objective = config.objective
    if objective.kind != "dpo" or objective.loss not in ("sigmoid", "cdpo", "robust"):
        return
    off = max(abs(metrics["loss"] - math.log(2)), abs(metrics["rewards/margins"]))
    if not off < FIRST_LOSS[config.compute_dtype]:
        raise AssertionError(f"the first loss is {metrics['loss']:.6f}, not ln 2: policy and reference differ")


def _chosen(
    config: TrainConfig, state: TrainState, history: History, saved: Checkpoints, say: Say
) -> tuple[int, TrainState]:
    """The step whose weights are the run's result, and its state."""
    healthy = int(history.detected["healthy"])
    if config.keep == "last" or history.detected["destabilisation"] is None:
        return int(state.step), state
    say(f"keeping step {healthy}, the last healthy one")
    return healthy, saved.load(healthy, state)


def _export(checkpoint: Checkpoint, parts: Parts, arrays: Arrays, out: Path, name: str, bar: pipeline.Bar) -> None:
    """The model as a Hugging Face folder, adapters merged into its weights."""
    model = parts.assemble(arrays)
    lora.merge(model)
    whole = take_apart(model)[1]
    memory = MemoryCheckpoint(name, dict(checkpoint.config), whole, checkpoint.tokenizer())
    memory.folder = getattr(checkpoint, "folder", None)
    export(memory, str(out), overwrite=True, bar=bar)
