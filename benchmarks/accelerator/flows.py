"""A whole audit and a DPO step by this project."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from benchmarks.accelerator.common import (
    PROMPTS,
    SHAPES,
    Program,
    alone,
    at_once,
    card,
    compiled,
    decoder_config,
    pairs,
    planned,
    random_model,
    table,
)


def compile_audit(model: Any, devices: Any, work: Any, settings: Any) -> float:
    """Runs each program of an audit once, all at once; the seconds that it took."""
    import jax
    import jax.numpy as jnp

    from spinal_jax.audit.lens_step import zero_lens_sums
    from spinal_jax.audit.spectra import eigenvalues

    begin, boundaries, width = time.perf_counter(), model.config.depth + 1, model.config.width
    with jax.enable_x64(True):
        grams = devices.grams(1, work.slots, boundaries, width, np.dtype(np.float64))
        one, every = devices.of_boundaries(grams[0], [0])[0], jnp.ones(work.slots)
    batch, lens = devices.batch(next(iter(work))), devices.lens(model.head())
    x = jnp.zeros((boundaries, len(batch.measured), width), jnp.bfloat16)
    sums = devices.lens_sums(zero_lens_sums(boundaries, settings, 1, False))

    def step(function: Callable[..., Any], *arguments: Any) -> None:
        with jax.enable_x64(True):
            jax.block_until_ready(function(*arguments))

    at_once(
        partial(step, devices.forward_step, model, grams, devices.lens_error(), batch, (), work.groups_at_once),
        partial(step, devices.lens_step, (lens,), sums, (x,), batch, settings),
        partial(step, partial(eigenvalues, center=False), one, every, 1.0),
    )
    return time.perf_counter() - begin


def audit(name: str, shape: str, toy: bool) -> bool:
    """The whole audit with exact intervals, its sums and spectra on the device."""
    import jax

    from spinal_jax.audit.devices import OneDevice
    from spinal_jax.audit.gram_store import gram_home
    from spinal_jax.audit.measure import measure
    from spinal_jax.models.parts import take_apart
    from spinal_jax.parallel.device_defaults import batch_tokens

    decoder, settings = decoder_config(SHAPES[shape]), alone()
    model = random_model(decoder, "bfloat16")
    weights = sum(x.nbytes for x in take_apart(model)[1].values())
    devices = OneDevice()
    home = gram_home(decoder, settings, weights, devices)
    work = planned(decoder, 128 if toy else PROMPTS, 1024 if toy else batch_tokens(jax.default_backend()))
    compiling = compile_audit(model, devices, work, settings)
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


class Variant:
    """Training of all weights, or of adapters."""

    def __init__(self, decoder: Any, rank: int):
        from flax import nnx

        from spinal_jax.config.training import ObjectiveConfig, OptimizerConfig
        from spinal_jax.models.parts import Parts
        from spinal_jax.objectives.step import make_steps
        from spinal_jax.train.optimizer import optimizer

        self.decoder, self.rank = decoder, rank
        parts = Parts(nnx.eval_shape(self.model))
        self.trained = sorted(parts.paths(nnx.LoRAParam if rank else nnx.Param))
        self.method = optimizer(OptimizerConfig(schedule="constant"), 10)
        self.steps: Any = make_steps(
            parts, decoder, ObjectiveConfig("dpo"), self.method, dtype="bfloat16", remat="blocks"
        )

    def model(self) -> Any:
        from spinal_jax.models import lora

        model = random_model(self.decoder, "bfloat16" if self.rank else "float32")
        if self.rank:
            lora.attach(model, self.rank, 32.0, ("all-linear",), 0)
        return model

    def state(self) -> tuple[Any, Any]:
        """The state of the optimiser, and weights that are not trained."""
        import jax
        import jax.numpy as jnp

        from spinal_jax.models.parts import cast, take_apart
        from spinal_jax.objectives.step import TrainState

        arrays = take_apart(self.model())[1]
        parameters = cast({path: arrays.pop(path) for path in self.trained}, jnp.float32)
        with jax.numpy_dtype_promotion("standard"):
            return TrainState(parameters, self.method.init(parameters), jnp.int32(0)), arrays


def dpo(toy: bool) -> bool:
    """One DPO step, all weights and LoRA."""
    import jax
    import jax.numpy as jnp

    from spinal_jax.models.translate import parameter_shapes
    from spinal_jax.objectives.responses import choose_shape, micro_batches

    decoder, ranks, rows = decoder_config(SHAPES["toy" if toy else "1B"]), (0, 16), []
    examples, length = pairs(decoder.vocab_size, toy)
    shape = choose_shape([examples], length, 2 * len(examples) * length, 1)
    [(_, micro)] = micro_batches(examples, shape)
    micro, every = jax.tree.map(jnp.asarray, micro), jnp.float32(len(examples))
    variants, programs = {rank: Variant(decoder, rank) for rank in ranks}, {}
    for rank, variant in variants.items():
        state, fixed = jax.eval_shape(variant.state)
        gradients, sums = jax.eval_shape(variant.steps.first, state.parameters, fixed, micro, every)
        programs[f"first {rank}"] = Program(variant.steps.first, (state.parameters, fixed, micro, every))
        programs[f"update {rank}"] = Program(variant.steps.update, (state, gradients, sums))
    ready = compiled(programs)

    count = sum(int(np.prod(s.shape)) for s in parameter_shapes(decoder).values())
    for rank, variant in variants.items():
        state, fixed = variant.state()
        times, loss = [], float("nan")
        for _ in range(5):
            begin = time.perf_counter()
            gradients, sums = ready[f"first {rank}"](state.parameters, fixed, micro, every)
            state = ready[f"update {rank}"](state, gradients, sums).state
            del gradients
            loss = float(sums.loss) / len(examples)  # waits for the device
            jax.block_until_ready(state.parameters)
            times.append(time.perf_counter() - begin)
        del state, fixed
        taken, tokens = float(np.median(times[1:])), 2 * len(examples) * length
        stats = jax.devices()[0].memory_stats() or {}
        rows.append(
            (
                f"LoRA of rank {rank}" if rank else "all weights",
                f"{taken * 1e3:.0f}",
                f"{6 * count * tokens / taken / 1e12:.1f}",
                f"{stats.get('peak_bytes_in_use', 0) / 2**30:.1f}",
                f"{loss:.4f}",
            )
        )
    head = ("this project", "ms a step", "TFLOP/s by 6 P T", "peak GiB so far", "loss")
    table(f"DPO step, 1B shape, {len(examples)} pairs of {length} tokens ({card()})", head, rows)
    return True
