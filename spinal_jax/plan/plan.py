"""Builds a plan from the cost model, the memory of compiled steps, and device data sheets."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from spinal_jax.audit.pipeline import model_name
from spinal_jax.config.data_sheets import DEVICES
from spinal_jax.config.plan import PlanConfig
from spinal_jax.metrics import contraction
from spinal_jax.models.config import DecoderConfig
from spinal_jax.models.translate import parameter_shapes
from spinal_jax.plan import estimate
from spinal_jax.plan.compiled import Compiled, compiled
from spinal_jax.plan.layout import USABLE, USUAL, DeviceLayout, layout_of, planned_gram_home, would_fit
from spinal_jax.plan.record import AuditPlan, Memory, memory_of
from spinal_jax.plan.targets import why_not_compiled
from spinal_jax.plan.work import sample_prompts, widest

# Bytes of Python, the libraries and what they compile, in an audit of next to nothing (benchmarks/plan.py), and of
# PyTorch, which transformers imports with a tokenizer where it is installed.
PROCESS, TORCH = 585 * 2**20, 188 * 2**20


def make_plan(config: PlanConfig) -> AuditPlan:
    """Plans an audit from config.json only. Raises UserError for invalid settings."""
    from spinal_jax.plan.shapes import decoder_of

    decoder = decoder_of(config.model)
    layout = layout_of(config, decoder)
    work = sample_prompts(config, decoder, layout)
    shapes, dtype = parameter_shapes(decoder), config.model.dtype
    found = compiled(config, layout) if config.compile else None
    spectra = estimate.spectra(decoder, work, config.metrics, os.cpu_count() or 1, layout)
    memory = None if found is None else _memory(config, layout, found, spectra, shapes)
    device = DEVICES[config.device or USUAL]
    short = memory is not None and config.device is not None and memory.peak > USABLE * memory_of(device)
    gram = contraction.gram_dtype()
    packed = widest(work)
    return AuditPlan(
        name=config.model.name or model_name(config.model.source),
        decoder=decoder,
        model=config.model,
        parameters=estimate.parameter_count(shapes),
        device=config.device,
        devices=config.devices,
        layout=layout,
        sums=str(planned_gram_home(config, decoder, layout)),
        prompts=config.prompt_count,
        tokens=work.tokens,
        batches=len(work.batches),
        shape=(packed.height, packed.length, packed.measured),
        waste=work.waste,
        rows=work.rows,
        gram_dtype=gram.name,
        stages=estimate.audit_stages(decoder, shapes, work, config.metrics, dtype, layout, device.kind),
        spectra=spectra,
        memory=memory,
        compiled=found,
        received=None if found is None else len(work.batches) * (found.forward.received + found.lens.received),
        would_fit=would_fit(config, decoder, layout, memory_of(device)) if short else None,
        warnings=tuple(_warnings(config, work.rows, decoder, found)),
    )


def _memory(
    config: PlanConfig, layout: DeviceLayout, compiled: Compiled, spectra: estimate.SpectraCost, shapes: Any
) -> Memory:
    on_cpu = config.device == "cpu"
    count = layout.devices if on_cpu else 1  # what one memory holds
    temporaries = max(compiled.forward.temporaries, compiled.lens.temporaries)
    stack = max(estimate.parameter_bytes({path: shape}, config.model.dtype) for path, shape in shapes.items())
    process = (PROCESS + (TORCH if find_spec("torch") else 0)) if on_cpu else 0
    parameters, grams = count * compiled.parameters, count * compiled.grams
    taken = {"cpu": spectra.host_memory, "gpu": spectra.device_memory, "tpu": 0}[DEVICES[config.device or USUAL].kind]
    return Memory(
        parameters=parameters,
        table=count * compiled.table,
        grams=grams,
        batch=count * (compiled.peak - compiled.parameters - compiled.table - compiled.grams - temporaries),
        temporaries=count * temporaries,
        process=process,
        loading=parameters + (stack if on_cpu else 0) + process,
        spectra=int(parameters + grams + taken + process),
    )


def _warnings(config: PlanConfig, rows: int, decoder: DecoderConfig, compiled: Compiled | None) -> Iterator[str]:
    if rows < 4 * decoder.width:
        yield (
            f"N = {rows:,} rows are fewer than 4 d = {4 * decoder.width:,}: contraction reads high, so give "
            "more prompts."
        )
    device = DEVICES.get(config.device or "")
    if (
        compiled is not None
        and device is not None
        and device.kind != "cpu"
        and (why := why_not_compiled(config.device, config.devices)) is not None
    ):
        yield f"Memory is the estimate of XLA for CPUs: {why}."
    if device is not None and device.kind == "gpu" and config.devices > device.host:
        yield f"Only {device.host} {device.title} share NVLink: what crosses to other machines takes longer."
