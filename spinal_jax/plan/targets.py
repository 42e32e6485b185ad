"""Devices that a program can be compiled for without having them: slices of TPUs by libtpu, GPUs by JAX's CUDA plugin.

Both are found if they are installed. `jax.experimental.topologies` takes the description of the devices.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from spinal_jax.config.data_sheets import DEVICES

# Topology by number of chips: two-dimensional (v5e, v6e) and three-dimensional (v5p).
FLAT = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
CUBIC = {1: (1, 1, 1), 4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8)}
CUBIC |= {256: (4, 8, 8), 512: (8, 8, 8)}
SLICES = {"v5e": FLAT, "v6e": FLAT, "v5p": CUBIC}


@dataclass(frozen=True)
class Gpu:
    """What XLA's compiler asks about a GPU beyond its data sheet (CUDA's programming guide, and NVIDIA's white papers
    on the Ampere and Hopper architectures)."""

    capability: tuple[int, int]
    multiprocessors: int
    float32_units: int  # of a multiprocessor
    shared_memory: int  # bytes of a multiprocessor; a block gets up to 1 KiB less
    cache: int  # bytes of L2
    clock: float  # GHz


_HOPPER = Gpu((9, 0), 132, 128, 228 * 1024, 50 * 2**20, 1.98)
GPUS = {"a100": Gpu((8, 0), 108, 64, 164 * 1024, 40 * 2**20, 1.41), "h100": _HOPPER, "h200": _HOPPER}
PLUGINS = "jax-cuda13-plugin", "jax-cuda12-plugin"  # with either, programs are those of the GPU alone


def why_not_compiled(device: str | None, count: int) -> str | None:
    """The reason why programs for so many devices cannot be compiled without them, or None."""
    if device in GPUS:
        return _why_no_plugin(device, count)
    if device not in SLICES:
        return f"there is no compiler for {'an unnamed device' if device is None else device} without the device"
    if count not in SLICES[device]:
        return f"a slice of {device} has {', '.join(map(str, SLICES[device]))} chips, and not {count}"
    if find_spec("libtpu") is None:
        return "libtpu is not installed; pip install 'spinal-jax[tpu-plan]'"
    return None


def _why_no_plugin(device: str, count: int) -> str | None:
    host = DEVICES[device].host
    if count > host and count % host:
        return f"{count} {device} are not whole machines of {host}"
    if (plugin := _plugin()) is None:
        return "JAX's CUDA plugin is not installed; pip install 'spinal-jax[gpu-plan]'"
    ours = version("jaxlib")
    return None if plugin[1] == ours else f"{plugin[0]} {plugin[1]} is not of jaxlib {ours}"


def _plugin() -> tuple[str, str] | None:
    """The name and version of the CUDA plugin that is installed."""
    for name in PLUGINS:
        try:
            return name, version(name)
        except PackageNotFoundError:
            continue
    return None


def target_devices(device: str, count: int) -> Sequence[Any]:
    """Abstract devices, for compilation only (`why_not_compiled`)."""
    from jax.experimental import topologies

    if device in GPUS:
        host = DEVICES[device].host
        machines = "x".join(map(str, (1, max(1, count // host), min(count, host))))
        return topologies.get_topology_desc(
            platform="cuda", target_config=_description(device), topology=machines
        ).devices
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # do not query Google Cloud metadata
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # libtpu's lock is for processes that use the chips
    sides = SLICES[device][count]
    alone = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(sides) == 1 else {}
    name = f"{device}:{'x'.join(map(str, sides))}"
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **alone).devices


def compiler_of(device: str) -> str:
    """Name and version of the compiler for `target_devices`."""
    if device not in GPUS:
        return f"libtpu {version('libtpu')}"
    name, release = _plugin() or ("", "")
    return f"XLA for GPUs ({name} {release})"


def _description(device: str) -> str:
    """XLA's `GpuTargetConfigProto` as text."""
    gpu, sheet = GPUS[device], DEVICES[device]
    assert sheet.memory is not None
    major, minor = gpu.capability
    return f"""
        gpu_device_info {{
          threads_per_block_limit: 1024
          threads_per_warp: 32
          threads_per_core_limit: 2048
          core_count: {gpu.multiprocessors}
          fpus_per_core: {gpu.float32_units}
          block_dim_limit_x: {2**31 - 1}
          block_dim_limit_y: {2**16 - 1}
          block_dim_limit_z: {2**16 - 1}
          shared_memory_per_block: {48 * 1024}
          shared_memory_per_block_optin: {gpu.shared_memory - 1024}
          shared_memory_per_core: {gpu.shared_memory}
          registers_per_core_limit: {2**16}
          registers_per_block_limit: {2**16}
          memory_bandwidth: {sheet.bandwidth:.0f}
          device_memory_size: {sheet.memory:.0f}
          l2_cache_size: {gpu.cache}
          clock_rate_ghz: {gpu.clock}
          cuda_compute_capability {{ major: {major} minor: {minor} }}
        }}
        platform_name: "CUDA"
        runtime_version {{ major: 12 minor: 9 patch: 0 }}
        dnn_version_info {{ major: 9 minor: 12 patch: 0 }}
        device_description_str: "{sheet.title}"
    """
