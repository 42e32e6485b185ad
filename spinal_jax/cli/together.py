"""Runs a command in several processes: they start together, and if one ends early, all end.

Restarts are left to the launcher (`srun --kill-on-bad-exit`, JobSet, xpk); see docs/recipes.md.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from spinal_jax.cli.console import MISTAKE, Stopped, complain, stops_kept
from spinal_jax.errors import NotLeader, StoppedElsewhere, UserError
from spinal_jax.jsontypes import Json, ReadJson
from spinal_jax.parallel.distributed import ClusterSpec, start
from spinal_jax.parallel.meeting import NotMet
from spinal_jax.parallel.peers import SILENCE, PeerEnded, Peers, code_of, in_words

OWN = ("process", "start_timeout")  # parallel settings that may differ between processes
_RUNS: list[int] = []  # number of shared runs of this process; a sweep has several


def together(place: ClusterSpec, settings: ReadJson, timeout: int, folder: Path, job: Callable[[], int]) -> int:
    """Runs `job` in all processes of a run and returns the exit code of process 0.

    If a process fails, raises UserError, receives a signal or disappears, this process exits, because the shutdown of
    JAX would wait for the missing process.

    Args:
        place: address and number of this process.
        settings: must be equal in all processes.
        timeout: seconds until all processes must have started.
        folder: of the run; deleted if it is empty after an early end.
        job: what to run; it raises NotLeader in all but process 0.
    """
    if not _RUNS:
        _meet(place, timeout, folder)
    _RUNS.append(len(_RUNS))
    with Peers(place, _RUNS[-1]) as peers:
        try:
            return _run(peers, settings, job)
        except PeerEnded as ended:  # a signal can arrive at any point, also during error handling
            complain(in_words(ended.end, place))
            code = code_of(ended.end)
        except _Left as left:
            code = left.code
        with contextlib.suppress(OSError):
            folder.rmdir()
        sys.stdout.flush()
        with contextlib.suppress(RuntimeError):  # the coordination service has ended, so there is nothing to wait for
            peers.part()
        os._exit(code)


def _meet(place: ClusterSpec, timeout: int, folder: Path) -> None:
    try:
        start(place, timeout)
    except NotMet as error:
        complain(str(error))
        with contextlib.suppress(OSError):
            folder.rmdir()
        sys.stdout.flush()
        os._exit(error.code)


class _Left(Exception):
    """The run has ended in this process and the others know."""

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code


def _run(peers: Peers, settings: ReadJson, job: Callable[[], int]) -> int:
    try:
        with stops_kept():
            peers.check_same(_comparable(settings))
            code = job()
        peers.finish(code)
        return code
    except NotLeader:
        return peers.await_code()
    except UserError as error:
        peers.report("refused", str(error))
        complain(str(error))
        raise _Left(MISTAKE) from None
    except Stopped as stopped:
        peers.report("stopped", f"was {stopped}", stopped.number)
        complain(f"{stopped}; {stopped.kept}")
        raise _Left(128 + stopped.number) from None
    except StoppedElsewhere as error:
        if cause := peers.cause(SILENCE + 5):
            raise PeerEnded(cause) from None
        raise RuntimeError("the process that was asked to stop has not said so") from error
    except Exception as error:
        if cause := peers.cause(SILENCE + 5 if _is_exchange(error) else 0):
            raise PeerEnded(cause) from error
        from spinal_jax.cli.guard import describe_error

        code, message = describe_error(error)
        peers.report("refused" if code == MISTAKE else "failed", f"failed ({message})")
        complain(message)
        raise _Left(code) from None


def _is_exchange(error: Exception) -> bool:
    """Whether an error was caused by the communication of processes."""
    text = str(error).lower()
    return any(word in text for word in ("gloo", "nccl", "connection", "peer", "coordination", "barrier"))


def _comparable(settings: ReadJson) -> Json:
    parallel = {name: value for name, value in settings["parallel"].items() if name not in OWN}
    versions = {name: version(name) for name in ("spinal-jax", "jax", "jaxlib", "transformers")}
    return {**settings, "parallel": parallel, "version of": versions}
