"""Start of the processes that share a run, and checks that their inputs agree."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import numpy as np

from spinal_jax.config import ProcessesConfig
from spinal_jax.errors import UserError
from spinal_jax.parallel.meeting import meet

HEARTBEAT = 55  # seconds without a heartbeat after which JAX aborts all processes


@dataclass(frozen=True)
class ClusterSpec:
    """Address and number of this process among those that share a run."""

    coordinator: str  # HOST:PORT of process 0
    processes: int
    process: int
    devices: tuple[int, ...] | None = None  # local devices of the process; None is all

    @property
    def local(self) -> bool:
        """Whether the coordinator is reachable from this machine only."""
        host = self.coordinator.rpartition(":")[0]
        return host == "localhost" or host.startswith("127.")


def cluster_spec(config: ProcessesConfig) -> ClusterSpec:
    """The cluster of the settings or, with `parallel.coordinator=auto`, of SLURM, Open MPI or TPU metadata.

    Raises:
        UserError: the environment does not describe a cluster.
    """
    if config.coordinator != "auto":
        assert config.coordinator is not None
        assert config.processes is not None
        assert config.process is not None
        return ClusterSpec(config.coordinator, config.processes, config.process)
    from jax._src.clusters import ClusterEnv  # used by jax.distributed.initialize; there is no public name

    try:
        detected = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, config.start_timeout)
    except Exception as error:  # the detection does not document its errors
        raise UserError(f"parallel.coordinator is 'auto', but {type(error).__name__}: {error}") from error
    coordinator, processes, process, devices = detected
    if coordinator is None or processes is None or process is None:
        raise UserError(
            "parallel.coordinator is 'auto', but neither SLURM, Open MPI nor a TPU pod says which processes there are; "
            "give HOST:PORT of process 0, parallel.processes and parallel.process"
        )
    return ClusterSpec(coordinator, processes, process, None if devices is None else tuple(devices))


def start(cluster: ClusterSpec, timeout: int) -> None:
    """Starts JAX's coordination service in process 0 and connects this process to it. Must run before JAX initialises
    devices.

    Raises:
        UserError: this process cannot listen or connect.
        NotMet: not all processes have come after `timeout` seconds.
    """
    # JAX's own handler of SIGTERM would replace that of the command line.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")

    def connect() -> None:
        jax.distributed.initialize(
            cluster.coordinator,
            cluster.processes,
            cluster.process,
            None if cluster.devices is None else list(cluster.devices),
            cluster_detection_method="deactivate",
            initialization_timeout=timeout + 60,  # later than `meet` gives up
            heartbeat_timeout_seconds=HEARTBEAT,
            coordinator_bind_address=cluster.coordinator if cluster.local else None,
        )

    try:
        meet(connect, cluster.coordinator, cluster.processes, cluster.process, timeout)
    except RuntimeError as error:
        raise UserError(
            f"process {cluster.process} cannot use parallel.coordinator={cluster.coordinator}: "
            f"{str(error).splitlines()[0]}"
        ) from error


def all_same(value: str) -> bool:
    """Whether a text is equal in all processes."""
    return not len(np.flatnonzero(_differing({"": value})))


def check_same(facts: Mapping[str, str]) -> None:
    """Raises UserError in every process if one of the facts differs between processes."""
    if jax.process_count() == 1:
        return
    differing = _differing(facts)
    for number, name in enumerate(facts):
        if len(other := np.flatnonzero(differing[:, number])):
            raise UserError(f"process {other[0]} has other {name} than process 0; all must have the same")


def _differing(facts: Mapping[str, str]) -> np.ndarray:
    """[processes, facts] whether a fact differs from that of process 0."""
    from jax.experimental.multihost_utils import process_allgather

    own = [np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint32) for value in facts.values()]
    everybody = np.asarray(process_allgather(np.stack(own))).reshape(jax.process_count(), len(own), -1)
    return (everybody != everybody[0]).any(axis=-1)
