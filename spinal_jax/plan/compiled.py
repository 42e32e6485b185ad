"""The audit's two steps, compiled ahead of time over virtual devices: what the compiler says they take.

The compiler must know how many devices there are before JAX starts, so it runs in a process of its own, which has
shapes and no arrays. It is XLA for CPUs whatever the device: what it says of shapes, sharding and lifetimes holds
elsewhere too, but it multiplies bfloat16 in float32. An accelerator does not, so for one it is kept from widening all
weights before the loop over blocks; the copies that it makes of one block's are in its numbers, which are from above.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

from spinal_jax.config import build, to_mapping
from spinal_jax.config.plan import PlanConfig
from spinal_jax.errors import UserError
from spinal_jax.plan.collectives import received_bytes

# The pass that widens what a loop reads before the loop.
NO_WIDENING = "--xla_disable_hlo_passes=while-loop-invariant-code-motion"


@dataclass(frozen=True)
class Program:
    """One compiled step, in bytes of each device."""

    arguments: int
    outputs: int
    aliased: int  # outputs that lie where arguments did
    temporaries: int
    received: float  # from other devices


@dataclass(frozen=True)
class Compiled:
    """Both steps, and what lies on each device beside them, in bytes."""

    parameters: int
    table: int  # the unembedding as the lens has it, where that is not the parameter itself
    grams: int
    lens_sums: int
    batch: int
    kept: int  # residuals at the measured positions of one batch
    forward: Program
    lens: Program
    seconds: float  # that compiling took
    memory: int  # that it took, bytes

    @property
    def peak(self) -> int:
        """The most that a device holds at a time. The last batch's residuals stay until the next batch has its own."""
        resident = self.parameters + self.table + self.grams + self.lens_sums + 2 * (self.batch + self.kept)
        return resident + max(self.forward.temporaries, self.lens.temporaries)


def compiled(config: PlanConfig) -> Compiled:
    """Compiles the audit that `config` plans, in a process of its own. Errors: UserError."""
    given = os.environ.get("XLA_FLAGS", "").split()
    flags = [flag for flag in given if "host_platform_device_count" not in flag]
    flags.append(f"--xla_force_host_platform_device_count={config.devices}")
    if config.device != "cpu":
        flags.append(NO_WIDENING)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}
    done = subprocess.run(
        [sys.executable, "-m", __spec__.name],
        input=json.dumps(to_mapping(config)),
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"the step did not compile (exit code {done.returncode}):\n{done.stderr[-4000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    if "mistake" in found:
        raise UserError(found["mistake"])
    programs = {name: Program(**found[name]) for name in ("forward", "lens")}
    return Compiled(**{**found, **programs})


def _main() -> None:
    config = build(PlanConfig, json.load(sys.stdin))
    try:
        found: dict[str, Any] = asdict(_compile(config))
    except UserError as error:
        found = {"mistake": str(error)}
    print(json.dumps(found))


def _compile(config: PlanConfig) -> Compiled:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from spinal_jax.audit.abstract import abstract_arguments, lower_steps
    from spinal_jax.metrics import contraction
    from spinal_jax.parallel.mesh import make_mesh
    from spinal_jax.parallel.placement import Shards
    from spinal_jax.plan.estimate import item_bytes
    from spinal_jax.plan.shapes import decoder_of
    from spinal_jax.plan.work import pool, widest

    begin = time.perf_counter()
    backend = "cpu" if config.device == "cpu" else "gpu"  # which tiles of logits are made
    decoder, settings, dtype = decoder_of(config.model), config.metrics, config.model.dtype
    mesh = make_mesh(config.parallel)
    on_mesh = Shards.of(mesh, decoder.vocab_size * decoder.width * item_bytes("", dtype))
    shards = None if mesh.size == 1 else on_mesh
    work = pool(config, decoder, on_mesh.rows)
    batch = widest(work)
    gram = contraction.gram_dtype()
    with jax.enable_x64(True) if gram == np.float64 else contextlib.nullcontext():
        shape = batch.height, batch.length, batch.measured
        some = abstract_arguments(decoder, jnp.dtype(dtype), settings, shape, gram, shards=shards, slots=work.slots)
        forward, lens = (
            _program(step.compile()) for step in lower_steps(some, settings, work.groups_at_once, shards, backend)
        )
    return Compiled(
        parameters=_held(some.model),
        table=0 if shards is None else _held(some.lens),
        grams=_held(some.grams),
        lens_sums=_held(some.lens_sums),
        batch=_held(some.batch),
        kept=_held(some.x),
        forward=forward,
        lens=lens,
        seconds=time.perf_counter() - begin,
        memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def _held(tree: Any) -> int:
    """Bytes of abstract arrays on each device."""
    import jax

    def size(leaf: Any) -> int:
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(map(size, jax.tree.leaves(tree)))


def _program(step: Any) -> Program:
    found = step.memory_analysis()
    return Program(
        found.argument_size_in_bytes,
        found.output_size_in_bytes,
        found.alias_size_in_bytes,
        found.temp_size_in_bytes,
        received_bytes(step.as_text()),
    )


if __name__ == "__main__":
    _main()
