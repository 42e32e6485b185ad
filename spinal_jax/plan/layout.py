"""Layout of a planned audit over devices: the mesh that an audit would choose, and the storage of Gram sums."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from jax.sharding import AbstractMesh

from spinal_jax.audit.gram_store import GramHome, gram_bytes, home_for
from spinal_jax.audit.pipeline import weight_bytes
from spinal_jax.config import ParallelConfig
from spinal_jax.config.data_sheets import DEVICES
from spinal_jax.config.plan import PlanConfig
from spinal_jax.data.packing import SLOTS
from spinal_jax.errors import UserError
from spinal_jax.metrics.contraction import stripe_count
from spinal_jax.models.config import DecoderConfig
from spinal_jax.parallel.device_defaults import MODEL_SHARE
from spinal_jax.parallel.mesh import AXES
from spinal_jax.parallel.placement import Shards, host_memory, suited

USABLE = 0.9  # of a device's memory; the rest is the runtime's, and lost between arrays
USUAL = "h100"  # whose memory chooses the mesh where no device is named
MOST = 4096  # devices


@dataclass(frozen=True)
class DeviceLayout:
    """A mesh of data x fsdp x tensor devices, or replicas with a whole model each."""

    kind: Literal["one", "replicas", "mesh"]
    data: int
    fsdp: int
    tensor: int
    why: str = ""  # empty where it was asked for

    @property
    def devices(self) -> int:
        """Number of devices."""
        return self.data * self.fsdp * self.tensor

    @property
    def rows(self) -> int:
        """Number of devices that split the rows of a batch."""
        return self.data * self.fsdp

    def gram_share(self, width: int) -> int:
        """Number of devices that split the Gram sums."""
        if self.kind != "mesh":
            return 1
        mesh: Any = AbstractMesh((self.data, self.fsdp, self.tensor), AXES)
        return Shards(mesh).gram_share(width // stripe_count(width))

    def __str__(self) -> str:
        what = (
            f"pmap x {self.devices}" if self.kind == "replicas" else f"mesh {self.data} x {self.fsdp} x {self.tensor}"
        )
        return f"{what} ({self.why})" if self.why else what


def layout_of(config: PlanConfig, decoder: DecoderConfig) -> DeviceLayout:
    """The layout of the settings, or the one that an audit would choose. Raises UserError for an impossible one."""
    asked, count = config.parallel, config.devices
    if (asked.data, asked.fsdp, asked.tensor) != (-1, 1, 1):
        return _asked(config)
    if count == 1:
        return DeviceLayout("one", 1, 1, 1)
    device = DEVICES[config.device or USUAL]
    memory = None if device.memory is None else USABLE * device.memory
    hosts = -(-count // device.host)
    found = suited(count, memory, device.kind, hosts, whole_bytes(config, decoder), decoder.kv_heads)
    return DeviceLayout(found.kind, *found.sizes, found.why)


def _asked(config: PlanConfig) -> DeviceLayout:
    asked = config.parallel
    sizes = [asked.data, asked.fsdp, asked.tensor]
    known = math.prod(size for size in sizes if size > 0)
    if -1 in sizes and config.devices % known == 0:
        sizes[sizes.index(-1)] = config.devices // known
    if math.prod(sizes) != config.devices:
        raise UserError(
            f"parallel is data {asked.data} x fsdp {asked.fsdp} x tensor {asked.tensor}, which does not multiply to "
            f"devices={config.devices}; -1 for one axis takes what is left"
        )
    data, fsdp, tensor = sizes
    return DeviceLayout("mesh", data, fsdp, tensor)


def whole_bytes(config: PlanConfig, decoder: DecoderConfig) -> int:
    """Bytes of parameters and of the Gram sums of all groups, over all devices."""
    return weight_bytes(decoder, config.model.dtype) + gram_bytes(decoder, config.metrics)


def planned_gram_home(config: PlanConfig, decoder: DecoderConfig, layout: DeviceLayout) -> GramHome:
    """Where an audit on these devices stores its Gram sums."""
    share = layout.gram_share(decoder.width)
    split = layout.fsdp * layout.tensor if layout.kind == "mesh" else 1
    device = DEVICES[config.device or USUAL]
    memory = None if device.memory is None else USABLE * device.memory
    return home_for(
        gram_bytes(decoder, config.metrics),
        share,
        layout.devices // share,
        weight_bytes(decoder, config.model.dtype) / split,
        device.kind,
        memory,
        host_memory() if memory is None else None,
    )


def would_fit(config: PlanConfig, decoder: DecoderConfig, layout: DeviceLayout, memory: float) -> str | None:
    """Settings with more devices of `memory` bytes that fit the weights and the Gram sums of two groups, or None."""
    sums = gram_bytes(decoder, config.metrics)
    least = weight_bytes(decoder, config.model.dtype) + min(1.0, SLOTS / config.metrics.groups) * sums
    split = layout.fsdp * layout.tensor if layout.kind == "mesh" else 1
    count = config.devices
    while count <= MOST:
        chosen = layout_of(replace(config, devices=count, parallel=ParallelConfig()), decoder)
        parts = chosen.fsdp * chosen.tensor
        if least / parts <= MODEL_SHARE * USABLE * memory and (count > config.devices or parts > split):
            return f"devices={count} parallel.fsdp={chosen.fsdp} parallel.tensor={chosen.tensor}"
        count *= 2
    return None
