"""From the settings of an audit to its depth trace: open, plan, measure, describe."""

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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spinal_jax import data
from spinal_jax.audit.caveats import trace_warnings
from spinal_jax.audit.devices import Devices, devices_of
from spinal_jax.audit.gram_store import GramHome, gram_bytes, gram_home
from spinal_jax.audit.measure import Measurement, measure
from spinal_jax.audit.prompt_pool import batches_sha256, default_batch_tokens, prompt_pool
from spinal_jax.audit.prompt_pool import plan_prompts as plan_prompts
from spinal_jax.audit.prompt_pool import tokens_sha256 as tokens_sha256
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
from spinal_jax.metrics.depth import terminal_block
from spinal_jax.metrics.tail import fitted_ranks
from spinal_jax.models.config import DecoderConfig
from spinal_jax.models.decoder import Decoder
from spinal_jax.models.families import read_checkpoint
from spinal_jax.models.formats.base import Checkpoint
from spinal_jax.models.formats.byte_level import SIZES, byte_tokenizer
from spinal_jax.models.formats.memory import random_checkpoint
from spinal_jax.models.formats.open import open_checkpoint
from spinal_jax.models.fused_attention import ALONE, TITLES, kernel_of
from spinal_jax.models.translate import Family, load_decoder, parameter_shapes
from spinal_jax.parallel.distributed import all_same, check_same
from spinal_jax.parallel.placement import Choice, choose
from spinal_jax.progress import Bar, Say, no_bar

RANDOM = "random:"  # of a source: weights are drawn, not read
WORLD_PROMPTS = 128  # of the controlled world's pool, where no limit is set
HARDWARE_KEYS = ("devices", "processes")  # of an environment, with which an audit that was cut off need not go on


def run_audit(
    config: AuditConfig,
    texts: Sequence[str] | None = None,
    bar: Bar | None = None,
    say: Say | None = None,
    folder: Path | None = None,
) -> DepthTrace:
    """`audit` from a configuration record; `texts` replaces `config.prompts.path`, `say` gets the start-up line, and
    with `config.checkpoint_every` the run folder `folder` what is saved on the way.

    Processes that share the run each tokenise a part of the pool, tell each other what they have found, and make arrays
    of their own rows alone. All but the first raise NotLeader in the end.
    """
    bar = bar or no_bar
    prompts = read_prompt_set(config.prompts, texts)
    with opened(config.model) as (checkpoint, family, decoder):
        choice = choose_devices(config.parallel, decoder, config.model.dtype, config.metrics)
        devices = devices_of(choice)
        home = audit_gram_home(decoder, config.model.dtype, config.metrics, devices)
        tokens = prompt_pool(prompts, checkpoint.tokenizer(), decoder, config.prompts, config.metrics)
        name = config.model.name or model_name(config.model.source)

        def models(digest: str) -> dict[str, Any]:
            return model_record(name, config.model.source, checkpoint.revision, config.model.dtype, digest)

        pool = prompts_record(prompts, config.prompts)
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
                "prompts": {**pool, "tokens_sha256": tokens_sha256(tokens.sequences)},
                "metrics": to_mapping(config.metrics),
                "environment": {key: value for key, value in environment().items() if key not in HARDWARE_KEYS},
            }
            if saved.there:  # what an audit is compared with that was cut off; otherwise hashed while the weights load
                saved.check({**about, "model": models(checkpoint.sha256())}, config.overwrite)
            here = Leg(
                devices=str(replace(choice, why="")),
                processes=jax.process_count(),
                replicas=None if choice.replicas is None else choice.replicas.count,
                batch_tokens=batch_tokens,
                rows=devices.rows,
                slots=home.slots,
            )
            work = saved.plan(here, tokens.pack)
            if work.leaves and home.where == "devices":
                home = GramHome("file", "as where the audit was begun")
        check_processes_agree(checkpoint, work, choice)
        if say:
            say(start_line(name, config.model.dtype, decoder, work, choice, home))
        with ThreadPoolExecutor(1) as background:  # the digest takes every byte of the weights, as the load does
            hashed = background.submit(checkpoint.sha256)
            model = load(checkpoint, family, decoder, config.model.dtype, bar, devices)
            digest = hashed.result()
        check_weights(checkpoint, digest)
    progress = None
    if saved is not None and config.checkpoint_every is not None:
        progress = saved.begin({**about, "model": models(digest)}, config.checkpoint_every)
    found = measure(model, work, config.metrics, bar, devices=devices, progress=progress)
    return depth_trace(
        models(digest),
        pool,
        decoder,
        config.metrics,
        work,
        found,
    )


def model_record(name: str, source: str, revision: str | None, dtype: str, sha256: str) -> dict[str, Any]:
    """What a trace says of a model beside its shape; of a folder or file only the last part of the path."""
    return {
        "name": name,
        "source": Path(source).name or source,
        "revision": revision,
        "dtype": dtype,
        "sha256": sha256,
    }


