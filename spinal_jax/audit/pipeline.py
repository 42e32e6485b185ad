"""One audit from its settings to its depth trace: open the checkpoint, pack the prompts, measure, build the trace."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import platform
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from spinal_jax import data
from spinal_jax.audit.caveats import trace_warnings
from spinal_jax.audit.devices import Devices, devices_of
from spinal_jax.audit.gram_store import GramHome, gram_bytes, gram_home
from spinal_jax.audit.grouped_prompts import batches_sha256, default_batch_tokens, group_prompts
from spinal_jax.audit.grouped_prompts import plan_prompts as plan_prompts
from spinal_jax.audit.grouped_prompts import tokens_sha256 as tokens_sha256
from spinal_jax.audit.measure import measure
from spinal_jax.audit.measurement import Measurement
from spinal_jax.audit.trace import DepthTrace
from spinal_jax.config import (
    AuditConfig,
    AuditParallelConfig,
    MetricsConfig,
    ModelConfig,
    PromptsConfig,
    to_mapping,
)
from spinal_jax.data.packing import Plan
from spinal_jax.errors import UserError
from spinal_jax.files import writable
from spinal_jax.jsontypes import Json
from spinal_jax.metrics.depth import terminal_block
from spinal_jax.metrics.tail import fitted_ranks
from spinal_jax.models.config import DecoderConfig
from spinal_jax.models.decoder import Decoder
from spinal_jax.models.families import read_checkpoint
from spinal_jax.models.formats.base import Checkpoint
from spinal_jax.models.formats.open import open_checkpoint
from spinal_jax.models.formats.random_weights import RANDOM, open_random
from spinal_jax.models.fused_attention import ALONE, TITLES, kernel_of
from spinal_jax.models.translate import Family, load_decoder, parameter_shapes
from spinal_jax.parallel.distributed import all_same, check_same
from spinal_jax.parallel.placement import Choice, choose
from spinal_jax.progress import Bar, Say, no_bar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WORLD_PROMPTS = 128  # default number of prompts of the controlled world
HARDWARE_KEYS = ("devices", "processes")  # keys of `environment` that may change when an audit is resumed


def run_audit(
    config: AuditConfig,
    texts: Sequence[str] | None = None,
    bar: Bar | None = None,
    say: Say | None = None,
    folder: Path | None = None,
) -> DepthTrace:
    """Runs an audit.

    Args:
        config: the settings.
        texts: prompts in place of `config.prompts.path`.
        bar: opens progress bars.
        say: called with the start-up line.
        folder: run folder for intermediate state; required by `config.checkpoint_every`.

    Raises:
        UserError: for a mistake in the settings or the inputs.
        NotLeader: in all but the first of several processes, when the audit is complete.
    """
    bar = bar or no_bar
    prompts = read_prompt_set(config.prompts, texts)
    with opened(config.model) as (checkpoint, family, decoder):
        choice = choose_devices(config.parallel, decoder, config.model.dtype, config.metrics)
        devices = devices_of(choice)
        home = audit_gram_home(decoder, config.model.dtype, config.metrics, devices)
        tokenizer = checkpoint.tokenizer()
        tokens = group_prompts(prompts, tokenizer, decoder, config.prompts, config.metrics)
        name = config.model.name or model_name(config.model.source)

        def models(digest: str) -> Json:
            return model_record(name, config.model.source, checkpoint.revision, config.model.dtype, digest)

        prompts_section = prompts_record(prompts, config.prompts)
        batch_tokens = config.batch_tokens or default_batch_tokens(devices)
        saved, about = None, {}
        if config.checkpoint_every is None:
            work = tokens.pack(batch_tokens, devices.rows, home.slots)
        else:
            if folder is None:
                raise ValueError("checkpoint_every needs a folder to save into")
            from spinal_jax.audit.resume import Leg, Saved

            saved = Saved(folder)
            about |= {
                "prompts": {**prompts_section, "tokens_sha256": tokens_sha256(tokens.sequences)},
                "metrics": to_mapping(config.metrics),
                "environment": {key: value for key, value in environment().items() if key not in HARDWARE_KEYS},
            }
            if saved.there:  # checked before the weights load; a new audit is hashed meanwhile
                saved.check({**about, "model": models(checkpoint.sha256())}, config.overwrite)
            here = Leg(
                devices=str(replace(choice, why="")),
                processes=jax.process_count(),
                replicas=None if choice.replicas is None else choice.replicas.count,
                batch_tokens=batch_tokens,
                rows=devices.rows,
                slots=home.slots,
            )
            work = saved.plan(here, tokens.pack, config.overwrite)
            if work.leaves and home.where == "devices":
                home = GramHome("file", "as at the start of this audit")
        check_processes_agree(checkpoint, tokenizer, work, choice)
        if say:
            say(start_line(name, config.model.dtype, decoder, work, choice, home))
        model, digest = load_hashed(checkpoint, family, decoder, config.model.dtype, bar, devices)
    progress = None
    if saved is not None and config.checkpoint_every is not None:
        progress = saved.begin({**about, "model": models(digest)}, config.checkpoint_every)
    measurement = measure(model, work, config.metrics, bar, devices=devices, progress=progress)
    return depth_trace(
        models(digest),
        prompts_section,
        decoder,
        config.metrics,
        work,
        measurement,
    )


def model_record(name: str, source: str, revision: str | None, dtype: str, sha256: str) -> Json:
    """The "model" section of a trace, without the shape. Of a local path only the last part is kept."""
    return {
        "name": name,
        "source": Path(source).name or source,
        "revision": revision,
        "dtype": dtype,
        "sha256": sha256,
    }


def prompts_record(prompts: data.PromptSet, config: PromptsConfig) -> Json:
    """The "prompts" section of a trace, without numbers of tokens."""
    return {
        "source": data.stem(prompts.source),
        "format": prompts.format,
        "count": len(prompts.prompts),
        "skipped_empty": prompts.skipped_empty,
        "max_length": config.max_length,
        "chat_template": config.chat_template,
        "sha256": prompts.sha256,
    }


def depth_trace(
    model: Json,
    prompts: Json,
    decoder: DecoderConfig,
    settings: MetricsConfig,
    work: Plan,
    measurement: Measurement,
) -> DepthTrace:
    """Builds the trace of a measurement.

    Args:
        model: from `model_record`.
        prompts: from `prompts_record`.
        decoder: the shape of the model.
        settings: what was measured.
        work: the batches.
        measurement: the result of `measure`.
    """
    return DepthTrace(
        model={
            **model,
            "family": decoder.family,
            "parameters": sum(math.prod(shape.shape) for shape in parameter_shapes(decoder).values()),
            "layers": decoder.depth,
            "width": decoder.width,
            "vocabulary": decoder.vocab_size,
            "vocabulary_tokens": decoder.vocab_size if work.vocabulary is None else len(work.vocabulary),
            "vocabulary_sha256": None if work.vocabulary is None else work.vocabulary.sha256,
        },
        prompts={
            **prompts,
            **work.counts,
            "groups": len(measurement.rows),
            "tokens": work.tokens,
            "rows": work.rows,
            "positions": work.positions,
            "tokens_sha256": tokens_sha256(work.sequences),
        },
        settings={
            "window": list(settings.contraction.window),
            "skip": settings.contraction.skip,
            "center": settings.contraction.center,
            "positions": settings.transport.positions,
            "top_k": settings.transport.top_k,
            "temperature": settings.transport.temperature,
            "groups": settings.groups,
            "ranks": list(fitted_ranks(work.rows, decoder.width, settings.contraction.window)),
            "resolution": measurement.resolution,
            "terminal": list(settings.terminal) if isinstance(settings.terminal, tuple) else settings.terminal,
        },
        columns={
            **measurement.whole.columns,
            "contraction_half": measurement.contraction_half,
            **{f"{k}_se": v for k, v in measurement.errors.columns.items()},
        },
        summary={
            "terminal": list(terminal_block(decoder.depth, settings.terminal)),
            **measurement.whole.summary,
            **{f"{k}_se": v for k, v in measurement.errors.summary.items()},
            "degrees_of_freedom": len(measurement.rows) - 1,
        },
        environment=environment(),
        warnings=tuple(trace_warnings(measurement, work, decoder.width, settings.contraction.window)),
        arrays={
            "singular_values": measurement.singular_values,
            "groups/singular_values": measurement.singular_values_without.astype(np.float32),
            "groups/rows": measurement.rows,
            "groups/positions": measurement.positions,
            **{f"groups/{k}": np.array([c.columns[k] for c in measurement.without]) for k in measurement.whole.columns},
            **{f"variants/{k}": v for k, v in measurement.variants.items()},
        },
    )


def check_processes_agree(
    checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, work: Plan, choice: Choice
) -> None:
    """Raises UserError if processes that share a run differ in their inputs. Weights are compared by name and shape;
    `check_weights` compares their values."""
    if jax.process_count() == 1:
        return
    check_same(
        {
            "devices": str(choice),
            "model": json.dumps(checkpoint.config, sort_keys=True) + repr(sorted(checkpoint.names().items())),
            "revision of the model": str(checkpoint.revision),
            "tokenizer": json.dumps(tokenizer.get_vocab(), sort_keys=True),
            "prompts": tokens_sha256(work.sequences),
            "batches": batches_sha256(work),
        }
    )


def check_weights(checkpoint: Checkpoint, sha256: str) -> None:
    """Raises UserError, with the first differing tensor, if processes that share a run have different weights.

    Each process loads only the parts of tensors that its devices hold, so loaded values cannot be compared. All
    processes hash their whole files instead.
    """
    if jax.process_count() == 1 or all_same(sha256):
        return
    for name in checkpoint.names():
        tensor = np.ascontiguousarray(checkpoint.tensor(name))
        check_same({f"values of {name}": hashlib.sha256(tensor.reshape(-1).view(np.uint8).data).hexdigest()})
    check_same({"weight files, though equal tensors": sha256})


@contextlib.contextmanager
def opened(config: ModelConfig) -> Iterator[tuple[Checkpoint, Family, DecoderConfig]]:
    """Opens the checkpoint of the settings, with its family and its configuration."""
    open_source = open_random if config.source.startswith(RANDOM) else open_checkpoint
    checkpoint = open_source(config.source, config.revision, config.base)
    try:
        yield checkpoint, *read_checkpoint(checkpoint, config.ignore_keys)
    finally:
        checkpoint.close()


def choose_devices(asked: AuditParallelConfig, decoder: DecoderConfig, dtype: str, settings: MetricsConfig) -> Choice:
    """Chooses the devices for a model of this shape. Raises UserError if none fit."""
    table_bytes = unembedding_bytes(decoder, dtype)
    whole_bytes = weight_bytes(decoder, dtype) + gram_bytes(decoder, settings)
    return choose(asked, whole_bytes, decoder.kv_heads, table_bytes)


def audit_gram_home(decoder: DecoderConfig, dtype: str, settings: MetricsConfig, devices: Devices) -> GramHome:
    """Where an audit of this model stores its Gram sums."""
    return gram_home(decoder, settings, weight_bytes(decoder, dtype), devices)


def unembedding_bytes(decoder: DecoderConfig, dtype: str) -> int:
    """Size of the unembedding in bytes."""
    return decoder.vocab_size * decoder.width * jnp.dtype(dtype).itemsize


def weight_bytes(decoder: DecoderConfig, dtype: str) -> int:
    """Size of all parameters in bytes."""
    return sum(math.prod(shape.shape) for shape in parameter_shapes(decoder).values()) * jnp.dtype(dtype).itemsize


def load(
    checkpoint: Checkpoint,
    family: Family,
    decoder: DecoderConfig,
    dtype: str,
    bar: Bar | None = None,
    devices: Devices | None = None,
) -> Decoder:
    """Loads the weights onto the devices, with a progress bar."""
    size = sum(info.dtype.itemsize * math.prod(info.shape) for info in checkpoint.names().values())
    with (bar or no_bar)("load weights", size, "B") as advance:
        placing = None if devices is None else devices.placing
        return load_decoder(checkpoint, family, decoder, jnp.dtype(dtype), advance, placing)


def load_hashed(
    checkpoint: Checkpoint,
    family: Family,
    decoder: DecoderConfig,
    dtype: str,
    bar: Bar | None = None,
    devices: Devices | None = None,
) -> tuple[Decoder, str]:
    """`load`, with the SHA-256 of the weights, which a thread computes meanwhile. Raises UserError if processes that
    share a run have different weights."""
    with ThreadPoolExecutor(1) as background:
        hashed = background.submit(checkpoint.sha256)
        model = load(checkpoint, family, decoder, dtype, bar, devices)
        digest = hashed.result()
    check_weights(checkpoint, digest)
    return model, digest


def read_prompt_set(config: PromptsConfig, texts: Sequence[str] | None = None) -> data.PromptSet:
    """The prompts of the settings, or `texts`. Raises UserError if they cannot be read."""
    if config.format == "world" and texts is None:
        return data.World().prompts(config.limit or WORLD_PROMPTS)
    if texts is not None:
        return data.prompts_of(texts)
    source = data.source_of(config.path, config.dataset, config.split, config.name, config.revision)
    if config.path is None and config.dataset is None and config.format != "jsonl":
        raise UserError("prompts.path is missing; give prompts.path=FILE")
    path = None if config.path is None and config.dataset is None else source
    return data.read_prompts(path, config.format, config.field, config.limit, config.offset)


def model_name(source: str) -> str:
    """A short name: that of the file or folder."""
    if source.startswith(RANDOM):
        return RANDOM + model_name(source.removeprefix(RANDOM))
    path = Path(source)
    if not path.exists():
        return writable(path.stem if path.suffix == ".gguf" else source)
    path = path.resolve()
    if path.name == "model" and (path.parent / "settings.json").exists():
        path = path.parent  # the weights of a training run go by the run
    return writable(path.stem if path.suffix == ".gguf" else path.name)


def start_line(name: str, dtype: str, decoder: DecoderConfig, work: Plan, choice: Choice, home: GramHome) -> str:
    """One line on the model, the devices and the prompts of an audit."""
    device, count = jax.devices()[0], jax.device_count()
    kind = getattr(device, "device_kind", device.platform)
    shared = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    backend = jax.default_backend()
    chosen = kernel_of(decoder, jnp.dtype(dtype), backend, ALONE if choice.shards is None else choice.shards.mesh)
    reason = f" ({chosen.why})" if chosen.why else ""
    attention = "" if backend == "cpu" else f", attention by {TITLES[chosen.kernel]}{reason}"
    enough = "" if work.rows >= 4 * decoder.width else ", fewer than advised"
    shortened = work.counts.get("shortened", 0)
    cut = f" ({shortened:,} of them cut to their last tokens)" if shortened else ""
    return (
        f"{name}: {decoder.family}, {decoder.depth} blocks of {decoder.width}, {dtype} | "
        f"{kind} x {count}{shared}, {choice}, {home}{attention} | "
        f"{len(work.sequences):,} prompts{cut}, {work.tokens:,} tokens in "
        f"{len(work.batches)} batches, {work.waste:.0%} padding | N = {work.rows:,} rows, "
        f"4 d = {4 * decoder.width:,}{enough}"
    )


def environment() -> Json:
    """Versions and devices: everything that is equal for all runs on one machine."""
    device = jax.devices()[0]
    return {
        "spinal_jax": version("spinal-jax"),
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "flax", "numpy", "scipy", "transformers")},
        "platform": sys.platform,
        "backend": device.platform,
        "device": getattr(device, "device_kind", device.platform),
        "devices": jax.device_count(),
        **({"processes": jax.process_count()} if jax.process_count() > 1 else {}),
    }
