"""`spinal watch`: audits the checkpoints that a trainer writes into a folder, while it writes them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spinal_jax.audit import pipeline
from spinal_jax.audit.devices import Devices, devices_of
from spinal_jax.audit.measure import Reference, keep_reference, measure
from spinal_jax.audit.measurement import Measurement
from spinal_jax.audit.trace import DepthTrace
from spinal_jax.comparison.onset import no_onset_sentence
from spinal_jax.comparison.step_records import Rules
from spinal_jax.config import ModelConfig, to_mapping
from spinal_jax.config.watch import WatchConfig
from spinal_jax.data.packing import Plan
from spinal_jax.errors import UserError
from spinal_jax.jsontypes import Json
from spinal_jax.models.config import DecoderConfig
from spinal_jax.progress import Bar, Say, no_bar
from spinal_jax.recording.checkpoints import checkpoints, has_ended, trainer_metrics
from spinal_jax.recording.series import TraceSeries


@dataclass(frozen=True)
class Watched:
    """Result of `spinal watch`."""

    folder: Path
    steps: list[int]  # steps with a trace
    onset: Json  # the content of onset.json

    def __str__(self) -> str:
        began, broke = self.onset["onset"], self.onset["destabilisation"]
        return "\n".join(
            [
                f"{len(self.steps)} traces at steps {', '.join(map(str, self.steps)) or 'none'}",
                f"  onset     {began['evidence'] if began else no_onset_sentence(self.onset)}",
                f"  breaks    {broke['evidence'] if broke else 'No destabilisation'}",
            ]
        )


def run_watch(config: WatchConfig, folder: Path, bar: Bar | None = None, say: Say | None = None) -> Watched:
    """Measures the complete checkpoints of `config.dir` until training ends or `stop_file` exists, or only once if
    `once` is set. Traces of earlier calls are kept.

    Incomplete checkpoints are tried again later; checkpoints that are deleted while they are read are skipped.

    Args:
        config: the settings.
        folder: for traces, onset.json, metrics.jsonl, report.html and TensorBoard's events.
        bar: opens progress bars.
        say: called with a line for each checkpoint.

    Raises:
        UserError: no such folder, an unreadable checkpoint, another tokenizer than that of the reference, or the first
            checkpoint, which is the reference, was deleted.
    """
    bar, say = bar or no_bar, say or (lambda line: None)
    root = Path(config.dir).expanduser()
    if not root.is_dir():
        raise UserError(f"dir={config.dir} is no folder; give the folder into which the trainer writes checkpoints")
    series = TraceSeries(folder, _comparable(config), Rules(config.warmup_steps))
    watch = _Watch(config, root, series, bar, say)
    with contextlib.closing(series), contextlib.closing(watch):
        while True:
            ends = config.once or has_ended(root) or (config.stop_file is not None and Path(config.stop_file).exists())
            watch.look()
            if ends:
                return Watched(folder, series.steps, series.detected)
            time.sleep(config.poll_seconds)


def _comparable(config: WatchConfig) -> Json:
    """The settings that affect results, without waiting times and commands."""
    free = ("poll_seconds", "settle_seconds", "once", "stop_file", "on_destabilisation")
    kept = {name: value for name, value in to_mapping(config).items() if name not in free}
    return {"source": kept.pop("dir"), **kept}


class _Watch:
    """State of a watch: reference, tokenised prompts, and traces."""

    def __init__(self, config: WatchConfig, root: Path, series: TraceSeries, bar: Bar, say: Say):
        self.config, self.root, self.series, self.bar, self.say = config, root, series, bar, say
        self.prompts = pipeline.read_prompt_set(config.prompts)
        self.plan: Plan | None = None
        self.devices: Devices | None = None
        self.slots: int | None = None
        self.reference: Reference | None = None
        self.first: DepthTrace | None = None
        self.drawn = not series.steps  # an earlier watch may have ended before it wrote the page

    def close(self) -> None:
        """Frees the reference."""
        if self.reference is not None:
            self.reference.close()

    def look(self) -> None:
        """Measures complete checkpoints without a trace and updates the page."""
        last = self.series.steps[-1] if self.series.steps else -1
        for step, path in checkpoints(self.root, 0.0 if self.config.once else self.config.settle_seconds):
            if step <= last:
                continue
            try:
                self._measure(step, path)
            except (UserError, OSError):
                if path.exists():
                    raise
                self.say(f"{path.name} was deleted while it was read; passed over")
        if not self.drawn:
            self.series.metrics(trainer_metrics(self.root))
            self.series.report()
            self.drawn = True

    def _measure(self, step: int, path: Path) -> None:
        """Adds the trace of a checkpoint."""
        if self.reference is None:
            self._keep_reference(path)
        assert self.plan is not None
        assert self.first is not None
        model = ModelConfig(
            source=str(path), base=self.config.base, dtype=self.config.dtype, ignore_keys=self.config.ignore_keys
        )
        trace, measurement = self._audit(model, self.plan)
        policy = measurement.policy
        assert policy is not None
        if self.config.reference.source is None and not self.series.steps:
            trace = self.first
        before = self.series.detected["destabilisation"]
        detected = self.series.add(step, trace, self.first, policy, self._beside(step))
        self.say(f"{path.name}: Delta_align {self.series.records[-1].delta_align:.3g}")
        self.drawn = False
        if detected["destabilisation"] is not None and before is None:
            self._act(detected["destabilisation"])

    def _keep_reference(self, first: Path) -> None:
        """Runs the reference model: that of the settings, or the first checkpoint."""
        named = self.config.reference
        if named.source is not None:
            asked = ModelConfig(
                source=named.source,
                revision=named.revision,
                base=named.base,
                dtype=self.config.dtype,
                ignore_keys=self.config.ignore_keys,
            )
        else:
            if self.series.steps:
                first_step = self.series.steps[0]
                there = dict(checkpoints(self.root, 0.0))
                if first_step not in there:
                    raise UserError(
                        f"the checkpoint of step {first_step}, with which all are compared, is gone from {self.root}; "
                        "keep it there, or name a reference with reference.source"
                    )
                first = there[first_step]
            asked = ModelConfig(
                source=str(first), base=self.config.base, dtype=self.config.dtype, ignore_keys=self.config.ignore_keys
            )
        config = self.config
        with pipeline.opened(asked) as (checkpoint, family, decoder):
            choice = pipeline.choose_devices(config.parallel, decoder, config.dtype, config.metrics)
            self.devices = devices_of(choice)
            self.slots = pipeline.audit_gram_home(decoder, config.dtype, config.metrics, self.devices).slots
            self.plan = self._plan(checkpoint.tokenizer(), decoder)
            model, digest = pipeline.load_hashed(checkpoint, family, decoder, config.dtype, self.bar, self.devices)
            about = self._about(asked, checkpoint.revision, digest)
            self.reference = keep_reference(
                model, self.plan, config.metrics, self.bar, alone=True, devices=self.devices
            )
        assert self.reference.measurement is not None
        self.first = self._trace(about, decoder, self.plan, self.reference.measurement)

    def _audit(self, asked: ModelConfig, plan: Plan) -> tuple[DepthTrace, Measurement]:
        config = self.config
        with pipeline.opened(asked) as (checkpoint, family, decoder):
            own = self._plan(checkpoint.tokenizer(), decoder)
            if pipeline.tokens_sha256(own.sequences) != pipeline.tokens_sha256(plan.sequences):
                raise UserError(
                    f"the tokenizer of {asked.source} makes other tokens of the prompts than that of the reference"
                )
            if _vocabulary(own) != _vocabulary(plan):
                raise UserError(
                    f"the vocabulary of {asked.source} is not that of the reference; leave reference.source out, so "
                    "that the first checkpoint is the reference"
                )
            model, digest = pipeline.load_hashed(checkpoint, family, decoder, config.dtype, self.bar, self.devices)
            about = self._about(asked, checkpoint.revision, digest)
        measurement = measure(model, plan, config.metrics, self.bar, self.reference, self.devices)
        return self._trace(about, decoder, plan, measurement), measurement

    def _plan(self, tokenizer: Any, decoder: DecoderConfig) -> Plan:
        config = self.config
        return pipeline.plan_prompts(
            self.prompts, tokenizer, decoder, config.prompts, config.metrics, None, self.devices, self.slots
        )

    def _about(self, asked: ModelConfig, revision: str | None, sha256: str) -> Json:
        name = pipeline.model_name(asked.source)
        return pipeline.model_record(name, asked.source, revision, asked.dtype, sha256)

    def _trace(self, about: Json, decoder: DecoderConfig, plan: Plan, measurement: Measurement) -> DepthTrace:
        prompts = pipeline.prompts_record(self.prompts, self.config.prompts)
        return pipeline.depth_trace(about, prompts, decoder, self.config.metrics, plan, measurement)

    def _beside(self, step: int) -> dict[str, float]:
        """The last preference metrics of the trainer up to a step."""
        known: dict[str, float] = {}
        for line in trainer_metrics(self.root):
            if line["step"] <= step:
                known |= {name: float(value) for name, value in line.items() if "rewards/" in name}
        return known

    def _act(self, broke: Json) -> None:
        self.say(f"destabilised at step {broke['step']}: {broke['evidence']}")
        if self.config.on_destabilisation is not None:
            environment = {**os.environ, "SPINAL_STEP": str(broke["step"]), "SPINAL_EVIDENCE": broke["evidence"]}
            code = subprocess.run(self.config.on_destabilisation, shell=True, env=environment, check=False).returncode
            self.say(f"on_destabilisation ended with exit code {code}")


def _vocabulary(plan: Plan) -> tuple[int, str] | None:
    return None if plan.vocabulary is None else (plan.vocabulary.rows, plan.vocabulary.sha256)