def prompts_record(prompts: data.PromptSet, config: PromptsConfig) -> dict[str, Any]:
    """What a trace says of its prompts beside how many tokens they have."""
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
    model: dict[str, Any],
    prompts: dict[str, Any],
    decoder: DecoderConfig,
    settings: MetricsConfig,
    work: Plan,
    found: Measurement,
) -> DepthTrace:
    """The trace of a measurement: `measure(weights, work, settings)` of a model that may be in memory alone.

    Args:
        model: as from `model_record`.
        prompts: as from `prompts_record`.
        decoder: the model's shape.
        settings, work, found: what `measure` was given, and what it returned.
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
            "groups": len(found.rows),
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
            "resolution": found.resolution,
            "terminal": list(settings.terminal) if isinstance(settings.terminal, tuple) else settings.terminal,
        },
        columns={
            **found.whole.columns,
            "contraction_half": found.contraction_half,
            **{f"{k}_se": v for k, v in found.errors.columns.items()},
        },
        summary={
            "terminal": list(terminal_block(decoder.depth, settings.terminal)),
            **found.whole.summary,
            **{f"{k}_se": v for k, v in found.errors.summary.items()},
            "degrees_of_freedom": len(found.rows) - 1,
        },
        environment=environment(),
        warnings=tuple(trace_warnings(found, work, decoder.width, settings.contraction.window)),
        arrays={
            "singular_values": found.singular_values,
            "groups/singular_values": found.singular_values_without.astype(np.float32),
            "groups/rows": found.rows,
            "groups/positions": found.positions,
            **{f"groups/{k}": np.array([c.columns[k] for c in found.without]) for k in found.whole.columns},
            **{f"variants/{k}": v for k, v in found.variants.items()},
        },
    )


def check_processes_agree(checkpoint: Checkpoint, work: Plan, choice: Choice) -> None:
    """UserError where processes that share a run were given different things. Of the weights this compares names and
    shapes; `check_weights` compares their values."""
    check_same(
        {
            "devices": str(choice),
            "model": json.dumps(checkpoint.config, sort_keys=True) + repr(sorted(checkpoint.names().items())),
            "revision of the model": str(checkpoint.revision),
            "tokenizer": json.dumps(checkpoint.tokenizer().get_vocab(), sort_keys=True),
            "prompts": tokens_sha256(work.sequences),
            "batches": batches_sha256(work),
        }
    )


def check_weights(checkpoint: Checkpoint, sha256: str) -> None:
    """UserError where processes that share a run read different weights; it names the first tensor that differs.

    Each process reads only the parts of a tensor that its devices hold, so that no comparison of what was loaded could
    tell two checkpoints apart. All therefore hash their whole files, side by side.
    """
    if jax.process_count() == 1 or all_same(sha256):
        return
    for name in checkpoint.names():
        tensor = np.ascontiguousarray(checkpoint.tensor(name))
        check_same({f"values of {name}": hashlib.sha256(tensor.reshape(-1).view(np.uint8).data).hexdigest()})
    check_same({"weight files, though equal tensors": sha256})


@contextlib.contextmanager
def opened(config: ModelConfig) -> Iterator[tuple[Checkpoint, Family, DecoderConfig]]:
    """The checkpoint a user names, its family, and what its config.json says, read strictly."""
    is_random = config.source.startswith(RANDOM)
    checkpoint = _random(config) if is_random else open_checkpoint(config.source, config.revision, config.base)
    try:
        yield checkpoint, *read_checkpoint(checkpoint, config.ignore_keys)
    finally:
        checkpoint.close()


def _random(config: ModelConfig) -> Checkpoint:
    """`random:SHAPE@SEED`: drawn weights (seed 0 if none is given) for a byte-level Llama of a named size, or in the
    shape and with the tokenizer of another checkpoint."""
    shape, at, seed = config.source.removeprefix(RANDOM).rpartition("@")
    if not (at and seed.isascii() and seed.isdigit()):
        shape, seed = config.source.removeprefix(RANDOM), "0"
    seed = seed[:20]  # enough to be refused as too large
    if shape in SIZES:
        return random_checkpoint(config.source, dict(SIZES[shape]), byte_tokenizer(), int(seed))
    try:
        like = open_checkpoint(shape, config.revision)
    except UserError as error:
        raise UserError(f"{error}; sizes of random models are {', '.join(SIZES)}") from error
    with contextlib.closing(like):
        return random_checkpoint(config.source, like.config, like.tokenizer(), int(seed))


def choose_devices(asked: AuditParallelConfig, decoder: DecoderConfig, dtype: str, settings: MetricsConfig) -> Choice:
    """The devices for an audit of a model with this shape. Errors: UserError."""
    table_bytes = unembedding_bytes(decoder, dtype)
    return choose(asked, weight_bytes(decoder, dtype) + gram_bytes(decoder, settings), table_bytes)


def audit_gram_home(decoder: DecoderConfig, dtype: str, settings: MetricsConfig, devices: Devices) -> GramHome:
    """Where the Gram sums of an audit of this model are kept."""
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
    """The weights, with a progress bar over what is read; where `devices` want them."""
    size = sum(info.dtype.itemsize * math.prod(info.shape) for info in checkpoint.names().values())
    with (bar or no_bar)("load weights", size, "B") as advance:
        placing = None if devices is None else devices.placing
        return load_decoder(checkpoint, family, decoder, jnp.dtype(dtype), advance, placing)


def read_prompt_set(config: PromptsConfig, texts: Sequence[str] | None = None) -> data.PromptSet:
    """The prompts that `config` names, or `texts` in their place. Errors: UserError."""
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
    """A short name: the file's or folder's own."""
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
    """What will run on what, in one line."""
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


def environment() -> dict[str, Any]:
    """Versions and device, without anything that changes between equal runs on one machine."""
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
