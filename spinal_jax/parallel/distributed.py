"""The processes that share a run: how they find each other, and what all of them must have alike."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import numpy as np

from spinal_jax.config import AuditParallelConfig
from spinal_jax.errors import UserError

HEARTBEAT = 50  # seconds without one after which JAX ends a process that hangs


@dataclass(frozen=True)
class Place:
    """Where this process stands among those that share a run."""

    coordinator: str  # HOST:PORT of process 0
    processes: int
    process: int
    devices: tuple[int, ...] | None = None  # those of this host that it takes; None: all that it sees

    @property
    def local(self) -> bool:
        """Whether all processes are on this machine, so that nobody else has to reach them."""
        host = self.coordinator.rpartition(":")[0]
        return host == "localhost" or host.startswith("127.")


def place_of(config: AuditParallelConfig) -> Place:
    """What the settings say, or with `parallel.coordinator=auto` the environment: SLURM, Open MPI or TPU metadata.

    Raises:
        UserError: nothing in the environment says it.
    """
    if config.coordinator != "auto":
        assert config.coordinator is not None
        assert config.processes is not None
        assert config.process is not None
        return Place(config.coordinator, config.processes, config.process)
    from jax._src.clusters import ClusterEnv  # what jax.distributed.initialize asks; no public name tells beforehand

    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, config.start_timeout)
    except Exception as error:  # whatever a variable or an answer that is not as expected leads to
        raise UserError(f"parallel.coordinator is 'auto', but {type(error).__name__}: {error}") from error
    coordinator, processes, process, devices = found
    if coordinator is None or processes is None or process is None:
        raise UserError(
            "parallel.coordinator is 'auto', but neither SLURM, Open MPI nor a TPU pod says which processes there are; "
            "give HOST:PORT of process 0, parallel.processes and parallel.process"
        )
    return Place(coordinator, processes, process, None if devices is None else tuple(devices))


def start(place: Place, service: str, timeout: int) -> None:
    """Makes the devices of all processes visible to this one. Nothing may have asked JAX for devices before.

    Args:
        place: of this process.
        service: HOST:PORT at which JAX of process 0 is to serve the others.
        timeout: seconds that all of them have.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        service,
        place.processes,
        place.process,
        None if place.devices is None else list(place.devices),
        cluster_detection_method="deactivate",
        initialization_timeout=timeout,
        heartbeat_timeout_seconds=HEARTBEAT,
        coordinator_bind_address=service if place.local else None,
    )


def check_same(facts: Mapping[str, str]) -> None:
    """UserError, in every process, where something that all must have alike is not. For one process nothing."""
    if jax.process_count() == 1:
        return
    from jax.experimental.multihost_utils import process_allgather

    own = [np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint32) for value in facts.values()]
    everybody = np.asarray(process_allgather(np.stack(own)))  # [processes, facts, words]
    for number, name in enumerate(facts):
        other = np.flatnonzero((everybody[:, number] != everybody[0, number]).any(axis=-1))
        if len(other):
            raise UserError(f"process {other[0]} has other {name} than process 0; all must have the same")
