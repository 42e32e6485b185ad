"""What the processes of one run tell each other, in the key-value store of JAX's coordination service.

JAX ends a process that has lost another by `abort()`, which no Python code can catch and which prints a C++ stack
trace. A thread of each process therefore writes a counter every second and looks for what the others report, so that a
user reads which process is gone before JAX's own heartbeat expires. Process 0 reads all counters; the others read that
of process 0, so that the traffic grows with the number of processes and not with its square.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spinal_jax.errors import UserError
from spinal_jax.parallel.distributed import ClusterSpec

INTERVAL = 1.0  # seconds between two looks at the others
# JAX's heartbeats come every distributed.HEARTBEAT / 2 seconds, so that it may abort the processes that much later than
# one is gone. What follows takes less together.
SILENCE = 20.0  # seconds without a new counter after which a process counts as gone
GRACE = 3.0  # seconds in which the main thread may clean up before the process is ended
PARTING = 3.0  # seconds that process 0, which serves the others, waits for them to read why the run ends


@dataclass(frozen=True)
class End:
    """Why a run ends in all of its processes."""

    how: str  # "refused" (a user's mistake), "stopped" (a signal), "failed" or "gone"
    process: int
    host: str
    said: str
    number: int = 0  # of the signal


class PeerEnded(BaseException):
    """Raised in the main thread where the run has ended in another process. Not an Exception: nothing handles it but
    the command line."""

    def __init__(self, end: End):
        super().__init__(end.said)
        self.end = end


class Peers:
    """This process among those that share a run, once JAX's coordination service is up.

    Args:
        place: where this process stands.
        run: a number that all processes count alike, for the runs of one sweep.
    """

    def __init__(self, place: ClusterSpec, run: int = 0):
        from jax._src.distributed import global_state  # JAX has no public name for the client of its own service

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
        self._before = signal.signal(signal.SIGUSR1, self._interrupt)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(GRACE)
        signal.signal(signal.SIGUSR1, self._before)

    def check_same(self, settings: Mapping[str, Any], timeout: float = 60.0) -> None:
        """UserError where this process was started with other settings than process 0."""
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
        """Tells the others why the run ends here. The first report counts."""
        end = End(how, self.place.process, socket.gethostname(), said, number)
        self._stopping.set()
        self._tell("end", end.__dict__)

    def finish(self, code: int) -> None:
        """Process 0 tells the others its exit code."""
        self._tell("code", code)

    def await_code(self) -> int:
        """The exit code of process 0, once it has ended. PeerEnded where it fails meanwhile."""
        while True:
            if self._ended is not None:
                raise PeerEnded(self._ended)
            if 0 in (codes := self._told("code")):
                return codes[0]
            time.sleep(INTERVAL / 4)

    def cause(self, patience: float) -> End | None:
        """Why the run has ended elsewhere, waiting so many seconds for it to be known: an exchange with a process that
        is gone fails before anybody has noticed."""
        deadline = time.monotonic() + patience
        while self._ended is None and time.monotonic() < deadline:
            time.sleep(INTERVAL / 4)
        return self._ended

    def part(self) -> None:
        """To be called before this process ends early: JAX aborts all others as soon as process 0 is gone."""
        deadline = time.monotonic() + PARTING
        self._tell("left", True)
        expected = set(range(self.place.processes))
        if self._ended is not None and self._ended.how == "gone":
            expected -= {self._ended.process}
        while self.place.process == 0 and time.monotonic() < deadline and not expected <= self._told("left").keys():
            time.sleep(INTERVAL / 4)

    def _tell(self, name: str, value: Any) -> None:
        key = f"{self._prefix}/{name}/{self.place.process}"
        self._client.key_value_set(key, json.dumps(value), allow_overwrite=True)

    def _told(self, name: str) -> dict[int, Any]:
        """What each process has told under a name."""
        found = self._client.key_value_dir_get(f"{self._prefix}/{name}/")
        return {int(key.rpartition("/")[2]): json.loads(value) for key, value in found}

    def _watch(self) -> None:
        begin = time.monotonic()
        seen: dict[int, tuple[int, float]] = {}  # the last counter of each process, and when it came
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
        # The main thread cleans up where Python code runs; within an exchange that never ends it cannot.
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
        time.sleep(GRACE)
        if not self._stopping.is_set():
            os.write(2, f"spinal: {in_words(end, self.place)}\n".encode())
            with contextlib.suppress(RuntimeError):  # JAX's service is gone: there is nobody to wait for
                self.part()
            os._exit(code_of(end))

    def _interrupt(self, number: int, frame: Any) -> None:
        if frame is not None and frame.f_code.co_name == "_xla_gc_callback":
            # JAX's hook into garbage collection, in which an exception is printed and lost: again in a moment.
            threading.Timer(0.01, signal.pthread_kill, (threading.main_thread().ident, number)).start()
        elif self._ended is not None:
            raise PeerEnded(self._ended)


def in_words(end: End, place: ClusterSpec) -> str:
    """One sentence: which process, where, and what."""
    if end.how == "refused" and end.process == 0:
        return end.said
    who = f"process {end.process} of {place.processes}{f' on {end.host}' if end.host else ''}"
    if end.how == "refused":
        return f"{who}: {end.said}"
    return f"{who} {end.said}: the run ends in all {place.processes} processes"


def code_of(end: End) -> int:
    """The exit code: 2 for a mistake, 128 and the signal for a signal, otherwise 1."""
    return 2 if end.how == "refused" else 128 + end.number if end.how == "stopped" else 1


def _shown(value: Any) -> str:
    return "null" if value is None else value if isinstance(value, str) else json.dumps(value)
