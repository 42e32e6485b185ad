"""TPU slices for which libtpu can compile without TPUs."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

# Topology by number of chips: two-dimensional (v5e, v6e) and three-dimensional (v5p).
FLAT = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
CUBIC = {1: (1, 1, 1), 4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8)}
CUBIC |= {256: (4, 8, 8), 512: (8, 8, 8)}
SLICES = {"v5e": FLAT, "v6e": FLAT, "v5p": CUBIC}


def why_not_compiled(device: str, count: int) -> str | None:
    """The reason why libtpu cannot compile for such a slice, or None."""
    if device not in SLICES:
        return f"libtpu has no compiler for {device}"
    if count not in SLICES[device]:
        return f"a slice of {device} has {', '.join(map(str, SLICES[device]))} chips, and not {count}"
    if find_spec("libtpu") is None:
        return "libtpu is not installed; pip install 'spinal-jax[tpu-plan]'"
    return None


def slice_devices(device: str, count: int) -> Sequence[Any]:
    """Abstract devices of a slice, for compilation only (`why_not_compiled`)."""
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # do not query Google Cloud metadata
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # libtpu's lock is for processes that use the chips
    sides = SLICES[device][count]
    alone = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(sides) == 1 else {}
    name = f"{device}:{'x'.join(map(str, sides))}"
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **alone).devices
