"""The runs of a sweep in one or several processes, with their outcomes and the remaining time."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from spinal_jax.cli.console import DONE, Outcome, duration, short_path
from spinal_jax.cli.guard import describe_error
from spinal_jax.errors import AlreadyDone, UserError
from spinal_jax.files import locked, write_whole

TOLD = ".sweep-"  # prefix of the folder for outcomes of a sweep
_HELD: list[IO[str]] = []  # held by this process


class Sweep:
    """State of a sweep that its processes share: a folder with a file for each finished run."""

    def __init__(self, folder: Path, runs: Sequence[Sequence[str]] | None):
        """Starts a sweep in the launching process.

        Args:
            folder: of the sweep.
            runs: settings of each run, as NAME=VALUE; None if they are not known in advance.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        for left in folder.glob(f"{TOLD}*"):
            with contextlib.suppress(UserError), locked(left) as alone:
                if alone:  # its sweep was killed
                    shutil.rmtree(left)
        self._told = Path(tempfile.mkdtemp(prefix=TOLD, dir=folder))
        self._holding = contextlib.ExitStack()
        self._holding.enter_context(locked(self._told))
        self._total = None if runs is None else len(runs)
        self._started, self._launcher = time.time(), os.getpid()
        self._common = set.intersection(*map(set, runs)) if runs and len(runs) > 1 else set()

    def __getstate__(self) -> dict[str, Any]:  # for worker processes, without locks
        return {name: value for name, value in vars(self).items() if name != "_holding"}

    def run(self, number: int, settings: Sequence[str], folder: Path, job: Callable[[], int]) -> None:
        """Runs a job and stores its outcome. Complete runs are skipped.

        Args:
            number: of the run, from 0.
            settings: of the run, without those common to all.
            folder: of the run.
            job: returns an exit code; its errors end this run only.
        """
        if os.getpid() != self._launcher:
            self._settle()
        which = f"run {number + 1}" if self._total is None else f"run {number + 1} of {self._total}"
        own = " ".join(setting for setting in settings if setting not in self._common)
        print(f"{which}{self._left()}: {own}", file=sys.stderr, flush=True)
        try:
            outcome = Outcome(number, job())
        except AlreadyDone:
            print(f"  complete: {short_path(folder)}", file=sys.stderr, flush=True)
            outcome = Outcome(number, DONE, passed_over=True)
        except Exception as error:
            code, message = describe_error(error)
            outcome = Outcome(number, code, f"{message} ({which}: {own})")
        write_whole(self._told / f"{number}.json", json.dumps(asdict(outcome)).encode())
        free()

    def outcomes(self) -> list[Outcome]:
        """Outcomes of finished runs in order."""
        found = [Outcome(**json.loads(path.read_text(encoding="utf-8"))) for path in self._told.glob("*.json")]
        return sorted(found, key=lambda outcome: outcome.number)

    def close(self) -> None:
        """Deletes the stored outcomes."""
        shutil.rmtree(self._told)
        self._holding.close()

    def _left(self) -> str:
        """Estimated time of the remaining runs, from the runs that were not skipped."""
        ended = self.outcomes()
        ran = sum(not outcome.passed_over for outcome in ended)
        if self._total is None or not ran:
            return ""
        return f", about {duration((time.time() - self._started) / ran * (self._total - len(ended)))} left"

    def _settle(self) -> None:
        """Prepares a worker process: ignores Ctrl-C, which the launching process handles, and reserves one of the GPUs
        of CUDA_VISIBLE_DEVICES."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        gpus = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        if len(gpus) > 1:
            os.environ["CUDA_VISIBLE_DEVICES"] = next(filter(self._claims, gpus), gpus[0])

    def _claims(self, gpu: str) -> bool:
        """Whether this process could reserve a GPU until it ends."""
        lock = (self._told / f"gpu-{gpu}").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return False
        _HELD.append(lock)
        return True


def free() -> None:
    """Frees memory of a run. Hydra's basic launcher runs a sweep in one process, where unreachable arrays and compiled
    programs would accumulate."""
    gc.collect()
    if (jax := sys.modules.get("jax")) is not None:
        jax.clear_caches()
        gc.collect()
