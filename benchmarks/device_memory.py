"""Memory of an audit and of a DPO step on slices of TPUs and on GPUs, by their compilers, without any of them.

    python benchmarks/device_memory.py [--step audit dpo] [--devices v5e h100] [--chips 4 16] [--models llama-3-8b]

Needs libtpu (`pip install 'spinal-jax[tpu-plan]'`) or JAX's CUDA plugin (`'spinal-jax[gpu-plan]'`, and for DPO
`nvidia-cudnn-cu13`), and a few seconds to a few minutes a row on two cores.

A row of the audit is `spinal plan model=MODEL model.dtype=bfloat16 device=DEVICE devices=CHIPS`: 512 prompts of 256
tokens on the mesh that an audit chooses, all weights in bfloat16. A row of DPO is a step that trains all weights, in
float32 with AdamW's two moments, forward and backward in bfloat16, blocks computed again in the backward pass, a row of
512 tokens on each device (a pair of 256 tokens each), and weights and moments split over all devices
(`parallel.fsdp=-1`). Devices that weights or state alone do not fit are not compiled for; a row that takes longer than
`--minutes` is given up.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from spinal_jax.config.data_sheets import DEVICES
from spinal_jax.errors import UserError
from spinal_jax.plan.layout import USABLE

GIB = 2**30
MODELS = "llama-3-8b", "llama-3-70b", "deepseek-v3"
HEADS = {
    "audit": ("weights", "sums", "temporary", "at most", "of", "fits", "GB received a batch", "s to compile"),
    "dpo": (
        "weights, moments",
        "gradients",
        "temporary",
        "at most",
        "of",
        "fits",
        "GB received a step",
        "s to compile",
    ),
}
LENGTH, PAIR = 512, 2  # tokens of a row, and sequences in it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", nargs="*", default=list(HEADS), choices=list(HEADS))
    parser.add_argument("--devices", nargs="*", default=["v5e", "v5p"])
    parser.add_argument("--chips", nargs="*", type=int, default=[4, 16, 64, 256])
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--minutes", type=float, default=5, help="that a row may take")
    parser.add_argument("--row", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        step, model, device, chips = args.row
        print(f"row: {' | '.join(ROWS[step](model, device, int(chips)))}")
        return
    for step in args.step:
        head = "model", "chips", "mesh", *HEADS[step]
        print(f"\n| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
        for model in args.models:
            for device in args.devices:
                for chips in args.chips:
                    cells = in_time(args.minutes, step, model, device, str(chips))
                    print(f"| {model} | {chips} {device} | {cells} |", flush=True)


def in_time(minutes: float, *row: str) -> str:
    """The cells of a row, which a process of its own makes."""
    command = [sys.executable, __file__, "--row", *row]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        out, _ = process.communicate(timeout=60 * minutes)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # and what it has started
        process.wait()
        return f"not compiled in {minutes:g} minutes"
    found = [line.removeprefix("row: ") for line in out.splitlines() if line.startswith("row: ")]
    return found[0] if found else f"exit code {process.returncode}"


def audit(model: str, device: str, chips: int) -> Sequence[str]:
    """GiB of each device."""
    from spinal_jax.audit.pipeline import weight_bytes
    from spinal_jax.config import build
    from spinal_jax.config.plan import PlanConfig
    from spinal_jax.plan.plan import make_plan
    from spinal_jax.plan.shapes import decoder_of

    asked = {"source": model, "dtype": "bfloat16"}
    config = build(PlanConfig, {"model": asked, "device": device, "devices": chips})
    least = weight_bytes(decoder_of(config.model), "bfloat16") / chips
    if least > USABLE * memory(device):
        return too_large(least, device)
    try:
        found = make_plan(config)
    except UserError as error:  # the compiler says what it needs
        return no_room_for(least, str(error), device)
    assert found.memory is not None
    assert found.compiled is not None
    held, layout = found.memory, found.layout
    where = {"Gram sums in host memory": " (two groups)"}.get(found.sums.partition(" (")[0], "")
    return cells(
        mesh=(layout.data, layout.fsdp, layout.tensor),
        parts=(held.parameters + held.table, held.grams, held.temporaries),
        notes=("", where, ""),
        peak=held.peak,
        device=device,
        received=found.compiled.forward.received + found.compiled.lens.received,
        seconds=found.compiled.seconds,
    )


@dataclass(frozen=True)
class Step:
    """A compiled function, in bytes of each device."""

    temporaries: int
    more: int  # outputs that do not lie where arguments did
    received: float


def dpo(model: str, device: str, chips: int) -> Sequence[str]:
    """GiB of each device."""
    import time

    import jax

    from spinal_jax.config import ModelConfig, ParallelConfig
    from spinal_jax.config.training import LoRAConfig, ObjectiveConfig, OptimizerConfig
    from spinal_jax.models.translate import parameter_shapes
    from spinal_jax.objectives.responses import Shape
    from spinal_jax.parallel.mesh import make_mesh, row_multiple
    from spinal_jax.plan.collectives import received_bytes
    from spinal_jax.plan.compiled import held, no_room
    from spinal_jax.plan.shapes import decoder_of
    from spinal_jax.plan.targets import target_devices
    from spinal_jax.train.abstract import abstract_training, lower_steps
    from spinal_jax.train.optimizer import optimizer

    decoder = decoder_of(ModelConfig(model))
    least = 4 * 4 * sum(math.prod(x.shape) for x in parameter_shapes(decoder).values()) / chips
    if least > USABLE * memory(device):  # weights, gradients and two moments
        return too_large(least, device)
    kind = DEVICES[device].kind
    jax.default_backend = lambda: kind  # by which steps of training choose their attention
    mesh = make_mesh(ParallelConfig(1, chips, 1), target_devices(device, chips))
    rows = row_multiple(mesh)
    begin = time.perf_counter()
    some = abstract_training(
        decoder,
        Shape(rows=rows, length=LENGTH, sequences=PAIR * rows),
        mesh,
        dtype="bfloat16",
        method=optimizer(OptimizerConfig(), 100),
        objective=ObjectiveConfig("dpo"),
        adapters=LoRAConfig(),
        remat="blocks",
    )

    def compiled(lowered: Any) -> Step:
        program = lowered.compile()
        size = program.memory_analysis()
        return Step(
            size.temp_size_in_bytes,
            size.output_size_in_bytes - size.alias_size_in_bytes,
            received_bytes(program.as_text()),
        )

    try:
        more, update = map(compiled, lower_steps(some))
    except RuntimeError as error:
        if (why := no_room(error)) is None:
            raise
        return no_room_for(least, why, device)
    state, gradients = held((some.state, some.fixed, some.batch)), held(some.state.parameters)
    largest = max((more, update), key=lambda step: step.temporaries + step.more)
    return cells(
        mesh=tuple(mesh.devices.shape),
        parts=(state, gradients, largest.temporaries + largest.more),
        notes=("", "", ""),
        peak=state + gradients + largest.temporaries + largest.more,
        device=device,
        received=more.received + update.received,
        seconds=time.perf_counter() - begin,
    )


ROWS = {"audit": audit, "dpo": dpo}


def memory(device: str) -> float:
    """Bytes of a device."""
    found = DEVICES[device].memory
    assert found is not None
    return found


def too_large(least: float, device: str) -> Sequence[str]:
    """Cells of devices that have no room for what is there all the time."""
    return ["", f"{least / GIB:.1f}", "", "", "", f"{memory(device) / GIB:.1f}", "no", "", ""]


def no_room_for(least: float, why: str, device: str) -> Sequence[str]:
    """Cells of devices for which the compiler gives up, with the temporary memory that it asks for."""
    asked = re.search(r"temporaries \(([\d.]+)G\)", why)
    temporary = asked[1] if asked else why
    return ["", f"{least / GIB:.2f}", "", temporary, "", f"{memory(device) / GIB:.1f}", "no", "", ""]


def cells(
    *,
    mesh: tuple[int, ...],
    parts: Sequence[float],
    notes: Sequence[str],
    peak: float,
    device: str,
    received: float,
    seconds: float,
) -> Sequence[str]:
    """Those of a compiled row."""
    return [
        " x ".join(map(str, mesh)),
        *(f"{part / GIB:.2f}{note}" for part, note in zip(parts, notes, strict=True)),
        f"{peak / GIB:.2f}",
        f"{memory(device) / GIB:.1f}",
        "yes" if peak <= USABLE * memory(device) else "no",
        f"{received / 1e9:.2f}",
        f"{seconds:.0f}",
    ]


if __name__ == "__main__":
    main()
