"""Correctness against the CPU, the ceilings of the card, and stages of a batch against them."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import numpy as np

from benchmarks.accelerator.common import (
    SHAPES,
    TINY,
    alone,
    card,
    decoder_config,
    planned,
    random_model,
    seconds,
    table,
)

EXACT, LENS = 1e-4, 1e-3  # bounds: states in float32 against the CPU, relative; columns of a trace


def states_of(parts: Any, arrays: Any, tokens: np.ndarray, segments: np.ndarray, where: Any, dtype: str) -> np.ndarray:
    """[D + 1, N, d] hidden states of the real tokens, computed on a device in a dtype."""
    import jax
    import jax.numpy as jnp

    from spinal_jax.models.decoder import collect
    from spinal_jax.models.parts import cast

    model = parts.assemble(jax.device_put(cast(arrays, jnp.dtype(dtype)), where))
    kind = {"cuda": "gpu", "rocm": "gpu"}.get(where.platform, where.platform)

    def forward(model: Any, tokens: Any, segments: Any) -> Any:
        return model.forward(tokens, segments=segments, tap=collect(lambda h: h), backend=kind)[1]

    found = jax.jit(forward)(model, *jax.device_put((tokens, segments), where))
    return np.asarray(found.astype(jnp.float32))[:, segments > 0]


def correctness() -> bool:
    """Three tiny families on this device against the CPU."""
    import jax

    from spinal_jax.audit.measure import measure
    from spinal_jax.models.parts import take_apart

    cpu, here = jax.devices("cpu")[0], jax.devices()[0]
    rows, fine = [], True
    for name, config in TINY.items():
        decoder = decoder_config(config)
        with jax.default_device(cpu):
            model = random_model(decoder, "float32")
        parts, arrays = take_apart(model)
        tokens = np.random.default_rng(1).integers(0, decoder.vocab_size, (4, 96)).astype(np.int32)
        segments = np.repeat([[1] * 40 + [2] * 50 + [0] * 6], 4, axis=0).astype(np.int32)

        wanted = states_of(parts, arrays, tokens, segments, cpu, "float32")
        size = np.abs(wanted).max()
        exact = np.abs(states_of(parts, arrays, tokens, segments, here, "float32") - wanted).max() / size
        rough = np.abs(states_of(parts, arrays, tokens, segments, here, "bfloat16") - wanted).max() / size
        work, settings = planned(decoder, 64, 1024), alone()
        traces = []
        for device in (cpu, here):
            with jax.default_device(device):
                traces.append(measure(parts.assemble(jax.device_put(arrays, device)), work, settings).whole.columns)
        apart = {
            column: float(np.nanmax(np.abs(traces[0][column] - traces[1][column])))
            for column in ("contraction", "transport", "entropy")
        }
        ok = exact <= EXACT and max(apart.values()) <= LENS
        fine &= bool(ok)
        cells = (f"{apart['contraction']:.1e}", f"{apart['transport']:.1e}", f"{apart['entropy']:.1e}")
        rows.append((name, f"{exact:.1e}", f"{rough:.1e}", *cells, "yes" if ok else "NO"))
    table(
        f"Correctness against the CPU ({card()})",
        ("family", "float32 states", "bfloat16 states", "contraction", "transport", "entropy", "within bounds"),
        rows,
    )
    return fine


def ceilings(toy: bool) -> bool:
    """Products of matrices, eigenvalues, and the stages of a batch of the 8B shape against them."""
    import jax
    import jax.numpy as jnp

    from spinal_jax.audit.lens_step import pairs_of
    from spinal_jax.metrics import contraction
    from spinal_jax.metrics.transport import lens_stats
    from spinal_jax.models.translate import parameter_shapes
    from spinal_jax.plan import estimate

    rates, rows = {}, []
    with jax.enable_x64(True):
        for name in ("bfloat16", "float32", "float64"):
            rates[name], height, size = fastest_product(name, toy)
            rows.append((f"{name}, {height} x {size} by {size} x {size}", f"{rates[name] / 1e12:,.2f} TFLOP/s"))
        for size in (64,) if toy else (2048, 4096):
            a = jax.random.normal(jax.random.key(0), (size, size), jnp.float64)
            a = a @ a.T
            solve = jax.jit(lambda a: jnp.linalg.eigvalsh(a, UPLO="L", symmetrize_input=False))
            taken = seconds(lambda a=a, f=solve: f(a), 2)
            known = np.linalg.eigvalsh(np.asarray(a)) if size <= 2048 else None
            error = "" if known is None else f", error {np.abs(np.asarray(solve(a)) / known - 1).max():.0e}"
            rows.append((f"float64 eigenvalues, {size}", f"{taken:.3f} s{error}"))
            del a
    table(f"Ceilings ({card()})", ("what", "measured"), rows)

    decoder = decoder_config(SHAPES["toy" if toy else "8B"])
    model = random_model(decoder, "bfloat16")
    shapes, boundaries, width = parameter_shapes(decoder), decoder.depth + 1, decoder.width
    rows = []
    for length in (64,) if toy else (256, 8192):
        height = (512 if toy else 16384) // length
        tokens = jnp.zeros((height, length), jnp.int32)
        forward = jax.jit(lambda model, tokens: model.forward(tokens)[0])
        taken = seconds(lambda t=tokens, f=forward: f(model, t), 3)
        # The kernel skips the scores above the diagonal: half of the two products.
        skipped = 2 * decoder.depth * height * length**2 * decoder.heads * decoder.head_dim
        rate = (estimate.forward_flops(decoder, shapes, height, length) - skipped) / taken
        share = f"{rate / rates['bfloat16']:.0%}"
        rows.append((f"forward, {height} x {length}", f"{taken * 1e3:.1f}", f"{rate / 1e12:.1f}", share))
        if length <= 256:
            first = taken
    height, length = (8, 64) if toy else (64, 256)
    states = jax.random.normal(jax.random.key(1), (height, length, width), jnp.float32).astype(jnp.bfloat16)
    counted, slots = jnp.ones((height, length), jnp.float32), jnp.repeat(jnp.arange(4, dtype=jnp.int32), height // 4)
    with jax.enable_x64(True):
        grams = contraction.init(4, 1, width, np.dtype(np.float64))
        add = jax.jit(contraction.update, donate_argnums=0, static_argnames="backend")
        grams = add(grams, states, counted, slots, jnp.int32(0))
        jax.block_until_ready(grams)
        begin = time.perf_counter()
        for _ in range(10):
            grams = add(grams, states, counted, slots, jnp.int32(0))
        jax.block_until_ready(grams)
        taken = (time.perf_counter() - begin) / 10 * boundaries
    flops = 2 * height * length * contraction.triangle_size(width) * boundaries
    rows.append(
        (
            "Gram sums of all boundaries",
            f"{taken * 1e3:.1f}",
            f"{flops / taken / 1e12:.1f}",
            f"{taken / first:.0%} of the forward",
        )
    )
    count = 8 if toy else 704
    x = jax.random.normal(jax.random.key(2), (boundaries, count, width), jnp.float32).astype(jnp.bfloat16)
    lens = jax.jit(lambda model, x: lens_stats((model.head(),), (x,), pairs_of(boundaries)))
    taken = seconds(lambda: lens(model, x), 3)
    rate = 2 * boundaries * count * decoder.vocab_size * width / taken
    rows.append(
        (f"lens, {count} positions", f"{taken * 1e3:.1f}", f"{rate / 1e12:.1f}", f"{rate / rates['bfloat16']:.0%}")
    )
    table("Stages of a batch, 8B shape, bfloat16", ("stage", "ms", "TFLOP/s", "of the bfloat16 ceiling"), rows)
    return True


def fastest_product(dtype: str, toy: bool) -> tuple[float, int, int]:
    """(FLOP/s, rows, d): of products [rows, d] x [d, d] of several sizes the fastest, each in a chain of eight."""
    import jax
    import jax.numpy as jnp

    sizes = [(8192, 8192), (16384, 8192), (16384, 4096), (32768, 4096)]
    sizes = [(256, 256)] if toy else sizes if dtype == "bfloat16" else [(4096, 4096), (16384, 4096)]
    precision = None if dtype == "bfloat16" else jax.lax.Precision.HIGHEST
    found = []
    for height, size in sizes:
        keys = jax.random.split(jax.random.key(0))
        x = jax.random.normal(keys[0], (height, size), jnp.float32).astype(dtype)
        w = (jax.random.normal(keys[1], (size, size), jnp.float32) / size**0.5).astype(dtype)
        chain = jax.jit(lambda x, w: jax.lax.fori_loop(0, 8, lambda _, x: jnp.matmul(x, w, precision=precision), x))
        taken = seconds(partial(chain, x, w), 7, np.min) / 8
        found.append((2 * height * size**2 / taken, height, size))
    return max(found)


def attention(toy: bool) -> bool:
    """Attention by cuDNN and by XLA: forward and backward, several sequences in a row or one, and a window."""
    import jax
    import jax.numpy as jnp

    from spinal_jax.models.attention import allowed, attend
    from spinal_jax.models.fused_attention import attend_cudnn

    heads, kv_heads, dim, tokens = (4, 2, 16, 256) if toy else (32, 8, 128, 16384)
    on_gpu, fine, rows = jax.default_backend() == "gpu", True, []
    for length in (64,) if toy else (256, 2048, 8192):
        height = max(1, tokens // length)
        for packed, window in ((1, None), (4, None), (4, length // 8)):
            if length > 2048 and window:
                continue
            key = jax.random.key(length)
            q, k, v = (
                jax.random.normal(jax.random.fold_in(key, n), (height, length, count, dim), jnp.float32).astype(
                    jnp.bfloat16
                )
                for n, count in enumerate((heads, kv_heads, kv_heads))
            )
            segments = jnp.broadcast_to(1 + jnp.arange(length, dtype=jnp.int32) * packed // length, (height, length))
            span = None if window is None else jnp.int32(window)

            def plain(q: Any, k: Any, v: Any, segments: Any = segments, span: Any = span) -> Any:
                return attend(q, k, v, segments, window=span, scale=dim**-0.5, softcap=None)

            def fused(q: Any, k: Any, v: Any, segments: Any = segments, span: Any = span) -> Any:
                row = jnp.arange(q.shape[1], dtype=jnp.int32)
                mask = None if span is None else allowed(segments, row, span)
                return attend_cudnn(q, k, v, segments, scale=dim**-0.5, mask=mask)

            def gradients(function: Any) -> Any:
                def loss(*rows: Any) -> Any:
                    return jnp.sum(function(*rows).astype(jnp.float32) ** 2)

                return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))

            name = f"{height} x {length}, {packed} in a row" + (f", window {window}" if window else "")
            ours = seconds(partial(jax.jit(plain), q, k, v), 3)
            if not on_gpu:
                rows.append((name, f"{ours * 1e3:.2f}", "no GPU", "", "", ""))
                continue
            theirs = seconds(partial(jax.jit(fused), q, k, v), 3)
            some = tuple(x[:1] for x in (q, k, v))
            short = {"segments": segments[:1], "span": span}
            exact = jax.jit(partial(plain, **short))(*(x.astype(jnp.float32) for x in some))
            forward = (
                jnp.abs(jax.jit(partial(fused, **short))(*some).astype(jnp.float32) - exact).max()
                / jnp.abs(exact).max()
            )
            wanted = gradients(partial(plain, **short))(*(x.astype(jnp.float32) for x in some))
            found = gradients(partial(fused, **short))(*some)
            backward = max(
                float(jnp.abs(a.astype(jnp.float32) - b).max() / jnp.abs(b).max())
                for a, b in zip(found, wanted, strict=True)
            )
            ok = float(forward) < 2e-2 and backward < 4e-2  # a few roundings of bfloat16, 2^-8 each
            fine &= ok
            rows.append(
                (
                    name,
                    f"{ours * 1e3:.2f}",
                    f"{theirs * 1e3:.2f}",
                    f"{float(forward):.1e}",
                    f"{backward:.1e}",
                    "yes" if ok else "NO",
                )
            )
    head = ("rows", "XLA, ms", "cuDNN, ms", "forward apart", "backward apart", "within bounds")
    table(f"Attention, {heads} heads of {dim}, {kv_heads} key heads, bfloat16 ({card()})", head, rows)
    return fine
