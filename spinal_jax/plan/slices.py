"""Slices of TPUs that libtpu compiles for without one being there."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

# Chips along each axis, by how many there are: of a slice in two dimensions (v5e, v6e), and in three (v5p).
FLAT = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
CUBIC = {1: (1, 1, 1), 4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8)}
CUBIC |= {256: (4, 8, 8), 512: (8, 8, 8)}
SLICES = {"v5e": FLAT, "v6e": FLAT, "v5p": CUBIC}


def why_not_compiled(device: str, count: int) -> str | None:
    """Why the compiler for TPUs does not say what so many devices take; None: it does."""
    if device not in SLICES:
        return f"libtpu has no compiler for {device}"
    if count not in SLICES[device]:
        return f"a slice of {device} has {', '.join(map(str, SLICES[device]))} chips, and not {count}"
    if find_spec("libtpu") is None:
        return "libtpu is not installed; pip install 'spinal-jax[tpu-plan]'"
    return None


def slice_devices(device: str, count: int) -> Sequence[Any]:
    """The devices of a slice, which can be compiled for and nothing else (`why_not_compiled`)."""
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no machine on Google's cloud is asked what it is
    sides = SLICES[device][count]
    alone = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(sides) == 1 else {}
    name = f"{device}:{'x'.join(map(str, sides))}"
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **alone).devices
