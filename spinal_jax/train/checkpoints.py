"""Checkpoints of a training run, written by Orbax in the background."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from spinal_jax.errors import UserError
from spinal_jax.objectives.step import TrainState
from spinal_jax.parallel.agreement import of_leader

# Orbax logs every save, and the traceback of errors that it also raises.
logging.getLogger("absl").setLevel(logging.CRITICAL)


class _Preserve:
    """Orbax policy that keeps the latest checkpoints and a protected one."""

    def __init__(self, latest: int | None):
        self.latest, self.protected = latest, -1

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        first = 0 if self.latest is None else len(checkpoints) - self.latest
        return [number >= first or at.step == self.protected for number, at in enumerate(checkpoints)]


class Checkpoints:
    """Training states by step. A save returns when the arrays are copied; an interrupted save leaves nothing.

    Processes that share a run all save and load, each its part; the folder is theirs together.

    Attributes:
        latest: the step that was saved last, also by a run that was cut off; None where there is none.
    """

    def __init__(self, folder: Path, max_to_keep: int | None):
        self._policy = _Preserve(max_to_keep)
        self._orbax = ocp.training.Checkpointer(
            str(folder.absolute()),
            preservation_policy=self._policy,
            cleanup_tmp_directories=True,
        )
        self._pending: Any = None
        self.latest: int | None = of_leader(max((at.step for at in self._orbax.checkpoints), default=None))

    def save(self, step: int, state: TrainState) -> None:
        """Saves in the background, after the previous save, because Orbax drops overlapping saves."""
        self.wait()
        if step != self.latest:
            self.latest = step
            self._pending = self._orbax.save_checkpointables_async(step, {"state": state._asdict()}, force=True)

    def protect(self, step: int) -> None:
        """Protects one step, instead of the one protected before."""
        self._policy.protected = step

    def wait(self) -> None:
        """Waits until everything is on disk."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def load(self, step: int, like: TrainState) -> TrainState:
        """The state of a step, placed as `like`. Raises UserError for another model."""

        def abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

        wanted = jax.tree.map(abstract, like._asdict())
        try:
            saved = self._orbax.load_checkpointables(step, {"state": wanted})["state"]
        except (ValueError, KeyError) as error:
            raise UserError(
                f"the checkpoint of step {step} in {self._orbax.directory} is of another model or optimiser: "
                f"{str(error).splitlines()[0]}"
            ) from error
        return TrainState(**saved)

    def close(self) -> None:
        """Waits for pending saves."""
        self.wait()
        self._orbax.close()
