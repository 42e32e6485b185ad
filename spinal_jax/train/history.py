"""Traces of a training run on fixed prompts, each compared with that of step 0."""

from __future__ import annotations

import hashlib
import json
from typing import NamedTuple

from spinal_jax.audit import pipeline
from spinal_jax.audit.devices import Devices
from spinal_jax.audit.measure import Reference, keep_reference, measure
from spinal_jax.audit.measurement import Measurement
from spinal_jax.audit.trace import DepthTrace
from spinal_jax.comparison.compare import BothModels, compare_traces
from spinal_jax.comparison.onset import detect, save_onset
from spinal_jax.comparison.record import Comparison, save_comparison
from spinal_jax.comparison.sources import step_folders, step_name
from spinal_jax.comparison.step_records import Rules, StepRecord, recall, record_of
from spinal_jax.config import MetricsConfig
from spinal_jax.data.packing import Plan
from spinal_jax.errors import NotLeader
from spinal_jax.files import load_json_file, malformed
from spinal_jax.jsontypes import Json
from spinal_jax.models.decoder import Decoder
from spinal_jax.parallel.agreement import of_leader
from spinal_jax.progress import Bar
from spinal_jax.train.folder import ONSET, TRACES, TrainingFolder


class Health(NamedTuple):
    """What the traces so far say of a run, the same in every process."""

    step: int  # the last healthy one
    destabilised: str  # the evidence; empty where it has not


class History:
    """Traces so far. The model of step 0 is the reference of all that follow.

    All processes that share a run measure; the leading one keeps and writes the results.

    Attributes:
        health: what the traces so far say of the run.
    """

    def __init__(
        self,
        model: Decoder,
        prompts: Plan,
        settings: MetricsConfig,
        records: tuple[Json, Json],
        out: TrainingFolder | None,
        bar: Bar,
        rules: Rules,
        devices: Devices,
    ):
        """Measures the model of step 0.

        Args:
            model: the policy before any step.
            prompts: the batches of the prompts.
            settings: what is measured.
            records: the sections "model" and "prompts" of the traces.
            out: the run's folder; None in processes that do not lead.
            bar: opens progress bars.
            rules: by which onset and destabilisation are detected.
            devices: what the traces are measured on: those that train.
        """
        self.prompts, self.settings, self.out = prompts, settings, out
        self.rules = rules
        self.model_record, self.prompts_record = records
        self.config = model.config
        self.reference: Reference = keep_reference(model, prompts, settings, bar, alone=True, devices=devices)
        self.first = self.last = self._trace(self.reference.measurement, 0) if self.reference.measurement else None
        self.records: list[StepRecord] = []
        self.beside: list[dict[str, float]] = []
        self.detected = detect([], [], rules)
        self.health = _health(self.detected)

    def close(self) -> None:
        """Frees what is kept of the model of step 0."""
        self.reference.close()

    def recall(self) -> None:
        """Takes up what a run that was cut off has written."""
        if self.out is not None and (file := self.out.folder / ONSET).exists():
            with malformed(file):
                self.records, self.beside, _ = recall(load_json_file(file, finite=True), step_folders(self.out.folder))
            self.detected = detect(self.records, self.beside, self.rules)
        self.health = Health(*of_leader(_health(self.detected)))

    def add(self, step: int, model: Decoder, beside: dict[str, float], bar: Bar) -> Health:
        """Measures the policy after `step` updates, writes the trace, and returns the health of the run.

        Args:
            step: how many updates were done.
            model: the policy.
            beside: what else is known of it: reward margin and accuracy.
            bar: opens progress bars.
        """
        try:
            measurement = measure(model, self.prompts, self.settings, bar, self.reference)
        except NotLeader:
            pass
        else:
            self._add(step, measurement, beside)
        self.health = Health(*of_leader(_health(self.detected)))
        return self.health

    def _add(self, step: int, measurement: Measurement, beside: dict[str, float]) -> None:
        assert self.out is not None
        assert self.first is not None
        trace = self.first if step == 0 else self._trace(measurement, step)
        policy = measurement.policy
        assert policy is not None
        both = BothModels(
            policy_distance=policy.distance,
            policy_distance_without=policy.distance_without,
            kl=policy.divergence,
            kl_without=policy.divergence_without,
        )
        comparison = compare_traces(trace, self.first, both)
        self.out.trace(step, trace, self.first, _scalars(comparison) | {"kl": policy.divergence})
        save_comparison(comparison, self.out.folder / TRACES / step_name(step))
        self.last = trace
        self.records.append(record_of(step, comparison))
        self.beside.append({**beside, "kl": policy.divergence})
        self.detected = detect(self.records, self.beside, self.rules)
        save_onset(self.detected, self.out.folder / ONSET)

    def _trace(self, measurement: Measurement, step: int) -> DepthTrace:
        assert self.out is not None
        model = {**self.model_record, "name": f"{self.model_record['name']}, step {step}"}
        if step:  # weights of later steps are told apart by what they follow from
            origin = json.dumps([self.out.started_with, step], sort_keys=True)
            model["sha256"] = hashlib.sha256(origin.encode()).hexdigest()
        return pipeline.depth_trace(model, self.prompts_record, self.config, self.settings, self.prompts, measurement)


def _health(detected: Json) -> Health:
    broke = detected["destabilisation"]
    return Health(int(detected["healthy"]), broke["evidence"] if broke else "")


def _scalars(comparison: Comparison) -> dict[str, float]:
    names = ("delta_align", "delta_contraction", "delta_transport", "coherence")
    return {name: float(comparison.summary[name]) for name in names}
