"""The devices of an audit: one device, a mesh that shards every array, or replicas that split each batch.

All three run the same two steps, `forward_step` and `lens_step`, and handle all transfers to and from devices.
"""

from __future__ import annotations

from spinal_jax.audit.device_base import Devices
from spinal_jax.audit.device_mesh import OnMesh
from spinal_jax.audit.device_one import OneDevice
from spinal_jax.audit.device_replicas import OnReplicas
from spinal_jax.parallel.placement import Choice

__all__ = ["Devices", "OnMesh", "OnReplicas", "OneDevice", "devices_of"]


def devices_of(choice: Choice) -> Devices:
    """The implementation for the chosen devices."""
    if choice.replicas is not None:
        return OnReplicas(choice.replicas)
    return OneDevice() if choice.shards is None else OnMesh(choice.shards)
