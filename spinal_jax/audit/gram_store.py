"""Storage of Gram sums: on the devices, in host memory, or in a scratch file."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, Literal, final

import jax
import numpy as np

from spinal_jax.audit.devices import Devices
from spinal_jax.audit.spectra import BoundarySums, GramSource, Worker
from spinal_jax.config import MetricsConfig
from spinal_jax.data.packing import SLOTS
from spinal_jax.metrics import contraction
from spinal_jax.models.config import DecoderConfig
from spinal_jax.parallel.device_defaults import HOST_SHARE, gram_memory_share
from spinal_jax.parallel.placement import device_memory, host_memory

GIB = 2**30


@dataclass(frozen=True)
class GramHome:
    """The storage of the Gram sums of all groups, and the reason."""

    where: Literal["devices", "host", "file"]
    why: str

    @property
    def slots(self) -> int | None:
        """Maximum number of groups in a batch, for `data.packing.plan_batches`."""
        return None if self.where == "devices" else SLOTS

    def __str__(self) -> str:
        places = {"devices": "on the devices", "host": "in host memory", "file": "in a scratch file"}
        return f"Gram sums {places[self.where]} ({self.why})"


def gram_bytes(config: DecoderConfig, settings: MetricsConfig) -> int:
    """Size of the Gram sums of all groups in bytes, over all devices."""
    numbers = contraction.triangle_size(config.width) + config.width
    return 8 * (1 + len(settings.variants.skip)) * settings.groups * (config.depth + 1) * numbers


def gram_home(config: DecoderConfig, settings: MetricsConfig, weight_bytes: int, devices: Devices) -> GramHome:
    """On the devices if the sums of all groups fit next to the weights, else in host memory, else in a file.

    Args:
        config: the shape of the model.
        settings: what is measured.
        weight_bytes: size of the parameters, over all devices.
        devices: devices of the audit.
    """
    share, parts = devices.gram_share(config.width), 1 if devices.shards is None else devices.shards.parameter_split
    copies = len(devices.workers) // share
    sums, weights, backend = gram_bytes(config, settings), weight_bytes / parts, jax.default_backend()
    return home_for(sums, share, copies, weights, backend, device_memory(), host_memory())


def home_for(
    size: int, share: int, copies: int, weight_bytes: float, backend: str, memory: float | None, host: float | None
) -> GramHome:
    """`gram_home` from sizes in bytes.

    Args:
        size: of the sums of all groups.
        share: number of devices that split the sums.
        copies: number of replicas of the sums.
        weight_bytes: of the parameters on one device.
        backend: kind of device.
        memory: of one device; None if devices use host memory.
        host: of the host; None is unlimited.
    """
    if memory is None and host is not None:
        room = HOST_SHARE * host
        if size * copies <= room:
            return GramHome("devices", f"{size * copies / GIB:.1f} of {room / GIB:.1f} GiB")
        return GramHome("file", f"{size * copies / GIB:.1f} GiB, more than {HOST_SHARE:.0%} of {host / GIB:.1f} GiB")
    room = math.inf if memory is None else gram_memory_share(backend) * (memory - weight_bytes)
    if size / share <= room:
        return GramHome("devices", f"{size / share / GIB:.1f} of {room / GIB:.1f} GiB each")
    said = f"{size / share / GIB:.1f} GiB each, room for {max(room, 0) / GIB:.1f}"
    if host is None or size <= HOST_SHARE * host:
        return GramHome("host", said)
    return GramHome("file", f"{said}; {size / GIB:.1f} GiB are more than {HOST_SHARE:.0%} of the host's memory")


def fits_host(config: DecoderConfig, settings: MetricsConfig) -> bool:
    """Whether the sums of all groups fit into the memory of this host."""
    return gram_bytes(config, settings) <= HOST_SHARE * host_memory()


@final
class OnDevices(GramSource):
    """Gram sums that stay on the devices."""

    def __init__(self, devices: Devices, grams: contraction.Grams):
        self.devices, self.grams = devices, grams

    def at(self, boundaries: Sequence[int]) -> dict[int, BoundarySums]:
        return self.devices.of_boundaries(self.grams, boundaries)


class GramStore(GramSource, ABC):
    """Gram sums that have left the devices, for the boundaries whose spectra this process computes.

    Args:
        groups: G.
        boundaries: the boundaries of each of `workers`.
        workers: the devices that share the work.
        width: d.
    """

    def __init__(self, groups: int, boundaries: Sequence[Sequence[int]], workers: Sequence[Worker], width: int):
        self.group_count, self.width = groups, width
        self.mine = [number for number, each in enumerate(workers) if each.process_index == jax.process_index()]
        self.boundaries = sorted({boundary for number in self.mine for boundary in boundaries[number]})

    def at(self, boundaries: Sequence[int]) -> dict[int, BoundarySums]:
        known = {}
        for number in self.mine:
            boundary = boundaries[number]
            if boundary in self.boundaries and boundary not in known:
                known[boundary] = self.read(boundary)
        return {number: known[boundaries[number]] for number in self.mine if boundaries[number] in known}

    def zeros(self) -> BoundarySums:
        """Sums of zero rows at one boundary."""
        height = self.width // contraction.stripe_count(self.width)
        stripes = tuple(np.zeros((self.group_count, height, end)) for end in contraction.stripe_ends(self.width))
        return BoundarySums(second=stripes, first=np.zeros((self.group_count, self.width)))

    @abstractmethod
    def add(self, group: int, sums: Callable[[int], BoundarySums], depth: int) -> None:
        """Adds the sums of one run of rows of a group; `sums(boundary)` is called for each of 0..depth."""

    @abstractmethod
    def read(self, boundary: int) -> BoundarySums:
        """The sums of all groups at a boundary."""


@final
class HostStore(GramStore):
    """Gram sums in host memory."""

    def __init__(self, groups: int, boundaries: Sequence[Sequence[int]], workers: Sequence[Worker], width: int):
        super().__init__(groups, boundaries, workers, width)
        self._sums: dict[int, BoundarySums] = {}

    def add(self, group: int, sums: Callable[[int], BoundarySums], depth: int) -> None:
        for boundary in range(depth + 1):
            added = sums(boundary)
            if boundary in self.boundaries:
                held = self._sums.setdefault(boundary, self.zeros())
                for total, part in zip((*held.second, held.first), (*added.second, added.first), strict=True):
                    total[group] += part

    def read(self, boundary: int) -> BoundarySums:
        return self._sums.get(boundary) or self.zeros()


@final
class FileStore(GramStore):
    """Gram sums in a scratch file. A record holds one run of rows of a group, at all boundaries."""

    def __init__(
        self,
        file: IO[bytes],
        groups: int,
        boundaries: Sequence[Sequence[int]],
        workers: Sequence[Worker],
        width: int,
    ):
        super().__init__(groups, boundaries, workers, width)
        self.file = file
        self.shapes = [x.shape[1:] for x in (*self.zeros().second, self.zeros().first)]
        self.size = 8 * sum(math.prod(shape) for shape in self.shapes)  # bytes at one boundary
        self.record = self.size * len(self.boundaries)
        self.groups: list[int] = []  # group of each record

    def add(self, group: int, sums: Callable[[int], BoundarySums], depth: int) -> None:
        for boundary in range(depth + 1):
            added = sums(boundary)
            if boundary in self.boundaries:
                for part in (*added.second, added.first):
                    self.file.write(np.ascontiguousarray(part, np.float64).reshape(-1).data)
        self.groups.append(group)

    def go_on(self, groups: Sequence[int]) -> None:
        """Continues with the first records of the file, one for each of `groups`, and truncates the rest. Raises
        ValueError if the file is shorter."""
        length = len(groups) * self.record
        if (there := self.file.seek(0, os.SEEK_END)) < length:
            raise ValueError(f"the file of Gram sums has {there} bytes of {length}")
        self.groups = list(groups)
        self.file.truncate(length)
        self.file.seek(length)

    def inherit(self, held: Sequence[tuple[IO[bytes], Sequence[int]]], groups: Sequence[int]) -> None:
        """Starts with the records of files of other processes, one for each of `groups`. `held` lists these files, each
        with the boundaries in its records."""
        self.file.truncate(0)
        self.file.seek(0)
        for record in range(len(groups)):
            for boundary in self.boundaries:
                file, theirs = next(pair for pair in held if boundary in pair[1])
                file.seek((record * len(theirs) + theirs.index(boundary)) * self.size)
                if len(data := file.read(self.size)) != self.size:
                    raise ValueError(f"a file of Gram sums ends within record {record}")
                self.file.write(data)
        self.groups = list(groups)

    def read(self, boundary: int) -> BoundarySums:
        sums = self.zeros()
        index = self.boundaries.index(boundary)
        for record, group in enumerate(self.groups):
            self.file.seek(record * self.record + index * self.size)
            for total, shape in zip((*sums.second, sums.first), self.shapes, strict=True):
                total[group] += np.frombuffer(self.file.read(8 * math.prod(shape)), np.float64).reshape(shape)
        return sums
