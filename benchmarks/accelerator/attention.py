"""Attention by cuDNN and by XLA: several sequences in a row or one, and a window."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

from benchmarks.accelerator.common import Program, card, compiled, normal, seconds, table

FORWARD, BACKWARD = 2e-2, 4e-2  # bounds, relative to the largest: a few roundings of bfloat16, 2^-8 each


class Case(NamedTuple):
    """A batch of rows."""

    height: int
    length: int
    packed: int  # sequences in a row
    window: int | None

    @property
    def name(self) -> str:
        """As it stands in the table."""
        window = f", window {self.window}" if self.window else ""
        return f"{self.height} x {self.length}, {self.packed} in a row{window}"

    def segments(self) -> Any:
        """[n, T] the number of the sequence of each token."""
        import jax.numpy as jnp

        numbers = 1 + jnp.arange(self.length, dtype=jnp.int32) * self.packed // self.length
        return jnp.broadcast_to(numbers, (self.height, self.length))


def attention(toy: bool) -> bool:
    """Times of both, and how far cuDNN's forward and backward pass are from XLA's in float32."""
    import jax
    import jax.numpy as jnp

    heads, kv_heads, dim, tokens = (4, 2, 16, 256) if toy else (32, 8, 128, 16384)
    kernels = ["XLA", "cuDNN"] if jax.default_backend() == "gpu" else ["XLA"]
    cases = [
        Case(max(1, tokens // length), length, packed, window)
        for length in ((64,) if toy else (256, 2048, 8192))
        for packed, window in ((1, None), (4, None), (4, length // 8))
        if length <= 2048 or window is None
    ]
    programs = {}
    for case in cases:
        q, k, v = (
            normal(n, (case.height, case.length, count, dim)) for n, count in enumerate((heads, kv_heads, kv_heads))
        )
        segments = case.segments()
        first = tuple(x[:1] for x in (q, k, v))
        for kernel in kernels:
            programs[f"{case.name}: {kernel}"] = Program(jax.jit(partial(attend, case, kernel)), (segments, q, k, v))
            if kernels[1:]:
                wide = first if kernel == "cuDNN" else tuple(x.astype(jnp.float32) for x in first)
                program = jax.jit(partial(with_gradients, case, kernel))
                programs[f"{case.name}: {kernel} with gradients"] = Program(program, (segments[:1], *wide))
    ready = compiled(programs)

    def run(name: str) -> Any:
        return ready[name](*programs[name].arguments)

    rows = []
    for case in cases:
        times = [f"{seconds(partial(run, f'{case.name}: {kernel}'), 3) * 1e3:.2f}" for kernel in kernels]
        if len(kernels) == 1:
            rows.append((case.name, *times, "no GPU", "", "", ""))
            continue
        wanted, found = (run(f"{case.name}: {kernel} with gradients") for kernel in kernels)
        forward, *backward = (apart(a, b) for a, b in zip(found, wanted, strict=True))
        ok = forward < FORWARD and max(backward) < BACKWARD
        rows.append((case.name, *times, f"{forward:.1e}", f"{max(backward):.1e}", "yes" if ok else "NO"))
    head = ("rows", "XLA, ms", "cuDNN, ms", "forward apart", "backward apart", "within bounds")
    table(f"Attention, {heads} heads of {dim}, {kv_heads} key heads, bfloat16 ({card()})", head, rows)
    return all(row[-1] != "NO" for row in rows)


def attend(case: Case, kernel: str, segments: Any, q: Any, k: Any, v: Any) -> Any:
    """Attention of rows [n, T, heads, features]."""
    import jax.numpy as jnp

    from spinal_jax.models import attention, fused_attention

    window, scale = None if case.window is None else jnp.int32(case.window), q.shape[-1] ** -0.5
    if kernel == "XLA":
        return attention.attend(q, k, v, segments, window=window, scale=scale, softcap=None)
    mask = None if window is None else attention.allowed(segments, jnp.arange(case.length, dtype=jnp.int32), window)
    return fused_attention.attend_cudnn(q, k, v, segments, scale=scale, mask=mask)


def with_gradients(case: Case, kernel: str, segments: Any, *rows: Any) -> tuple[Any, ...]:
    """Attention, and the gradients of the sum of its squares."""
    import jax
    import jax.numpy as jnp

    def loss(*rows: Any) -> tuple[Any, Any]:
        out = attend(case, kernel, segments, *rows).astype(jnp.float32)
        return jnp.sum(out**2), out

    (_, out), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(*rows)
    return out, *gradients


def apart(found: Any, wanted: Any) -> float:
    """Largest difference, relative to the largest number that is wanted."""
    import jax.numpy as jnp

    return float(jnp.abs(found.astype(jnp.float32) - wanted).max() / jnp.abs(wanted).max())
