"""The audit's two steps, compiled ahead of time for devices that need not be there: what the compiler says they take.

A process of its own does it, which has shapes and no arrays. For TPUs libtpu compiles where it is installed
(`spinal_jax.plan.slices`). Otherwise XLA for CPUs does, over as many virtual devices, of which there must be enough
before JAX starts: what it says of shapes, sharding and lifetimes holds elsewhere too, but it multiplies bfloat16 in
float32. An accelerator does not, so for one it is kept from widening all weights before the loop over blocks; the
copies that it makes of one block's are in its numbers, which are from above.
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
from importlib.metadata import version
from typing import Any

from spinal_jax.config import build, to_mapping
from spinal_jax.config.plan import PlanConfig
from spinal_jax.errors import UserError
from spinal_jax.parallel.data_sheets import DEVICES
from spinal_jax.plan.collectives import received_bytes
from spinal_jax.plan.layout import DeviceLayout
from spinal_jax.plan.slices import slice_devices, why_not_compiled

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
    compiler: str
    seconds: float  # that compiling took
    memory: int  # that it took, bytes

    @property
    def peak(self) -> int:
        """The most that a device holds at a time. The last batch's residuals stay until the next batch has its own."""
        resident = self.parameters + self.table + self.grams + self.lens_sums + 2 * (self.batch + self.kept)
        return resident + max(self.forward.temporaries, self.lens.temporaries)


def compiled(config: PlanConfig, layout: DeviceLayout) -> Compiled:
    """Compiles the audit that `config` plans, in a process of its own. Errors: UserError."""
    given = os.environ.get("XLA_FLAGS", "").split()
    flags = [flag for flag in given if "host_platform_device_count" not in flag]
    if why_not_tpu(config) is not None:
        flags.append(f"--xla_force_host_platform_device_count={config.devices}")
        if config.device != "cpu":
            flags.append(NO_WIDENING)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}
    done = subprocess.run(
        [sys.executable, "-m", __spec__.name],
        input=json.dumps([to_mapping(config), asdict(layout)]),
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


def why_not_tpu(config: PlanConfig) -> str | None:
    """Why libtpu does not compile this plan; None: it does."""
    if config.device is None or DEVICES[config.device].kind != "tpu":
        return "it is for TPUs"
    return why_not_compiled(config.device, config.devices)


def _main() -> None:
    config, layout = json.load(sys.stdin)
    try:
        found: dict[str, Any] = asdict(_compile(build(PlanConfig, config), DeviceLayout(**layout)))
    except UserError as error:
        found = {"mistake": str(error)}
    print(json.dumps(found))


def _compile(config: PlanConfig, layout: DeviceLayout) -> Compiled:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from spinal_jax.audit.abstract import abstract_arguments, lower_steps
    from spinal_jax.audit.pipeline import unembedding_bytes
    from spinal_jax.config import ParallelConfig
    from spinal_jax.metrics import contraction
    from spinal_jax.parallel.mesh import make_mesh
    from spinal_jax.parallel.placement import Shards
    from spinal_jax.plan.shapes import decoder_of
    from spinal_jax.plan.work import pool, widest

    begin = time.perf_counter()
    for_tpu = why_not_tpu(config) is None
    devices = slice_devices(config.device or "", config.devices) if for_tpu else jax.devices()
    backend = "cpu" if config.device == "cpu" else "tpu" if for_tpu else "gpu"  # which tiles and kernels are made
    decoder, settings, dtype = decoder_of(config.model), config.metrics, config.model.dtype
    shards = None
    if layout.kind == "mesh" and layout.devices > 1:
        mesh = make_mesh(ParallelConfig(layout.data, layout.fsdp, layout.tensor), devices)
        shards = Shards.of(mesh, unembedding_bytes(decoder, dtype))
    work = pool(config, decoder, layout)
    batch = widest(work)
    each = layout.devices if shards is None else 1  # replicas have a part of every batch each
    shape = batch.height // each, batch.length, batch.measured // each
    gram = contraction.gram_dtype()
    with jax.enable_x64(True) if gram == np.float64 else contextlib.nullcontext():
        some = abstract_arguments(
            decoder,
            jnp.dtype(dtype),
            settings,
            shape,
            gram,
            shards=shards,
            device=devices[0] if for_tpu else None,
            slots=work.slots,
        )
        forward, lens = (
            _program(step.compile()) for step in lower_steps(some, settings, work.groups_at_once, shards, backend)
        )
    return Compiled(
        parameters=held(some.model),
        table=0 if shards is None else held(some.lens),
        grams=held(some.grams),
        lens_sums=held(some.lens_sums),
        batch=held(some.batch),
        kept=held(some.x),
        forward=forward,
        lens=lens,
        compiler=f"libtpu {version('libtpu')}" if for_tpu else f"XLA for CPUs (jaxlib {version('jaxlib')})",
        seconds=time.perf_counter() - begin,
        memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def held(tree: Any) -> int:
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
