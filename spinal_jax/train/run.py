"""One training run from its settings to a trained checkpoint and its depth traces in a run folder."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from spinal_jax.audit import pipeline
from spinal_jax.audit.devices import devices_of
from spinal_jax.audit.gram_store import gram_home
from spinal_jax.audit.trace import DepthTrace
from spinal_jax.comparison.onset import no_onset_sentence
from spinal_jax.comparison.step_records import MAX_DISTANCE, Rules, Series, control_wobble, load_control
from spinal_jax.config import to_mapping
from spinal_jax.config.training import MOST_STEPS, TrainConfig
from spinal_jax.data.packing import Plan
from spinal_jax.errors import NotLeader, UserError
from spinal_jax.jsontypes import Json
from spinal_jax.models import lora
from spinal_jax.models.config import DecoderConfig
from spinal_jax.models.decoder import Decoder
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
from spinal_jax.parallel import device_defaults
from spinal_jax.parallel.agreement import check_shared, leads, of_leader, to_host
from spinal_jax.parallel.distributed import check_same
from spinal_jax.parallel.mesh import (
    AXES,
    make_mesh,
    on_all,
    parameter_shardings,
    placed,
    row_multiple,
    shard_parameters,
    shard_rows,
)
from spinal_jax.parallel.placement import Choice, Shards
from spinal_jax.progress import Advance, Bar, Say, no_bar
from spinal_jax.report.training import write_training_report
from spinal_jax.runs import folder as run_folder
from spinal_jax.train import reference as references
from spinal_jax.train.checkpoints import Checkpoints
from spinal_jax.train.course import due, run_course
from spinal_jax.train.folder import CHECKPOINTS, MODEL, TrainingFolder
from spinal_jax.train.history import History
from spinal_jax.train.loop import Diverged, Lookup, Task
from spinal_jax.train.optimizer import optimizer, schedule
from spinal_jax.train.result import chosen, export_result

FULL_COPIES = 4  # copies of the weights in full training: parameters, two moments, reference
# By default traces take about a twentieth of the time. Costs are in forward passes: an audit is a forward pass, the
# lens and the spectra; a step is a forward pass, its recomputation, and a backward pass.
TRACE_SHARE, TRACE_PASSES, STEP_PASSES = 0.05, 2.0, 4.0


@dataclass(frozen=True)
class Trained:
    """Result of a training run."""

    step: int  # number of updates of the exported model
    metrics: dict[str, float]  # of the last step
    trace: DepthTrace  # of the last step
    onset: Json  # content of onset.json
    folder: Path  # run folder, with the weights in `model`
    seconds: dict[str, float]  # time of each stage

    def __str__(self) -> str:
        shown = ("loss", "eval_loss", "rewards/margins", "eval_rewards/margins", "eval_rewards/accuracies")
        numbers = ", ".join(f"{name} {self.metrics[name]:.4g}" for name in shown if name in self.metrics)
        lines = [str(self.trace), f"  trained   {self.step} steps: {numbers}"]
        began, broke = self.onset["onset"], self.onset["destabilisation"]
        lines.append(f"  onset     {began['evidence'] if began else no_onset_sentence(self.onset)}")
        lines.append(f"  breaks    {broke['evidence'] if broke else 'No destabilisation'}")
        return "\n".join(lines)


def run_train(config: TrainConfig, folder: Path, bar: Bar | None = None, say: Say | None = None) -> Trained:
    """Runs a training run, or resumes an interrupted one with the same settings.

    If several processes share the run, each loads the weights of its devices, builds its rows of every batch, and saves
    its part of every checkpoint; process 0 writes all other files. SIGTERM at one process ends all of them after a step
    whose state is saved.

    Args:
        config: the settings.
        folder: run folder, with the files of `spinal_jax.train.folder`, a page and a manifest.
        bar: opens progress bars.
        say: called with the start-up line and with events.

    Raises:
        UserError: for a mistake in the settings or the inputs.
        Diverged: the loss or a gradient is not finite. The state before that step is saved.
        NotLeader: in all but process 0, when the run is complete.
        StoppedElsewhere: another process was asked to stop.
    """
    seconds: dict[str, float] = {}
    bar, say = _timed(bar or no_bar, seconds), (say if leads() else None) or (lambda line: None)
    mesh = make_mesh(config.parallel)
    with contextlib.ExitStack() as stack:
        checkpoint, family, decoder = stack.enter_context(pipeline.opened(config.model))
        tokenizer = checkpoint.tokenizer()
        examples = read_examples(config, tokenizer, decoder)
        stop = config.steps or steps_of_epochs(config, len(examples.train))
        shape = micro_shape(config, decoder, examples, stop, mesh)
        prompts = pipeline.read_prompt_set(config.prompts)
        choice = Choice(
            Shards.of(mesh, pipeline.unembedding_bytes(decoder, config.model.dtype)) if mesh.size > 1 else None, None
        )
        devices = devices_of(choice)
        slots = gram_home(decoder, config.metrics, state_bytes(config, decoder), devices).slots
        traced_prompts = pipeline.plan_prompts(
            prompts, tokenizer, decoder, config.prompts, config.metrics, devices=devices, slots=slots
        )
        name, weights = config.model.name or pipeline.model_name(config.model.source), checkpoint.sha256()
        records = (
            pipeline.model_record(name, config.model.source, checkpoint.revision, config.model.dtype, weights),
            pipeline.prompts_record(prompts, config.prompts),
        )
        traces = due(config.trace_every or trace_interval(traced_prompts, examples, config.batch_size), stop)
        rules = onset_rules(config, traces)
        say(_start_line(name, config, decoder, examples, shape, stop, mesh))
        started_with = {
            "config": to_mapping(config),
            "weights": weights,
            "examples": references.fingerprint("", "", (*examples.train, *examples.held_out)),
            "prompts": prompts.sha256,
            "control": rules.control,
        }
        pipeline.check_processes_agree(checkpoint, tokenizer, traced_prompts, choice)
        check_same({"examples": started_with["examples"], "onset.control": repr(rules.control)})
        pipeline.check_weights(checkpoint, weights)
        out = None
        if leads():
            out = stack.enter_context(contextlib.closing(TrainingFolder(folder, started_with, config.overwrite)))
        check_shared(folder)

        model = pipeline.load(checkpoint, family, decoder, config.model.dtype, bar, devices)
        if config.lora.rank:
            lora.attach(model, config.lora.rank, config.lora.alpha, config.lora.targets, config.seed)
        parts, parameters, fixed = split_parameters(model, config, mesh)
        del model
        method = optimizer(config.optimizer, stop)
        state = begin(parameters, method, mesh)
        remat = config.remat or ("all_but_linear" if jax.default_backend() == "cpu" else "blocks")
        steps = make_steps(parts, decoder, config.objective, method, dtype=config.compute_dtype, remat=remat, mesh=mesh)
        train, held_out, live = _reference(config, steps, parameters, fixed, examples, shape, mesh, stop, weights, bar)
        rate = schedule(config.optimizer, stop)
        task = Task(config, steps, fixed, examples, shape, mesh, rate, train, held_out, live)
        first = parts.assemble({**fixed, **parameters})
        history = stack.enter_context(
            contextlib.closing(History(first, traced_prompts, config.metrics, records, out, bar, rules, devices))
        )
        del first, parameters
        saved = stack.enter_context(contextlib.closing(Checkpoints(folder / CHECKPOINTS, config.max_to_keep)))
        if saved.latest is not None:
            state = saved.load(saved.latest, state)
            say(f"going on from step {saved.latest} of {stop}")
        if out is not None:
            out.go_on(int(state.step))
        history.recall()
        try:
            state, metrics = run_course(task, state, stop, traces, parts, history, saved, out, bar, say)
        except Diverged as error:
            saved.save(error.step, error.state)
            raise
        kept, state = chosen(config, state, history, saved, say)
        export_result(checkpoint, parts, {**fixed, **state.parameters}, folder / MODEL, name, bar)
        if history.last is None:
            raise NotLeader
        trained = Trained(kept, metrics, history.last, history.detected, folder, seconds)
    with bar("report", 1, "page") as advance:
        write_training_report(folder)
        advance(1)
    run_folder.write_manifest(folder, "train", to_mapping(config), run_folder.about_trace(trained.trace), seconds)
    return trained


def _timed(bar: Bar, seconds: dict[str, float]) -> Bar:
    """Progress bars that add the time of each stage to `seconds`."""

    @contextlib.contextmanager
    def opened(what: str, total: int, unit: str) -> Iterator[Advance]:
        begin = time.perf_counter()
        with bar(what, total, unit) as advance:
            yield advance
        seconds[what] = round(seconds.get(what, 0.0) + time.perf_counter() - begin, 3)

    return opened


def begin(parameters: Arrays, method: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state before the first step."""
    with jax.numpy_dtype_promotion("standard"):  # as in `make_steps`
        shardings = parameter_shardings(jax.eval_shape(method.init, parameters), mesh)
        moments = jax.jit(method.init, out_shardings=shardings)(parameters)
    return TrainState(parameters, moments, placed(np.int32(0), on_all(mesh)))


