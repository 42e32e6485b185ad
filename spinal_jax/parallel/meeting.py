"""The wait for all processes of a run to start, and what one of them can see of the others meanwhile.

JAX's own timeout ends the process by `abort()` without naming anybody. Until all have connected, its service answers no
question either, so connections to the port of process 0 are all there is to see.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

INTERVAL = 2.0  # seconds between two looks
LOST = 20.0  # seconds without an answer of process 0, after it had answered, after which it counts as gone
_ESTABLISHED = "01"  # as /proc/net/tcp has it


class NotMet(Exception):
    """Not all processes are there. JAX still waits for them in a thread, so this process can only end by `os._exit`.

    Attributes:
        code: the exit code: 2 where somebody never came, 1 where process 0 came and is gone.
    """

    def __init__(self, said: str, code: int):
        super().__init__(said)
        self.code = code


def meet(connect: Callable[[], None], coordinator: str, processes: int, process: int, timeout: float) -> None:
    """Runs `connect`, which returns once all processes have connected, in a thread: signals reach the main thread.

    Raises:
        NotMet: it took more than `timeout` seconds, or process 0 had answered and does not any more.
        Exception: what `connect` raises.
    """
    here, met, raised = f"process {process} of {processes}", threading.Event(), []

    def work() -> None:
        try:
            connect()
        except Exception as error:
            raised.append(error)
        met.set()

    begin, answered = time.monotonic(), None
    threading.Thread(target=work, daemon=True).start()
    while not met.wait(min(INTERVAL, max(0.0, begin + timeout - time.monotonic()))):
        now = time.monotonic()
        if process and _answers(coordinator):
            answered = now
        if answered is not None and now - answered > LOST:
            said = f"process 0 of {processes} is gone ({coordinator} has not answered {here} for {LOST:.0f} s)"
            raise NotMet(said, 1)
        if now - begin >= timeout:
            whom = f"the other {processes - 1}" if process == 0 else "process 0 and the others"
            missed = f"{here} did not meet {whom} at parallel.coordinator={coordinator} within parallel.start_timeout="
            raise NotMet(f"{missed}{timeout:g}; {_seen(coordinator, processes, process, answered is not None)}", 2)
    if raised:
        raise raised[0]


def _seen(coordinator: str, processes: int, process: int, answered: bool) -> str:
    """Who is there and who is not, as far as this process can tell."""
    ask = "is each of them running, with a parallel.process of its own?"
    if process:
        return f"process 0 answers there, others are missing; {ask}" if answered else f"nothing answers there; {ask}"
    hosts = Counter(connected(int(coordinator.rpartition(":")[2])))
    whence = ", ".join(f"{count} from {host}" for host, count in sorted(hosts.items()))
    return f"{hosts.total()} of {processes} have connected, this one included ({whence}); {ask}" if hosts else ask


def connected(port: int) -> list[str]:
    """The hosts that are connected to a port of this machine, one entry a connection. Nothing where the system has no
    /proc."""
    found = []
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
                _, local, remote, state, *_ = line.split()
                if state == _ESTABLISHED and int(local.rpartition(":")[2], 16) == port:
                    found.append(_host(remote.partition(":")[0]))
    return found


def _host(digits: str) -> str:
    """An address as /proc writes it: words of 32 bits in the machine's order."""
    words = bytes.fromhex(digits)
    if sys.byteorder == "little":
        words = b"".join(words[begin : begin + 4][::-1] for begin in range(0, len(words), 4))
    address = ipaddress.ip_address(words)
    return str(getattr(address, "ipv4_mapped", None) or address)


def _answers(coordinator: str) -> bool:
    host, _, port = coordinator.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), INTERVAL).close()
    except OSError:
        return False
    return True
