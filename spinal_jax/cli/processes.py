"""Processes that share one run, on one machine or many: they find each other, and they end together.

Every `spinal` of such a run starts a second process, its worker, and stays behind as its keeper. Workers compute, with
JAX's own connections among them. These are not what tells that one has died: JAX ends a process that cannot reach its
coordinator by abort(), with a C++ stack trace for a message, and an exchange with a process that is gone may wait for
ever. Keepers do no work, so that they can always be heard: that of process 0 listens at the coordinator's address, the
others connect to it, and the operating system closes a connection when the process behind it ends, in whatever way.

What keepers and workers say is lines of JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, NoReturn

from spinal_jax.cli.console import DONE, FAILED, Stopped, complain, stop
from spinal_jax.errors import AlreadyDone, NotLeader, UserError
from spinal_jax.files import difference
from spinal_jax.parallel.distributed import Place, start

# How a process may end, the likeliest cause of all the others first. JAX aborts those that have lost another.
CAUSES = ("killed", "refused", "stopped", "crashed", "failed")
GRACE = 2.0  # seconds in which reports come in before their cause is chosen
PATIENCE = 10.0  # seconds for others to answer, or to end
SILENCE = 30  # seconds without an answer from a machine after which it counts as gone
OWN = ("process", "start_timeout")  # of the parallel settings, what processes need not have alike


class Wire:
    """Messages over a connection."""

    def __init__(self, connection: socket.socket):
        self.connection = connection
        self._rest = b""

    def send(self, **message: Any) -> None:
        """Says something. Whether the other end is gone is for `receive` to tell."""
        with contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """What has been said, waiting for something; None where the other end is closed. TimeoutError."""
        try:
            came = self.connection.recv(1 << 16)
        except TimeoutError:
            raise
        except OSError:
            return None
        *lines, self._rest = (self._rest + came).split(b"\n")
        return [json.loads(line) for line in lines] if came else None

    def answer(self, deadline: float) -> dict[str, Any] | None:
        """The next message, of ends that take turns. TimeoutError once the deadline has passed."""
        while True:
            self.connection.settimeout(max(0.01, deadline - time.monotonic()))
            found = self.receive()
            if found is None or found:
                self.connection.settimeout(None)
                return found[0] if found else None


def share(job: str, settings: Mapping[str, Any], folder: Path, place: Place, timeout: int) -> int:
    """Runs a job together with the other processes of a run, as the keeper of one of them.

    Args:
        job: its name, for the worker (`serve`).
        settings: of the job, which all processes must have alike.
        folder: of the run; only process 0 writes there.
        place: of this process.
        timeout: seconds in which all of them must have started.

    Returns:
        The exit code of process 0, or 1 where one of them has died or failed.

    Raises:
        UserError: they do not find each other, have different settings, or what one of them refuses.
        Stopped: one of them was.
    """
    with contextlib.ExitStack() as stack:
        meet = _welcome if place.process == 0 else _join
        wires, hosts, service = meet(stack, place, _comparable(settings), timeout)
        task = {"job": job, "settings": settings, "folder": str(folder), "service": service, "timeout": timeout}
        with _Worker(place, task) as worker:
            try:
                end = _await_end(place, wires, hosts, worker)
            except Stopped as stopped:
                for wire in wires.values():
                    wire.send(**_report("stopped", f"was {stopped}", number=stopped.number))
                raise
            if place.process == 0:
                for wire in wires.values():
                    wire.send(**end, end=True)
            if end["how"] == "done":
                _part(place, wires, worker)
    if end["how"] == "done":
        return end["code"]
    said = _in_words(end, place, hosts)
    if end["how"] == "refused":
        raise (AlreadyDone if end["already"] else UserError)(said)
    if end["how"] == "stopped":
        stopped = Stopped(end["number"])
        stopped.args = (said,)
        raise stopped
    if end["process"] == place.process and end["how"] in ("crashed", "failed"):
        print(worker.last_words(), end="", file=sys.stderr)
    complain(f"{said}: the run ends in all {place.processes} processes, and nothing is kept of it")
    return FAILED


def _report(how: str, said: str = "", **more: Any) -> dict[str, Any]:
    return {"how": how, "said": said, **more}


def _in_words(end: Mapping[str, Any], place: Place, hosts: Mapping[int, str]) -> str:
    """What happened, and where."""
    if end["how"] == "refused" and end["process"] == 0:
        return end["said"]
    host = end.get("host") or hosts.get(end["process"])
    who = f"process {end['process']} of {place.processes}{f' on {host}' if host else ''}"
    return f"{who}: {end['said']}" if end["how"] == "refused" else f"{who} {end['said']}"


def _comparable(settings: Mapping[str, Any]) -> dict[str, Any]:
    parallel = {name: value for name, value in settings["parallel"].items() if name not in OWN}
    return json.loads(json.dumps({**settings, "parallel": parallel}))


Meeting = tuple[dict[int, Wire], dict[int, str], str]  # wires and hosts by process, HOST:PORT for JAX


def _welcome(stack: contextlib.ExitStack, place: Place, settings: Any, timeout: int) -> Meeting:
    """Process 0: waits for all the others, and tells them where JAX will be."""
    deadline = time.monotonic() + timeout
    host, _, port = place.coordinator.rpartition(":")
    try:
        server = stack.enter_context(socket.create_server((host if place.local else "", int(port))))
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen at parallel.coordinator={place.coordinator}: {error.strerror or error}"
        ) from error
    wires: dict[int, Wire] = {}
    hosts = {0: socket.gethostname()}
    come: list[Wire] = []
    try:
        while len(wires) < place.processes - 1:
            wire, hello = _next(stack, server, deadline)
            if hello is None:
                absent = [number for number in range(1, place.processes) if number not in wires]
                which = "process" if len(absent) == 1 else "processes"
                raise UserError(
                    f"{which} {', '.join(map(str, absent))} of {place.processes} did not come to "
                    f"parallel.coordinator={place.coordinator} within parallel.start_timeout"
                )
            come.append(wire)
            number = hello["process"]
            if number in hosts:
                raise UserError(f"two processes are process {number}; each needs a parallel.process of its own")
            if differs := difference(hello["settings"], settings):
                name, theirs, ours = differs
                raise UserError(
                    f"process {number} on {hello['host']} was started with {name}={_shown(theirs)}, but process 0 with "
                    f"{_shown(ours)}; all take the same settings but for parallel.process"
                )
            wires[number], hosts[number] = wire, hello["host"]
    except UserError as error:
        for wire in come:
            wire.send(wrong=str(error))
        raise
    service = f"{host}:{_free_port(host if place.local else '')}"
    for wire in wires.values():
        wire.send(service=service)
    return wires, hosts, service


def _next(stack: contextlib.ExitStack, server: socket.socket, deadline: float) -> tuple[Wire, dict[str, Any] | None]:
    """Who comes next, and with what; None behind the deadline. Whoever is no process of ours is passed over."""
    while True:
        server.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            connection = stack.enter_context(server.accept()[0])
            wire = Wire(connection)
            hello = wire.answer(min(deadline, time.monotonic() + PATIENCE))
            if hello is not None and hello.keys() == {"process", "host", "settings"}:
                _keep_alive_on(connection)
                return wire, hello
        except (TimeoutError, ValueError):
            if time.monotonic() >= deadline:
                return Wire(server), None


def _join(stack: contextlib.ExitStack, place: Place, settings: Any, timeout: int) -> Meeting:
    """Any other process: goes to process 0, as soon as that is there."""
    deadline = time.monotonic() + timeout
    host, _, port = place.coordinator.rpartition(":")
    while True:
        left = max(0.01, deadline - time.monotonic())
        try:
            connection = stack.enter_context(socket.create_connection((host, int(port)), min(left, PATIENCE)))
            if connection.getsockname() != connection.getpeername():  # it may be its own other end, by chance
                break
            connection.close()
        except OSError as error:
            if time.monotonic() >= deadline:
                raise UserError(
                    f"process {place.process} finds nobody at parallel.coordinator={place.coordinator} "
                    f"within parallel.start_timeout ({error.strerror or error}); is process 0 running there?"
                ) from error
            time.sleep(0.2)
    _keep_alive_on(connection)
    wire = Wire(connection)
    wire.send(process=place.process, host=socket.gethostname(), settings=settings)
    told = None
    with contextlib.suppress(TimeoutError):
        told = wire.answer(time.monotonic() + timeout + PATIENCE)
    if told is None:
        raise UserError(f"process 0 at parallel.coordinator={place.coordinator} did not begin the run")
    if "wrong" in told:
        raise UserError(told["wrong"])
    return {0: wire}, {0: host}, told["service"]


def _shown(value: Any) -> str:
    return "null" if value is None else value if isinstance(value, str) else json.dumps(value)


def _keep_alive_on(connection: socket.socket) -> None:
    """Lets the system close the connection once the other machine is silent."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {
        "TCP_KEEPIDLE": 10,
        "TCP_KEEPINTVL": 5,
        "TCP_KEEPCNT": (SILENCE - 10) // 5,
        "TCP_USER_TIMEOUT": 1000 * SILENCE,
    }
    for name, value in options.items():
        if hasattr(socket, name):  # not every system has all of them
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _free_port(host: str) -> int:
    with socket.create_server((host, 0)) as server:
        return server.getsockname()[1]