def split_parameters(model: Decoder, config: TrainConfig, mesh: Mesh) -> tuple[Parts, Arrays, Arrays]:
    """(structure, trained parameters in float32, frozen parameters), placed on the mesh."""
    parts, arrays = take_apart(model)
    trained = parts.paths(nnx.LoRAParam if config.lora.rank else nnx.Param)
    parameters = cast({name: arrays[name] for name in sorted(trained)}, jnp.float32)
    fixed = {name: x for name, x in arrays.items() if name not in trained}
    return parts, shard_parameters(parameters, mesh), shard_parameters(fixed, mesh)


def state_bytes(config: TrainConfig, decoder: DecoderConfig) -> int:
    """Bytes of the training state during a trace, over all devices."""
    return pipeline.weight_bytes(decoder, config.model.dtype) * (1 if config.lora.rank else FULL_COPIES)


def steps_of_epochs(config: TrainConfig, examples: int) -> int:
    """The steps in which `config.epochs` passes over this many examples are made. Raises UserError for too many."""
    steps = config.epochs * examples / config.batch_size
    if steps > MOST_STEPS:
        raise UserError(f"epochs is {config.epochs:g}, which makes {steps:.3g} steps; {MOST_STEPS:,} are the most")
    return math.ceil(steps)


def micro_shape(config: TrainConfig, decoder: DecoderConfig, examples: Examples, stop: int, mesh: Mesh) -> Shape:
    """The micro-batch shape with the least cost over the first steps."""
    micro = config.micro_tokens or device_defaults.training_tokens(jax.default_backend())
    steps = [examples.step(n, config.batch_size, config.seed)[1] for n in range(min(stop, TRIED_STEPS))]
    shares_up_to = shareable(decoder) if config.objective.kind == "dpo" else 0
    longest = longest_unit((*examples.train, *examples.held_out), shares_up_to)
    return choose_shape(steps, longest, micro, row_multiple(mesh), shares_up_to)


