"""The processes that share a run: how they find each other, and what all of them must have alike."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import numpy as np

from spinal_jax.config import ProcessesConfig
from spinal_jax.errors import UserError
from spinal_jax.parallel.meeting import meet

HEARTBEAT = 55  # seconds without one after which JAX aborts all processes of a run


@dataclass(frozen=True)
class ClusterSpec:
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


def cluster_spec(config: ProcessesConfig) -> ClusterSpec:
    """What the settings say, or with `parallel.coordinator=auto` the environment: SLURM, Open MPI or TPU metadata.

    Raises:
        UserError: nothing in the environment says it.
    """
    if config.coordinator != "auto":
        assert config.coordinator is not None
        assert config.processes is not None
        assert config.process is not None
        return ClusterSpec(config.coordinator, config.processes, config.process)
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
    return ClusterSpec(coordinator, processes, process, None if devices is None else tuple(devices))


def start(place: ClusterSpec, timeout: int) -> None:
    """Starts JAX's coordination service in process 0 and connects this process to it, after which JAX sees the devices
    of all processes. Nothing may have asked JAX for devices before.

    Raises:
        UserError: this process cannot listen or connect.
        NotMet: not all processes have come after `timeout` seconds.
    """
    # JAX's own handler of SIGTERM would replace that of the command line.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")

    def connect() -> None:
        jax.distributed.initialize(
            place.coordinator,
            place.processes,
            place.process,
            None if place.devices is None else list(place.devices),
            cluster_detection_method="deactivate",
            initialization_timeout=timeout + 60,  # later than `meet` gives up
            heartbeat_timeout_seconds=HEARTBEAT,
            coordinator_bind_address=place.coordinator if place.local else None,
        )

    try:
        meet(connect, place.coordinator, place.processes, place.process, timeout)
    except RuntimeError as error:
        raise UserError(
            f"process {place.process} cannot use parallel.coordinator={place.coordinator}: {str(error).splitlines()[0]}"
        ) from error


def all_same(value: str) -> bool:
    """Whether all processes hold the same text; each gets the same answer."""
    return not len(np.flatnonzero(_differing({"": value})))


def check_same(facts: Mapping[str, str]) -> None:
    """UserError, in every process, where something that all must have alike is not. For one process nothing."""
    if jax.process_count() == 1:
        return
    differing = _differing(facts)
    for number, name in enumerate(facts):
        if len(other := np.flatnonzero(differing[:, number])):
            raise UserError(f"process {other[0]} has other {name} than process 0; all must have the same")


def _differing(facts: Mapping[str, str]) -> np.ndarray:
    """[processes, facts] whether what a process holds differs from what process 0 holds."""
    from jax.experimental.multihost_utils import process_allgather

    own = [np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint32) for value in facts.values()]
    everybody = np.asarray(process_allgather(np.stack(own))).reshape(jax.process_count(), len(own), -1)
    return (everybody != everybody[0]).any(axis=-1)