class _Worker:
    """The process that computes, from where a keeper sees it."""

    def __init__(self, place: Place, task: Mapping[str, Any]):
        ours, theirs = socket.socketpair()
        self.wire = Wire(ours)
        # All that JAX's libraries write goes to a file, and in processes that are not the first what Python does too.
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed by __exit__)
        self._leads = place.process == 0
        out = [os.dup(1), os.dup(2)] if self._leads else []
        sys.stdout.flush()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", f"from spinal_jax.cli.jobs import work; work({theirs.fileno()})"],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            pass_fds=[theirs.fileno(), *out],
        )
        theirs.close()
        for number in out:
            os.close(number)
        self.wire.send(**task, out=out, place=[place.coordinator, place.processes, place.process, place.devices])

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        """Ends it. That of process 0 may have to clear up in the run folder."""
        if self._leads and self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(PATIENCE / 2)
        self._process.kill()
        self._process.wait()
        self.wire.connection.close()
        self._log.seek(0)
        self._written = self._log.read().decode(errors="replace")
        self._log.close()

    def leave(self) -> None:
        """Lets it go, its work being done."""
        self.wire.send(leave=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(PATIENCE)

    def death(self) -> dict[str, Any]:
        """How it died, having closed its end."""
        try:
            code = self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            return _report("failed", "stopped answering")
        if code >= 0:
            return _report("failed", f"is gone (exit code {code})")
        how = "killed" if code == -signal.SIGKILL else "crashed"
        return _report(how, f"is gone (ended by {signal.Signals(-code).name})")

    def last_words(self, lines: int = 30) -> str:
        """The end of what it has written, of one that has ended."""
        return "".join(self._written.splitlines(keepends=True)[-lines:])


def _await_end(place: Place, wires: Mapping[int, Wire], hosts: Mapping[int, str], worker: _Worker) -> dict[str, Any]:
    """The first report by which the run is over, or the one that is the cause where several come at once."""
    reports: dict[int, dict[str, Any]] = {}  # the first of each process
    deadline: float | None = None
    with selectors.DefaultSelector() as selector:
        for number, wire in (*wires.items(), (place.process, worker.wire)):
            selector.register(wire.connection, selectors.EVENT_READ, (number, wire))
        while deadline is None or time.monotonic() < deadline:
            for key, _ in selector.select(None if deadline is None else max(0.0, deadline - time.monotonic())):
                number, wire = key.data
                found = wire.receive()
                if found is None:
                    selector.unregister(wire.connection)
                    own = wire is worker.wire
                    found = [worker.death() if own else _report("killed", "is gone (its connection was closed)")]
                for report in found:
                    if "end" in report:
                        return report
                    if report["how"] == "done":
                        return {**report, "process": 0}
                    report = {"process": number, "host": hosts.get(number), **report}
                    if place.process == 0 or wire is not worker.wire:
                        reports.setdefault(number, report)
                    elif number not in reports:
                        reports[number] = {**report, "host": socket.gethostname()}
                        wires[0].send(**reports[number])
                    deadline = deadline or time.monotonic() + (GRACE if place.process == 0 else PATIENCE)
                    if place.process and number == 0:  # nobody is left to say what the cause is
                        return reports[0]
    return min(reports.values(), key=lambda report: (CAUSES.index(report["how"]), report["process"]))


def _part(place: Place, wires: Mapping[int, Wire], worker: _Worker) -> None:
    """All is done: workers end, that of process 0, at which JAX of the others is, the last of all."""
    if place.process == 0:
        deadline = time.monotonic() + PATIENCE
        for wire in wires.values():
            with contextlib.suppress(TimeoutError):
                wire.answer(deadline)
    worker.leave()


def serve(number: int, jobs: Mapping[str, Callable[[dict[str, Any], Path, bool], int]]) -> NoReturn:
    """The worker's side: runs the job that its keeper names, `jobs[name](settings, folder, leads)`.

    Args:
        number: of the file descriptor on which the keeper is.
        jobs: by name; each returns an exit code.
    """
    wire = Wire(socket.socket(fileno=number))
    task = wire.receive()
    while task == []:
        task = wire.receive()
    if task is None:
        os._exit(FAILED)
    (task,) = task
    coordinator, processes, process, devices = task["place"]
    place = Place(coordinator, processes, process, None if devices is None else tuple(devices))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the keeper's
    signal.signal(signal.SIGTERM, stop)
    for name, descriptor in zip(("stdout", "stderr"), task["out"], strict=False):
        setattr(sys, name, os.fdopen(descriptor, "w", buffering=1, encoding="utf-8", errors="replace"))
    threading.Thread(target=_leave, args=(wire,), daemon=True).start()
    try:
        start(place, task["service"], task["timeout"])
        code = jobs[task["job"]](task["settings"], Path(task["folder"]), process == 0)
        report = _report("done", code=code) if process == 0 else None
    except NotLeader:
        report = None
    except UserError as error:
        report = _report("refused", str(error), already=isinstance(error, AlreadyDone))
    except Stopped as stopped:
        report = _report("stopped", f"was {stopped}", number=stopped.number)
    except Exception as error:
        os.write(2, traceback.format_exc().encode(errors="replace"))
        report = _report("failed", f"failed ({type(error).__name__}: {' '.join(str(error).split())[:300]})")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.stdout.flush()
    if report is not None:
        wire.send(**report)
    while report is None or report["how"] != "stopped":  # JAX of the others may need this process until all have ended
        signal.pause()
    os._exit(FAILED)


def _leave(wire: Wire) -> None:
    """Ends this process as soon as its keeper says so, or is gone."""
    while (found := wire.receive()) is not None:
        if found:
            break
    sys.stdout.flush()
    os._exit(DONE)
