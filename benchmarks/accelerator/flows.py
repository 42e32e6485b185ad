"""A whole audit and a DPO step by this project."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks.accelerator.common import (
    PROMPTS,
    SHAPES,
    alone,
    card,
    decoder_config,
    pairs,
    planned,
    random_model,
    table,
)


def audit(name: str, shape: str, toy: bool) -> bool:
    """The whole audit with exact intervals, its sums and spectra on the device."""
    import jax
    import jax.numpy as jnp

    from spinal_jax.audit.devices import OneDevice
    from spinal_jax.audit.gram_store import gram_home
    from spinal_jax.audit.lens_step import zero_lens_sums
    from spinal_jax.audit.measure import measure
    from spinal_jax.audit.spectra import eigenvalues
    from spinal_jax.models.parts import take_apart
    from spinal_jax.parallel.device_defaults import batch_tokens

    decoder, settings = decoder_config(SHAPES[shape]), alone()
    model = random_model(decoder, "bfloat16")
    weights = sum(x.nbytes for x in take_apart(model)[1].values())
    devices = OneDevice()
    home = gram_home(decoder, settings, weights, devices)
    work = planned(decoder, 128 if toy else PROMPTS, 1024 if toy else batch_tokens(jax.default_backend()))
    begin = time.perf_counter()
    with jax.enable_x64(True):
        grams = devices.grams(1, work.slots, decoder.depth + 1, decoder.width, np.dtype(np.float64))
        batch = devices.batch(next(iter(work)))
        lens = devices.lens(model.head())
        grams, x, _ = devices.forward_step(model, grams, devices.lens_error(), batch, (), work.groups_at_once)
        sums = devices.lens_sums(zero_lens_sums(decoder.depth + 1, settings, 1, False))
        jax.block_until_ready(devices.lens_step((lens,), sums, (x,), batch, settings))
        one = devices.of_boundaries(grams[0], [0])[0]
        jax.block_until_ready(eigenvalues(one, jnp.ones(work.slots), 1.0, center=False))
    del grams, x, one, batch
    compiling = time.perf_counter() - begin
    took: dict[str, float] = {}

    @contextlib.contextmanager
    def bar(what: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        start = time.perf_counter()
        yield lambda amount: None
        took[what] = time.perf_counter() - start

    begin = time.perf_counter()
    found = measure(model, work, settings, bar, devices=devices)
    whole = time.perf_counter() - begin
    stats = jax.devices()[0].memory_stats() or {}
    rows = [
        ("prompts, tokens, batches", f"{len(work.sequences)}, {work.tokens:,}, {len(work.batches)}"),
        ("Gram sums", str(home)),
        ("compiling and one batch, s", f"{compiling:.1f}"),
        ("batches, s", f"{took['audit']:.2f}"),
        ("spectra, s", f"{took['spectra']:.2f}"),
        ("**whole, s**", f"**{whole:.2f}**"),
        ("peak memory of the device, GiB", f"{stats.get('peak_bytes_in_use', 0) / 2**30:.1f}"),
        (
            "contraction at the last boundary",
            f"{found.whole.columns['contraction'][-1]:.4f} +- {found.errors.columns['contraction'][-1]:.4f}",
        ),
    ]
    table(f"Audit with exact intervals, {name} shape, bfloat16 ({card()})", ("", "this project"), rows)
    return bool(np.isfinite(found.whole.columns["contraction"]).all())


def dpo(toy: bool) -> bool:
    """One DPO step, all weights and LoRA."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from spinal_jax.config.training import ObjectiveConfig, OptimizerConfig
    from spinal_jax.models import lora
    from spinal_jax.models.parts import cast, take_apart
    from spinal_jax.models.translate import parameter_shapes
    from spinal_jax.objectives.responses import choose_shape, micro_batches
    from spinal_jax.objectives.step import TrainState, make_steps
    from spinal_jax.train.optimizer import optimizer

    decoder, rows = decoder_config(SHAPES["toy" if toy else "1B"]), []
    examples, length = pairs(decoder.vocab_size, toy)
    count = sum(int(np.prod(s.shape)) for s in parameter_shapes(decoder).values())
    for name, rank in (("all weights", 0), ("LoRA of rank 16", 16)):
        model = random_model(decoder, "bfloat16" if rank else "float32")
        if rank:
            lora.attach(model, rank, 32.0, ("all-linear",), 0)
        parts, arrays = take_apart(model)
        trained = parts.paths(nnx.LoRAParam if rank else nnx.Param)
        parameters = cast({path: arrays[path] for path in sorted(trained)}, jnp.float32)
        fixed = {path: x for path, x in arrays.items() if path not in trained}
        del model, arrays
        method = optimizer(OptimizerConfig(schedule="constant"), 10)
        steps = make_steps(parts, decoder, ObjectiveConfig("dpo"), method, dtype="bfloat16", remat="blocks")
        with jax.numpy_dtype_promotion("standard"):
            state = TrainState(parameters, method.init(parameters), jnp.int32(0))
        del parameters
        shape = choose_shape([examples], length, 2 * len(examples) * length, 1)
        times, loss = [], float("nan")
        for _ in range(5):
            begin = time.perf_counter()
            gradients: Any = None
            sums: Any = None
            for _, micro in micro_batches(examples, shape):
                micro = jax.tree.map(jnp.asarray, micro)
                arguments = (state.parameters, fixed, micro, jnp.float32(len(examples)))
                gradients, sums = (
                    steps.first(*arguments) if gradients is None else steps.more(*arguments, gradients, sums)
                )
            updated = steps.update(state, gradients, sums)
            del gradients
            state = updated.state
            loss = float(sums.loss) / len(examples)  # waits for the device
            jax.block_until_ready(state.parameters)
            times.append(time.perf_counter() - begin)
        del state, updated, fixed
        taken, tokens = float(np.median(times[1:])), 2 * len(examples) * length
        stats = jax.devices()[0].memory_stats() or {}
        rows.append(
            (
                name,
                f"{taken * 1e3:.0f}",
                f"{6 * count * tokens / taken / 1e12:.1f}",
                f"{stats.get('peak_bytes_in_use', 0) / 2**30:.1f}",
                f"{loss:.4f}",
            )
        )
    head = ("this project", "ms a step", "TFLOP/s by 6 P T", "peak GiB so far", "loss")
    table(f"DPO step, 1B shape, {len(examples)} pairs of {length} tokens ({card()})", head, rows)
    return True
