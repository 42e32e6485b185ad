"""What the processes of a run settle together, in exchanges that all of them must take part in, in the same order.

One process alone gets its own answer at once.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax import Array

from spinal_jax.errors import StoppedElsewhere, UserError

EXCHANGED = 1 << 28  # bytes that all processes together give at a time
PATIENCE = 10.0  # seconds that a network file system may take to show a new file


def leads() -> bool:
    """Whether this process is the first of those that share the run, or the only one."""
    return jax.process_index() == 0


def of_each(number: int) -> list[int]:
    """The number of every process, of 32 bits, in order."""
    if jax.process_count() == 1:
        return [number]
    from jax.experimental.multihost_utils import process_allgather

    return np.asarray(process_allgather(np.int32(number))).reshape(-1).tolist()


def of_leader(value: Any) -> Any:
    """What process 0 holds: an array, whose shape and dtype all processes know, or a JSON value."""
    if jax.process_count() == 1:
        return value
    from jax.experimental.multihost_utils import broadcast_one_to_all

    if isinstance(value, np.ndarray):
        return np.array(broadcast_one_to_all(value))
    text = json.dumps(value).encode() if leads() else b""
    size = int(broadcast_one_to_all(np.int32(len(text))))
    held = np.zeros(-(-size // 1024) * 1024, np.uint8)  # few sizes: each is a program that is compiled
    held[: len(text)] = np.frombuffer(text, np.uint8)
    return json.loads(np.asarray(broadcast_one_to_all(held)).tobytes()[:size])


def gathered(own: bytes) -> list[bytes]:
    """What each process gives, in the order of the processes; all get it."""
    count = jax.process_count()
    if count == 1:
        return [own]
    from jax.experimental.multihost_utils import process_allgather

    high, low = (of_each(number) for number in divmod(len(own), 1 << 20))
    lengths = [(one << 20) + other for one, other in zip(high, low, strict=True)]
    parts = [bytearray() for _ in range(count)]
    step, longest = max(1 << 10, EXCHANGED // count), max(lengths)
    for begin in range(0, longest, step):
        width = min(step, longest - begin)
        some = np.frombuffer(own[begin : begin + width].ljust(width, b"\0"), np.uint8)
        everybody = np.asarray(process_allgather(some)).reshape(count, width)
        for part, each, length in zip(parts, everybody, lengths, strict=True):
            part += each[: max(0, length - begin)].tobytes()
    return [bytes(part) for part in parts]


def own_part(count: int) -> range:
    """Which of so many things this process takes, where all processes share them: consecutive ones."""
    here, processes = jax.process_index(), jax.process_count()
    return range(count * here // processes, count * (here + 1) // processes)


def to_host(tree: Any) -> Any:
    """The arrays of a tree as NumPy's, whole in every process."""

    def whole(x: Array) -> Any:
        if x.is_fully_addressable or x.is_fully_replicated:
            return x
        from jax.experimental.multihost_utils import process_allgather

        return process_allgather(x, tiled=True)

    return jax.device_get(jax.tree.map(whole, tree))


def check_shared(folder: Path) -> None:
    """UserError, in every process, where one does not see what process 0 writes into its run folder."""
    if jax.process_count() == 1:
        return
    file = folder / of_leader(f".{os.getpid()}.{time.time_ns()}.tmp")
    try:
        if leads():
            file.touch()
        of_each(0)  # none looks before it is there
        until = time.monotonic() + PATIENCE
        while not (seen := file.exists()) and time.monotonic() < until:
            time.sleep(0.1)
        sees = of_each(int(seen))
    finally:
        if leads():
            file.unlink(missing_ok=True)
    if 0 in sees:
        raise UserError(
            f"process {sees.index(0)} does not see the folder {folder} of process 0, but all processes write "
            "checkpoints there; choose a hydra.run.dir on a file system that they share"
        )


class StopRequests:
    """Within the context SIGTERM waits for `check`, so that all processes end behind the same piece of work. Behind the
    context it comes again where it came."""

    def __init__(self) -> None:
        self._asked = False
        self._before: Any = None

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():  # Python lets no other one say what a signal does
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def asked(self) -> bool:
        """Whether any process was asked to stop; all get the same answer."""
        return 1 in of_each(int(self._asked))

    def check(self) -> None:
        """StoppedElsewhere, in every process, where one of them was asked to stop."""
        if 1 in (asked := of_each(int(self._asked))):
            raise StoppedElsewhere(f"process {asked.index(1)} was asked to stop")

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            if self._asked:
                signal.raise_signal(signal.SIGTERM)
