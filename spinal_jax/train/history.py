"""The footprint of a run over its steps: traces of one fixed pool of prompts, each compared with that of step 0."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from spinal_jax.audit import pipeline
from spinal_jax.audit.measure import Measurement, Reference, keep, measure
from spinal_jax.audit.trace import DepthTrace
from spinal_jax.comparison.compare import BothModels, compare_traces
from spinal_jax.comparison.onset import Rules, StepRecord, detect, recall, record_of, save_onset
from spinal_jax.comparison.record import Comparison, save_comparison
from spinal_jax.config import MetricsConfig
from spinal_jax.data.packing import Plan
from spinal_jax.models.decoder import Decoder
from spinal_jax.train.folder import ONSET, TRACES, TrainingFolder, trace_name


class History:
    """Traces so far. The model of step 0 is the reference of all that follow."""

    def __init__(
        self,
        model: Decoder,
        pool: Plan,
        settings: MetricsConfig,
        records: tuple[dict[str, Any], dict[str, Any]],
        out: TrainingFolder,
        bar: pipeline.Bar,
        rules: Rules,
    ):
        """Measures the model of step 0.

        Args:
            model: the policy before any step.
            pool: the prompts, planned.
            settings: what is measured.
            records: what traces say of the model and of the prompts.
            out: the run's folder.
            bar: opens progress bars.
            rules: by which onset and destabilisation are detected.
        """
        self.pool, self.settings, self.out, self.bar = pool, settings, out, bar
        self.rules = rules
        self.model_record, self.prompts_record = records
        self.config = model.config
        self.reference: Reference = keep(model, pool, settings, bar, alone=True)
        assert self.reference.measurement is not None
        self.first = self._trace(self.reference.measurement, 0)
        self.last = self.first
        self.records: list[StepRecord] = []
        self.beside: list[dict[str, float]] = []
        self.detected = detect([], [], rules)

    def close(self) -> None:
        """Frees what is kept of the model of step 0."""
        self.reference.close()

    def recall(self) -> None:
        """Takes up what a run that was cut off has written."""
        file, traces = self.out.folder / ONSET, self.out.folder / TRACES
        if not file.exists():
            return
        folder_of = {int(path.name.rpartition("_")[2]): path for path in traces.iterdir()}
        self.records, self.beside, _ = recall(json.loads(file.read_text(encoding="utf-8")), folder_of)
        self.detected = detect(self.records, self.beside, self.rules)

    def add(self, step: int, model: Decoder, beside: dict[str, float]) -> dict[str, Any]:
        """Traces the policy after `step` updates, writes what is found, and returns what onset.json now holds.

        Args:
            step: how many updates were done.
            model: the policy.
            beside: what else is known of it: reward margin and accuracy.
        """
        found = measure(model, self.pool, self.settings, self.bar, self.reference)
        trace = self.first if step == 0 else self._trace(found, step)
        policy = found.policy
        assert policy is not None
        both = BothModels(
            policy_distance=policy.distance,
            policy_distance_without=policy.distance_without,
            kl=policy.divergence,
            kl_without=policy.divergence_without,
        )
        comparison = compare_traces(trace, self.first, both)
        self.out.trace(step, trace, self.first, _scalars(comparison) | {"kl": policy.divergence})
        save_comparison(comparison, self.out.folder / TRACES / trace_name(step))
        self.last = trace
        self.records.append(record_of(step, comparison))
        self.beside.append({**beside, "kl": policy.divergence})
        self.detected = detect(self.records, self.beside, self.rules)
        save_onset(self.detected, self.out.folder / ONSET)
        return self.detected

    def _trace(self, found: Measurement, step: int) -> DepthTrace:
        model = {**self.model_record, "name": f"{self.model_record['name']}, step {step}"}
        if step:  # weights of later steps are told apart by what they follow from
            origin = json.dumps([self.out.started_with, step], sort_keys=True)
            model["sha256"] = hashlib.sha256(origin.encode()).hexdigest()
        return pipeline.depth_trace(model, self.prompts_record, self.config, self.settings, self.pool, found)


def _scalars(comparison: Comparison) -> dict[str, float]:
    names = ("delta_align", "delta_contraction", "delta_transport", "coherence")
    return {name: float(comparison.summary[name]) for name in names}
