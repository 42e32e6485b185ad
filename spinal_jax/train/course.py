"""The loop of a training run: optimiser steps, checkpoints, evaluations and traces."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

from spinal_jax.config.training import TrainConfig
from spinal_jax.errors import StoppedElsewhere
from spinal_jax.models.parts import Parts
from spinal_jax.objectives.step import TrainState
from spinal_jax.parallel.agreement import StopRequests, of_leader
from spinal_jax.progress import Advance, Bar, Say
from spinal_jax.train.checkpoints import Checkpoints
from spinal_jax.train.folder import TrainingFolder
from spinal_jax.train.history import History
from spinal_jax.train.loop import Task, evaluate, optimise

# Tolerance for the first loss against ln 2; the reference is computed in another order.
FIRST_LOSS = {"float32": 1e-4, "bfloat16": 2e-2}
SAVES = 4  # default number of checkpoints in a run


def due(every: int | tuple[int, ...], stop: int) -> frozenset[int]:
    """The steps from 0 to `stop` at which something is due: 0, `stop` and multiples of `every`; or 0 and a list of
    steps."""
    if isinstance(every, tuple):
        return frozenset({0, *(step for step in every if step <= stop)})
    return frozenset({*range(0, stop, every), stop})


def run_course(
    task: Task,
    state: TrainState,
    stop: int,
    traces: frozenset[int],
    parts: Parts,
    history: History,
    saved: Checkpoints,
    out: TrainingFolder | None,
    bar: Bar,
    say: Say,
) -> tuple[TrainState, dict[str, float]]:
    """Runs the remaining steps, with checkpoints, evaluations and traces when they are due."""
    config, start = task.config, int(state.step)
    saves = due(config.save_every or -(-stop // SAVES), stop) - {0}
    if config.keep == "best_before_onset":
        saves |= traces
    evaluations = due(config.eval_every or stop, stop) | {stop} if task.examples.held_out else frozenset()
    logged = traces | saves | evaluations  # the step before: it stands beside a trace, also where a run goes on there
    last: dict[str, float] = {
        name: value
        for name, value in (out.before if out is not None else {}).items()
        if isinstance(value, float) and not name.startswith("eval_")
    }
    requests = StopRequests()

    def pause(step: int, state: TrainState) -> tuple[dict[str, float], str]:
        """Does what is due before a step. Returns the evaluation and the reason to end the run, or ""."""
        if step in saves:
            saved.save(step, state)
        evaluated = evaluate(task, state.parameters) if step in evaluations else {}
        reached = False
        if config.until_eval_loss is not None and evaluated:
            reached = of_leader(evaluated["eval_loss"] <= config.until_eval_loss)
        if step not in traces and not reached:
            return evaluated, ""
        beside = {name: value for name, value in {**last, **evaluated}.items() if "rewards/" in name}
        model = parts.assemble({**task.fixed, **state.parameters})
        health = history.add(step, model, beside, _heeding(bar, requests))
        saved.protect(health.step)
        if reached:
            return evaluated, f"the held-out loss is {evaluated['eval_loss']:.4g}"
        return evaluated, health.destabilised if config.stop_on_destabilisation else ""

    with requests, bar("train", stop, "step") as advance:
        advance(start)
        try:
            evaluated, ends = pause(start, state)
            if not ends:
                for done in optimise(task, state, start, stop):
                    state = done.state
                    if done.number == 0:
                        _check_first(config, done.metrics)
                    last = done.metrics
                    logs = evaluated or done.number % config.log_every == 0 or done.number + 1 in logged
                    if out is not None and logs:
                        blocks = [float(norm) for norm in done.norms.blocks]
                        out.metrics(done.number, {**last, **evaluated, "block_grad_norms": blocks})
                    advance(1)
                    evaluated, ends = pause(done.number + 1, state)
                    if ends:
                        break
                    requests.check()
        except StoppedElsewhere:
            saved.save(int(state.step), state)
            saved.wait()
            raise
        step = int(state.step)
        if out is not None and evaluated:
            out.metrics(step, evaluated)
        if ends:
            say(f"stopped after step {step} of {stop}: {ends}")
        elif config.until_eval_loss is not None:
            say(f"the held-out loss has not come down to {config.until_eval_loss:g} in {stop} steps")
        saved.save(step, state)
        saved.wait()
    return state, {**last, **evaluated}


def _heeding(bar: Bar, requests: StopRequests) -> Bar:
    """A progress bar that ends a trace between batches if a process was asked to stop."""

    @contextlib.contextmanager
    def opened(what: str, total: int, unit: str) -> Iterator[Advance]:
        def advanced(amount: int) -> None:
            advance(amount)
            if what == "audit":  # whose batches are equal in all processes
                requests.check()

        with bar(what, total, unit) as advance:
            yield advanced

    return opened


def _check_first(config: TrainConfig, metrics: dict[str, float]) -> None:
    """Asserts that the sigmoid loss of step 0, where policy and reference are equal, is ln 2."""
    objective = config.objective
    if objective.kind != "dpo" or objective.loss not in ("sigmoid", "cdpo", "robust"):
        return
    off = max(abs(metrics["loss"] - math.log(2)), abs(metrics["rewards/margins"]))
    if not off < FIRST_LOSS[config.compute_dtype]:
        raise AssertionError(f"the first loss is {metrics['loss']:.6f}, not ln 2: policy and reference differ")
