"""Where Gram sums are once they have been made: on the devices, in the memory of the host, or in a scratch file."""

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
from spinal_jax.parallel.device_defaults import GRAM_SHARE, HOST_SHARE
from spinal_jax.parallel.placement import device_memory, host_memory

GIB = 2**30


@dataclass(frozen=True)
class GramHome:
    """Where the Gram sums of all groups are kept, and why there."""

    where: Literal["devices", "host", "file"]
    why: str

    @property
    def slots(self) -> int | None:
        """Groups in a batch at most, as `data.packing.plan_batches` takes it."""
        return None if self.where == "devices" else SLOTS

    def __str__(self) -> str:
        places = {"devices": "on the devices", "host": "in host memory", "file": "in a scratch file"}
        return f"Gram sums {places[self.where]} ({self.why})"


def gram_bytes(config: DecoderConfig, settings: MetricsConfig) -> int:
    """Of the Gram sums of all groups, on all devices together."""
    numbers = contraction.triangle_size(config.width) + config.width
    return 8 * (1 + len(settings.variants.skip)) * settings.groups * (config.depth + 1) * numbers


def gram_home(config: DecoderConfig, settings: MetricsConfig, weight_bytes: int, devices: Devices) -> GramHome:
    """On the devices where the sums of all groups fit beside the weights, else in host memory, else in a file.

    Args:
        config: the model's shape.
        settings: what is measured.
        weight_bytes: of the parameters, all devices together.
        devices: what the audit runs on.
    """
    share, parts = devices.gram_share(config.width), 1 if devices.shards is None else devices.shards.parameter_split
    copies = len(devices.workers) // share
    return home_for(gram_bytes(config, settings), share, copies, weight_bytes / parts, device_memory(), host_memory())


def home_for(
    size: int, share: int, copies: int, weight_bytes: float, memory: float | None, host: float | None
) -> GramHome:
    """`gram_home` from numbers alone.

    Args:
        size: bytes of the sums of all groups.
        share: how many devices split them.
        copies: how many such sets of devices there are.
        weight_bytes: of the parameters on one device.
        memory: bytes of one device; None: devices share the memory of the host.
        host: bytes of the host's memory; None: as much as is asked for.
    """
    if memory is None and host is not None:
        room = HOST_SHARE * host
        if size * copies <= room:
            return GramHome("devices", f"{size * copies / GIB:.1f} of {room / GIB:.1f} GiB")
        return GramHome("file", f"{size * copies / GIB:.1f} GiB, more than {HOST_SHARE:.0%} of {host / GIB:.1f} GiB")
    room = math.inf if memory is None else GRAM_SHARE * (memory - weight_bytes)
    if size / share <= room:
        return GramHome("devices", f"{size / share / GIB:.1f} of {room / GIB:.1f} GiB each")
    said = f"{size / share / GIB:.1f} GiB each, room for {max(room, 0) / GIB:.1f}"
    if host is None or size <= HOST_SHARE * host:
        return GramHome("host", said)
    return GramHome("file", f"{said}; {size / GIB:.1f} GiB are more than {HOST_SHARE:.0%} of the host's memory")


def fits_host(config: DecoderConfig, settings: MetricsConfig) -> bool:
    """Whether the memory of this machine has room for the sums of all groups."""
    return gram_bytes(config, settings) <= HOST_SHARE * host_memory()


@final
class OnDevices(GramSource):
    """Sums of all groups that are still where they were made."""

    def __init__(self, devices: Devices, grams: contraction.Grams):
        self.devices, self.grams = devices, grams

    def at(self, boundaries: Sequence[int]) -> dict[int, BoundarySums]:
        return self.devices.of_boundaries(self.grams, boundaries)


class GramStore(GramSource, ABC):
    """Sums that have left the devices, of the boundaries that this process takes the spectra of.

    Args:
        groups: G.
        boundaries: for each of `workers` those that it takes.
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
        """Nothing yet, of one boundary."""
        height = self.width // contraction.stripe_count(self.width)
        stripes = tuple(np.zeros((self.group_count, height, end)) for end in contraction.stripe_ends(self.width))
        return BoundarySums(second=stripes, first=np.zeros((self.group_count, self.width)))

    @abstractmethod
    def add(self, group: int, sums: Callable[[int], BoundarySums], depth: int) -> None:
        """Adds the sums of one run of rows of a group: `sums(boundary)`, which is asked for each of 0..depth."""

    @abstractmethod
    def read(self, boundary: int) -> BoundarySums:
        """What was added at a boundary, of all groups."""


@final
class HostStore(GramStore):
    """Sums in the memory of the host."""

    def __init__(self, groups: int, boundaries: Sequence[Sequence[int]], workers: Sequence[Worker], width: int):
        super().__init__(groups, boundaries, workers, width)
        self._sums: dict[int, BoundarySums] = {}

    def add(self, group: int, sums: Callable[[int], BoundarySums], depth: int) -> None:
        for boundary in range(depth + 1):
            found = sums(boundary)
            if boundary in self.boundaries:
                held = self._sums.setdefault(boundary, self.zeros())
                for total, part in zip((*held.second, held.first), (*found.second, found.first), strict=True):
                    total[group] += part

    def read(self, boundary: int) -> BoundarySums:
        return self._sums.get(boundary) or self.zeros()


@final
class FileStore(GramStore):
    """Sums in a scratch file of records, each of one run of rows of a group at all boundaries."""

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
        self.size = 8 * sum(math.prod(shape) for shape in self.shapes)  # bytes of a boundary
        self.record = self.size * len(self.boundaries)
        self.groups: list[int] = []  # of each record

    def add(self, group: int, sums: Callable[[int], BoundarySums], depth: int) -> None:
        for boundary in range(depth + 1):
            found = sums(boundary)
            if boundary in self.boundaries:
                for part in (*found.second, found.first):
                    self.file.write(np.ascontiguousarray(part, np.float64).reshape(-1).data)
        self.groups.append(group)

    def go_on(self, groups: Sequence[int]) -> None:
        """Takes over what the file holds of these groups, a record each, and forgets what is behind that. ValueError
        where it holds less."""
        length = len(groups) * self.record
        if (there := self.file.seek(0, os.SEEK_END)) < length:
            raise ValueError(f"the file of Gram sums has {there} bytes of {length}")
        self.groups = list(groups)
        self.file.truncate(length)
        self.file.seek(length)

    def inherit(self, held: Sequence[tuple[IO[bytes], Sequence[int]]], groups: Sequence[int]) -> None:
        """Begins with what files of other processes hold of these groups, a record each. `held` is these files, each
        with the boundaries that are in its records."""
        self.file.truncate(0)
        self.file.seek(0)
        for record in range(len(groups)):
            for boundary in self.boundaries:
                file, theirs = next(pair for pair in held if boundary in pair[1])
                file.seek((record * len(theirs) + theirs.index(boundary)) * self.size)
                if len(found := file.read(self.size)) != self.size:
                    raise ValueError(f"a file of Gram sums ends within record {record}")
                self.file.write(found)
        self.groups = list(groups)

    def read(self, boundary: int) -> BoundarySums:
        sums = self.zeros()
        place = self.boundaries.index(boundary)
        for record, group in enumerate(self.groups):
            self.file.seek(record * self.record + place * self.size)
            for total, shape in zip((*sums.second, sums.first), self.shapes, strict=True):
                total[group] += np.frombuffer(self.file.read(8 * math.prod(shape)), np.float64).reshape(shape)
        return sums
