"""Three tiny families on this device against the CPU."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from benchmarks.accelerator.common import TINY, alone, at_once, card, decoder_config, planned, random_model, table

EXACT, LENS = 1e-4, 1e-3  # bounds: states in float32 against the CPU, relative; columns of a trace


def correctness() -> bool:
    """Whether the states in float32 and the columns of a trace are within their bounds."""
    rows = at_once(*(partial(family, name) for name in TINY))
    head = ("family", "float32 states", "bfloat16 states", "contraction", "transport", "entropy", "within bounds")
    table(f"Correctness against the CPU ({card()})", head, rows)
    return all(row[-1] == "yes" for row in rows)


def family(name: str) -> tuple[str, ...]:
    """The row of one of them."""
    import jax

    from spinal_jax.audit.measure import measure
    from spinal_jax.models.parts import take_apart

    cpu, here = jax.devices("cpu")[0], jax.devices()[0]
    decoder = decoder_config(TINY[name])
    with jax.default_device(cpu):
        parts, arrays = take_apart(random_model(decoder, "float32"))
    tokens = np.random.default_rng(1).integers(0, decoder.vocab_size, (4, 96)).astype(np.int32)
    segments = np.repeat([[1] * 40 + [2] * 50 + [0] * 6], 4, axis=0).astype(np.int32)
    work, settings = planned(decoder, 64, 1024), alone()

    def trace(device: Any) -> Any:
        with jax.default_device(device):
            return measure(parts.assemble(jax.device_put(arrays, device)), work, settings).whole.columns

    states = partial(states_of, parts, arrays, tokens, segments)
    wanted, exact, rough, known, found = at_once(
        partial(states, cpu, "float32"),
        partial(states, here, "float32"),
        partial(states, here, "bfloat16"),
        partial(trace, cpu),
        partial(trace, here),
    )
    largest = np.abs(wanted).max()
    away, away_rough = (float(np.abs(each - wanted).max() / largest) for each in (exact, rough))
    apart = [float(np.nanmax(np.abs(known[x] - found[x]))) for x in ("contraction", "transport", "entropy")]
    ok = away <= EXACT and max(apart) <= LENS
    return name, *(f"{each:.1e}" for each in (away, away_rough, *apart)), "yes" if ok else "NO"


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