def trace_interval(traced_prompts: Plan, examples: Examples, batch_size: int) -> int:
    """Steps between traces, so that these take about TRACE_SHARE of the time. Independent of the devices, so that a
    resumed run has its traces at the same steps."""
    tokens = sum(len(sequence.ids) for example in examples.train for sequence in example)
    step = STEP_PASSES * batch_size * tokens / len(examples.train)
    return math.ceil(TRACE_PASSES * traced_prompts.tokens / (TRACE_SHARE * step))


def onset_rules(config: TrainConfig, traces: frozenset[int]) -> Rules:
    """The rules of onset detection. The rule on the distance from step 0 is off for language modelling and for random
    initial weights.

    Raises:
        UserError: the control run has too few traces, or another interval between them.
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
    shared = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return (
        f"{name}: {decoder.family}, {decoder.depth} blocks of {decoder.width} | {what}, {method}, "
        f"{config.compute_dtype} | {jax.devices()[0].device_kind} x {jax.device_count()}{shared}, mesh {sizes} | "
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
    bar: Bar,
) -> tuple[Lookup | None, Lookup | None, Arrays | None]:
    """Lookups of reference log-probabilities for training and held-out examples, or the parameters of a reference
    that is evaluated in each step."""
    if config.objective.kind != "dpo":
        return None, None, None
    if config.objective.reference == "live":
        base = zeroed_adapters(parameters) if config.lora.rank else parameters
        return None, None, jax.tree.map(jnp.copy, base)  # a copy, because the first step donates the parameters

    def score(batch: ResponseBatch) -> np.ndarray:
        return np.asarray(to_host(steps.score(parameters, fixed, shard_rows(batch, mesh))))

    def cached(some: Sequence[Example], wanted: Sequence[int]) -> Lookup:
        name = references.fingerprint(weights, config.compute_dtype, some)
        file = references.cache_folder(config.objective.cache) / f"{name}.safetensors"
        unknown_yet = np.full((len(some), len(some[0])), np.nan, np.float32)
        # Hosts may have different caches, but must run the same computations.
        logp = of_leader(references.cached(file, *unknown_yet.shape) if leads() else unknown_yet)
        if unknown := [i for i in wanted if np.isnan(logp[i]).any()]:
            with bar("reference", len(unknown), "example") as advance:
                chosen = [some[i] for i in unknown]
                logp[unknown] = references.score_examples(chosen, config.batch_size, shape, score, advance)
            if leads():
                references.save_cached(file, logp)
        return lambda numbers: logp[list(numbers)]

    # In the order of training, so that examples are packed as in training.
    seen = list(dict.fromkeys(i for n in range(stop) for i in examples.step(n, config.batch_size, config.seed)[0]))
    held_out = examples.held_out
    return cached(examples.train, seen), cached(held_out, range(len(held_out))) if held_out else None, None
