"""A command that several processes share: they start together, and when one ends early all of them do.

Restarting is the launcher's (`srun --kill-on-bad-exit`, JobSet, xpk); see docs/recipes.md.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from spinal_jax.cli.console import MISTAKE, Stopped, complain
from spinal_jax.errors import NotLeader, StoppedElsewhere, UserError
from spinal_jax.parallel.distributed import ClusterSpec, start
from spinal_jax.parallel.meeting import NotMet
from spinal_jax.parallel.peers import SILENCE, PeerEnded, Peers, code_of, in_words

OWN = ("process", "start_timeout")  # of the parallel settings, what processes need not have alike
_RUNS: list[int] = []  # how many runs this process has shared: a sweep has several


def together(
    place: ClusterSpec, settings: Mapping[str, Any], timeout: int, folder: Path, job: Callable[[], int]
) -> int:
    """The exit code of process 0, after `job` has run in all processes of a run.

    Where one of them fails, refuses something, gets a signal or is gone, this ends the process: JAX's own shutdown
    would wait for the process that is no longer there.

    Args:
        place: of this process.
        settings: which all processes must have alike.
        timeout: seconds in which all of them must have started.
        folder: of the run; it goes where the run ends early and nothing is in it.
        job: what to run; NotLeader from it means that the result is with process 0.
    """
    if not _RUNS:
        _meet(place, timeout, folder)
    _RUNS.append(len(_RUNS))
    with Peers(place, _RUNS[-1]) as peers:
        try:
            return _run(peers, settings, job)
        except PeerEnded as ended:  # it may come at any point, also where another error is being handled
            complain(in_words(ended.end, place))
            code = code_of(ended.end)
        except _Left as left:
            code = left.code
        with contextlib.suppress(OSError):
            folder.rmdir()
        sys.stdout.flush()
        with contextlib.suppress(RuntimeError):  # JAX's service is gone: there is nobody to wait for
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
    """The run has ended here, and this has been said."""

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code


def _run(peers: Peers, settings: Mapping[str, Any], job: Callable[[], int]) -> int:
    try:
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
    """Whether an error is of an exchange among processes."""
    text = str(error).lower()
    return any(word in text for word in ("gloo", "nccl", "connection", "peer", "coordination", "barrier"))


def _comparable(settings: Mapping[str, Any]) -> dict[str, Any]:
    parallel = {name: value for name, value in settings["parallel"].items() if name not in OWN}
    versions = {name: version(name) for name in ("spinal-jax", "jax", "jaxlib", "transformers")}
    return {**settings, "parallel": parallel, "version of": versions}
