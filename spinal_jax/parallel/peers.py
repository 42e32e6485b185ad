"""Status exchange of the processes of a run through the key-value store of JAX's coordination service.

If a process disappears, JAX aborts the others with a C++ stack trace, which Python cannot catch. A thread in each
process therefore writes a counter every second and reads the reports of the others, so that the missing process is
reported before JAX's heartbeat expires. Process 0 reads all counters; the others read that of process 0, so that
traffic is linear in the number of processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from dataclasses import dataclass
from types import FrameType
from typing import Any

from spinal_jax.errors import UserError
from spinal_jax.interrupts import Interruption, outside_imports
from spinal_jax.jsontypes import ReadJson
from spinal_jax.parallel.distributed import ClusterSpec

INTERVAL = 1.0  # seconds between checks
# JAX aborts at least distributed.HEARTBEAT / 2 seconds after a process disappears. The following times add up to less.
SILENCE = 20.0  # seconds without a new counter after which a process is considered gone
GRACE = 3.0  # seconds for the clean-up of the main thread before the process is ended
PARTING = 3.0  # seconds that process 0 waits for the others to read the reason


@dataclass(frozen=True)
class End:
    """The reason for the end of a run."""

    how: str  # "refused" (a user's mistake), "stopped" (a signal), "failed" or "gone"
    process: int
    host: str
    said: str
    number: int = 0  # of the signal


class PeerEnded(Interruption):
    """Raised in the main thread if the run has ended in another process. Not an Exception, so that only the command
    line handles it."""

    number = signal.SIGUSR1

    def __init__(self, end: End):
        super().__init__(end.said)
        self.end = end


class Peers:
    """Status of this process for the others of the run. Needs JAX's coordination service.

    Args:
        place: address and number of this process.
        run: number of the run within a sweep, equal in all processes.
    """

    def __init__(self, place: ClusterSpec, run: int = 0):
        from jax._src.distributed import global_state  # no public name in JAX

        self.place = place
        assert global_state.client is not None, "JAX's coordination service has not been started"
        self._client = global_state.client
        self._prefix = f"spinal/{run}"
        self._stopping = threading.Event()
        self._ended: End | None = None
        self._before = signal.getsignal(signal.SIGUSR1)
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peers:
        self._tell("host", socket.gethostname())
        self._before = signal.signal(signal.SIGUSR1, outside_imports(self._interrupt))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(GRACE)
        signal.signal(signal.SIGUSR1, self._before)

    def check_same(self, settings: ReadJson, timeout: float = 60.0) -> None:
        """Raises UserError if the settings differ from those of process 0."""
        from spinal_jax.files import first_difference

        if self.place.process == 0:
            self._tell("settings", settings)
            return
        key = f"{self._prefix}/settings/0"
        lead = json.loads(self._client.blocking_key_value_get(key, int(timeout * 1000)))
        if differs := first_difference(json.loads(json.dumps(settings)), lead):
            name, ours, theirs = differs
            raise UserError(
                f"process {self.place.process} on {socket.gethostname()} was started with {name}={_shown(ours)}, but "
                f"process 0 with {_shown(theirs)}; all take the same settings but for parallel.process"
            )

    def report(self, how: str, said: str, number: int = 0) -> None:
        """Reports the end of the run in this process. Only the first report is kept."""
        end = End(how, self.place.process, socket.gethostname(), said, number)
        self._stopping.set()
        self._tell("end", end.__dict__)

    def finish(self, code: int) -> None:
        """Publishes the exit code of process 0."""
        self._tell("code", code)

    def await_code(self) -> int:
        """Waits for the exit code of process 0. Raises PeerEnded if it fails."""
        while True:
            if self._ended is not None:
                raise PeerEnded(self._ended)
            if 0 in (codes := self._told("code")):
                return codes[0]
            time.sleep(INTERVAL / 4)

    def cause(self, patience: float) -> End | None:
        """The reason for the end of the run in another process, waiting until it is known: communication fails before
        the missing process is detected."""
        deadline = time.monotonic() + patience
        while self._ended is None and time.monotonic() < deadline:
            time.sleep(INTERVAL / 4)
        return self._ended

    def part(self) -> None:
        """Waits before an early exit of process 0, because JAX aborts the others when it is gone."""
        deadline = time.monotonic() + PARTING
        self._tell("left", True)
        expected = set(range(self.place.processes))
        if self._ended is not None and self._ended.how == "gone":
            expected -= {self._ended.process}
        while self.place.process == 0 and time.monotonic() < deadline and not expected <= self._told("left").keys():
            time.sleep(INTERVAL / 4)

    def _tell(self, name: str, value: object) -> None:
        key = f"{self._prefix}/{name}/{self.place.process}"
        self._client.key_value_set(key, json.dumps(value), allow_overwrite=True)

    def _told(self, name: str) -> dict[int, Any]:
        """The values that the processes have published under a name."""
        found = self._client.key_value_dir_get(f"{self._prefix}/{name}/")
        return {int(key.rpartition("/")[2]): json.loads(value) for key, value in found}

    def _watch(self) -> None:
        begin = time.monotonic()
        seen: dict[int, tuple[int, float]] = {}  # last counter of each process, and its time
        count, last = 0, begin
        while not self._stopping.wait(INTERVAL):
            now = time.monotonic()
            count, pause, last = count + 1, now - last, now
            try:
                end = self._look(count, seen, begin, now)
            except Exception as error:
                first = str(error).splitlines()[0] if str(error) else type(error).__name__
                end = End("gone", 0, "", f"cannot be reached any more ({first[:200]})")
            if pause > SILENCE:
                said = f"was suspended for {pause:.0f} s, and the others have ended the run"
                end = End("gone", self.place.process, socket.gethostname(), said)
            if end is not None and not self._stopping.is_set():
                self._end(end)
                return

    def _look(self, count: int, seen: dict[int, tuple[int, float]], begin: float, now: float) -> End | None:
        self._tell("alive", count)
        if reports := self._told("end"):
            return min((End(**report) for report in reports.values()), key=lambda end: (end.how, end.process))
        if self.place.process == 0:
            counters, expected = self._told("alive"), range(self.place.processes)
        else:
            counters = {0: json.loads(self._client.key_value_try_get(f"{self._prefix}/alive/0"))} if count > 5 else {}
            expected = range(1 if count > 5 else 0)
        for process in expected:
            counter = counters.get(process, -1)
            if process not in seen or seen[process][0] != counter:
                seen[process] = (counter, now)
            elif now - seen[process][1] > SILENCE:
                host = self._told("host").get(process, "")
                return End("gone", process, host, f"is gone (nothing heard for {SILENCE:.0f} s)")
        return None

    def _end(self, end: End) -> None:
        if end.how == "gone" and self.place.process == 0:
            self._tell("end", end.__dict__)
        self._ended = end
        # The main thread can clean up only while it runs Python code, not inside a blocked collective.
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
        time.sleep(GRACE)
        if not self._stopping.is_set():
            os.write(2, f"spinal: {in_words(end, self.place)}\n".encode())
            with contextlib.suppress(RuntimeError):  # the coordination service has ended
                self.part()
            os._exit(code_of(end))

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._ended is not None:
            raise PeerEnded(self._ended)


def in_words(end: End, place: ClusterSpec) -> str:
    """The reason as one sentence with process and host."""
    if end.how == "refused" and end.process == 0:
        return end.said
    who = f"process {end.process} of {place.processes}{f' on {end.host}' if end.host else ''}"
    if end.how == "refused":
        return f"{who}: {end.said}"
    return f"{who} {end.said}: the run ends in all {place.processes} processes"


def code_of(end: End) -> int:
    """The exit code: 2 for a mistake, 128 and the signal for a signal, otherwise 1."""
    return 2 if end.how == "refused" else 128 + end.number if end.how == "stopped" else 1


def _shown(value: object) -> str:
    return "null" if value is None else value if isinstance(value, str) else json.dumps(value)
