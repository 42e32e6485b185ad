"""How devices and processes share the work."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from spinal_jax.config.record import about, require


@dataclass(frozen=True)
class ParallelConfig:
    """How devices share the work: data x fsdp x tensor; -1 takes the devices that are left: `parallel`."""

    data: int = field(
        default=-1, metadata=about("devices that share the rows of a batch; -1: all that are left", "devices")
    )
    fsdp: int = field(default=1, metadata=about("devices that share rows and parameters", "devices"))
    tensor: int = field(
        default=1, metadata=about("devices that share heads, inner features and the vocabulary", "devices")
    )

    def __post_init__(self) -> None:
        sizes = {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}
        for name, size in sizes.items():
            require(size == -1 or size > 0, f"parallel.{name}", size, "a number above 0, or -1 for what is left")
        require(list(sizes.values()).count(-1) < 2, "parallel", sizes, "-1 for one axis at most")


@dataclass(frozen=True)
class ProcessesConfig(ParallelConfig):
    """How devices, of one process or of several, share the work: `parallel`."""

    coordinator: str | None = field(
        default=None,
        metadata=about("HOST:PORT of process 0 where several processes share the run; auto: from SLURM or a TPU pod"),
    )
    processes: int | None = field(
        default=None, metadata=about("processes that share the run, where coordinator is HOST:PORT")
    )
    process: int | None = field(default=None, metadata=about("number of this process, from 0"))
    start_timeout: int = field(
        default=55,
        metadata=about("time for all processes to start; more where hosts start minutes apart", "seconds"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.start_timeout > 0, "parallel.start_timeout", self.start_timeout, "a number of seconds above 0")
        if self.coordinator is None or self.coordinator == "auto":
            right = "null unless parallel.coordinator is HOST:PORT"
            require(self.processes is None, "parallel.processes", self.processes, right)
            require(self.process is None, "parallel.process", self.process, right)
            return
        host, _, port = self.coordinator.rpartition(":")
        good = bool(host) and port.isascii() and port.isdigit() and len(port) < 6 and 0 < int(port) < 1 << 16
        require(good, "parallel.coordinator", self.coordinator, "HOST:PORT of process 0, auto, or null for one process")
        right = "how many processes share the run, where parallel.coordinator is HOST:PORT"
        require(self.processes is not None and self.processes > 0, "parallel.processes", self.processes, right)
        right = f"which process this is, from 0 to {(self.processes or 1) - 1}"
        here = self.process is not None and 0 <= self.process < (self.processes or 1)
        require(here, "parallel.process", self.process, right)


@dataclass(frozen=True)
class AuditParallelConfig(ProcessesConfig):
    """How devices share an audit: `parallel`."""

    backend: Literal["auto", "mesh", "pmap"] = field(
        default="auto",
        metadata=about("mesh: devices share the model; pmap: a whole model on each; auto: by device and memory"),
    )

    def __post_init__(self) -> None:
        whole = self.backend != "pmap" or (self.fsdp == 1 and self.tensor == 1)
        right = "mesh where parallel.fsdp or parallel.tensor split the model"
        require(whole, "parallel.backend", self.backend, right)
        alone = self.backend != "pmap" or self.coordinator is None
        require(alone, "parallel.backend", self.backend, "auto or mesh where several processes share the run")
        super().__post_init__()

    @property
    def default(self) -> bool:
        """Whether no size was given."""
        return (self.data, self.fsdp, self.tensor) == (-1, 1, 1)
