"""The devices an audit runs on: one, a mesh that shares every array, or replicas that each do a part of every batch.

All three run the same two steps, `forward_step` and `lens_step`. Whatever goes to devices or comes back passes through
here.
"""

from __future__ import annotations

from spinal_jax.audit.device_base import Devices
from spinal_jax.audit.device_mesh import OnMesh
from spinal_jax.audit.device_one import OneDevice
from spinal_jax.audit.device_replicas import OnReplicas
from spinal_jax.parallel.placement import Choice

__all__ = ["Devices", "OnMesh", "OnReplicas", "OneDevice", "devices_of"]


def devices_of(choice: Choice) -> Devices:
    """What runs the audit on the devices that were chosen."""
    if choice.replicas is not None:
        return OnReplicas(choice.replicas)
    return OneDevice() if choice.shards is None else OnMesh(choice.shards)
