"""Memory of an audit on slices of TPUs, by the compiler for TPUs, of which none is needed.

    python benchmarks/tpu_memory.py [--devices v5e v5p] [--chips 4 16 64 256] [--models llama-3-8b ...]

Needs libtpu (`pip install 'spinal-jax[tpu-plan]'`) and about half a minute a row on two cores. Every row is `spinal
plan model=MODEL model.dtype=bfloat16 device=DEVICE devices=CHIPS`: 512 prompts of 256 tokens on the mesh that an
audit chooses. A slice that the weights alone do not fit is not compiled.
"""

from __future__ import annotations

import argparse

from spinal_jax.audit.pipeline import weight_bytes
from spinal_jax.config import build
from spinal_jax.config.plan import PlanConfig
from spinal_jax.errors import UserError
from spinal_jax.parallel.data_sheets import DEVICES
from spinal_jax.plan.layout import USABLE
from spinal_jax.plan.plan import make_plan
from spinal_jax.plan.record import memory_of
from spinal_jax.plan.shapes import decoder_of

GIB = 2**30
MODELS = "llama-3-8b", "llama-3-70b", "deepseek-v3"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", nargs="*", default=["v5e", "v5p"])
    parser.add_argument("--chips", nargs="*", type=int, default=[4, 16, 64, 256])
    parser.add_argument("--models", nargs="*", default=MODELS)
    args = parser.parse_args()
    head = "model", "chips", "mesh", "weights", "sums", "temporary", "at most", "of", "fits", "GB received a batch"
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
    for model in args.models:
        for device in args.devices:
            for chips in args.chips:
                print(f"| {' | '.join(row(model, device, chips))} |", flush=True)


def row(model: str, device: str, chips: int) -> list[str]:
    """One line: GiB of each chip."""
    asked = {"source": model, "dtype": "bfloat16"}
    config = build(PlanConfig, {"model": asked, "device": device, "devices": chips})
    room = memory_of(DEVICES[device])
    least = weight_bytes(decoder_of(config.model), "bfloat16") / chips
    name = [model, f"{chips} {device}"]
    if least > USABLE * room:
        return [*name, "", f"{least / GIB:.1f}", "", "", "", f"{room / GIB:.1f}", "no", ""]
    try:
        found = make_plan(config)
    except UserError as error:
        return [*name, "", "", "", "", "", f"{room / GIB:.1f}", str(error), ""]
    assert found.memory is not None
    assert found.compiled is not None
    memory, layout = found.memory, found.layout
    where = {"Gram sums in host memory": " (two groups)"}.get(found.sums.partition(" (")[0], "")
    received = (found.compiled.forward.received + found.compiled.lens.received) / 1e9
    return [
        *name,
        f"{layout.data} x {layout.fsdp} x {layout.tensor}",
        f"{(memory.parameters + memory.table) / GIB:.2f}",
        f"{memory.grams / GIB:.2f}{where}",
        f"{memory.temporaries / GIB:.2f}",
        f"{memory.peak / GIB:.2f}",
        f"{room / GIB:.1f}",
        "yes" if found.fits(device) else "no",
        f"{received:.2f}",
    ]


if __name__ == "__main__":
    main()
