"""Collective operations of the processes of a run. All processes must call them in the same order.

With a single process they return its own value.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TypeVar, cast

import jax
import numpy as np
from jax import Array

from spinal_jax.errors import StoppedElsewhere, UserError

T = TypeVar("T")
EXCHANGED = 1 << 28  # bytes of all processes in one exchange
PATIENCE = 10.0  # seconds until a new file is visible on a network file system


def leads() -> bool:
    """Whether this is process 0."""
    return jax.process_index() == 0


def of_each(number: int) -> list[int]:
    """Gathers a 32-bit number of every process, in order."""
    if jax.process_count() == 1:
        return [number]
    from jax.experimental.multihost_utils import process_allgather

    return np.asarray(process_allgather(np.int32(number))).reshape(-1).tolist()


def of_leader(value: T) -> T:
    """Broadcasts a value of process 0: an array of known shape and dtype, or a JSON value."""
    if jax.process_count() == 1:
        return value
    from jax.experimental.multihost_utils import broadcast_one_to_all

    if isinstance(value, np.ndarray):
        return cast(T, np.array(broadcast_one_to_all(value)))
    text = json.dumps(value).encode() if leads() else b""
    size = int(broadcast_one_to_all(np.int32(len(text))))
    held = np.zeros(-(-size // 1024) * 1024, np.uint8)  # few sizes, because each is compiled
    held[: len(text)] = np.frombuffer(text, np.uint8)
    return json.loads(np.asarray(broadcast_one_to_all(held)).tobytes()[:size])


def gathered(own: bytes) -> list[bytes]:
    """Gathers bytes of every process, in order."""
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
    """The range of this process if `count` items are divided over all processes."""
    here, processes = jax.process_index(), jax.process_count()
    return range(count * here // processes, count * (here + 1) // processes)


def to_host(tree: T) -> T:
    """Copies the whole arrays of a tree to the host of every process."""

    def whole(x: Array) -> Array:
        if x.is_fully_addressable or x.is_fully_replicated:
            return x
        from jax.experimental.multihost_utils import process_allgather

        return process_allgather(x, tiled=True)

    return jax.device_get(jax.tree.map(whole, tree))


def check_shared(folder: Path) -> None:
    """Raises UserError in every process if one of them cannot see the files of process 0 in the run folder."""
    if jax.process_count() == 1:
        return
    file = folder / of_leader(f".{os.getpid()}.{time.time_ns()}.tmp")
    try:
        if leads():
            file.touch()
        of_each(0)  # waits until it exists
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
    """Inside the context, SIGTERM is delayed until `check`, so that all processes end at the same point. On exit, a
    delayed signal is raised again."""

    def __init__(self) -> None:
        self._asked = False
        self._before: Callable[[int, FrameType | None], object] | int | None = None

    def __enter__(self) -> StopRequests:
        if (
            threading.current_thread() is threading.main_thread()
        ):  # Python allows signal handlers in the main thread only
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def asked(self) -> bool:
        """Whether any process was asked to stop; equal in all processes."""
        return 1 in of_each(int(self._asked))

    def check(self) -> None:
        """Raises StoppedElsewhere in every process if one of them was asked to stop."""
        if 1 in (asked := of_each(int(self._asked))):
            raise StoppedElsewhere(f"process {asked.index(1)} was asked to stop")

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            if self._asked:
                signal.raise_signal(signal.SIGTERM)
