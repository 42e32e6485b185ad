"""`spinal_jax.Recorder`: depth traces of parameters in memory, for a training loop in JAX."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from spinal_jax.audit import pipeline
from spinal_jax.audit.measure import Reference, keep_reference, measure
from spinal_jax.audit.measurement import Measurement
from spinal_jax.audit.trace import DepthTrace, load_trace
from spinal_jax.comparison.step_records import Rules
from spinal_jax.config import MetricsConfig, ModelConfig, PromptsConfig, to_mapping
from spinal_jax.errors import UserError
from spinal_jax.jsontypes import Json, ReadJson
from spinal_jax.models.decoder import Decoder
from spinal_jax.models.families import family_of
from spinal_jax.models.formats.base import TensorInfo
from spinal_jax.models.parts import Parts, cast
from spinal_jax.models.translate import load_decoder, parameter_shapes
from spinal_jax.recording.series import TraceSeries

SHARE = 0.05  # share of the time for traces without a given interval

Parameters = ReadJson


class Recorder:
    """Records depth traces of a policy during training, each compared with the first.

    >>> recorder = Recorder("path/to/base", every=50, folder="traces")
    >>> for step, batch in enumerate(batches):
    ...     recorder(step, params, metrics={"loss": loss})
    ...     params, loss = train_step(params, batch)
    >>> recorder.close()

    Measurements run on the devices of the parameters before `recorder(...)` returns; comparisons and files are made in
    a background thread. A recorder with the same settings and folder continues an earlier one: it measures `model`
    again, which must equal the first traced parameters, and skips steps with a trace.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        prompts: str | os.PathLike[str] | Sequence[str] | None = None,
        *,
        folder: str | os.PathLike[str],
        every: int | None = None,
        mapping: Callable[[Any], Parameters] | None = None,
        prompt_settings: PromptsConfig | None = None,
        metrics: MetricsConfig | None = None,
        warmup_steps: int = 0,
    ) -> None:
        """Reads config and tokenizer of `model`; weights are passed to the recorder later.

        Args:
            model: the checkpoint that training starts from: hub id, folder or .gguf file.
            prompts: a file, a list of texts, or None for the prompts that ship with the package.
            folder: for traces/, onset.json, metrics.jsonl, report.html and TensorBoard's events.
            every: steps between traces; None takes at most 5 % of the time, the thread that writes files included.
            mapping: converts the parameters into a flat mapping of names to arrays, with names of the Hugging Face
                checkpoint or paths of this package. None if they already are such a mapping.
            prompt_settings: format, limit, length and template of the prompts.
            metrics: what is measured.
            warmup_steps: of the learning rate; excluded from the estimate of noise.

        Raises:
            UserError: the model or the prompts cannot be read, or the folder holds something else.
        """
        self._source = os.fspath(model)
        if every is not None and every < 1:
            raise UserError(f"every is {every}; it takes a number of steps above 0, or None")
        named = isinstance(prompts, (str, os.PathLike))
        asked = prompt_settings or PromptsConfig(path=os.fspath(prompts) if named else None)
        self.settings, self.every, self.mapping = metrics or MetricsConfig(), every, mapping
        texts = None if named or prompts is None else list(prompts)
        found = pipeline.read_prompt_set(asked, texts)
        with pipeline.opened(ModelConfig(source=os.fspath(model))) as (checkpoint, _, decoder):
            self.config, self._hf_config = decoder, dict(checkpoint.config)
            self.plan = pipeline.plan_prompts(found, checkpoint.tokenizer(), decoder, asked, self.settings)
        self.name = pipeline.model_name(os.fspath(model))
        self._prompts = pipeline.prompts_record(found, asked)
        about = {"model": {"source": self.name}, "prompts": to_mapping(asked), "metrics": to_mapping(self.settings)}
        self.series = TraceSeries(Path(folder), {"source": f"recorder of {self.name}", **about}, Rules(warmup_steps))
        self._structure: Parts | None = None
        self._reference: Reference | None = None
        self._first: DepthTrace | None = None
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="spinal-recorder")
        self._pending: Future[None] | None = None
        self._lines = {line["step"]: line for line in self.series.logged()}
        self._latest = self.series.steps[-1] if self.series.steps else -1
        self._began, self._spent, self._last = time.monotonic(), 0.0, 0.0
        self._written = 0.0  # seconds of the background thread

    def __call__(self, step: int, parameters: Any, metrics: ReadJson | None = None) -> bool:
        """Stores the metrics of a step, and records a trace if one is due.

        Args:
            step: number of updates so far, ascending.
            parameters: a `spinal_jax` decoder, or the input of `mapping`; they are not changed. With paths of this
                package they stay on their devices; with Hugging Face names they are copied through host memory.
            metrics: numbers of this step with the names of TRL.

        Returns:
            Whether a trace was recorded.

        Raises:
            UserError: parameters that are missing or have another shape, or a folder whose first trace is not that of
                `model`.
        """
        numbers = {name: float(value) for name, value in (metrics or {}).items()}
        if numbers:
            self._lines[step] = {"step": step, **numbers}
        if not self._is_due(step):
            return False
        begin = time.monotonic()
        self._trace(step, parameters, {name: value for name, value in numbers.items() if "rewards/" in name})
        self._last = time.monotonic() - begin
        self._spent += self._last
        self._latest = step
        return True

    def _is_due(self, step: int) -> bool:
        if self._latest < 0 or step <= self._latest:
            return self._latest < 0
        if self.every is not None:
            return step % self.every == 0
        elapsed = time.monotonic() - self._began
        return self._spent + self._last + self._written <= SHARE * elapsed

    def _trace(self, step: int, parameters: Any, beside: Mapping[str, float]) -> None:
        model, digest = self._assemble(parameters), f"step {step} of a recording"
        if self._reference is None:
            self._keep_reference(step, model)
        assert self._reference is not None
        assert self._first is not None
        measurement = measure(model, self.plan, self.settings, None, self._reference)
        del model
        first = self._first
        trace = first if self._latest < 0 else self._record(step, digest, measurement)
        policy = measurement.policy
        assert policy is not None
        self.wait()
        lines = [self._lines[number] for number in sorted(self._lines)]

        def write() -> None:
            begin = time.thread_time()
            self.series.add(step, trace, first, policy, beside)
            self.series.metrics(lines)
            self._written += time.thread_time() - begin

        self._pending = self._worker.submit(write)

    def _keep_reference(self, step: int, model: Decoder) -> None:
        """Measures the reference: the parameters of `step`, or `model` if there are traces already."""
        steps = self.series.steps
        if steps:
            step = steps[0]
            with pipeline.opened(ModelConfig(source=self._source)) as (checkpoint, family, decoder):
                model = pipeline.load(checkpoint, family, decoder, "float32")
        self._reference = keep_reference(model, self.plan, self.settings, alone=True)
        assert self._reference.measurement is not None
        self._first = self._record(step, f"step {step} of a recording", self._reference.measurement)
        if steps:
            saved = load_trace(self.series.trace_folder(step))
            alike = {
                name: np.allclose(values, self._first.columns[name], rtol=1e-4, atol=1e-6, equal_nan=True)
                for name, values in saved.columns.items()
            }
            if not all(alike.values()):
                raise UserError(
                    f"{self.series.folder} cannot be gone on with: its first trace, of step {step}, is not that of "
                    f"{self._source}"
                )

    def _record(self, step: int, digest: str, measurement: Measurement) -> DepthTrace:
        sha256 = hashlib.sha256(f"{self.name} {digest}".encode()).hexdigest()
        about = pipeline.model_record(f"{self.name}, step {step}", self.name, None, "float32", sha256)
        return pipeline.depth_trace(about, self._prompts, self.config, self.settings, self.plan, measurement)

    def _assemble(self, parameters: Any) -> Decoder:
        """The decoder of a mapping by paths of this package, with arrays in place, or by Hugging Face names."""
        given: Any = parameters if self.mapping is None else self.mapping(parameters)
        if isinstance(given, Decoder):
            given = {".".join(map(str, path)): x.get_value() for path, x in nnx.to_flat_state(nnx.state(given))}
        shapes = parameter_shapes(self.config)
        if shapes.keys() <= given.keys():
            arrays: dict[str, Array] = {name: jnp.asarray(given[name]) for name in shapes}
            for name, shape in shapes.items():
                if arrays[name].shape != shape.shape:
                    raise UserError(f"the parameter {name} has shape {arrays[name].shape}, not {shape.shape}")
            return self._parts().assemble(cast(arrays, jnp.float32))
        tensors = _Tensors(self.name, self._hf_config, given)
        return load_decoder(tensors, family_of(str(self._hf_config["model_type"])), self.config, jnp.dtype("float32"))

    def _parts(self) -> Parts:
        if self._structure is None:
            self._structure = Parts(nnx.eval_shape(lambda: Decoder(self.config, rngs=nnx.Rngs(0))))
        return self._structure

    def wait(self) -> None:
        """Waits until all traces are on disk."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def close(self) -> None:
        """Waits for pending traces, then writes metrics.jsonl and the report."""
        self.wait()
        self._worker.shutdown()
        if self._reference is not None:
            self._reference.close()
        if self.series.steps:
            self.series.metrics([self._lines[step] for step in sorted(self._lines)])
            self.series.report()
        self.series.close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Tensors:
    """Parameters under Hugging Face's names as a `Checkpoint`. A tied unembedding may be missing."""

    kind = "memory"
    revision: str | None = None

    def __init__(self, source: str, config: Json, given: Parameters) -> None:
        self.source, self.config, self._given = source, config, given

    def names(self) -> Mapping[str, TensorInfo]:
        return {name: TensorInfo(np.shape(self._given[name]), np.dtype(np.float32)) for name in sorted(self._given)}

    def tensor(self, name: str) -> np.ndarray:
        return np.asarray(self._given[name], np.float32)

    def tokenizer(self) -> Any:
        raise NotImplementedError("the recorder has the tokenizer of the model it was given")

    def sha256(self) -> str:
        raise NotImplementedError("weights in memory have no file")

    def close(self) -> None:
        """No-op."""
