"""Ahead-of-time compilation of the two steps of an audit for absent devices, for their memory.

The compilation runs in a separate process with abstract arrays, by the compiler for the device if it is installed
(`spinal_jax.plan.targets`). Otherwise XLA for CPUs compiles over virtual devices, whose number must be set before JAX
starts. Its shapes, shardings and buffer lifetimes hold for other backends too, but it multiplies bfloat16 in float32.
For accelerators, it is therefore prevented from converting all weights before the loop over blocks. The copies of one
block remain in the result, which is an upper bound.
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
from spinal_jax.config.data_sheets import DEVICES
from spinal_jax.config.plan import PlanConfig
from spinal_jax.errors import UserError
from spinal_jax.jsontypes import Json
from spinal_jax.plan.collectives import received_bytes
from spinal_jax.plan.layout import DeviceLayout
from spinal_jax.plan.targets import compiler_of, target_devices, why_not_compiled

# The pass that hoists conversions out of a loop.
NO_WIDENING = "--xla_disable_hlo_passes=while-loop-invariant-code-motion"


@dataclass(frozen=True)
class Program:
    """Memory of one compiled step in bytes on each device."""

    arguments: int
    outputs: int
    aliased: int  # outputs in the buffers of arguments
    temporaries: int
    received: float  # received from other devices


@dataclass(frozen=True)
class Compiled:
    """Both steps and the other arrays on each device, in bytes."""

    parameters: int
    table: int  # copy of the unembedding for the lens, if it is sharded differently
    grams: int
    lens_sums: int
    batch: int
    kept: int  # hidden states at the measured positions of a batch
    forward: Program
    lens: Program
    compiler: str
    seconds: float  # that compiling took
    memory: int  # that it took, bytes

    @property
    def peak(self) -> int:
        """Peak memory of a device. The hidden states of a batch are kept until those of the next exist."""
        resident = self.parameters + self.table + self.grams + self.lens_sums + 2 * (self.batch + self.kept)
        return resident + max(self.forward.temporaries, self.lens.temporaries)


def compiled(config: PlanConfig, layout: DeviceLayout) -> Compiled:
    """Compiles the audit of the plan in a separate process. Raises UserError if that fails."""
    given = os.environ.get("XLA_FLAGS", "").split()
    flags = [flag for flag in given if "host_platform_device_count" not in flag]
    if why_not_compiled(config.device, config.devices) is not None:
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
    answer = json.loads(done.stdout.splitlines()[-1])
    if "mistake" in answer:
        raise UserError(answer["mistake"])
    programs = {name: Program(**answer[name]) for name in ("forward", "lens")}
    return Compiled(**{**answer, **programs})


def _main() -> None:
    config, layout = json.load(sys.stdin)
    try:
        answer: Json = asdict(_compile(build(PlanConfig, config), DeviceLayout(**layout)))
    except UserError as error:
        answer = {"mistake": str(error)}
    except RuntimeError as error:
        if (why := no_room(error)) is None:
            raise
        answer = {
            "mistake": f"the audit does not fit: {why}; give more devices, a larger parallel.tensor or a smaller "
            "batch_tokens"
        }
    print(json.dumps(answer))


def no_room(error: RuntimeError) -> str | None:
    """What the compiler says of a program that the device has no memory for, or None for another error."""
    status, _, said = str(error).partition("\n")[0].partition(": ")
    return said.rstrip(".") if status == "RESOURCE_EXHAUSTED" and " HBM" in said else None


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
    from spinal_jax.plan.work import sample_prompts, widest

    begin = time.perf_counter()
    target = config.device if why_not_compiled(config.device, config.devices) is None else None
    devices = jax.devices() if target is None else target_devices(target, config.devices)
    # Selects tiles and kernels.
    backend = "cpu" if config.device == "cpu" else "gpu" if target is None else DEVICES[target].kind
    decoder, settings, dtype = decoder_of(config.model), config.metrics, config.model.dtype
    shards = None
    if layout.kind == "mesh" and layout.devices > 1:
        mesh = make_mesh(ParallelConfig(layout.data, layout.fsdp, layout.tensor), devices)
        shards = Shards.of(mesh, unembedding_bytes(decoder, dtype))
    work = sample_prompts(config, decoder, layout)
    batch = widest(work)
    each = layout.devices if shards is None else 1  # replicas split each batch
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
            device=None if target is None else devices[0],
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
        compiler=f"XLA for CPUs (jaxlib {version('jaxlib')})" if target is None else compiler_of(target),
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
    memory = step.memory_analysis()
    return Program(
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        received_bytes(step.as_text()),
    )


if __name__ == "__main__":
    _main()
