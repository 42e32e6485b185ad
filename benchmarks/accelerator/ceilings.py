"""The ceilings of the card, and the stages of a batch against them."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from benchmarks.accelerator.common import (
    SHAPES,
    Program,
    card,
    compiled,
    decoder_config,
    normal,
    random_model,
    seconds,
    table,
)

PRODUCTS = {  # dtype: (rows, d) of products [rows, d] x [d, d]
    "bfloat16": [(8192, 8192), (16384, 8192), (16384, 4096), (32768, 4096)],
    "float32": [(4096, 4096), (16384, 4096)],
    "float64": [(4096, 4096), (16384, 4096)],
}
CHAIN = 8  # products in a chain
GRAMS = "Gram sums of all boundaries"
SOME = 10  # boundaries of which Gram sums are measured


class Stage(NamedTuple):
    """A stage of a batch."""

    program: Program
    flops: float
    calls: int = 1  # of the program


def ceilings(toy: bool) -> bool:
    """Of products of matrices and of eigenvalues, and what the stages of a batch of the 8B shape reach."""
    products, solvers, stages = product_programs(toy), solver_programs(toy), stages_of_a_batch(toy)
    ready = compiled(products | solvers | {name: stage.program for name, stage in stages.items()})

    best: dict[str, tuple[float, str]] = {}
    for name, program in products.items():
        (height, size), dtype = program.arguments[0].shape, program.arguments[0].dtype.name
        rate = CHAIN * 2 * height * size**2 / seconds(partial(ready[name], *program.arguments), 7, np.min)
        best[dtype] = max(best.get(dtype, (0.0, "")), (rate, name))
    rows = [(name, f"{rate / 1e12:,.2f} TFLOP/s") for rate, name in best.values()]
    for name, program in solvers.items():
        solve, error = partial(ready[name], *program.arguments), ""
        if len(program.arguments[0]) <= 2048:
            known = np.linalg.eigvalsh(np.asarray(program.arguments[0]))
            error = f", error {np.abs(np.asarray(solve()) / known - 1).max():.0e}"
        rows.append((name, f"{seconds(solve, 2):.3f} s{error}"))
    table(f"Ceilings ({card()})", ("what", "measured"), rows)

    lines, forward, ceiling = [], 0.0, best["bfloat16"][0]
    for name, stage in stages.items():
        arguments = stage.program.arguments
        if name == GRAMS:
            taken = stage.calls * gram_seconds(ready[name], *arguments)
            share = f"{taken / forward:.0%} of the forward"
        else:
            taken = seconds(partial(ready[name], *arguments), 3)
            share = f"{stage.flops / taken / ceiling:.0%}"
        forward = forward or taken
        lines.append((name, f"{taken * 1e3:.1f}", f"{stage.flops / taken / 1e12:.1f}", share))
    table("Stages of a batch, 8B shape, bfloat16", ("stage", "ms", "TFLOP/s", "of the bfloat16 ceiling"), lines)
    return True


def product_programs(toy: bool) -> dict[str, Program]:
    """Chains of products of matrices."""
    import jax
    import jax.numpy as jnp

    programs = {}
    for dtype, sizes in PRODUCTS.items():
        precision = None if dtype == "bfloat16" else jax.lax.Precision.HIGHEST

        @jax.jit
        def chain(x: Any, w: Any, precision: Any = precision) -> Any:
            return jax.lax.fori_loop(0, CHAIN, lambda _, x: jnp.matmul(x, w, precision=precision), x)

        for height, size in [(256, 256)] if toy else sizes:
            with jax.enable_x64(True):
                x, w = normal(0, (height, size), dtype), normal(1, (size, size), dtype, size**-0.5)
            programs[f"{dtype}, {height} x {size} by {size} x {size}"] = Program(chain, (x, w), x64=True)
    return programs


def solver_programs(toy: bool) -> dict[str, Program]:
    """Eigenvalues of symmetric matrices."""
    import jax
    import jax.numpy as jnp

    solve, programs = jax.jit(partial(jnp.linalg.eigvalsh, UPLO="L", symmetrize_input=False)), {}
    for size in (64,) if toy else (2048, 4096):
        with jax.enable_x64(True):
            x = normal(0, (size, size), "float64")
            programs[f"float64 eigenvalues, {size}"] = Program(solve, (x @ x.T,), x64=True)
    return programs


def stages_of_a_batch(toy: bool) -> dict[str, Stage]:
    """Forward pass, Gram sums and lens of the 8B shape, the forward pass of a batch of short rows first."""
    import jax
    import jax.numpy as jnp

    from spinal_jax.audit.lens_step import pairs_of
    from spinal_jax.metrics import contraction
    from spinal_jax.metrics.transport import lens_stats
    from spinal_jax.models.translate import parameter_shapes
    from spinal_jax.plan import estimate

    decoder = decoder_config(SHAPES["toy" if toy else "8B"])
    model, shapes = random_model(decoder, "bfloat16"), parameter_shapes(decoder)
    boundaries, width, stages = decoder.depth + 1, decoder.width, {}

    for length in (64,) if toy else (256, 8192):
        height = (512 if toy else 16384) // length
        # The kernel skips the scores above the diagonal: half of the two products.
        skipped = 2 * decoder.depth * height * length**2 * decoder.heads * decoder.head_dim
        forward = jax.jit(lambda model, tokens: model.forward(tokens)[0])
        stages[f"forward, {height} x {length}"] = Stage(
            Program(forward, (model, jnp.zeros((height, length), jnp.int32))),
            estimate.forward_flops(decoder, shapes, height, length) - skipped,
        )

    height, length = (8, 64) if toy else (64, 256)
    counted, slots = jnp.ones((height, length), jnp.float32), jnp.repeat(jnp.arange(4, dtype=jnp.int32), height // 4)
    with jax.enable_x64(True):
        sums = contraction.init(4, 1, width, np.dtype(np.float64))
    stages[GRAMS] = Stage(
        Program(
            jax.jit(contraction.update, donate_argnums=0),
            (sums, normal(1, (height, length, width)), counted, slots, jnp.int32(0)),
            x64=True,
        ),
        2 * height * length * contraction.triangle_size(width) * boundaries,
        calls=boundaries,
    )

    count = 8 if toy else 704
    lens = jax.jit(lambda model, x: lens_stats((model.head(),), (x,), pairs_of(boundaries)))
    stages[f"lens, {count} positions"] = Stage(
        Program(lens, (model, normal(2, (boundaries, count, width)))),
        2 * boundaries * count * decoder.vocab_size * width,
    )
    return stages


def gram_seconds(add: Callable[..., Any], sums: Any, *rows: Any) -> float:
    """Of one boundary. `add` takes the sums in place, so each call gets those of the last."""
    import jax

    sums = jax.block_until_ready(add(sums, *rows))
    begin = time.perf_counter()
    for _ in range(SOME):
        sums = add(sums, *rows)
    jax.block_until_ready(sums)
    return (time.perf_counter() - begin) / SOME
