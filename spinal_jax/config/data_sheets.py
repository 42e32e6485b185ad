"""Accelerators by name, with the numbers of their data sheets."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from spinal_jax.errors import UserError

# Seconds of all float64 eigenvalues of a symmetric matrix by its width, `jnp.linalg.eigvalsh` on one H200.
EIGENVALUES_H200 = {2048: 0.027, 4096: 0.109, 8192: 0.545}
BANDWIDTH_H200 = 4800e9

TPU_PASSES = (
    6  # bfloat16 products in one of float32 at precision HIGHEST (https://docs.jax.dev/en/latest/201/precision.html)
)

EXACT_PASSES = 9  # bfloat16 products in one of a Gram sum that is as good as float64 (metrics/contraction.py)


@dataclass(frozen=True)
class Device:
    """Peak rates of a device for dense arithmetic: FLOP/s by dtype, memory size and bandwidth in bytes and bytes/s.

    `link`: bytes/s received from neighbours, half of the bidirectional rate of data sheets, or None. `memory` is None
    for host memory.
    """

    title: str
    kind: Literal["cpu", "gpu", "tpu"]
    host: int  # maximum number in a machine
    bfloat16: float
    float32: float  # products at full precision: no TensorFloat32; bfloat16 in several passes on a TPU
    float64: float  # on a TPU, which has none in hardware, that of Gram sums
    memory: float | None
    bandwidth: float
    link: float | None
    source: str

    def rate(self, dtype: str) -> float:
        """FLOP/s of matrix products in a dtype."""
        rates = {"bfloat16": self.bfloat16, "float32": self.float32, "float64": self.float64}
        return rates[dtype]

    def eigenvalues(self, width: int) -> float | None:
        """Seconds for the float64 eigenvalues of a matrix on GPUs; None for devices that do not compute them.

        Measured on an H200; interpolated by a power law, and scaled by memory bandwidth for other GPUs, which is an
        estimate.
        """
        if self.kind != "gpu":
            return None
        widths = sorted(EIGENVALUES_H200)
        low, high = widths[:2] if width <= widths[1] else widths[-2:]
        first, second = EIGENVALUES_H200[low], EIGENVALUES_H200[high]
        power = math.log(second / first) / math.log(high / low)
        return first * (width / low) ** power * BANDWIDTH_H200 / self.bandwidth


def _tpu(page: str, host: int, bfloat16: float, memory: float, bandwidth: float, link_gbit: float) -> Device:
    return Device(
        title=f"TPU {page}",
        kind="tpu",
        host=host,
        bfloat16=bfloat16,
        float32=bfloat16 / TPU_PASSES,
        float64=bfloat16 / EXACT_PASSES,
        memory=memory,
        bandwidth=bandwidth,
        link=link_gbit * 1e9 / 8 / 2,  # stated in Gbit/s over all links and both directions
        source=f"https://cloud.google.com/tpu/docs/{page}",
    )


_HOPPER = {"bfloat16": 989.5e12, "float32": 67e12, "float64": 67e12, "link": 450e9}  # half of the rate with sparsity

DEVICES = {
    "v4": _tpu("v4", 4, 275e12, 32 * 2**30, 1200e9, 2400),
    "v5e": _tpu("v5e", 8, 197e12, 16e9, 819e9, 1600),
    "v5p": _tpu("v5p", 4, 459e12, 95e9, 2765e9, 4800),
    "v6e": _tpu("v6e", 8, 918e12, 32e9, 1640e9, 3584),
    "a100": Device(
        title="A100 SXM, 80 GB",
        kind="gpu",
        host=8,
        bfloat16=312e12,
        float32=19.5e12,
        float64=19.5e12,
        memory=80e9,
        bandwidth=2039e9,
        link=300e9,
        source="https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/"
        "nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf",
    ),
    "h100": Device(
        title="H100 SXM",
        kind="gpu",
        host=8,
        memory=80e9,
        bandwidth=3350e9,
        source="https://www.nvidia.com/en-us/data-center/h100/",
        **_HOPPER,
    ),
    "h200": Device(
        title="H200 SXM",
        kind="gpu",
        host=8,
        memory=141e9,
        bandwidth=BANDWIDTH_H200,
        source="https://www.nvidia.com/en-us/data-center/h200/",
        **_HOPPER,
    ),
    # 56 cores at 2.0 GHz with two 512-bit units of fused multiply-add each, 8 channels of DDR5-4800. bfloat16 is
    # computed in float32 here. As the host of accelerators it takes the eigenvalues.
    "cpu": Device(
        title="Xeon Platinum 8480+",
        kind="cpu",
        host=1,
        bfloat16=56 * 2.0e9 * 64,
        float32=56 * 2.0e9 * 64,
        float64=56 * 2.0e9 * 32,
        memory=None,
        bandwidth=8 * 4800e6 * 8,
        link=None,
        source="https://www.intel.com/content/www/us/en/products/sku/231746/"
        "intel-xeon-platinum-8480-processor-105m-cache-2-00-ghz/specifications.html",
    ),
}


def device_of(name: str) -> Device:
    """The device of a name. Raises UserError if it is unknown."""
    if name not in DEVICES:
        raise UserError(f"device is {name!r}; there are {', '.join(DEVICES)}")
    return DEVICES[name]
