"""What an audit has summed so far, kept in its run folder, so that one that was killed goes on."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

import jax
from orbax.checkpoint import v1 as ocp

from spinal_jax.errors import UserError
from spinal_jax.files import difference, write_whole

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells every step of a save

T = TypeVar("T")
FOLDER, SETTINGS, SAVED = "progress", "settings.json", "saved"  # in the run folder, and in the first


class Progress:
    """Saves of an audit's sums between batches: Orbax for what is on devices, while the audit goes on, beside the
    scratch files of the sums that have left them.

    Within the context SIGTERM waits for the end of a batch and for a save, and then comes again.
    """

    def __init__(self, folder: Path, every: int, about: Mapping[str, Any], overwrite: bool = False):
        """Opens the part of a run folder anew, or where an equal audit was cut off.

        Args:
            folder: of the run.
            every: batches between saves.
            about: everything on which the sums depend.
            overwrite: begin anew where the audit that was cut off is another.

        Raises:
            UserError: that audit is another one.
        """
        self.folder, self.every = folder.absolute() / FOLDER, every
        about = json.loads(json.dumps(about))
        settings = self.folder / SETTINGS
        differs = difference(json.loads(settings.read_text(encoding="utf-8")), about) if settings.exists() else None
        if differs and not overwrite:
            name, saved, own = differs
            raise UserError(
                f"{folder} holds an unfinished audit with {name} = {saved!r}, but this one has {own!r}: make them "
                "equal to go on, set overwrite=true, or choose another hydra.run.dir"
            )
        if self.folder.exists() and (differs or not settings.exists()):
            shutil.rmtree(self.folder)
        if not settings.exists():
            self.folder.mkdir(parents=True)
            write_whole(settings, (json.dumps(about, indent=1) + "\n").encode())
        latest: Any = ocp.training.preservation_policies.LatestN(n=2)  # not of the type that Orbax declares
        self._orbax = ocp.training.Checkpointer(
            str(self.folder / SAVED),
            preservation_policy=latest,
            cleanup_tmp_directories=True,
        )
        self._x64 = jax.config.jax_enable_x64  # type: ignore[attr-defined]
        self._pending: Any = None
        self._before: Any = None
        self._asked = False  # to stop

    def __enter__(self) -> Progress:
        if threading.current_thread() is threading.main_thread():  # Python lets no other one say what a signal does
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def _ask(self, number: int, frame: Any) -> None:
        self._asked = True

    def __exit__(self, *_: object) -> None:
        self._wait()
        self._orbax.close()
        self._stop_if_asked()
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _stop_if_asked(self) -> None:
        if self._asked:
            self._asked = False
            signal.signal(signal.SIGTERM, self._before)
            self._before = None
            signal.raise_signal(signal.SIGTERM)

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def file(self, number: int) -> IO[bytes]:
        """The scratch file of a number, with what it held."""
        path = self.folder / f"sums-{number}"
        path.touch()
        return path.open("r+b")

    @property
    def begun(self) -> int:
        """How many batches are in what was saved last; 0 where nothing was."""
        return max((at.step for at in self._orbax.checkpoints), default=0)

    def load(self, state: T) -> T:
        """What was saved last, each array placed as in `state`; that itself where nothing was."""
        if not self.begun:
            return state
        leaves, shape = jax.tree.flatten(state)
        like = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in _named(leaves).items()}
        jax.config.update("jax_enable_x64", True)  # for Orbax's threads, which would make float32 of float64
        try:
            found = self._orbax.load_checkpointables(self.begun, {"state": like})["state"]
        finally:
            jax.config.update("jax_enable_x64", self._x64)
        return jax.tree.unflatten(shape, [found.get(str(number), x) for number, x in enumerate(leaves)])

    def after(self, batches: int, total: int, state: Any, files: Sequence[IO[bytes]]) -> None:
        """To be called when so many batches of the total are in `state` and in the scratch files: saves where it is
        time for that or the audit is to stop, and then stops it."""
        if batches % self.every == 0 or batches == total or self._asked:
            self._wait()  # Orbax would drop this save for the one that is running
            for file in files:
                file.flush()
                os.fsync(file.fileno())
            named = {"state": _named(jax.tree.leaves(state))}
            self._pending = self._orbax.save_checkpointables_async(batches, named, force=True)
        if self._asked:
            self._wait()
            self._stop_if_asked()


def _named(leaves: Sequence[Any]) -> dict[str, Any]:
    """By number; Orbax keeps no array without elements."""
    return {str(number): x for number, x in enumerate(leaves) if x.size}
